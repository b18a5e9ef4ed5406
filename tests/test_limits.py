"""The measured limits are plausible, and what is measured is what is stated."""

from __future__ import annotations

import numpy as np
import pytest

from pyllm import _cpu
from pyllm.limits import measure
from pyllm.ops import Ops

LANES = {"amx_bf16": 16, "avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}


def test_limits_are_positive_and_ordered():
    limits = measure(1, read_bytes=64 << 20)
    assert limits.threads == 1
    assert limits.isa == _cpu.active_isa()
    assert 0.1 < limits.read_gbps < 5000
    assert 0.1 < limits.f32_gflops < 50000
    assert limits.bf16_gflops > 0.1
    assert limits.int8_gops > limits.f32_gflops / 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_counted_in_full(threads: int):
    context = Ops(threads).context
    lanes = LANES[_cpu.active_isa()]
    assert context.limits("f32", chunks=7, rounds=11) == 7 * 11 * 12 * lanes * 2
    assert context.limits("int8", chunks=7, rounds=11) == 7 * 11 * 12 * lanes * 8
    data = np.ones(3 * _cpu.LIMITS_CHUNK, np.float32)
    for streams in (1, 4):
        assert context.limits("read", data, streams=streams) == data.nbytes


def test_misuse_is_refused():
    context = Ops(1).context
    with pytest.raises(ValueError, match="limit: expected read, f32, bf16 or int8, got fp64"):
        context.limits("fp64")
    with pytest.raises(ValueError, match="data: expected a multiple of"):
        context.limits("read", np.ones(5, np.float32))
    with pytest.raises(ValueError, match="data: expected a multiple of"):
        context.limits("read")
    with pytest.raises(ValueError, match="chunks and rounds"):
        context.limits("f32", chunks=-1)
    with pytest.raises(TypeError, match="data"):
        context.limits("read", np.ones(_cpu.LIMITS_CHUNK, np.float64))
