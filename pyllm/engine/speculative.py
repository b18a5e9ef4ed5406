"""Speculative decoding: cheap guesses of the next tokens, several of which one step of the model checks.

Reading the weights for one token costs about as much as reading them for a few. So a step computes a sequence's last
token and, behind it, `drafts`: guesses of what follows. Then the sequence's own sampler chooses at each of these
positions in turn, and goes on to the next for as long as what it chose is the draft there. A step gives one token more
than drafts were accepted, never fewer than without drafts.

The output is that of plain decoding, token by token, whatever is drafted: every token is chosen by the ordinary sampler
from the ordinary logits (a row's bits do not depend on the rows beside it) with the tokens before it known, and the
random number that belongs to its place. So greedy decoding stays greedy decoding, a seed gives what it gives without
drafts, and the distribution is the model's own.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318) accept a draft x with probability
min(1, p(x) / q(x)), p being the model's distribution and q the one that x was drawn from, and draw a rejected one anew
from what is left of p. Where a draft is certain (q(x) = 1) their rule and this one accept it with probability p(x). A
draft model here draws with the random numbers of the target's sampler, so that similar distributions choose the same
token: acceptance is somewhat below theirs, 1 for equal models, and in exchange no output depends on the drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from pyllm.engine.request import Completion
from pyllm.engine.sampler import RowState
from pyllm.engine.scheduler import Scheduler, Work
from pyllm.engine.sequence import Sequence

MAX_DRAFTS = 32
NGRAM_DRAFTS, MODEL_DRAFTS = 7, 4  # of a step, unless the user says how many
MAX_REST = 32  # steps without drafts after many that accepted nothing
# Looked for in this order. On stories of a small trained model a fourth token found nothing more, and a single one gave
# a tenth more tokens a step for twice the drafts.
NGRAM_SIZES = (3, 2)


def drafts_per_step(speculative: str | None, draft_model: object | None, number: int | None) -> int:
    """How many tokens to guess for a sequence in a step, 0 for none; `ValueError` where the options make no sense."""
    if speculative not in (None, "ngram"):
        raise ValueError(f"speculative: expected 'ngram' or None, got {speculative!r}; a draft model is draft_model's")
    if speculative is not None and draft_model is not None:
        raise ValueError("speculative, draft_model: expected one source of drafts, got both: give one of them alone")
    off = speculative is None and draft_model is None
    if number is None:
        return 0 if off else MODEL_DRAFTS if draft_model is not None else NGRAM_DRAFTS
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_DRAFTS:
        raise ValueError(f"num_speculative_tokens: expected an integer from 1 to {MAX_DRAFTS}, got {number!r}")
    if off:
        raise ValueError(f"num_speculative_tokens: {number} tokens need a source: give speculative or draft_model too")
    return number


@dataclass(frozen=True)
class Prospect:
    """A sequence whose continuation is wanted: at most `most` tokens behind all that it has.

    `sampling` is how its next token will be chosen; not to be changed (`fork` it).
    """

    sequence: Sequence
    sampling: RowState
    most: int


class Proposer(Protocol):
    """Where drafts come from. A proposal may be anything: it decides how fast the output comes, never what it is."""

    def propose(self, prospects: Seq[Prospect]) -> list[list[int]]:
        """Drafts for each of them, none where there is nothing to guess."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended; it may be one that was never asked for."""

    def clear(self) -> None:
        """All have ended, and a step may have failed halfway."""


@dataclass
class _Pace:
    """How drafting went for a sequence: what nothing comes of is tried more and more seldom, and with fewer drafts."""

    failures: int = 0  # drafted steps in a row that accepted nothing
    rest: int = 0  # steps until the next try
    length: int | None = None  # of the sequence when the last step drafted for it

    def ready(self, length: int) -> bool:
        """Whether to draft for the sequence, which has `length` tokens now; called once a step."""
        if self.length is not None:
            accepted = length - self.length > 1
            self.failures = 0 if accepted else self.failures + 1
            self.rest = 0 if self.failures < 2 else min(2**self.failures, MAX_REST)
            self.length = None
        if self.rest:
            self.rest -= 1
            return False
        return True


