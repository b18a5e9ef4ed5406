"""Beam search: the most probable continuations of a prompt, several of which are followed at once.

A search holds `num_beams` sequences. Each step computes the next token's log-probabilities for all of them, and of all
ways to extend a beam by a token the best go on; those that end are set aside as hypotheses. The rules (which extensions
count, how hypotheses are ranked, when a search is over) are those of Hugging Face transformers.

Beams with a common beginning share the blocks of the cache that hold it: a beam that is extended twice is forked, and
the last block, if it is not full, is copied when one of the two writes to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm.cache import blocks_for
from pyllm.engine.sampler import RowState
from pyllm.engine.scheduler import Scheduler
from pyllm.engine.sequence import Sequence
from pyllm.errors import RequestError
from pyllm.ops import F32, Ops
from pyllm.sampling import SamplingParams


@dataclass
class Beam:
    """A continuation that is followed: `logprob` is the sum over its output; `next` the best tokens and their
    log-probabilities, once they are computed."""

    sequence: Sequence
    state: RowState
    logprob: float
    next: tuple[list[int], list[float]] | None = None


@dataclass(frozen=True)
class Hypothesis:
    """An ended continuation: its output tokens, their summed log-probability, and the score that ranks it."""

    token_ids: list[int]
    logprob: float
    score: float
    ended: bool  # by its last token; else its length ended it


class BeamSearch:
    """The beams of one request, and what they found. `ends` are the tokens that end a beam."""

    def __init__(self, params: SamplingParams, sequence: Sequence, state: RowState, ends: Seq[int]) -> None:
        self.width = params.num_beams
        self.length_penalty = params.length_penalty
        self.early_stopping = params.early_stopping
        self.ends = frozenset(ends)
        self.beams = [Beam(sequence, state, 0.0)]
        self.hypotheses: list[Hypothesis] = []  # the best so far, best first
        self.done = False
        self._most = sequence.limit - sequence.prompt_length
        sequence.seats = self.width

    @property
    def sequences(self) -> list[Sequence]:
        """Those of the beams."""
        return [beam.sequence for beam in self.beams]

    @property
    def candidates(self) -> int:
        """Extensions of a beam that can matter: enough for `width` to go on, whatever tokens end others."""
        return max(2, 1 + len(self.ends)) * self.width

    def state(self, sequence: Sequence) -> RowState:
        """How the next token of one of its sequences is chosen."""
        return self._beam(sequence).state

    def take(self, sequence: Sequence, ids: NDArray[np.int32], logprobs: F32) -> None:
        """The best next tokens of one of its sequences, best first, with -1 where there are no more."""
        known = [int(token) for token in ids if token >= 0]
        self._beam(sequence).next = known, logprobs[: len(known)].tolist()

    @property
    def ready(self) -> bool:
        """Whether the next tokens of all beams are known."""
        return all(beam.next is not None for beam in self.beams)

    def advance(self, scheduler: Scheduler) -> None:
        """Extend the beams by a token, and give what does not go on back to the scheduler."""
        going: list[tuple[Beam, int, float]] = []
        length = self.beams[0].sequence.generated + 1
        for rank, (logprob, beam, token) in enumerate(self._extensions()):
            if token in self.ends or length >= self._most:
                if rank < self.width:
                    self._conclude(self.beams[beam], token, logprob, length)
            elif len(going) < self.width:
                going.append((self.beams[beam], token, logprob))
        self.done = not going or self._settled(going[0][2], length)
        old = self.sequences
        self.beams = [] if self.done else self._forked(going, scheduler)
        scheduler.replace(old, self.sequences)

    def clear(self) -> None:
        """Nothing is followed any more."""
        self.beams = []

    def _beam(self, sequence: Sequence) -> Beam:
        return next(beam for beam in self.beams if beam.sequence is sequence)

    def _extensions(self) -> list[tuple[float, int, int]]:
        """The best of all beams: summed log-probability, index of the beam, token."""
        every = [
            (beam.logprob + logprob, i, token)
            for i, beam in enumerate(self.beams)
            if beam.next is not None
            for token, logprob in zip(*beam.next, strict=True)
        ]
        return sorted(every, key=lambda each: (-each[0], each[1:]))[: self.candidates]

    def _conclude(self, beam: Beam, token: int, logprob: float, length: int) -> None:
        tokens = [*beam.sequence.output_ids, token]
        found = Hypothesis(tokens, logprob, logprob / length**self.length_penalty, token in self.ends)
        self.hypotheses = sorted([*self.hypotheses, found], key=lambda each: -each.score)[: self.width]

    def _settled(self, best: float, length: int) -> bool:
        """Whether the search is over while beams, the best of which has this log-probability, could go on."""
        if len(self.hypotheses) < self.width:
            return False
        if self.early_stopping is True:
            return True
        hoped = self._most if self.early_stopping == "never" and self.length_penalty > 0 else length
        return bool(best / hoped**self.length_penalty <= self.hypotheses[-1].score)

    def _forked(self, going: list[tuple[Beam, int, float]], scheduler: Scheduler) -> list[Beam]:
        last = {id(beam): i for i, (beam, _, _) in enumerate(going)}  # who goes on as it is: copying comes first
        beams = []
        for i, (parent, token, logprob) in enumerate(going):
            if last[id(parent)] == i:
                child = Beam(parent.sequence, parent.state, logprob)
            else:
                child = Beam(parent.sequence.fork(scheduler.pool), parent.state.fork(), logprob)
            beams.append((child, token))
        for child, token in beams:
            child.sequence.tokens.append(token)
            child.state.append(token)
            child.sequence.seats = 1
        beams[0][0].sequence.seats = self.width - len(beams) + 1
        return [child for child, _ in beams]


def check_beams(
    params: SamplingParams, prompt: Seq[int], max_length: int, scheduler: Scheduler, speculative: bool
) -> None:
    """Raise `RequestError` for a search behind `prompt` that an engine with this scheduler cannot run."""
    beams = params.num_beams
    if speculative:
        raise RequestError("num_beams: expected 1 with speculative decoding: load the model without it for beams")
    if beams > scheduler.max_sequences:
        raise RequestError(
            f"num_beams: expected at most max_num_seqs = {scheduler.max_sequences}, got {beams}: raise max_num_seqs, "
            "or search with fewer beams"
        )
    most = max_length if params.max_tokens is None else params.max_tokens
    length = min(max_length, len(prompt) + most)
    needed, held = beams * blocks_for(length), scheduler.pool.size
    if needed > held:
        raise RequestError(
            f"num_beams: {beams} beams of up to {length} tokens take {needed} blocks of cache, which has {held}: lower "
            "num_beams or max_tokens, or raise kv_cache_bytes"
        )


def best_next(ops: Ops, logits: F32, states: Seq[RowState], count: int) -> tuple[NDArray[np.int32], F32]:
    """The `count` best next tokens of each row of logits [R, V] and their log-probabilities, both [R, <= count].

    What a request asks for changes log-probabilities, not logits, and what it forbids is left out without raising the
    others: so scores of beams compare. -1 and -inf stand where fewer tokens may follow, NaN in rows of no numbers.
    `logits` are changed.
    """
    logits = np.asarray(logits)  # changed in place below, on the host
    count = min(count, logits.shape[1])
    anything = np.zeros(len(states), np.int32)
    _, _, best, ids = ops.logprobs(logits, anything, count)
    changed = [row for row, state in enumerate(states) if not state.unchanged and ids[row, 0] >= 0]
    if not changed:
        return ids, best
    totals = logits[np.arange(len(states)), ids[:, 0]] - best[:, 0]  # log of the sum of exponentials
    for row in changed:
        _change(logits[row], states[row], float(totals[row]))
    _, _, _, ids[changed] = ops.logprobs(logits[changed], anything[: len(changed)], count)
    for row in changed:
        best[row] = np.where(ids[row] >= 0, logits[row, ids[row]] - totals[row], -np.inf)
    return ids, best


def _change(logits: F32, state: RowState, total: float) -> None:
    """Change the log-probabilities logits [V] - total as a request wants."""
    forced = state.forced()
    if forced is not None:
        logits[:] = -np.inf
        logits[forced] = total
        return
    params = state.params
    seen, counts = state.history
    if seen.size:
        values = logits[seen] - total
        values = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        values -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        logits[seen] = values + total
    logits[state.bias_ids] += state.bias_values
    if state.allowed.size:
        kept = logits[state.allowed]
        logits[:] = -np.inf
        logits[state.allowed] = kept
    logits[state.forbidden()] = -math.inf
