"""Which tokens the next step computes: continuous batching with chunked prefill. Bookkeeping only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from pyllm.cache import BLOCK_TOKENS, BlockPool
from pyllm.engine.sequence import Sequence


@dataclass(slots=True)  # frozen, it would take three times as long to make
class Work:
    """Tokens [start, start + count) of a sequence; with `last` they reach its end, and the next one is to be chosen.

    `drafts` are guesses of what follows that end: the step computes them too, so that they can be checked.
    """

    sequence: Sequence
    start: int
    count: int
    last: bool
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the step that it takes."""
        return self.count + len(self.drafts)


class Scheduler:
    """Running sequences come first, oldest first; what is left of a step's token budget admits waiting ones in order.
    A bidirectional prefix is not cut: its sequence waits for a step that has room for all of it.

    When blocks run out the youngest running sequence gives its blocks back and waits again; it is recomputed later, to
    the same bits. A sequence that has a source is admitted once `source_pool` has blocks for it.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_sequences: int,
        max_tokens: int,
        share_prefixes: bool,
        source_pool: BlockPool | None = None,
    ) -> None:
        self.pool = pool
        self.source_pool = source_pool
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.share_prefixes = share_prefixes
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens looked for in the prefix cache, and found
        self._plan: list[Work] = []
        self._repeats = 0  # further steps for which the plan stays as it is, one token on

    @property
    def repeats(self) -> int:
        """Further steps for which the last plan stays as it is, as long as nothing ends or is added."""
        return self._repeats

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._repeats = 0
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks; unknown ones are ignored."""
        self._repeats = 0
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.leave(self.pool)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def replace(self, old: Seq[Sequence], new: Seq[Sequence]) -> None:
        """The sequences of a search go on as `new`, in their place; old ones that are not among these are removed."""
        self._repeats = 0
        place = next((i for i, sequence in enumerate(self.running) if sequence in old), 0)
        for sequence in old:
            if sequence not in new:
                self.remove(sequence)
        for sequence in new:
            if sequence in old:
                continue
            if sequence.blocks:
                self.running.insert(place, sequence)
            else:
                self.waiting.appendleft(sequence)

    def clear(self) -> None:
        """Forget all sequences and what the blocks hold."""
        self.pool = BlockPool(self.pool.size)
        if self.source_pool is not None:
            self.source_pool = BlockPool(self.source_pool.size)
        self._repeats = 0
        self.running.clear()
        self.waiting.clear()

    def schedule(self) -> list[Work]:
        """The work of the next step; `advance` tells when it is done. Empty when nothing is queued.

        Where every sequence goes on with the one token that it got since, in the blocks that it has, it is the list of
        the last step again, with its works moved on; in all other cases a new list.
        """
        if self._repeats:
            self._repeats -= 1
            for work in self._plan:
                work.start += 1
            return self._plan
        budget = self.max_tokens
        plan: list[Work] = []
        index, preempted = 0, self.preemptions
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count == 0:  # a beam that waits for the others of its search
                index += 1
                continue
            while not sequence.reserve(self.pool, sequence.computed + count):
                self._preempt()
                if len(self.running) <= index:
                    break
            else:
                plan.append(self._work(sequence, count))
                budget -= count
                index += 1
        # Who was just put back must not take at once the blocks that others were short of.
        room = self.preemptions == preempted
        seats = self.max_sequences - sum(sequence.seats for sequence in self.running)
        while room and self.waiting and budget > 0 and self.waiting[0].seats <= seats:
            sequence = self.waiting[0]
            sequence.adopt_prefix(self.pool)
            count = min(len(sequence.tokens) - sequence.computed, budget)
            whole = sequence.computed + count >= sequence.prefix
            if not whole or not self.reserve(sequence, sequence.computed + count):
                sequence.leave(self.pool)
                break
            self.running.append(self.waiting.popleft())
            seats -= sequence.seats
            self.prefix_queries += len(sequence.tokens) if sequence.share_prefix else 0
            self.prefix_hits += sequence.computed
            plan.append(self._work(sequence, count))
            budget -= count
        assert plan or not (self.running or self.waiting), "the cache must hold at least one sequence of full length"
        self._plan = plan
        left_out = self.waiting or len(plan) < len(self.running)
        self._repeats = 0 if left_out else min((_repeats(work) for work in plan), default=0)
        return plan

    def with_drafts(self, work: Work, drafts: Seq[int]) -> Work:
        """The work with as many of these drafts as free blocks hold: nobody is put back for a guess."""
        sequence = work.sequence
        assert work.last and not work.drafts
        self._repeats = 0
        room = (len(sequence.blocks) + self.pool.free) * BLOCK_TOKENS - len(sequence.tokens)
        drafts = tuple(drafts[:room])
        reserved = sequence.reserve(self.pool, len(sequence.tokens) + len(drafts))
        assert reserved
        return replace(work, drafts=drafts)

    def advance(self, plan: list[Work]) -> None:
        """The step is done: its keys and values are in the cache."""
        for work in plan:
            work.sequence.computed = work.start + work.count

    def settle(self, plan: list[Work]) -> None:
        """Drafts were checked: those accepted are tokens of their sequences now, the others leave nothing behind."""
        for work in plan:
            if work.drafts and work.sequence.blocks:  # it has not ended
                work.sequence.settle(self.pool)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Hold blocks for so many tokens of a sequence, and for its source; False where there are too few."""
        if not sequence.reserve(self.pool, tokens):
            return False
        return sequence.source is None or (self.source_pool is not None and sequence.source.reserve(self.source_pool))

    def _work(self, sequence: Sequence, count: int) -> Work:
        # Published before it is computed: whoever finds the block in this very step reads it after this step's writes.
        end = sequence.computed + count
        if self.share_prefixes:
            sequence.publish(self.pool, end)
        return Work(sequence, sequence.computed, count, end == len(sequence.tokens) < sequence.limit)

    def _preempt(self) -> None:
        sequence = self.running.pop()
        sequence.leave(self.pool)
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def _repeats(work: Work) -> int:
    """Steps after this one that take one token each, before its sequence fills a block, begins one or ends."""
    if not work.last or work.count > 1:
        return 0
    return max(0, min(BLOCK_TOKENS - 2 - work.start % BLOCK_TOKENS, work.sequence.limit - 2 - work.start))
