"""Continuous batching and chunked prefill, without a model."""

import random

import pytest

from pyllm.cache import BLOCK_TOKENS, BlockPool, blocks_for
from pyllm.engine.scheduler import Scheduler, Work
from pyllm.engine.sequence import Sequence


def scheduler(blocks: int = 64, max_sequences: int = 8, max_tokens: int = 32, share: bool = True) -> Scheduler:
    return Scheduler(BlockPool(blocks), max_sequences, max_tokens, share)


def run(s: Scheduler, steps: int = 10_000) -> int:
    """Step until all sequences reached their limit, checking every plan; the number of steps."""
    for step in range(steps):
        plan = s.schedule()
        if not plan:
            return step
        assert sum(w.count for w in plan) <= s.max_tokens and len(plan) <= s.max_sequences
        assert len({w.sequence for w in plan}) == len(plan)
        for w in plan:
            assert w.count > 0 and w.start == w.sequence.computed
            assert blocks_for(w.start + w.count) <= len(w.sequence.blocks)
            assert list(w.sequence.table[: len(w.sequence.blocks)]) == w.sequence.blocks
        s.pool.check()
        s.advance(plan)
        for w in plan:
            if w.last:
                w.sequence.tokens.append(step % 50)
            if len(w.sequence.tokens) >= w.sequence.limit:
                s.remove(w.sequence)
    raise AssertionError("never ends")


def test_prompts_share_a_step_and_long_ones_are_chunked() -> None:
    s = scheduler(max_tokens=32)
    long, short = Sequence(range(50), 2, True), Sequence(range(100, 110), 2, True)
    s.add(long)
    s.add(short)
    first = s.schedule()
    assert [(w.sequence, w.start, w.count, w.last) for w in first] == [(long, 0, 32, False)]
    s.advance(first)
    second = s.schedule()
    assert [(w.sequence, w.start, w.count, w.last) for w in second] == [(long, 32, 18, True), (short, 0, 10, True)]


def test_equal_prefix_is_computed_once_even_within_a_step() -> None:
    s = scheduler(max_tokens=1000)
    prompt = list(range(2 * BLOCK_TOKENS + 5))
    a, b = Sequence(prompt, 1, True), Sequence(prompt, 1, True)
    s.add(a)
    s.add(b)
    plan = s.schedule()
    assert [(w.start, w.count) for w in plan] == [(0, len(prompt)), (2 * BLOCK_TOKENS, 5)]
    assert a.blocks[:2] == b.blocks[:2] and a.blocks[2] != b.blocks[2]


def test_a_prefix_as_long_as_a_block_is_not_taken_for_one() -> None:
    """The second block of a text that says the same twice is not the first one behind such a prefix."""
    s = scheduler(max_tokens=4 * BLOCK_TOKENS)
    block = list(range(BLOCK_TOKENS))
    s.add(Sequence([*block, *block, 1], 1, True))
    s.schedule()
    other = Sequence([*block, 1], 1, True, prefix=BLOCK_TOKENS)
    other.adopt_prefix(s.pool)
    assert other.computed == 0


def test_last_prompt_token_is_always_computed() -> None:
    s = scheduler(max_tokens=1000)
    prompt = list(range(BLOCK_TOKENS))
    for _ in range(2):
        sequence = Sequence(prompt, 1, True)
        s.add(sequence)
        [work] = s.schedule()
        assert work.last and work.start < len(prompt)
        s.advance([work])
        s.remove(sequence)


def test_prefix_is_not_shared_where_that_is_off() -> None:
    s = scheduler(max_tokens=1000, share=False)
    for _ in range(2):
        s.add(Sequence(range(BLOCK_TOKENS * 2), 1, False))
    assert [w.start for w in s.schedule()] == [0, 0]


def test_youngest_gives_way_when_blocks_run_out_and_all_finish() -> None:
    s = scheduler(blocks=4, max_tokens=64)
    old, young = Sequence(range(60), 120, True), Sequence(range(500, 560), 120, True)
    s.add(old)
    s.add(young)
    run(s)
    assert s.preemptions > 0
    assert old.generated == young.generated == 120
    assert s.pool.free == 4


def test_a_plan_repeats_until_a_block_ends_or_the_limit_or_anything_changes() -> None:
    s = scheduler()
    a, b = Sequence(range(5), 2 * BLOCK_TOKENS, True), Sequence(range(100, 103), 20, True)
    s.add(a)
    before: list[Work] = []

    def repeated() -> bool:
        nonlocal before
        plan = s.schedule()
        s.advance(plan)
        for work in plan:
            assert work.start + work.count == len(work.sequence.tokens) == work.sequence.computed
            work.sequence.tokens.append(1)
        same, before = plan is before, plan
        return same

    assert [repeated() for _ in range(4)] == [False, False, True, True]  # the prompt, then one token a step
    s.add(b)
    assert [repeated() for _ in range(4)] == [False, False, True, True]
    s.remove(b)
    assert [repeated() for _ in range(2)] == [False, True]
    while len(a.tokens) < BLOCK_TOKENS:
        assert repeated()
    assert [repeated() for _ in range(3)] == [False, False, True]  # a block is full, and one begins
    while len(a.tokens) < 2 * BLOCK_TOKENS:
        assert repeated()
    assert [repeated() for _ in range(3)] == [False, False, True]
    while len(a.tokens) < a.limit:
        assert repeated()
    assert not repeated()


@pytest.mark.parametrize("seed", range(30))
def test_random_loads_finish_and_free_everything(seed: int) -> None:
    rng = random.Random(seed)
    s = scheduler(blocks=rng.randint(5, 20), max_sequences=rng.randint(1, 6), max_tokens=rng.choice([1, 7, 64, 300]))
    most = s.pool.size * BLOCK_TOKENS
    sequences = []
    for _ in range(rng.randint(1, 12)):
        prompt = [rng.randint(0, 1)] * rng.randint(1, min(150, most - 1)) + [rng.randint(0, 5)]
        sequences.append(Sequence(prompt, rng.randint(0, min(120, most - len(prompt))), rng.random() < 0.8))
        s.add(sequences[-1])
    for victim in rng.sample(sequences, len(sequences) // 4):
        s.remove(victim)
        sequences.remove(victim)
    run(s)
    assert all(len(q.tokens) == q.limit for q in sequences)
    assert s.pool.free == s.pool.size
