"""Keys and values written into the paged cache, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.attention import BF16, DTYPES, PAGE, empty, put, quantized
from oracle.harness import ISAS, Framed, at_isa
from oracle.rope import rope

from pyllm.ops import Ops

RNG = np.random.default_rng(3)


def bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(np.uint8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_the_layout(isa: str, dtype: np.dtype) -> None:
    for size in (1, 2, 3, 8, 15, 16, 17, 33, 64, 80, 127, 256):
        for rows, threads in ((0, 1), (1, 2), (5, 1), (40, 1), (40, 2), (100, 3)):
            heads, blocks, half = 2, 3, size // 2
            k = Framed(RNG.normal(size=(rows, heads * size)).astype(np.float32), offset=size % 5)
            v = Framed(RNG.normal(size=(rows, heads * size)).astype(np.float32), gap=1)
            cos, sin = (RNG.normal(size=(rows, half)).astype(np.float32) for _ in range(2))
            slots = RNG.permutation(blocks * PAGE)[:rows].astype(np.int64)
            if threads > 1:  # tokens that follow each other, but for a gap, within blocks and from one to the next
                slots = np.arange(rows, dtype=np.int64) + 13
                slots[rows // 2 :] += 30
            slots[:: 7 if threads == 1 else 23] = -1
            cache = Framed(empty(blocks, heads, size, dtype), offset=0, gap=0)
            with at_isa(isa):
                Ops(threads).kv_write(cache.array, k.array, v.array, slots, size, cos, sin)
            cache.check()
            expected = empty(blocks, heads, size, dtype)
            rotated = rope(k.array.reshape(rows, heads, size), cos, sin)
            for t in np.flatnonzero(slots >= 0):
                put(expected, int(slots[t]), rotated[t], v.array[t].reshape(heads, size))
            assert np.array_equal(bits(cache.array), bits(expected))


@pytest.mark.parametrize("isa", ISAS)
def test_rounds_as_rope_does(isa: str) -> None:
    ops, size, rows = Ops(2), 64, 33
    k, v = (RNG.normal(size=(rows, size)).astype(np.float32) for _ in range(2))
    slots = np.arange(rows, dtype=np.int64)
    inv_freq = (10000.0 ** -(np.arange(24) / 24)).astype(np.float32)[None]
    with at_isa(isa):
        cos, sin = ops.rope_angles(np.arange(100, 100 + rows, dtype=np.int32), inv_freq)
        together, apart = (empty(1, 1, size, DTYPES[0]) for _ in range(2))
        ops.kv_write(together, k, v, slots, size, cos, sin)
        ops.kv_write(apart, ops.rope(k.copy(), cos, sin, size), v, slots, size)
    assert np.array_equal(bits(together), bits(apart))


def test_keeps_special_values() -> None:
    k = np.array([[np.inf, -np.inf, np.nan, 1e-40, 3.3961776e38, -0.0]], np.float32)
    cache = empty(1, 1, 6, BF16)
    Ops(1).kv_write(cache, k, k, np.zeros(1, np.int64), 6)
    with np.errstate(over="ignore"):
        expected = k[0].astype(BF16).astype(np.float32)
    stored = cache[0, 0, 1].reshape(PAGE // 2, 16, 2)[0, :6, 0].astype(np.float32)
    assert np.array_equal(stored, expected, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_says_what_it_cannot_hold(isa: str) -> None:
    """What is not finite gives NaN, what is too small gives 0, and neither touches another head or token."""
    size = 21
    plain = RNG.normal(size=(9, size)).astype(np.float32)
    for place in (0, 7, 15, 16, 20):
        rows = plain.copy()
        rows[0, place], rows[1, place], rows[2, place] = np.inf, -np.inf, np.nan
        rows[3] *= 1e-37
        rows[4] = 0
        rows[5, place] = 3.4e38
        rows[6] *= 1e30
        cache = empty(1, 1, size, np.dtype(np.int8))
        with at_isa(isa):
            Ops(1).kv_write(cache, rows, rows[::-1].copy(), np.arange(9), size)
        for half, given in zip(cache[0, 0], (rows, rows[::-1]), strict=True):
            scales = half[PAGE * 32 :].view(BF16)[:9].astype(np.float32)
            assert np.array_equal(np.isnan(scales), ~np.isfinite(given).all(axis=1))
            assert np.array_equal(scales == 0, np.abs(given).max(axis=1) < 1e-30)
            assert np.array_equal(scales, quantized(given)[1].astype(np.float32), equal_nan=True)


def test_int8_is_within_half_a_step() -> None:
    size, rows = 80, 1000
    k = (RNG.normal(size=(rows, size)) * np.exp(RNG.normal(size=(rows, 1)) * 20)).astype(np.float32)
    integers, scale = quantized(k)
    assert np.abs(integers.astype(int)).max() == 127
    wide = scale.astype(np.float64)[:, None]
    clipped = np.abs(k) > 127.5 * wide
    assert not clipped.any()
    assert (np.abs(integers * wide - k) <= wide * 0.500001).all()


def test_tokens_of_one_pair_on_different_threads() -> None:
    ops, size, rows = Ops(3), 16, PAGE * 4
    k, v = (RNG.normal(size=(rows, size)).astype(np.float32) for _ in range(2))
    slots = np.concatenate([np.arange(0, rows, 2), np.arange(1, rows, 2)]).astype(
        np.int64
    )  # a pair's tokens lie far apart
    expected = empty(4, 1, size, BF16)
    Ops(1).kv_write(expected, k, v, slots, size)
    for _ in range(50):
        cache = empty(4, 1, size, BF16)
        ops.kv_write(cache, k, v, slots, size)
        assert np.array_equal(bits(cache), bits(expected))


def test_refuses_bad_arguments() -> None:
    ops = Ops(1)
    cache = empty(2, 2, 8, DTYPES[0])
    k, slots = np.zeros((3, 16), np.float32), np.arange(3, dtype=np.int64)
    with pytest.raises(ValueError, match=r"slots\[1\]: expected below blocks \* 64 = 128, got 128"):
        ops.kv_write(cache, k, k, np.array([0, 128, 1]), 8)
    with pytest.raises(TypeError, match="slots: expected int64"):
        ops.kv_write(cache, k, k, slots.astype(np.int32), 8)
    with pytest.raises(TypeError, match="cache: expected float32, bfloat16 or int8, got float16"):
        ops.kv_write(cache.astype(np.float16), k, k, slots, 8)
    with pytest.raises(TypeError, match="cache: expected float32"):
        ops.kv_write(cache.astype(np.float64), k, k, slots, 8)
    with pytest.raises(ValueError, match=r"cache: expected \[blocks, kv_heads, 2, 2048\] for head_size 17"):
        ops.kv_write(cache, k, k, slots, 17)
    with pytest.raises(ValueError, match=r"k: expected float32\[any, 16\], got float32\[3, 15\]"):
        ops.kv_write(cache, k[:, 1:], k, slots, 8)
    with pytest.raises(ValueError, match=r"v: expected float32\[3, 16\], got float32\[2, 16\]"):
        ops.kv_write(cache, k, k[1:], slots, 8)
    with pytest.raises(ValueError, match="cos and sin: expected both or neither"):
        ops.kv_write(cache, k, k, slots, 8, np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="C-contiguous"):
        ops.kv_write(cache[:, ::-1], k, k, slots, 8)
    cache.flags.writeable = False
    with pytest.raises(ValueError, match="cache: expected a writable array"):
        ops.kv_write(cache, k, k, slots, 8)