class Speculation:
    """Puts drafts behind the works of a plan, at most `tokens` each and `max_rows` of the step with the last tokens."""

    def __init__(self, proposer: Proposer, tokens: int, max_rows: int) -> None:
        self.proposer = proposer
        self.tokens = tokens
        self.max_rows = max_rows
        self._paces: dict[Sequence, _Pace] = {}

    def extend(
        self, plan: list[Work], completions: Mapping[Sequence, Completion], scheduler: Scheduler, vocabulary: int
    ) -> list[Work]:
        """The plan with drafts behind the works of sequences that decode, as many as the step and memory hold."""
        turns = []
        for sequence in (work.sequence for work in plan if work.last and work.count == 1):
            if not sequence.draftable:
                continue
            pace = self._paces.setdefault(sequence, _Pace())
            if pace.ready(len(sequence.tokens)):
                turns.append((sequence, pace))
        if not turns:
            return plan
        rows = self.max_rows - sum(work.last for work in plan)
        rows = min(rows, scheduler.max_tokens - sum(work.count for work in plan))
        share = max(1, rows // len(turns))  # where there are too few for all, those that succeed come first
        prospects = []
        for sequence, pace in sorted(turns, key=lambda turn: turn[1].failures):
            # The token chosen behind the last draft is the limit's at most.
            room = min(share, rows, sequence.limit - len(sequence.tokens) - 1)
            most = min(room, max(1, self.tokens >> pace.failures))
            if most > 0:
                prospects.append(Prospect(sequence, completions[sequence].sampling, most))
                rows -= most
        if not prospects:
            return plan
        found = {
            prospect.sequence: _known(drafts[: prospect.most], vocabulary)
            for prospect, drafts in zip(prospects, self.proposer.propose(prospects), strict=True)
        }
        return [self._with_drafts(work, found.get(work.sequence, ()), scheduler) for work in plan]

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._paces.pop(sequence, None)
        self.proposer.forget(sequence)

    def clear(self) -> None:
        """All have ended."""
        self._paces.clear()
        self.proposer.clear()

    def _with_drafts(self, work: Work, drafts: Seq[int], scheduler: Scheduler) -> Work:
        if drafts:
            work = scheduler.with_drafts(work, drafts)
        if work.drafts:
            self._paces[work.sequence].length = len(work.sequence.tokens)
        return work


def _known(drafts: Seq[int], vocabulary: int) -> Seq[int]:
    """Until the first that is no token of the model."""
    bad = next((i for i, token in enumerate(drafts) if not 0 <= token < vocabulary), None)
    return drafts[:bad]


class NgramProposer:
    """Prompt lookup (Saxena 2023, prompt-lookup-decoding): what followed the sequence's last tokens before.

    The longest of the last `sizes` tokens that stand in the sequence already are looked up, and the tokens behind their
    latest occurrence are the drafts; where these run into the end they go on from its beginning, as a loop does.
    """

    def __init__(self, sizes: Seq[int] = NGRAM_SIZES) -> None:
        self.sizes = tuple(sorted(sizes, reverse=True))
        self._indexes: dict[Sequence, _NgramIndex] = {}

    def propose(self, prospects: Seq[Prospect]) -> list[list[int]]:
        """Drafts for each, as long as asked for, or none where its last tokens are new."""
        return [self._continuation(p.sequence, p.most) for p in prospects]

    def forget(self, sequence: Sequence) -> None:
        """Drop its index."""
        self._indexes.pop(sequence, None)

    def clear(self) -> None:
        """Drop all."""
        self._indexes.clear()

    def _continuation(self, sequence: Sequence, most: int) -> list[int]:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _NgramIndex(self.sizes)
        tokens = sequence.tokens
        start = index.find(tokens)
        if start is None:
            return []
        drafts = tokens[start : start + most]
        period = len(tokens) - start
        while len(drafts) < most:
            drafts.append(drafts[len(drafts) - period])
        return drafts


class _NgramIndex:
    """For each n-gram of a growing list of tokens, the place behind its latest occurrence that something follows."""

    def __init__(self, sizes: Seq[int]) -> None:
        self._behind: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._known = 1  # places up to it are indexed; nothing stands before the first token

    def find(self, tokens: Seq[int]) -> int | None:
        """Where the longest n-gram at the end of `tokens`, which only grow from call to call, went on before."""
        for size, behind in self._behind.items():
            for place in range(max(self._known, size), len(tokens)):
                behind[tuple(tokens[place - size : place])] = place
        self._known = max(self._known, len(tokens))
        for size, behind in self._behind.items():
            found = behind.get(tuple(tokens[-size:]))
            if found is not None:
                return found
        return None
