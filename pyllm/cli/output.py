"""What the command line prints, and where: progress bars, statistics, warnings and errors, all on stderr."""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllm.engine.engine import Stats
    from pyllm.llm import LLM

_quiet = False


def be_quiet(quiet: bool) -> None:
    """From here on say nothing on stderr but errors."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


def note(text: str = "") -> None:
    """A line on stderr, unless --quiet."""
    if not _quiet:
        _to_stderr(text)


def complain(text: str) -> None:
    """An error on stderr."""
    _to_stderr(f"pyllm: error: {text}")


def write(text: str, end: str = "") -> None:
    """Text on stdout, at once."""
    if sys.stdout is None:
        raise OSError(9, "standard output is closed", "stdout")
    sys.stdout.write(text + end)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """A JSON object on stdout, on one line."""
    write(json.dumps(value, ensure_ascii=False), end="\n")


def show_warnings_plainly() -> None:
    """Python warnings as one line on stderr; characters that the output's encoding lacks as question marks."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"pyllm: warning: {message}")

    warnings.showwarning = show
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def log_json(line: Any) -> None:
    """A JSON object on stderr, on one line, unless --quiet."""
    if not _quiet:
        _to_stderr(json.dumps(line, ensure_ascii=False))


@contextmanager
def progress_bar(what: str, show: bool = True) -> Iterator[Callable[..., None] | None]:
    """A bar on stderr while this lasts: gives a function that takes the share done, and a text to stand behind the
    bar; None where stderr is no terminal."""
    if _quiet or not show or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[more]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0, more="")
        yield lambda share, more="": progress.update(task, completed=share, more=more)


def report(llm: LLM, seed: int, *, interrupted: bool = False) -> None:
    """The closing line on stderr, unless --quiet; measures the read bandwidth that it compares with."""
    if _quiet:
        return
    memory = peak_memory()  # before the measurement takes its own
    # A draft model's reading is no part of `weight_bytes`: there is nothing to compare.
    compared = not interrupted and llm.stats.decode_steps > 0 and llm.plan.draft_model is None
    read_gbps = read_bandwidth(llm.ops.threads) if compared else None
    line = statistics(llm.stats, weight_bytes=llm.weight_bytes, read_gbps=read_gbps, memory=memory, seed=seed)
    note(line + (" | interrupted" if interrupted else ""))


def statistics(stats: Stats, *, weight_bytes: int, read_gbps: float | None, memory: int, seed: int) -> str:
    """Tokens and speeds, the share of the read bandwidth that decoding reached, memory, seed."""
    parts = [f"prompt: {stats.prompt_tokens} tokens, {_rate(stats.prompt_tokens, stats.prompt_seconds)} tok/s"]
    generation = (
        f"generation: {stats.generated_tokens} tokens, {_rate(stats.decode_tokens, stats.generation_seconds)} tok/s"
    )
    share = bandwidth_share(stats, weight_bytes, read_gbps)
    if share is not None:
        within = f"{share:.0%} of this machine's read bandwidth" if share <= 1.1 else "from the caches, not memory"
        generation += f" ({within})"
    parts.append(generation)
    if stats.acceptance_rate is not None:
        parts.append(
            f"drafts: {stats.accepted_tokens} of {stats.drafted_tokens} accepted ({stats.acceptance_rate:.0%}), "
            f"{_rate(stats.decode_tokens, stats.decode_steps)} tokens a step"
        )
    return " | ".join([*parts, f"peak memory {memory / 1e9:.2f} GB", f"seed {seed}"])


def bandwidth_share(stats: Stats, weight_bytes: int, read_gbps: float | None) -> float | None:
    """Weights read in decode steps per second, over what this machine can read; None where nothing was decoded."""
    if not read_gbps or stats.generation_seconds <= 0:
        return None
    return weight_bytes * stats.decode_steps / stats.generation_seconds / 1e9 / read_gbps


def read_bandwidth(threads: int) -> float:
    """Measured now, in 10^9 bytes per second; about a third of a second."""
    from pyllm import limits
    from pyllm._cpu import Context

    return limits.read_bandwidth(Context(threads), 256 << 20)


def peak_memory() -> int:
    """Most memory this process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rate(count: int, seconds: float) -> str:
    if count == 0 or seconds <= 0:
        return "-"
    rate = count / seconds
    return f"{rate:.1f}" if rate < 1000 else f"{rate:.0f}"


def _to_stderr(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:  # nobody listens
        pass
