"""How well a model predicts held-out files, by the engine that serves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyllm.errors import ConfigError, RequestError
from pyllm.llm import LLM
from pyllm.train.token_store import TokenStore

BATCH = 64  # sequences scored together


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over the predicted tokens of a file."""

    name: str
    loss: float
    tokens: int
    documents: int

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

    With `mask_prompt` only answers count. Raises `ConfigError` where they cannot be told from prompts, `RequestError`
    where nothing counts.
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
    ends = store.ends[:limit]
    pieces: list[tuple[int, int]] = []
    begin = 0
    for end in map(int, ends):
        step = llm.max_model_len - 1
        pieces += [(start, min(start + step + 1, end)) for start in range(begin, end - 1, max(step, 1))]
        begin = end
    total, counted = 0.0, 0
    for at in range(0, len(pieces), BATCH):
        chosen = pieces[at : at + BATCH]
        scores = llm.score([{"prompt_token_ids": store.tokens[a:b].tolist()} for a, b in chosen])
        for (a, b), score in zip(chosen, scores, strict=True):
            answers = store.answers[a + 1 : b] if mask_prompt and store.answers is not None else None
            kept = [v for i, v in enumerate(score.logprobs) if answers is None or answers[i]]
            total -= sum(kept)
            counted += len(kept)
        if progress is not None:
            progress((at + len(chosen)) / len(pieces))
    if counted == 0:
        raise RequestError(f"{store.name}: no token to predict")
    return Evaluation(store.name, total / counted, counted, len(ends))
