"""What the steps that measure share: the device, seconds of a launch, random arrays, rows of results."""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu.process import Row


@contextmanager
def device(emulated: bool) -> Iterator[Any]:
    """The GPU, or the emulated one."""
    if emulated:
        from emulated_cuda import emulated_gpu

        with emulated_gpu() as gpu:
            yield gpu
        return
    from pyllm.device import open_device

    yield open_device()


def seconds_of(gpu: Any, launch: Callable[[int], None], count: int, rounds: int = 5) -> float:
    """Seconds of one launch: the median over rounds of `count` launches, launch(i) being the i-th.

    They are recorded as a graph, or given to the stream one by one where no graph can be had, which the log then says.
    A round repeats them for at least 5 ms, so that what the host does at its ends is little of it.
    """
    launch(0)
    gpu.synchronize()
    try:
        graph = recorded(gpu, launch, count)
        run = functools.partial(gpu.replay, graph)
    except Exception:
        traceback.print_exc()

        def run() -> None:
            for i in range(count):
                launch(i)

    return median_seconds(gpu, run, rounds) / count


def recorded(gpu: Any, launch: Callable[[int], None], count: int) -> Any:
    """A graph of `count` launches."""
    gpu.begin_graph()
    try:
        for i in range(count):
            launch(i)
    except BaseException:
        gpu.drop_graph()
        raise
    return gpu.end_graph()


def median_seconds(gpu: Any, run: Callable[[], None], rounds: int = 5) -> float:
    """Seconds of `run`, which gives the stream work: the median over rounds of at least 5 ms."""

    def repeated(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            run()
        gpu.synchronize()
        return (time.perf_counter() - began) / times

    repeated(1)
    repeats = max(1, math.ceil(5e-3 / repeated(1)))
    return float(np.median([repeated(repeats) for _ in range(rounds)]))


@functools.cache
def noise_block(gpu: Any, scale: float, dtype: Any) -> Any:
    """4 Mi small normals on the GPU."""
    return gpu.upload((np.random.default_rng(0).standard_normal(1 << 22) * scale).astype(dtype))


def noise(gpu: Any, shape: tuple[int, ...], scale: float, dtype: Any) -> Any:
    """An array of small normals on the GPU, made there: a block of them, which is doubled until the array is full."""
    source, count = noise_block(gpu, scale, dtype), int(np.prod(shape))
    flat, done = gpu.empty([count], dtype), min(count, source.size)
    gpu.write(flat[:done], source[:done])
    while done < count:
        piece = min(done, count - done)
        gpu.write(flat[done : done + piece], flat[:piece])
        done += piece
    return flat.reshape(*shape)


def torch_gpu() -> Any:
    """torch, where it is installed and sees a GPU; else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def torch_product(torch: Any, m: int, n: int, k: int) -> float:
    """TFLOP/s of torch's bfloat16 product of random matrices."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    count = max(3, int(4e12 / (2 * m * n * k)))
    for repeat in (3, count):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeat):
            a @ b.T
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / repeat
    return 2 * m * n * k / seconds / 1e12


def row_of(name: str, unit: str, value: float, **more: Any) -> Row:
    """A figure as the JSON files hold it."""
    return {"name": name, "value": value, "unit": unit, **more}


def guarded(name: str, measure: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``measure(name)``, and one that tells of its failure."""
    try:
        yield from measure(name)
    except Exception as error:
        yield {"name": name, "error": f"{type(error).__name__}: {error}"}
