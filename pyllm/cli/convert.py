"""`pyllm convert`: quantize a model into a new folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import given_text
from pyllm.cli.output import be_quiet, note, progress_bar


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("convert")(convert)


def convert(
    model: Annotated[str, typer.Argument(help="Folder in the Hugging Face layout, or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The new folder; it must not exist.")],
    quantization: Annotated[str, o.option("--quantization", env="QUANTIZATION", help="int4 or int8.")],
    group_size: Annotated[
        int | None,
        o.option("--group-size", help="Inputs that share a scale: 32, 64 (default of int4), 128; int8 also 0: all."),
    ] = None,
    calibration: Annotated[
        Path | None, o.option("--calibration", help="UTF-8 text to weigh rounding errors with; - reads stdin.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        o.option("--skip", help="Keep modules that match, such as '*.down_proj'; may be given several times."),
    ] = None,
    threads: o.Threads = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """Write a quantized copy of a model that this and other engines load (compressed-tensors layout)."""
    be_quiet(quiet)
    from pyllm.convert import convert as convert_model

    text = None
    if calibration is not None:
        what = "calibration text"
        text = given_text("-", None, what) if str(calibration) == "-" else given_text(None, calibration, what)
    with progress_bar("converting") as progress:
        done = convert_model(
            model,
            out,
            quantization=quantization,
            group_size=group_size,
            calibration=text,
            skip=skip or (),
            threads=threads,
            revision=revision,
            offline=offline,
            progress=progress,
        )
    worst = max(done.errors, key=lambda module: done.errors[module].relative)
    note(
        f"{done.folder}: {done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB | {len(done.errors)} "
        f"matrices as {quantization}, relative RMS error {done.error.relative:.3%} (round to nearest: "
        f"{done.error.relative_nearest:.3%}){', weighted by activations' if text else ''} | most in {worst}: "
        f"{done.errors[worst].relative:.3%} (round to nearest: {done.errors[worst].relative_nearest:.3%})"
    )
    return 0
