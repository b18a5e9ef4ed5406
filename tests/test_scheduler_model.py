"""The scheduler and the block pool against simple models of what they promise, in random order of everything."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyllm.cache import BLOCK_TOKENS, BlockPool, blocks_for
from pyllm.engine.scheduler import Scheduler
from pyllm.engine.sequence import Sequence

SALTS = (b"", b"a" * 16, b"b" * 16)


class SchedulerMachine(RuleBasedStateMachine):
    """The model: which tokens every block was last written with, and in whose name (salt).

    Whatever order things happen in, a sequence only ever reads blocks that hold its own tokens, written under its own
    salt; steps keep to their budget; arrival decides who gives way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(BlockPool(1), 1, 1, True)
        self.live: list[Sequence] = []  # by arrival
        self.written: dict[tuple[int, int], tuple[bytes, list[int]]] = {}  # (block, place) -> salt, tokens up to it
        self.token = 0

    @initialize(blocks=st.integers(4, 10), sequences=st.integers(1, 4), tokens=st.sampled_from([1, 7, 40, 300]))
    def begin(self, blocks: int, sequences: int, tokens: int) -> None:
        self.scheduler = Scheduler(BlockPool(blocks), sequences, tokens, True)

    @rule(
        length=st.integers(1, 3 * BLOCK_TOKENS),
        more=st.integers(0, BLOCK_TOKENS),
        kind=st.integers(0, 1),
        salt=st.sampled_from(SALTS),
        copies=st.integers(1, 2),
    )
    def add(self, length: int, more: int, kind: int, salt: bytes, copies: int) -> None:
        for _ in range(copies):
            sequence = Sequence([kind] * length, more, True, salt)
            if blocks_for(sequence.limit) <= self.scheduler.pool.size:
                self.scheduler.add(sequence)
                self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def cancel(self, index: int) -> None:
        sequence = self.live.pop(index % len(self.live))
        self.scheduler.remove(sequence)
        assert not sequence.blocks

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        assert bool(plan) == bool(self.live)
        assert sum(work.count for work in plan) <= self.scheduler.max_tokens
        assert len(plan) <= self.scheduler.max_sequences
        for work in plan:  # as the kernels do: first all writes of a step, then its reads
            sequence = work.sequence
            assert work.start == sequence.computed or work.count == 1
            for place in range(work.start, work.start + work.count):
                at = int(sequence.table[place // BLOCK_TOKENS]), place % BLOCK_TOKENS
                self.written[at] = sequence.salt, sequence.tokens[: place + 1]
        for work in plan:
            sequence = work.sequence
            for place in range(work.start + work.count):
                at = int(sequence.table[place // BLOCK_TOKENS]), place % BLOCK_TOKENS
                assert self.written[at] == (sequence.salt, sequence.tokens[: place + 1])
        self.scheduler.advance(plan)
        for work in list(plan):
            sequence = work.sequence
            if work.last:
                self.token += 1
                sequence.tokens.append(2 + self.token % 3)
            if sequence.computed >= sequence.prompt_length and len(sequence.tokens) >= sequence.limit:
                self.scheduler.remove(sequence)
                self.live.remove(sequence)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        held = {block for sequence in self.live for block in sequence.blocks}
        assert pool.free == pool.size - len(held)
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)

    @invariant()
    def running_ones_came_first(self) -> None:
        order = [*self.scheduler.running, *self.scheduler.waiting]
        assert order == self.live

    def teardown(self) -> None:
        """Everything finishes, and then everything is free."""
        for _ in range(20000):
            if not self.live:
                break
            self._step()
        assert not self.live and self.scheduler.pool.free == self.scheduler.pool.size


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
