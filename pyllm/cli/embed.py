"""`pyllm embed`: vectors of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import given_texts, load
from pyllm.cli.output import be_quiet, progress_bar, write_json

TOGETHER = 64  # texts that run at a time


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("embed")(embed)


def embed(
    model: o.Model,
    text: Annotated[list[str] | None, typer.Argument(help="Texts; - reads stdin.", show_default=False)] = None,
    file: Annotated[Path | None, o.option("--file", "-f", help="Read texts from this file, one a line.")] = None,
    out: Annotated[Path | None, o.option("--out", "-o", help="Write a .npy file, float32 [texts, width].")] = None,
    pooling: o.Pooling = None,
    normalize: o.Normalize = None,
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
    """Embeddings of texts: a JSON line for each, or a .npy file of all."""
    be_quiet(quiet)
    texts = given_texts(text, file)
    if out is not None and out.suffix != ".npy":
        raise typer.BadParameter(f"--out: expected a name that ends in .npy, got {out}.")
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
        verbose=verbose,
        sequences=min(len(texts), TOGETHER),
    )
    with progress_bar("embedding") as bar:
        show = (lambda done, of: bar(done / of)) if bar else None
        vectors = llm.embed(texts, pooling=pooling, normalize=normalize, progress=show)
    if out is not None:
        np.save(out, vectors, allow_pickle=False)
        return 0
    for one, vector in zip(texts, vectors, strict=True):
        write_json({"text": one, "embedding": vector.tolist()})
    return 0
