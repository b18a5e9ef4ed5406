"""The `pyllm` command: one file per group of subcommands; the only place that prints and ends the process.

Text that was asked for goes to stdout; everything else (progress, statistics, warnings, errors) to stderr. Exit
codes: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted. PYLLM_TRACEBACK=1 adds tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process) and end the process with its exit code."""
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        _close_stdout()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("PYLLM_TRACEBACK"):
            raise
        code = explain(error)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code; what goes wrong is raised, but for errors of usage."""
    import typer

    from pyllm.cli.output import show_warnings_plainly

    show_warnings_plainly()
    try:
        result: Any = build_app()(list(arguments) or ["--help"], prog_name="pyllm", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except typer.Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else OK


def build_app() -> typer.Typer:
    """The command line with all its subcommands."""
    import typer

    from pyllm.cli import (
        batch,
        bench,
        chat,
        convert,
        embed,
        encode,
        evaluate,
        generate,
        info,
        options,
        plan,
        plot,
        score,
        serve,
        tokenize,
        train,
    )

    app = typer.Typer(
        name="pyllm",
        help="Run and train transformer language models on the CPU.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options.main_options)
    for module in (
        generate,
        chat,
        score,
        embed,
        encode,
        evaluate,
        train,
        tokenize,
        plot,
        convert,
        info,
        plan,
        bench,
        serve,
        batch,
    ):
        module.register(app)
    return app


def explain(error: Exception) -> int:
    """Say on stderr, in one paragraph, what went wrong; gives the exit code."""
    from pyllm.cli.output import complain
    from pyllm.errors import PyllmError

    if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
        _drop_stdout()
        return FAILED
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's errors of usage
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "pyllm"
        complain(f"{error.format_message().rstrip('.')}. Try '{command} --help'.")
        return int(error.exit_code)
    if isinstance(error, PyllmError):
        complain(str(error))
        return FAILED
    if isinstance(error, MemoryError):
        complain(f"out of memory{f': {error}' if str(error) else ''}. `pyllm plan` says what a model needs.")
        return FAILED
    if isinstance(error, OSError):
        _drop_stdout()
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{where}{error.strerror or error}")
        return FAILED
    if isinstance(error, (ValueError, TypeError)):
        complain(str(error))
        return USAGE
    complain(f"internal error: {type(error).__name__}: {error}. Please report it, with the output of `pyllm info`.")
    return FAILED


def _close_stdout() -> None:
    """Write out what is buffered now, where an error can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_stdout() -> None:
    """Forget what could not be written, lest the interpreter tries again as it ends and complains."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass
