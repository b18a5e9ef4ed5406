"""`pyllm eval`: loss and perplexity of a model on files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import load
from pyllm.cli.output import be_quiet, progress_bar, write, write_json

if TYPE_CHECKING:
    from pyllm.train.evaluation import Evaluation

SHOWN = ("name", "loss", "tokens", "documents")


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
    quantization_skip: o.QuantizationSkip = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Loss and perplexity on files as `pyllm train` reads them, each document by itself; of a classifier its loss and
    accuracy."""
    be_quiet(quiet)
    from pyllm.default_model import default_model
    from pyllm.folder import resolve
    from pyllm.models import read_spec
    from pyllm.train.evaluation import evaluate as run
    from pyllm.train.evaluation import evaluate_labels
    from pyllm.train.token_store import open_tokens

    folder = resolve(model, revision=revision, offline=offline) if model is not None else default_model()
    of_labels = read_spec(folder).head.kind.is_pooled
    if of_labels and mask_prompt:
        raise typer.BadParameter("--mask-prompt is for models that predict tokens, this one classifies texts.")
    stores = []
    if not of_labels:
        with progress_bar("tokenising") as progress:
            stores = [open_tokens(path, folder, progress=progress) for path in files]
    llm = load(
        str(folder),
        device=device,
        dtype=dtype,
        quantization=quantization,
        quantization_skip=quantization_skip,
        threads=threads,
        ctx_size=ctx_size,
        kv_cache_dtype=kv_cache_dtype,
        revision=None,
        offline=offline,
        sequences=32,
        enable_prefix_caching=False,
    )
    results = []
    for path in files if of_labels else ():
        with progress_bar("classifying") as progress:
            results.append(evaluate_labels(llm, path, limit=limit, progress=progress))
    for store in stores:
        with progress_bar("scoring") as progress:
            results.append(run(llm, store, mask_prompt=mask_prompt, limit=limit, progress=progress))
    for result in results if not json else ():
        write(_said(result, of_labels), end="\n")
    if json:
        more = "accuracy" if of_labels else "perplexity"
        write_json([{name: getattr(result, name) for name in (*SHOWN, more)} for result in results])
    return 0


def _said(result: Evaluation, of_labels: bool) -> str:
    loss = f"{result.name}: loss {result.loss:.4f}"
    if of_labels:
        accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.4f}"
        return f"{loss}{accuracy} over {result.documents} texts"
    return f"{loss}, perplexity {result.perplexity:.4f} over {result.tokens} tokens of {result.documents} documents"
