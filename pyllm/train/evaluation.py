"""How well a model predicts held-out files, by the engine that serves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, RequestError
from pyllm.llm import LLM
from pyllm.spec import Problem
from pyllm.tokenizer import Tokenizer
from pyllm.train.labelled import LabelSet, encode_examples, need_pairs, read_examples
from pyllm.train.pairs import Pairs, pair_form
from pyllm.train.token_store import TokenStore

BATCH = 64  # sequences scored together


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over the predicted tokens of a file, or over its labels; of values their mean squared error.

    `accuracy` is the share of labels that are right, see :class:`pyllm.train.EvalReport`; `cut` labelled texts were
    longer than the context.
    """

    name: str
    loss: float
    tokens: int
    documents: int
    accuracy: float | None = None
    cut: int = 0

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    llm: LLM,
    store: TokenStore,
    *,
    mask_prompt: bool = False,
    limit: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Score the first `limit` documents, each by itself; longer ones in pieces of the context.

    With `mask_prompt` only answers count, as they do where the model has an encoder, whose documents must be pairs.
    Raises `ConfigError` where they cannot be told from prompts, `RequestError` where nothing counts.
    """
    if mask_prompt and not store.maskable:
        raise ConfigError(
            f"mask_prompt: {store.name}: the chat template writes earlier turns anew, so that prompts and answers "
            "cannot be told apart"
        )
    if mask_prompt and store.answers is None:
        raise ConfigError(
            f"mask_prompt: {store.name} holds no prompts: expected `prompt` and `completion`, or `messages`"
        )
    texts = _pairs_of(llm, store, limit) if llm.spec.encoder is not None else _pieces_of(llm, store, limit, mask_prompt)
    total, counted, done = 0.0, 0, 0
    while chosen := list(islice(texts.given, BATCH)):
        scores = llm.score([given for given, _ in chosen])
        for (_, answers), score in zip(chosen, scores, strict=True):
            kept = [v for i, v in enumerate(score.logprobs) if answers is None or answers[i]]
            total -= sum(kept)
            counted += len(kept)
        done += len(chosen)
        if progress is not None:
            progress(done / texts.count)
    if counted == 0:
        raise RequestError(f"{store.name}: no token to predict")
    return Evaluation(store.name, total / counted, counted, texts.documents)


def evaluate_labels(
    llm: LLM, path: Path, *, limit: int | None = None, progress: Callable[[float], None] | None = None
) -> Evaluation:
    """Classify the first `limit` labelled texts of a file by a model with a head of labels, longer ones cut to the
    context as in training; raises `DataError`."""
    labels = LabelSet.of_head(llm.spec.head)
    problem, examples = read_examples(path)
    labels.check(problem, str(path))
    need_pairs(llm.spec.head, examples)
    examples = examples[:limit]
    types = llm.spec.embedding.types > 1
    texts = encode_examples(
        path, examples, labels, Tokenizer.load(llm.folder), llm.folder, context=llm.max_model_len, types=types
    )
    targets = labels.blank(len(examples))
    for row, target in enumerate(texts.targets):
        labels.write(targets, row, target)
    show = None if progress is None else lambda done, of: progress(done / of)
    found = llm.classify(list(texts.encoded()), progress=show)
    scores = np.array([list(result.scores.values()) for result in found], np.float64)
    if problem is Problem.REGRESSION:
        loss = (scores - targets) ** 2
        return Evaluation(str(path), float(loss.mean()), loss.size, len(examples), cut=texts.cut)
    if problem is Problem.SINGLE_LABEL:
        chosen, right = scores[np.arange(len(targets)), targets], scores.argmax(1) == targets
    else:
        chosen, right = np.where(targets > 0, scores, 1 - scores), (scores > 0.5) == (targets > 0)
    loss = -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))
    return Evaluation(str(path), float(loss.mean()), loss.size, len(examples), float(right.mean()), texts.cut)


@dataclass(frozen=True)
class _Texts:
    """What is scored, each with which of its predicted tokens count (None: all), and how many of them there are."""

    given: Iterator[tuple[dict[str, list[int]], NDArray[np.uint8] | None]]
    count: int
    documents: int


def _pieces_of(llm: LLM, store: TokenStore, limit: int | None, mask_prompt: bool) -> _Texts:
    """Documents, in pieces where they are longer than the context."""
    ends = store.ends[:limit]
    pieces: list[tuple[int, int]] = []
    begin = 0
    for end in map(int, ends):
        step = llm.max_model_len - 1
        pieces += [(start, min(start + step + 1, end)) for start in range(begin, end - 1, max(step, 1))]
        begin = end
    answers = store.answers if mask_prompt else None
    given = (
        ({"prompt_token_ids": store.tokens[a:b].tolist()}, None if answers is None else answers[a + 1 : b])
        for a, b in pieces
    )
    return _Texts(given, len(pieces), len(ends))


def _pairs_of(llm: LLM, store: TokenStore, limit: int | None) -> _Texts:
    """Sources with their targets, which are what counts."""
    form = pair_form(llm.spec, llm.tokenizer, llm.engine.defaults)
    # A decoder is given the whole target behind its start token, here.
    pairs = Pairs(store, form, llm.plan.max_source, longest_target=llm.max_model_len - 1)
    count = pairs.count() if limit is None else min(limit, pairs.count())
    read = (pairs.pair(index) for index in range(count))
    given = (
        ({"prompt_token_ids": source.tolist(), "target_token_ids": target.tolist()}, None) for source, target in read
    )
    return _Texts(given, count, count)
