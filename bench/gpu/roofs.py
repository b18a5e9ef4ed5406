"""Step: what the machine can do at most, of which later figures are fractions."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu.process import Check, Row
from gpu.timing import device, guarded, median_seconds, recorded, row_of, seconds_of, torch_gpu, torch_product

READ, COPY, LOADING, PRODUCT = "read", "copy", "loading of weights", "torch's product of 8192^3"


def roofs(check: Check) -> Row:
    """Reading, copying, torch's product, and what an edge of a graph and a kernel in it cost."""
    return {"rows": roof_rows(check.emulated)}


def roof_rows(emulated: bool) -> Iterator[Row]:
    """Each roof, unless it fails."""
    size, edges = ((1 << 16), 10) if emulated else ((4 << 30), 1000)
    with device(emulated) as gpu:
        yield from guarded("memory", functools.partial(memory, gpu, size, 2 if emulated else gpu.multiprocessors * 8))
        yield from guarded(LOADING, functools.partial(loading, gpu, size // 4))
        for overlapped in (False, True):
            name = "edge, programmatic" if overlapped else "edge"
            yield from guarded(name, functools.partial(edge, gpu, overlapped, edges))
        torch = None if emulated else torch_gpu()
        if torch is not None:
            yield row_of(PRODUCT, "TFLOP/s", torch_product(torch, 8192, 8192, 8192))


def memory(gpu: Any, size: int, blocks: int, name: str) -> Iterator[Row]:
    """Bytes a second of reading `size` bytes, and of copying half of them, read and written."""
    x, out, half = gpu.zeros([size], np.uint8), gpu.zeros([blocks], np.uint32), size // 2
    read = seconds_of(gpu, lambda _: gpu.kernels.read_probe(out.raw, x.raw, gpu.stream), 2)
    yield row_of(READ, "GB/s", size / read / 1e9)
    yield row_of(COPY, "GB/s", 2 * half / seconds_of(gpu, lambda _: gpu.write(x[:half], x[half:]), 2) / 1e9)


def loading(gpu: Any, size: int, name: str) -> Iterator[Row]:
    """Bytes a second from the memory of the host to that of the GPU, as weights go."""
    host = np.ones((size // 4096, 4096), np.uint8)
    gpu.upload(host)
    began = time.perf_counter()
    gpu.upload(host)
    yield row_of(name, "GB/s", size / (time.perf_counter() - began) / 1e9)


def edge(gpu: Any, overlapped: bool, count: int, name: str) -> Iterator[Row]:
    """Microseconds from one kernel of a graph to the next, and the GPU's memory that a kernel of it takes."""
    gpu.kernels.empty_probe(overlapped, gpu.stream)
    gpu.synchronize()
    before = gpu.memory()[0]
    graph = recorded(gpu, lambda _: gpu.kernels.empty_probe(overlapped, gpu.stream), count)
    gpu.replay(graph)
    gpu.synchronize()
    kept = max(before - gpu.memory()[0], 0) / count
    took = median_seconds(gpu, lambda: gpu.replay(graph)) / count
    yield row_of(name, "us", took * 1e6, **{"bytes of a kernel": kept})
