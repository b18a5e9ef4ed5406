"""`pyllm score` and `pyllm perplexity`: how likely a model finds given text."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import checked, given_text, load
from pyllm.cli.output import be_quiet, progress_bar, write, write_json


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("score")(score)
    app.command("perplexity")(perplexity)


def score(
    model: o.Model,
    text: Annotated[str | None, typer.Argument(help="The text to score; - reads stdin.", show_default=False)] = None,
    prompt: Annotated[str | None, o.option("--prompt", "-p", help="Score the text after this one.")] = None,
    file: Annotated[Path | None, o.option("--file", "-f", help="Read the text from this file.")] = None,
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
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Log-probability (in nats) of every token of a text, and of the whole."""
    be_quiet(quiet)
    content = given_text(text, file, "text")
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
    )
    [result] = llm.score([(checked(prompt, "--prompt"), content)] if prompt is not None else [content])
    tokens = [llm.decode([i], skip_special_tokens=False) for i in result.token_ids]
    if json:
        rows = zip(result.token_ids, tokens, result.logprobs, strict=True)
        write_json({"total": result.total, "tokens": [{"id": i, "token": t, "logprob": value} for i, t, value in rows]})
        return 0
    for token, value in zip(tokens, result.logprobs, strict=True):
        write(f"{value:10.4f}  {token!r}", end="\n")
    count = len(tokens)
    write(f"{result.total:10.4f}  {count} tokens", end="")
    write(f", perplexity {math.exp(-result.total / count):.4f}" if count else "", end="\n")
    return 0


def perplexity(
    model: o.Model,
    file: Annotated[Path, typer.Argument(help="UTF-8 text; - reads stdin.", show_default=False)],
    stride: Annotated[
        int | None, o.option("--stride", min=1, help="Tokens between windows; default half the context.")
    ] = None,
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
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> int:
    """Perplexity of a text, in windows of the context that overlap so that tokens keep what stands before them."""
    be_quiet(quiet)
    text = given_text("-", None, "text") if str(file) == "-" else given_text(None, file, "text")
    llm = load(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        quantization_skip=quantization_skip,
        threads=threads,
        ctx_size=ctx_size,
        kv_cache_dtype=kv_cache_dtype,
        revision=revision,
        offline=offline,
        verbose=verbose,
    )
    with progress_bar("scoring") as bar:
        result = llm.perplexity(text, stride=stride, progress=(lambda done, of: bar(done / of)) if bar else None)
    if json:
        write_json({**asdict(result), "bits_per_byte": result.bits_per_byte})
    else:
        write(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens "
            f"({result.nll / result.tokens:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte)",
            end="\n",
        )
    return 0
