"""Drafts from a smaller model of the same vocabulary, which continues each sequence as its target would sample it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from pyllm.cache import BlockPool
from pyllm.engine.runner import Runner
from pyllm.engine.sampler import RowState
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence
from pyllm.engine.speculative import Prospect
from pyllm.ops import F32
from pyllm.sampling import sample_inputs


class DraftModel:
    """A `Proposer` with a model, cache and blocks of its own.

    For each sequence it keeps a copy with the draft model's keys and values. A copy first takes in what its sequence
    got since it was last asked for (rejected drafts are overwritten), at most a step's tokens for all of them together;
    those that then stand at the end of their sequence are continued, all in the same steps.
    """

    def __init__(self, runner: Runner, blocks: int, max_length: int, share_prefixes: bool) -> None:
        self.runner = runner
        self.pool = BlockPool(blocks)
        self.max_length = max_length  # the draft model's context; longer sequences get no drafts
        self.share_prefixes = share_prefixes
        self._copies: dict[Sequence, _Copy] = {}

    def propose(self, prospects: Seq[Prospect]) -> list[list[int]]:
        """Drafts for each, fewer than asked for where context or memory end."""
        drafts: dict[Sequence, list[int]] = {p.sequence: [] for p in prospects}
        plan, turns = self._catch_up(prospects, drafts)
        if not plan:
            return list(drafts.values())
        logits, drawn = self._ends(plan, [turn.sampling for turn in turns])
        while turns := self._choose(turns, logits, drawn):
            works = [turn.copy.work(1, last=True) for turn in turns]
            logits, drawn = self.runner.decode(works, [turn.sampling for turn in turns])
            for turn in turns:
                turn.copy.sequence.computed += 1
        return list(drafts.values())

    def forget(self, sequence: Sequence) -> None:
        """Free what its copy held."""
        copy = self._copies.pop(sequence, None)
        if copy is not None:
            copy.sequence.leave(self.pool)

    def clear(self) -> None:
        """Forget all sequences and all blocks."""
        self.runner.ops.stop()
        self._copies.clear()
        self.pool = BlockPool(self.pool.size)

    def _catch_up(self, prospects: Seq[Prospect], drafts: dict[Sequence, list[int]]) -> tuple[list[Work], list[_Turn]]:
        """Work that brings the copies up to date, and the turns of those that it brings to the end, in its order."""
        wanted = {p.sequence for p in prospects}
        budget = self.runner.max_tokens
        plan, turns = [], []
        for prospect in prospects:
            sequence = prospect.sequence
            most = min(prospect.most, self.max_length - len(sequence.tokens) + 1)  # the last draft is not computed
            if most <= 0:
                self.forget(sequence)
                continue
            copy = self._copy_of(sequence)
            count = min(len(sequence.tokens) - copy.sequence.computed, budget)
            if count == 0 or not self._reserve(copy, copy.sequence.computed + count, wanted):
                continue
            work = copy.work(count, last=copy.sequence.computed + count == len(sequence.tokens))
            if self.share_prefixes:
                copy.sequence.publish(self.pool, work.start + count)
            copy.sequence.computed += count
            budget -= count
            plan.append(work)
            if work.last:
                turns.append(_Turn(copy, prospect.sampling.fork(), most, drafts[sequence]))
        return plan, turns

    def _ends(self, plan: list[Work], states: list[RowState]) -> tuple[F32, list[int] | None]:
        """Logits at the end of each work that reaches the end of its sequence, and what was drawn, as of a decode."""
        if len(plan) > len(states) or sum(work.count for work in plan) > self.runner.max_rows:
            return self.runner.last_logits(plan, self.runner.forward(plan)), None
        logits, drawn = self.runner.decode(plan, states)
        if len(logits) > len(plan):
            ends = np.cumsum([work.count for work in plan]) - 1
            return logits[ends], drawn if drawn is None else [drawn[end] for end in ends]
        return logits, drawn

    def _choose(self, turns: list[_Turn], logits: F32, drawn: list[int] | None) -> list[_Turn]:
        """A draft for each turn; those that go on, with room for their draft in the cache."""
        if not turns:
            return []
        if drawn is None:
            forbidden = [turn.sampling.forbidden() for turn in turns]
            inputs = sample_inputs([turn.sampling for turn in turns], forbidden if any(forbidden) else None)
            drawn = self.runner.ops.sample(logits, inputs).tolist()
        going = []
        for turn, token in zip(turns, drawn, strict=True):
            if token < 0:  # nothing to choose from, or no numbers: for the target to say
                continue
            turn.drafts.append(token)
            sequence = turn.copy.sequence
            if len(turn.drafts) < turn.most and sequence.reserve(self.pool, len(sequence.tokens) + 1):
                sequence.tokens.append(token)
                turn.sampling.append(token)
                going.append(turn)
        return going

    def _copy_of(self, sequence: Sequence) -> _Copy:
        copy = self._copies.get(sequence)
        if copy is None:
            copy = self._copies[sequence] = _Copy(sequence, self.share_prefixes)
            copy.sequence.adopt_prefix(self.pool)
        copy.follow(sequence)
        return copy

    def _reserve(self, copy: _Copy, tokens: int, wanted: set[Sequence]) -> bool:
        """Blocks for so many tokens of a copy, if need be those of sequences whose drafts are not `wanted` now."""
        if copy.sequence.reserve(self.pool, tokens):
            return True
        for other in self._copies.keys() - wanted:
            self.forget(other)
        return copy.sequence.reserve(self.pool, tokens)


class _Copy:
    """What the draft model has of a sequence: its tokens, then drafts that were computed too."""

    def __init__(self, target: Sequence, share_prefix: bool) -> None:
        prompt = target.tokens[: target.prompt_length]
        self.sequence = Sequence(prompt, target.limit - target.prompt_length, share_prefix, target.salt)
        self.sequence.tokens = target.tokens.copy()
        self.known = len(target.tokens)  # of these; what stands behind them is drafts

    def follow(self, target: Sequence) -> None:
        """Take in what the target chose; what was computed stays as far as the drafts were right."""
        mine, tokens = self.sequence.tokens, target.tokens
        agreed = self.known
        while agreed < min(len(mine), len(tokens)) and mine[agreed] == tokens[agreed]:
            agreed += 1
        mine[self.known :] = tokens[self.known :]
        self.known = len(tokens)
        self.sequence.computed = min(self.sequence.computed, agreed, len(tokens) - 1)

    def work(self, count: int, last: bool) -> Work:
        """The next `count` tokens."""
        return Work(self.sequence, self.sequence.computed, count, last)


@dataclass
class _Turn:
    """A copy being continued: `most` drafts at most, chosen by `sampling`."""

    copy: _Copy
    sampling: RowState
    most: int
    drafts: list[int] = field(default_factory=list)
