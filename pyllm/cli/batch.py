"""`pyllm batch`: requests from a file, in the format of OpenAI's batches."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import FAILED, INTERRUPTED, OK
from pyllm.cli import options as o
from pyllm.cli.inputs import load
from pyllm.cli.output import be_quiet, complain, log_json, note, progress_bar
from pyllm.cli.serve import embedding_of, missing_extra, served_name

if TYPE_CHECKING:
    from pyllm.server.batch import Progress


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("batch")(batch)


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one JSON object a line.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Answers, as they come.", show_default=False)],
    model: o.DefaultModel = None,
    served_model_name: o.ServedName = None,
    max_num_seqs: o.MaxSequences = 32,
    pooling: o.Pooling = None,
    normalize: o.Normalize = None,
    chat_template: o.ChatTemplate = None,
    device: o.Device = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    quantization_skip: o.QuantizationSkip = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    prefix: o.Prefix = False,
    revision: o.Revision = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Answer the requests of a file. A run that was ended goes on where it was when it is started again."""
    be_quiet(quiet)
    if (missing := missing_extra()) is not None:
        complain(f"pyllm batch needs the package {missing}: pip install 'pyllm[serve]'")
        return FAILED
    from pyllm.server.batch import run
    from pyllm.server.limits import Limits
    from pyllm.server.service import Service

    llm = load(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        quantization_skip=quantization_skip,
        threads=threads,
        ctx_size=ctx_size,
        prefix=prefix,
        kv_cache_dtype=kv_cache_dtype,
        revision=revision,
        offline=offline,
        chat_template=chat_template,
        verbose=verbose,
        sequences=max_num_seqs,
    )
    limits = Limits(max_queue=sys.maxsize, max_requests=sys.maxsize, max_seconds=float("inf"))
    name = served_model_name or served_name(model)

    def log(line: dict[str, Any]) -> None:
        if "error" in line:  # the server's own faults, with their tracebacks
            log_json(line)

    service = Service(llm, name, limits, (), log, embedding_of(llm.folder, pooling, normalize))
    began = time.monotonic()
    try:
        with progress_bar("answering") as bar:

            def told(progress: Progress) -> None:
                if bar:
                    speed = progress.tokens / (time.monotonic() - began)
                    bar(progress.answered / progress.lines, f"{progress.answered}/{progress.lines}, {speed:.0f} tok/s")

            progress = asyncio.run(run(service, source, target, told))
    except KeyboardInterrupt:
        note(f"interrupted: {target} has the answers so far; the same command goes on with the rest")
        return INTERRUPTED
    note(f"{progress.answered} of {progress.lines} answered in {target}, {progress.failed} of them with an error now")
    return OK
