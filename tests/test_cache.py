"""Bookkeeping of cache blocks."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.cache import BLOCK_TOKENS, BlockPool, KVCache, blocks_for, chain_hash
from pyllm.models import read_spec

GOLDEN = Path(__file__).resolve().parent / "golden"


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]


def test_block_bytes() -> None:
    spec = read_spec(GOLDEN / "llama")
    layers = [b.attention for b in spec.blocks]
    tokens = sum(2 * BLOCK_TOKENS * a.kv_heads for a in layers)
    padded = -(-layers[0].head_dim // 16) * 16
    for dtype, each in (("float32", 4 * padded), ("bfloat16", 2 * padded), ("int8", padded + 2)):
        assert KVCache.block_bytes(spec, dtype) == tokens * each
        assert sum(a.nbytes for a in KVCache(spec, 3, dtype).layers) == 3 * tokens * each


def test_chain_hash_depends_on_tokens_and_on_all_before() -> None:
    a, b = list(range(BLOCK_TOKENS)), list(range(1, BLOCK_TOKENS + 1))
    first = chain_hash(b"", a)
    assert first == chain_hash(b"", list(a))
    assert len({first, chain_hash(b"", b), chain_hash(first, a), chain_hash(chain_hash(b"", b), a)}) == 4


def test_freed_block_is_found_until_its_number_is_handed_out_again() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.publish(block, b"key")
    pool.give_back([block])
    assert pool.find([b"key", b"other"]) == [block]
    pool.give_back([block])
    assert {pool.take(), pool.take()} == {0, 1}
    assert pool.find([b"key"]) == []
    pool.check()


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, plain = pool.take(), pool.take()
    pool.publish(cached, b"key")
    pool.give_back([cached])
    pool.give_back([plain])
    assert [pool.take(), pool.take()] == [plain, 2]
    assert pool.find([b"key"]) == [cached]


def test_the_block_behind_the_last_one_is_taken_if_nothing_can_be_found_in_it() -> None:
    pool = BlockPool(6)
    first = pool.take()
    other = pool.take()
    assert pool.take(after=other) == 2
    pool.give_back([other])
    assert pool.take(after=2) == 3  # not the one that was freed last
    assert pool.take(after=first) == other
    pool.publish(3, b"key")
    pool.give_back([3])
    assert pool.take(after=2) == 4  # 3 may be found again
    assert pool.find([b"key"]) == [3]
    assert pool.take(after=5) == 5  # there is none behind the last
    pool.check()


def test_shared_block_is_free_only_when_all_let_go() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.publish(block, b"key")
    assert pool.find([b"key"]) == [block]
    pool.give_back([block])
    assert pool.free == 0
    pool.give_back([block])
    assert pool.free == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "back", "publish", "find"]), st.integers(0, 7)), max_size=60))
def test_invariants_hold_whatever_is_done(actions: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(5), []
    for action, n in actions:
        if action == "take" and pool.free:
            held.append(pool.take(after=n - 2))
        elif action == "back" and held:
            pool.give_back([held.pop(n % len(held))])
        elif action == "publish" and held:
            pool.publish(held[n % len(held)], b"%d" % n)
        elif action == "find":
            held += pool.find([b"%d" % n])
        pool.check()
        assert pool.free == 5 - len(set(held))
