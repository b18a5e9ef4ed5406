"""A replay checks the values that say where memory is read or written, as the calls do, before it runs anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllm.ops import Ops
from pyllm.sampling import GREEDY_ROW, SampleInputs, SamplingParams, SamplingState, sample_inputs

E, BLOCKS = 16, 3


def recorded(name: str, ops: Ops) -> tuple[dict[str, NDArray[np.generic]], Callable[[], object]]:
    """The arrays whose values decide addresses, and the call that reads them."""
    rng = np.random.default_rng(0)
    zeros = np.zeros(2, np.int32)
    x = rng.normal(size=(4, E)).astype(np.float32)
    cache = np.zeros((BLOCKS, 1, 2, 64 * E), np.float32)
    if name == "embedding":
        arrays: dict[str, NDArray[np.generic]] = {"tokens": zeros.copy(), "positions": zeros.copy()}
        return arrays, lambda: ops.embedding(arrays["tokens"], x, arrays["positions"], x)
    if name == "packed embedding":
        arrays, table = {"tokens": zeros.copy()}, ops.pack(x)
        return arrays, lambda: ops.embedding(arrays["tokens"], table)
    if name == "gather":
        arrays = {"index": zeros.copy()}
        return arrays, lambda: ops.gather(x, arrays["index"])
    if name == "rope_angles":
        arrays = {"positions": zeros.copy(), "table": zeros.copy()}
        return arrays, lambda: ops.rope_angles(arrays["positions"], x, arrays["table"])
    if name == "kv_write":
        arrays = {"slots": np.zeros(2, np.int64)}
        return arrays, lambda: ops.kv_write(cache, x[:2], x[:2], arrays["slots"], E)
    if name == "logprobs":
        arrays = {"ids": zeros.copy()}
        return arrays, lambda: ops.logprobs(x[:2], arrays["ids"])
    arrays = {
        "starts": np.arange(3, dtype=np.int32),
        "lengths": np.ones(2, np.int32),
        "tables": np.zeros((2, 2), np.int32),
    }
    return arrays, lambda: ops.attention(
        x[:2], cache, arrays["starts"], arrays["lengths"], arrays["tables"], head_size=E, scale=1.0
    )


@pytest.mark.parametrize(
    ("name", "array", "value"),
    [
        ("embedding", "tokens", 4),
        ("embedding", "tokens", -1),
        ("embedding", "positions", 1 << 30),
        ("packed embedding", "tokens", 4),
        ("gather", "index", 1 << 30),
        ("rope_angles", "positions", -1),
        ("rope_angles", "table", 4),
        ("kv_write", "slots", 1 << 40),
        ("logprobs", "ids", E),
        ("attention", "starts", 1),
        ("attention", "lengths", 129),
        ("attention", "tables", BLOCKS),
    ],
)
def test_a_replay_refuses_what_the_call_refuses(name: str, array: str, value: int) -> None:
    ops = Ops(threads=1)
    arrays, call = recorded(name, ops)
    before, after = np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros((1, 4), np.float32)
    index = np.ones(1, np.int32)
    ops.begin_recording()
    ops.context.gather(after, before, index)
    call()
    graph = ops.end_recording()
    ops.replay(graph)
    assert np.array_equal(after[0], before[1])

    after[:] = 0
    good = arrays[array].copy()
    arrays[array].flat[0] = value
    with pytest.raises(ValueError) as eager:
        call()
    with pytest.raises(ValueError) as replayed:
        ops.replay(graph)
    assert str(replayed.value) == str(eager.value)
    assert array in str(replayed.value)
    assert not after.any(), "nothing is run"

    arrays[array][...] = good
    ops.replay(graph)
    assert np.array_equal(after[0], before[1])


def test_values_that_the_graph_itself_writes_are_checked_too() -> None:
    """Indices that an earlier call of the same graph turns into what is out of bounds."""
    ops = Ops(threads=1)
    index = np.zeros(4, np.int32)
    x, far = np.ones((2, 4), np.float32), np.full((1, 4), 1 << 30, np.int32).view(np.float32)
    ops.begin_recording()
    ops.context.gather(index.view(np.float32).reshape(1, 4), far, np.zeros(1, np.int32))
    ops.gather(x, index)
    graph = ops.end_recording()
    with pytest.raises(ValueError, match="index"):
        ops.replay(graph)


def test_a_recorded_draw_is_that_of_its_rows_at_each_replay() -> None:
    """Rows are read and checked anew; lists beside them change their length, so they cannot be recorded."""
    ops, rows = Ops(threads=2), np.repeat(GREEDY_ROW, 3)
    logits = np.random.default_rng(0).normal(0, 2, (3, 100)).astype(np.float32)
    state = SamplingState(SamplingParams(top_k=50, logit_bias={1: 1.0}), [], seed=5)
    ops.begin_recording()
    drawn = ops.sample(logits, SampleInputs(rows))
    with pytest.raises(ValueError, match="cannot be recorded"):
        ops.sample(logits[:1], sample_inputs([state]))
    graph = ops.end_recording()

    ops.replay(graph)
    assert np.array_equal(drawn, logits.argmax(1))
    seen = set()
    for position in range(20):
        state.position = position
        rows[:] = state.row
        ops.replay(graph)
        assert np.array_equal(drawn, ops.sample(logits, SampleInputs(rows)))
        seen.add(tuple(drawn))
    assert len(seen) > 1

    rows["top_p"][1] = 2
    with pytest.raises(ValueError, match="top_p of row 1"):
        ops.replay(graph)
