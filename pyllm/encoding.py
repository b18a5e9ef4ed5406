"""What a model makes of given texts without continuing them: vectors, labels, words behind masks, replaced tokens.

`Encoding` is what :class:`pyllm.LLM` builds on, and holds these tasks. All of them run texts through the model, keep
the hidden states that matter, and pass those through the model's head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.errors import RequestError, TokenizerError, shown
from pyllm.ops import F32, Ops
from pyllm.pooling import KeptStates, Pool, embedding_rule
from pyllm.prompts import Encoded, Prompt, Prompts
from pyllm.reading import Progress, Reader, T
from pyllm.spec import HeadKind, ModelSpec, Problem
from pyllm.tokenizer import Tokenizer
from pyllm.tokenizer_backend import Span

CLASSES = {  # what transformers calls the classes of models that have these heads
    HeadKind.TOKENS: "ForMaskedLM",
    HeadKind.POOLED: "ForSequenceClassification",
    HeadKind.EACH: "ForPreTraining of ELECTRA",
    HeadKind.LABELS: "ForTokenClassification",
    HeadKind.NEXT: "BertForNextSentencePrediction",
}
NO_ENTITY = "O"  # the label of tokens that belong to no entity


@dataclass(frozen=True)
class Classification:
    """What a classifier says of a text: the best label, and the score of every one.

    Scores are probabilities, together 1 where one label holds, each by itself where several may; or the values
    themselves where the model was trained on values.
    """

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class TokenProbability:
    """A token and a probability: of filling a mask, or of having been replaced."""

    token_id: int
    token: str | None  # None without a tokenizer
    probability: float


@dataclass(frozen=True)
class TokenLabel:
    """A token of a text, its most probable label, and that one's probability.

    `start` and `end` are its first character in the text and the one behind it; None where token ids were given, or
    the tokenizer, a SentencePiece model without a tokenizer.json, does not say them.
    """

    token_id: int
    token: str | None  # None without a tokenizer
    label: str
    score: float
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Entity:
    """Neighbouring tokens of one label, as ``text[start:end]``; `score` is the mean of theirs."""

    label: str
    score: float
    start: int
    end: int
    text: str


class Encoding:
    """Tasks on given texts; see :class:`pyllm.LLM`."""

    spec: ModelSpec
    ops: Ops
    folder: Path
    tokenizer: Tokenizer | None
    _prompts: Prompts
    _reader: Reader

    def embed(
        self,
        texts: Sequence[Prompt],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        progress: Progress = None,
    ) -> F32:
        """Embeddings float32 [N, D] of N texts: their hidden states after the final norm, made one vector each.

        `pooling` is "last", "cls" (the first token), "mean" or "max"; `normalize` gives vectors of length 1. Where they
        are None the model's folder says what they are (modules.json, as sentence-transformers writes it).

        Raises `ValueError` where nothing says how to pool, `RequestError` for a text that is empty or too long,
        `NonFiniteError` when hidden states are no numbers.
        """
        _check_listed("embed", texts)
        rule = embedding_rule(self.folder, pooling, normalize)
        encoded = [self._prompts.read(text) for text in texts]
        for text in encoded:
            rule.check(len(text.ids))
        pools = [Pool(rule.pooling) for _ in encoded]
        self._reader.states(encoded, pools, progress)
        vectors = np.empty((len(pools), self.spec.hidden), np.float32)
        for vector, pool in zip(vectors, pools, strict=True):
            vector[:] = rule.vector(pool)
        return vectors

    def classify(
        self, texts: Sequence[Prompt | tuple[str, str] | Encoded], *, progress: Progress = None
    ) -> list[Classification]:
        """The labels of texts, or of pairs of texts, by the names that the model's config gives them. A model that
        predicts next sentences says "next" of pairs whose second text follows the first, "random" of others.

        Raises `RequestError` where the model is no classifier, `NonFiniteError` when its scores are no numbers.
        """
        problem = self.spec.head.problem
        if self.spec.head.kind is HeadKind.NEXT and not all(isinstance(text, (tuple, Encoded)) for text in texts):
            raise RequestError(
                "classify: expected pairs (first, second), for this model says whether the second of two texts follows "
                "the first, got a text by itself"
            )
        values = [_scores(row, problem) for row in self._pooled("classify", texts, progress)]
        labels = self.spec.head.labels
        found = []
        for row in values:
            best = int(row.argmax())
            found.append(Classification(labels[best], float(row[best]), dict(zip(labels, row.tolist(), strict=True))))
        return found

    def score_pairs(self, pairs: Sequence[tuple[str, str]], *, progress: Progress = None) -> list[float]:
        """One score for each pair of texts, as a cross-encoder gives it: higher where they belong together.

        They are the model's own, not probabilities. Raises `RequestError` where it has not just one label,
        `NonFiniteError` when its scores are no numbers.
        """
        if self.spec.head.kind.is_pooled and len(self.spec.head.labels) != 1:
            raise RequestError(
                f"score_pairs: expected a model with one label, this one has {len(self.spec.head.labels)}: classify "
                "the pairs instead"
            )
        return [float(value) for value in self._pooled("score_pairs", pairs, progress)[:, 0]]

    def fill_mask(
        self, texts: Sequence[Prompt], *, top_k: int = 5, progress: Progress = None
    ) -> list[list[list[TokenProbability]]]:
        """For each text, and each of its masks in order, the `top_k` most probable tokens, the best first.

        A mask is the tokenizer's mask token (BERT's [MASK], RoBERTa's <mask>) in the text. Raises `RequestError` for a
        text without one, and where the model does not predict masked tokens; `NonFiniteError` when logits are no
        numbers.
        """
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= self.spec.vocab_size:
            raise ValueError(f"top_k: expected 1 to the vocabulary's {self.spec.vocab_size}, got {top_k!r}")
        self._need_head("fill_mask", HeadKind.TOKENS)
        mask = self._prompts.need_tokenizer().mask_token_id
        if mask is None:
            raise RequestError("fill_mask: the tokenizer names no mask token (mask_token in tokenizer_config.json)")
        encoded = self._encode("fill_mask", texts)
        places = [[at for at, token in enumerate(text.ids) if token == mask] for text in encoded]
        for text, at in zip(encoded, places, strict=True):
            if not at:
                name = self._prompts.need_tokenizer().token_of(mask)
                raise RequestError(f"fill_mask: expected {name} in the text, found none in {shown(text.text)}")

        def best(logits: F32) -> list[list[TokenProbability]]:
            _, _, top, ids = self.ops.logprobs(logits, np.zeros(len(logits), np.int32), top_k)
            return [self._tokens(*pair) for pair in zip(ids, np.exp(top), strict=True)]

        return self._head_of_tokens(encoded, places, best, progress)

    def detect_replaced(self, texts: Sequence[Prompt], *, progress: Progress = None) -> list[list[TokenProbability]]:
        """For each text the probability of each of its tokens that it was put in place of another (ELECTRA).

        Raises `RequestError` where the model was not made for it, `NonFiniteError` when its logits are no numbers.
        """
        self._need_head("detect_replaced", HeadKind.EACH)
        encoded = self._encode("detect_replaced", texts)
        found = self._head_of_tokens(encoded, [None] * len(encoded), lambda x: list(_sigmoid(x[:, 0])), progress)
        return [
            self._tokens(np.array(text.ids), np.array(probabilities, np.float32))
            for text, probabilities in zip(encoded, found, strict=True)
        ]

    def label_tokens(self, texts: Sequence[Prompt], *, progress: Progress = None) -> list[list[TokenLabel]]:
        """For each text the label of each of its tokens; of a text, and not of token ids, without special tokens.

        Raises `RequestError` where the model labels no tokens, `NonFiniteError` when its scores are no numbers.
        """
        self._need_head("label_tokens", HeadKind.LABELS)
        _check_listed("label_tokens", texts)
        encoded = [self._prompts.read(text) for text in texts]
        labels = self.spec.head.labels

        def best(rows: F32) -> list[tuple[str, float]]:
            scores = [_scores(row, self.spec.head.problem) for row in rows]
            return [(labels[int(row.argmax())], float(row.max())) for row in scores]

        found = self._head_of_tokens(encoded, [None] * len(encoded), best, progress)
        spans = [self._prompts.spans(text) for text in texts]
        return [self._labelled(*given) for given in zip(encoded, found, spans, strict=True)]

    def find_entities(self, texts: Sequence[str], *, progress: Progress = None) -> list[list[Entity]]:
        """For each text what its tokens' labels say together, in order: such as the names in it.

        Neighbours of one label belong together, where labels are "B-X" and "I-X" up to the next "B-X"; both are then
        label "X". Tokens of the label "O" belong to nothing. Raises as `label_tokens`.
        """
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("find_entities: expected a list of texts, for token ids have no characters")
        if (None, None) in (self._prompts.spans("a") or ()):
            raise TokenizerError(
                "find_entities: expected a tokenizer that says which characters a token stands for, found a "
                "SentencePiece model: put the model's tokenizer.json into the folder"
            )
        found = self.label_tokens(texts, progress=progress)
        return [_entities(text, tokens) for text, tokens in zip(texts, found, strict=True)]

    # Inside

    def _labelled(
        self, text: Encoded, labels: Sequence[tuple[str, float]], spans: Sequence[Span | None] | None
    ) -> list[TokenLabel]:
        places = [(None, None)] * len(text.ids) if spans is None else spans
        return [
            TokenLabel(token, self._token_of(token), *label, *place)
            for token, label, place in zip(text.ids, labels, places, strict=True)
            if place is not None
        ]

    def _pooled(self, task: str, texts: Sequence[Prompt | tuple[str, str] | Encoded], progress: Progress) -> F32:
        """Scores [N, labels] of texts."""
        self._need_head(task, HeadKind.POOLED, HeadKind.NEXT)
        encoded = self._encode(task, texts)
        scores = self._head_of_tokens(encoded, [[0]] * len(encoded), lambda rows: list(rows.copy()), progress)
        return np.array(scores, np.float32).reshape(-1, self.spec.outputs)

    def _head_of_tokens(
        self,
        texts: Sequence[Encoded],
        places: Sequence[list[int] | None],
        reduce: Callable[[F32], list[T]],
        progress: Progress,
    ) -> list[list[T]]:
        """What `reduce` makes of the head's rows at these places of each text (None: all), see `Reader.head`."""
        pools = deque(KeptStates(at) for at in places)
        self._reader.states(texts, pools, progress)
        counts = []

        def states() -> Iterator[F32]:
            while pools:
                rows = pools.popleft().rows  # no other reference: they are free once they are reduced
                counts.append(len(rows))
                yield rows

        found = iter(self._reader.head(states(), reduce))
        return [list(islice(found, count)) for count in counts]

    def _encode(self, task: str, texts: Sequence[Prompt | tuple[str, str] | Encoded]) -> list[Encoded]:
        _check_listed(task, texts)
        return [
            self._prompts.pair(task, text) if isinstance(text, tuple) else self._prompts.read(text) for text in texts
        ]

    def _need_head(self, task: str, *kinds: HeadKind) -> None:
        if self.spec.is_encoder and self.spec.head.kind in kinds:
            return
        found = "a decoder"
        if self.spec.is_encoder:
            own = CLASSES.get(self.spec.head.kind)
            found = "an encoder without a head" if own is None else f"an encoder of a class like {own}"
        raise RequestError(
            f"{task}: expected a model whose config.json names a class like {CLASSES[kinds[0]]} as its architecture, "
            f"this one is {found}"
        )

    def _tokens(self, ids: Any, probabilities: Any) -> list[TokenProbability]:
        return [
            TokenProbability(token, self._token_of(token), probability)
            for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]

    def _token_of(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.token_of(token_id)


def _check_listed(task: str, texts: Sequence[object]) -> None:
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"{task}: expected a list of texts, got one by itself")


def _scores(row: F32, problem: Problem | None) -> F32:
    """A row of the head as probabilities or values."""
    if problem is Problem.REGRESSION:
        return row
    if problem is Problem.MULTI_LABEL:
        return _sigmoid(row)
    weights = np.exp(row - row.max())
    return np.asarray(weights / weights.sum(), np.float32)


def _entities(text: str, tokens: Sequence[TokenLabel]) -> list[Entity]:
    """Groups of a text's tokens."""
    groups: list[tuple[str, list[TokenLabel]]] = []
    for token in tokens:
        mark, dash, label = token.label.partition("-")
        if not (dash and mark in ("B", "I")):
            mark, label = "I", token.label
        if mark == "B" or not groups or groups[-1][0] != label:
            groups.append((label, []))
        groups[-1][1].append(token)
    found = []
    for label, group in groups:
        start, end = group[0].start, group[-1].end
        if label != NO_ENTITY and start is not None and end is not None:
            found.append(Entity(label, sum(token.score for token in group) / len(group), start, end, text[start:end]))
    return found


def _sigmoid(x: F32) -> F32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x.astype(np.float64))), np.float32)
