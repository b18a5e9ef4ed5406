"""Fixtures shared by all benchmarks: kernels, measured limits, and what is recorded beside every time.

Run with ``pytest bench``; ``pytest bench --quick --benchmark-disable`` runs all once, on small sizes, for the results
alone. Every benchmark states the bytes it has to move and the operations it has to do, checks its
result, and records GFLOP/s, GB/s and the fraction of this machine's limit measured in the same run in ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import pytest

from pyllm.isa import default_threads
from pyllm.limits import Limits, measure
from pyllm.ops import Ops

Record = Callable[..., None]
_quick = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of all benchmarks, and of the end-to-end one."""
    parser.addoption("--quick", action="store_true", help="small sizes: do the benchmarks still run and check out?")
    parser.addoption("--models", help="shape:dtype,... of pyllm/compare/shapes.py; default gpt2:float32")
    parser.addoption("--model-folder", help="keep the made models here, to use them again")


def pytest_configure(config: pytest.Config) -> None:
    """Before the benchmarks' files are read, whose sizes depend on it."""
    global _quick
    _quick = config.getoption("--quick")
    config.option.models = config.option.models or sized("gpt2:float32", "stories-42m:bfloat16")


Size = TypeVar("Size")


def sized(full: Size, quick: Size) -> Size:
    """A size to measure, and what stands for it under --quick."""
    return quick if _quick else full


@pytest.fixture(scope="session")
def threads() -> int:
    """Threads that ours and the peers run on; PYLLM_THREADS chooses."""
    return default_threads()


@pytest.fixture(scope="session")
def ops(threads: int) -> Ops:
    """The kernels, on `threads` threads."""
    return Ops(threads)


@pytest.fixture(scope="module")
def limits(threads: int) -> Limits:
    """This machine's limits, measured anew for every file: a shared machine's speed drifts."""
    return measure(threads)


@pytest.fixture
def record(benchmark: Any, limits: Limits) -> Generator[Record, None, None]:
    """``record(dtype="float32", bytes=..., operations=...)``: state what one call has to move and do.

    After the timing this puts GFLOP/s, GB/s, the fraction of the limit (the longer of the two times that bytes and
    operations need at the limits, over the time taken), ISA level and threads into ``benchmark.extra_info``.
    """
    stated: dict[str, Any] = {}

    def state(*, dtype: str = "float32", bytes: float = 0, operations: float = 0, **more: Any) -> None:
        stated.update(dtype=dtype, bytes=bytes, operations=operations, **more)

    yield state
    if stated and benchmark.stats is not None and benchmark.stats.stats.data:
        benchmark.extra_info.update(describe(limits, benchmark.stats.stats.median, **stated))


def describe(
    limits: Limits, seconds: float, *, dtype: str, bytes: float, operations: float, **more: Any
) -> dict[str, Any]:
    """What a call that took `seconds` reached, beside the limits it was up against."""
    peak = {"float32": limits.f32_gflops, "bfloat16": limits.bf16_gflops, "int8": limits.int8_gops}[dtype]
    needed = max(bytes / limits.read_gbps, operations / peak) / 1e9
    return {
        "dtype": dtype,
        "gflops": round(operations / seconds / 1e9, 2),
        "gbps": round(bytes / seconds / 1e9, 2),
        "fraction_of_limit": round(needed / seconds, 3),
        "limited_by": "bytes" if bytes / limits.read_gbps >= operations / peak else "operations",
        "limit_gbps": round(limits.read_gbps, 2),
        "limit_gflops": round(peak, 1),
        "isa": limits.isa,
        "threads": limits.threads,
        **more,
    }
