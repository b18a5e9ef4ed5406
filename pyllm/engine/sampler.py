"""Chooses tokens: requests' parameters become the sampling kernel's arrays, its results log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyllm.batch import I32
from pyllm.engine.outputs import Logprob
from pyllm.errors import RequestError
from pyllm.ops import F32, Ops
from pyllm.sampling import SamplingParams, SamplingState, sample_inputs
from pyllm.structured import Matcher
from pyllm.tokenizer import Tokenizer


class BadWords:
    """Token sequences that must not be generated: each bad word, at the start of a text and after a space."""

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer | None) -> None:
        """Raises `RequestError` where there is no tokenizer."""
        if tokenizer is None:
            raise RequestError("bad_words need a tokenizer; this model was loaded with skip_tokenizer_init")
        self._alone: list[int] = []  # words of one token
        self._begun: dict[int, list[list[int]]] = {}  # the others, by the last token but one
        texts = dict.fromkeys(text for word in words for text in (word, f" {word.lstrip()}"))
        for word in dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts):
            if len(word) == 1:
                self._alone.append(word[0])
            elif word:
                self._begun.setdefault(word[-2], []).append(list(word))

    def banned(self, output: Sequence[int]) -> list[int]:
        """Tokens that would end a bad word after this output."""
        begun = self._begun.get(output[-1], ()) if output else ()
        return [*self._alone, *(word[-1] for word in begun if list(output[1 - len(word) :]) == word[:-1])]


class Shared(NamedTuple):
    """What a request's parameters become once, for all its prompts and completions; made by `Engine.prepare`.

    A `matcher` at the beginning of its grammar, and its bad words.
    """

    matcher: Matcher | None = None
    bad_words: BadWords | None = None


class RowState(SamplingState):
    """What choosing the next token of one completion depends on, beside its logits."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        index: int,
        prompt: Sequence[int],
        vocab: int,
        end_ids: Sequence[int],
        most: int,
        forced: tuple[int | None, int | None] = (None, None),
        shared: Shared = Shared(),  # noqa: B008 immutable
    ) -> None:
        """State before the first of `most` output tokens; the first and the last of these may be `forced`.

        `prompt` is what penalties and n-grams count besides the output; `shared` with the request's other completions.
        """
        for where, largest in (
            ("logit_bias", max(params.logit_bias, default=0)),
            ("allowed_token_ids", params.allowed.max(initial=0)),
            ("forced_bos_token_id, forced_eos_token_id", max((token for token in forced if token), default=0)),
        ):
            if largest >= vocab:
                raise RequestError(
                    f"{where}: expected token ids below {vocab}, the size of the vocabulary, got {largest}"
                )
        super().__init__(params, prompt, seed, index)
        self.params = params
        self._output: list[int] = []
        self._ends = sorted({*end_ids, *(i for i in params.stop_token_ids if i < vocab)})
        self._bad_words = shared.bad_words
        self._ngrams = NgramBans(params.no_repeat_ngram_size, prompt) if params.no_repeat_ngram_size else None
        self._most, self._forced = most, forced
        self.matcher = None if shared.matcher is None else shared.matcher.fork()
        bans = self._bad_words or params.min_tokens or self._ngrams or self.matcher
        self.unchanged = self.plain and not bans and forced == (None, None)  # the logits decide as they are
        self.plain = self.unchanged and params.logprobs is None and params.num_beams == 1

    def fork(self) -> RowState:
        """One that goes on by itself from here."""
        twin = super().fork()
        twin._output = self._output.copy()
        twin._ngrams = copy.deepcopy(self._ngrams)
        twin.matcher = None if self.matcher is None else self.matcher.fork()
        return twin

    def append(self, token: int) -> None:
        """The token was chosen."""
        super().append(token)
        self._output.append(token)
        if self._ngrams is not None:
            self._ngrams.append(token)
        if self.matcher is not None:
            self.matcher.append(token)

    def forced(self) -> int | None:
        """The next token where there is no choice: the first or the last of the output may be given."""
        first, last = self._forced
        if last is not None and len(self._output) == self._most - 1:
            return last
        return first if not self._output else None

    def forbidden(self) -> list[int]:
        """Tokens that must not be chosen next: ends before the minimum, the last token of an n-gram that stands there
        already, and that of a bad word begun."""
        if self.forced() is not None:
            return []
        banned = list(self._ends) if len(self._output) < self.params.min_tokens else []
        if self._bad_words is not None:
            banned.extend(self._bad_words.banned(self._output))
        if self._ngrams is not None:
            banned.extend(self._ngrams.banned())
        return banned


class NgramBans:
    """The n-grams of a growing sequence: which tokens would make one stand there twice."""

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self._begun = size - 1
        self._tail: tuple[int, ...] = ()  # the last tokens, with which the next one makes an n-gram
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The sequence goes on with `token`."""
        if len(self._tail) == self._begun:
            self._followers.setdefault(self._tail, []).append(token)
        self._tail = (*self._tail, token)[-self._begun :] if self._begun else ()

    def banned(self) -> list[int]:
        """Tokens that followed the last n - 1 before."""
        return self._followers.get(self._tail, [])


class Chosen(NamedTuple):
    """Tokens [R], -1 where the logits are no numbers; log-probabilities for the rows that asked for them."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]


class Sampler:
    """Chooses tokens of many completions in one kernel call."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def sample(self, logits: F32, states: Sequence[RowState]) -> Chosen:
        """The next token for each row of logits [R, V], which are changed in place."""
        forbidden = [s.forbidden() for s in states]
        inputs = sample_inputs(states, forbidden if any(forbidden) else None)
        wanted = [s.params.logprobs for s in states]
        asked = max((n for n in wanted if n is not None), default=None)
        matched = [(row, s.matcher) for row, s in enumerate(states) if s.matcher is not None]
        changed = inputs.history or inputs.bias or inputs.allowed or matched
        if matched:
            logits = np.asarray(logits)  # changed in place below, on the host
        raw = logits.copy() if asked is not None and changed else logits
        for row, matcher in matched:
            np.minimum(logits[row], matcher.ceiling(), out=logits[row])
        tokens = self.ops.sample(logits, inputs)
        for row, state in enumerate(states):
            forced = state.forced()
            if forced is not None and tokens[row] >= 0:
                tokens[row] = forced
        if asked is None:
            return Chosen(tokens.tolist(), [None] * len(states))
        entries = self.logprobs(raw, np.maximum(tokens, 0), asked)
        listed = [_first(e, n) if n is not None else None for e, n in zip(entries, wanted, strict=True)]
        return Chosen(tokens.tolist(), listed)

    def logprobs(self, logits: F32, ids: I32, top: int) -> list[dict[int, Logprob]]:
        """Log-probabilities of ids [R] and of the `top` likeliest tokens of each row: id first, then by rank."""
        chosen, ranks, best, best_ids = self.ops.logprobs(logits, ids, min(top, logits.shape[1]))
        return [
            {int(ids[i]): Logprob(float(chosen[i]), int(ranks[i]))}
            | {
                int(token): Logprob(float(value), rank)
                for rank, (token, value) in enumerate(zip(best_ids[i], best[i], strict=True), 1)
                if token >= 0 and token != ids[i]
            }
            for i in range(len(ids))
        ]


def _first(entry: dict[int, Logprob], top: int) -> dict[int, Logprob]:
    """The chosen token and those of rank `top` or better."""
    return {token: value for i, (token, value) in enumerate(entry.items()) if i == 0 or value.rank <= top}
