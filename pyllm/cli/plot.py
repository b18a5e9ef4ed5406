"""`pyllm plot`: the curves of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.output import be_quiet, note


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("plot")(plot)


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `pyllm train`.", show_default=False)],
    out: Annotated[
        Path | None, o.option("--out", "-o", help="Picture to write: .png, .svg, .pdf; default RUN/loss.png.")
    ] = None,
    quiet: o.Quiet = False,
) -> int:
    """Draw loss and learning rate of a training run."""
    be_quiet(quiet)
    from pyllm.train.plot import plot_run

    target = out if out is not None else run / "loss.png"
    plot_run(run, target)
    note(str(target))
    return 0
