"""`pyllm eval`: loss and perplexity of a model on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import load
from pyllm.cli.output import be_quiet, progress_bar, write, write_json


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("eval")(evaluate)


def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Held-out data: .txt, .jsonl, .bin.", show_default=False)],
    model: o.DefaultModel = None,
    mask_prompt: Annotated[bool, o.option("--mask-prompt", help="Only answers count.")] = False,
    limit: Annotated[int | None, o.option("--limit", min=1, help="First documents of each file; default all.")] = None,
    device: o.Device = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Loss and perplexity on files as `pyllm train` reads them, each document by itself."""
    be_quiet(quiet)
    from pyllm.default_model import default_model
    from pyllm.folder import resolve
    from pyllm.train.evaluation import evaluate as run
    from pyllm.train.token_store import open_tokens

    folder = resolve(model, revision=revision, offline=offline) if model is not None else default_model()
    with progress_bar("tokenising") as progress:
        stores = [open_tokens(path, folder, progress=progress) for path in files]
    llm = load(
        str(folder),
        device=device,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        ctx_size=ctx_size,
        kv_cache_dtype=kv_cache_dtype,
        revision=None,
        offline=offline,
        sequences=32,
        enable_prefix_caching=False,
    )
    results = []
    for store in stores:
        with progress_bar("scoring") as progress:
            results.append(run(llm, store, mask_prompt=mask_prompt, limit=limit, progress=progress))
    if json:
        write_json([{**vars(result), "perplexity": result.perplexity} for result in results])
        return 0
    for result in results:
        write(
            f"{result.name}: loss {result.loss:.4f}, perplexity {result.perplexity:.4f} over {result.tokens} tokens of "
            f"{result.documents} documents",
            end="\n",
        )
    return 0
