"""`pyllm fill-mask`, `classify`, `score-pairs`, `detect-replaced` and `label-tokens`: what encoders say of texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import checked, given_pairs, given_texts, load
from pyllm.cli.output import be_quiet, progress_bar, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

TOGETHER = 64  # texts that run at a time

Texts = Annotated[list[str] | None, typer.Argument(help="Texts; - reads stdin.", show_default=False)]
File = Annotated[Path | None, o.option("--file", "-f", help="Read texts from this file, one a line.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("fill-mask")(fill_mask)
    app.command("classify")(classify)
    app.command("score-pairs")(score_pairs)
    app.command("detect-replaced")(detect_replaced)
    app.command("label-tokens")(label_tokens)


def fill_mask(
    model: o.Model,
    text: Texts = None,
    file: File = None,
    top_k: Annotated[int, o.option("--top-k", "-k", min=1, help="Tokens for each mask; default 5.")] = 5,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """The most probable tokens for each mask of a text: a JSON line for each text."""
    texts = given_texts(text, file)
    found = _run(quiet, "filling", model, threads, dtype, quantization, revision, offline,
                 lambda llm, show: llm.fill_mask(texts, top_k=top_k, progress=show))  # fmt: skip
    for one, masks in zip(texts, found, strict=True):
        write_json({"text": one, "masks": [[asdict(token) for token in mask] for mask in masks]})
    return 0


def classify(
    model: o.Model,
    text: Texts = None,
    file: Annotated[
        Path | None,
        o.option("--file", "-f", help="Read texts from this file, one a line; from .jsonl also pairs (text, pair)."),
    ] = None,
    second: Annotated[
        str | None, o.option("--pair", "-p", help="Classify pairs: each text together with this one behind it.")
    ] = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """The label of each text and the scores of all labels: a JSON line for each text."""
    inputs = given_pairs(text, file, second)
    found = _run(quiet, "classifying", model, threads, dtype, quantization, revision, offline,
                 lambda llm, show: llm.classify(inputs, progress=show))  # fmt: skip
    for one, result in zip(inputs, found, strict=True):
        given = {"text": one} if isinstance(one, str) else {"text": one[0], "pair": one[1]}
        write_json({**given, **asdict(result)})
    return 0


def score_pairs(
    model: o.Model,
    query: Annotated[str, typer.Argument(help="The first text of each pair.", show_default=False)],
    text: Texts = None,
    file: File = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """The score of each text together with a first one, such as a query: a JSON line for each text."""
    texts, first = given_texts(text, file), checked(query, "the command line")
    found = _run(quiet, "scoring", model, threads, dtype, quantization, revision, offline,
                 lambda llm, show: llm.score_pairs([(first, one) for one in texts], progress=show))  # fmt: skip
    for one, score in zip(texts, found, strict=True):
        write_json({"text": one, "score": score})
    return 0


def detect_replaced(
    model: o.Model,
    text: Texts = None,
    file: File = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """The probability of each token that it replaced another, by ELECTRA: a JSON line for each text."""
    texts = given_texts(text, file)
    found = _run(quiet, "reading", model, threads, dtype, quantization, revision, offline,
                 lambda llm, show: llm.detect_replaced(texts, progress=show))  # fmt: skip
    for one, tokens in zip(texts, found, strict=True):
        write_json({"text": one, "tokens": [asdict(token) for token in tokens]})
    return 0


def label_tokens(
    model: o.Model,
    text: Texts = None,
    file: File = None,
    entities: Annotated[
        bool, o.option("--entities", help="Neighbours of one label together, without those of the label O.")
    ] = False,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    quiet: o.Quiet = False,
) -> int:
    """The label of each token, such as the kind of name it belongs to: a JSON line for each text."""
    texts, what = given_texts(text, file), "entities" if entities else "tokens"

    def task(llm: Any, show: Any) -> Any:
        return (llm.find_entities if entities else llm.label_tokens)(texts, progress=show)

    found = _run(quiet, "labelling", model, threads, dtype, quantization, revision, offline, task)
    for one, parts in zip(texts, found, strict=True):
        write_json({"text": one, what: [asdict(part) for part in parts]})
    return 0


def _run(
    quiet: bool,
    doing: str,
    model: str,
    threads: int | None,
    dtype: str | None,
    quantization: str | None,
    revision: str | None,
    offline: bool,
    task: Callable[[Any, Any], Any],
) -> Any:
    """What the task gives, called with the loaded model and a function that shows its progress."""
    be_quiet(quiet)
    llm = load(
        model,
        device=None,
        dtype=dtype,
        quantization=quantization,
        quantization_skip=None,
        threads=threads,
        ctx_size=None,
        kv_cache_dtype=None,
        revision=revision,
        offline=offline,
        sequences=TOGETHER,
    )
    with progress_bar(doing) as bar:
        return task(llm, (lambda done, of: bar(done / of)) if bar else None)
