"""The limits of this machine, measured: how fast it reads memory and how fast it multiplies and adds.

A kernel's speed says little by itself; as a fraction of these it says how much is left to gain. The figures are those
of the ISA level in use (see :mod:`pyllm.isa`)::

    >>> from pyllm.limits import measure
    >>> measure(threads=2).read_gbps
    41.7
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from pyllm import _cpu, isa

_READ_BYTES = (
    512 << 20
)  # beyond the largest last-level caches in use, of which a virtual machine rarely owns a fair share
_REPEATS = 5
_SECONDS = 0.02  # of one repeat


@dataclass(frozen=True)
class Limits:
    """Most this machine does on `threads` threads at ISA level `isa`; a multiply-add counts as two operations."""

    threads: int
    isa: str
    read_gbps: float
    """Sequential reads by the better of two patterns, 10^9 bytes per second."""
    f32_gflops: float
    """float32 multiply-adds, 10^9 operations per second."""
    bf16_gflops: float
    """Products of bfloat16 with float32 sums: the faster of dot products and float32 multiply-adds."""
    int8_gops: float
    """8-bit dot products with 32-bit sums."""


def measure(threads: int | None = None, *, read_bytes: int = _READ_BYTES) -> Limits:
    """Measure the limits on `threads` threads (default: :func:`pyllm.isa.default_threads`). Takes about a second.

    Each figure is the median of several repeats. `read_bytes` is the size of the buffer that is read, cut to an
    eighth of the machine's free memory.
    """
    context = _cpu.Context(threads if threads is not None else isa.default_threads())
    f32 = _compute(context, "f32")
    return Limits(
        threads=context.threads,
        isa=isa.active_isa(),
        read_gbps=read_bandwidth(context, read_bytes),
        f32_gflops=f32,
        bf16_gflops=max(_compute(context, "bf16"), f32),
        int8_gops=_compute(context, "int8"),
    )


def peak_gflops(dtype: str, threads: int) -> float:
    """Measured peak of multiply-adds on float32 or of dot products on bfloat16, 10^9 operations per second."""
    return _compute(_cpu.Context(threads), {"float32": "f32", "bfloat16": "bf16"}[dtype])


def read_bandwidth(context: _cpu.Context, read_bytes: int = _READ_BYTES) -> float:
    """Measured speed of sequential reads from a buffer of `read_bytes`, in 10^9 bytes per second."""
    chunk = 4 * _cpu.LIMITS_CHUNK
    chunks = max(1, min(read_bytes, _free_memory() // 8) // chunk)
    data = _cpu.allocate(chunks * chunk).view(np.float32)
    data.fill(1.0)  # memory that was never written would be read from one shared page of zeros
    # Which pattern a memory system likes best differs: some read one long stream a thread fastest, some several.
    return max(_median_rate(partial(context.limits, "read", data, streams=streams)) for streams in (1, 4))


def _compute(context: _cpu.Context, limit: str) -> float:
    chunks = 16 * context.threads  # several a thread, so that a disturbed one holds nobody up
    rounds = 1000
    while True:
        start = time.perf_counter()
        context.limits(limit, chunks=chunks, rounds=rounds)
        seconds = time.perf_counter() - start
        if seconds > _SECONDS / 4:
            break
        rounds *= 2
    rounds = max(1, int(rounds * _SECONDS / seconds))
    return _median_rate(partial(context.limits, limit, chunks=chunks, rounds=rounds))


def _median_rate(run: Callable[[], int]) -> float:
    rates = []
    run()
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work = run()
        rates.append(work / (time.perf_counter() - start) / 1e9)
    return median(rates)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
