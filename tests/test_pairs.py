"""Files of pairs: how sources and targets are put together and packed, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from text_to_text import FORM, store_of, taken_apart

from pyllm.errors import ConfigError, DataError
from pyllm.train.pairs import PairedData, PairForm, Pairs
from pyllm.train.token_store import TokenStore


def some_pairs(count: int = 40) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(10, 50, rng.integers(1, 19)).tolist(), rng.integers(10, 50, rng.integers(0, 7)).tolist())
            for _ in range(count)]  # fmt: skip


def test_pairs_are_sources_and_targets() -> None:
    pairs = some_pairs()
    data = PairedData([store_of(pairs)], FORM, context=24, tokens=160)
    shapes, found = set(), []
    while len(found) < 6 * len(pairs):
        batch = data.next_batch()
        shapes.add(tuple(len(array) for array in batch))
        found += taken_apart(batch)
        assert max(np.diff(batch[2]).max(), np.diff(batch[4]).max()) <= 24
    assert all(found.count(pair) >= 4 * pairs.count(pair) for pair in pairs), "each once in an epoch, about"
    assert all(pair in pairs for pair in found)
    [(target, labels, starts, source, bounds)] = shapes
    assert target + source == 160 == labels + data.source_tokens and starts == bounds == data.sequences + 1
    ordered = PairedData([store_of(pairs)], FORM, context=24, tokens=160, shuffle=False)
    assert taken_apart(ordered.next_batch())[0] == pairs[0]


def test_room_is_shared_as_the_weights_say() -> None:
    """Of files with long sources and with long targets."""
    stores = [store_of([([10] * 30, [11] * 2)] * 20), store_of([([10] * 2, [11] * 30)] * 20)]
    for weights, share in (([0.9, 0.1], 0.83), ([0.1, 0.9], 0.17), (None, 0.5)):
        data = PairedData(stores, FORM, context=40, tokens=800, weights=weights)
        assert data.source_tokens == pytest.approx(800 * share, abs=30)


def test_a_start_token_does_not_stand_twice() -> None:
    form = PairForm(start=1, end=2, before=(1,), behind=(2,))
    data = PairedData([store_of([([10, 11], [12, 13])])], form, context=8, tokens=16)
    tokens, labels, _, source, bounds = data.next_batch()
    assert tokens[:3].tolist() == [1, 12, 13] and labels[:3].tolist() == [12, 13, 2]
    assert source[: bounds[1]].tolist() == [1, 10, 11, 2]


def test_pairs_go_on_where_a_run_stopped() -> None:
    def make(seed: int = 3) -> PairedData:
        return PairedData([store_of(some_pairs()), store_of(some_pairs(9))], FORM, context=24, tokens=96, seed=seed)

    data = make()
    for _ in range(5):
        data.next_batch()
    state = json.loads(json.dumps(data.state()))
    expected = [data.next_batch() for _ in range(9)]
    again = make()
    again.load_state(state)
    for batch in expected:
        for found, array in zip(again.next_batch(), batch, strict=True):
            np.testing.assert_array_equal(found, array)
    with pytest.raises(DataError, match="cannot go on with other data"):
        make(4).load_state(state)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([10], [11]), ([], [12])], "document 2 of 2 has an empty source"),
        ([([10] * 7, [11])], "document 1 of 1 has a source of more than the 8 tokens that there is room for, .* has 9"),
        ([([10], [11] * 7)], "document 1 of 1 has a target of more than the 8 tokens that there is room for, .* has 9"),
    ],
)
def test_pairs_that_do_not_fit(pairs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairedData([store_of(pairs)], FORM, context=8, tokens=16)


def test_a_part_of_a_file_names_documents_as_the_file_has_them() -> None:
    pairs = [([10], [11])] * 30 + [([10] * 9, [11])] + [([10], [11])] * 2
    store = store_of(pairs)
    first, rest = store.split(0.5)
    second, last = rest.split(0.3, whole=True)
    assert len(first.ends) + len(second.ends) + len(last.ends) == 33
    with pytest.raises(DataError, match="document 31 of 33 has a source of more than the 8 tokens"):
        Pairs(rest, FORM, context=8)
    assert (second.document(0), last.document(len(last.ends) - 1)) == (
        f"document {len(first.ends) + 1} of 33",
        "document 33 of 33",
    )


def test_pairs_take_little_memory_beside_their_tokens() -> None:
    store = store_of([([10] * 60, [11] * 40)] * 10000)
    tracemalloc.start()
    pairs = Pairs(store, FORM, context=64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(store.tokens)
    assert (pairs.count(), pairs.source_total, pairs.total) == (10000, 620000, 620000 + 420000)


def test_files_that_hold_no_pairs() -> None:
    store = store_of([([10], [11])])
    plain = TokenStore(store.tokens, store.ends, None, True, "key", "texts")
    with pytest.raises(DataError, match="texts: expected pairs for seq2seq"):
        PairedData([plain], FORM, context=8, tokens=16)
    for answers in ([0, 0, 0, 0], [0, 1, 0, 1]):
        mixed = TokenStore(store.tokens, store.ends, np.array(answers, np.uint8), True, "key", "mixed")
        with pytest.raises(DataError, match="document 1 of 1 is no source with one target behind it"):
            PairedData([mixed], FORM, context=8, tokens=16)
    with pytest.raises(ConfigError, match="batch_tokens: expected at least 16, a source and a target"):
        PairedData([store], FORM, context=8, tokens=15)


def test_sources_and_targets_may_have_different_room() -> None:
    longest = store_of([([10] * 6, [11] * 5)])  # 8 tokens with what is around them, and 7
    assert Pairs(longest, FORM, 8, longest_target=7).count() == 1
    with pytest.raises(DataError, match="a target of more than the 6 tokens that there is room for"):
        Pairs(longest, FORM, 8, longest_target=6)
