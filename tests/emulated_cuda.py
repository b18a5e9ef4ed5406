"""A GPU for tests, made of the host: what `pyllm.device` uses of cuda.core, over the emulator of tests/cuda_host.

Kernels are those of csrc/cuda behind the bindings of csrc/bindings, unchanged. A stream does nothing before somebody
waits for it, memory is NaN before it is written and after it is freed, so what the host forgets to wait for is seen.
Signatures are those of cuda.core 1.x, with which `tests/test_cuda_device.py` compares them where it is installed.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import pytest

from pyllm import device

MULTIPROCESSORS = 2


class _Library:
    """The functions of emulator.cc, typed."""

    def __init__(self) -> None:
        library = cuda_host.build()
        self.captured: set[int] = set()  # handles of the streams that are
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, result, *arguments in (
            ("stream", pointer),
            ("given", number, pointer),
            ("sync", None, pointer, number),
            ("sync_all", None),
            ("copy", None, pointer, pointer, pointer, number),
            ("fill", None, pointer, pointer, ctypes.c_int, number),
            ("begin_capture", None, pointer),
            ("end_capture", pointer, pointer),
            ("graph_size", number, pointer),
            ("launch_graph", None, pointer, pointer),
            ("delete_graph", None, pointer),
            ("limit_memory", number, number, number),
            ("allocate", pointer, number),
            ("free", None, pointer, pointer, number),
        ):
            function = getattr(library, f"host_{name}")
            function.restype, function.argtypes = result, list(arguments)
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream, self._given = stream, stream._library.given(stream.handle)

    def sync(self) -> None:
        self._stream._library.sync(self._stream.handle, self._given)

    def __sub__(self, other: Event) -> float:
        return 1.0  # milliseconds


class Stream:
    def __init__(self, library: Any) -> None:
        self._library = library
        self.handle = library.stream()

    def sync(self) -> None:
        assert self.handle not in self._library.captured, "a stream that is captured cannot be waited for"
        self._library.sync(self.handle, self._library.given(self.handle))

    def record(self, event: Event | None = None, options: object = None) -> Event:
        assert event is None, "an event is recorded once"
        return Event(self)


class GraphBuilder:
    def __init__(self, stream: Stream) -> None:
        self.stream, self._graph = stream, None

    def begin_building(self, mode: str | None = "relaxed") -> GraphBuilder:
        self.stream._library.captured.add(self.stream.handle)
        self.stream._library.begin_capture(self.stream.handle)
        return self

    def end_building(self) -> GraphBuilder:
        self.stream._library.captured.remove(self.stream.handle)
        self._graph = self.stream._library.end_capture(self.stream.handle)
        return self

    def complete(self, options: object = None) -> Graph:
        return Graph(self.stream._library, self._graph)

    def close(self) -> None:
        self.stream._library.captured.discard(self.stream.handle)


class Graph:
    def __init__(self, library: Any, graph: int) -> None:
        self._library, self._graph = library, graph
        self.nodes = library.graph_size(graph)

    def upload(self, stream: Stream) -> None:
        pass

    def launch(self, stream: Stream) -> None:
        self._library.launch_graph(self._graph, stream.handle)

    def close(self) -> None:
        self._library.delete_graph(self._graph)


class Buffer:
    def __init__(self, handle: int, size: int, stream: Stream | None, owner: object = None) -> None:
        self.handle, self.size, self._stream, self._owner = handle, size, stream, owner

    @staticmethod
    def from_handle(ptr: int, size: int, mr: object = None, owner: object = None, *, stream: object = None) -> Buffer:
        return Buffer(ptr, size, None, owner)

    def copy_from(self, src: Buffer, *, stream: Stream, options: object = None) -> None:
        assert src.size == self.size, "copies are of whole buffers"
        stream._library.copy(stream.handle, self.handle, src.handle, self.size)

    def copy_to(self, dst: Buffer | None = None, *, stream: Stream, options: object = None) -> Buffer:
        assert dst is not None
        dst.copy_from(self, stream=stream)
        return dst

    def fill(self, value: int, *, stream: Stream) -> None:
        stream._library.fill(stream.handle, self.handle, value, self.size)

    def close(self, stream: Stream | None = None) -> None:
        if self._stream is not None:
            self._stream._library.free(self._stream.handle, self.handle, self.size)
            self._stream = None

    def __del__(self) -> None:
        self.close()


class LegacyPinnedMemoryResource:
    def allocate(self, size: int, *, stream: Stream | None = None) -> Buffer:
        memory = (ctypes.c_ubyte * max(size, 1))()
        return Buffer(ctypes.addressof(memory), size, None, memory)


def _core(library: Any) -> ModuleType:
    class Device:
        name = "Emulated GPU"
        compute_capability = (9, 0)
        properties = SimpleNamespace(multiprocessor_count=MULTIPROCESSORS)
        memory_resource = SimpleNamespace(attributes=SimpleNamespace(reserved_mem_current=0, used_mem_current=0))

        def __init__(self, device_id: int | None = None) -> None:
            pass

        def set_current(self, ctx: object = None) -> None:
            pass

        def create_stream(self, obj: object = None, options: object = None) -> Stream:
            return Stream(library)

        def create_graph_builder(self) -> GraphBuilder:
            return GraphBuilder(Stream(library))

        def sync(self) -> None:
            assert not library.captured, "a wait for all streams breaks what is captured"
            library.sync_all()

        def allocate(self, size: int, *, stream: Stream) -> Buffer:
            handle = library.allocate(size)
            if not handle:
                stream.sync()  # frees what was given back
                handle = library.allocate(size)
            if not handle:
                raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: the emulated GPU is full")
            return Buffer(handle, size, stream)

    module = ModuleType("cuda.core")
    module.__version__ = "1.2.2"
    for part in (Device, Stream, Event, Buffer, LegacyPinnedMemoryResource):
        setattr(module, part.__name__, part)
    return module


@contextmanager
def emulated_gpu(memory: int = 1 << 40) -> Iterator[device.Device]:
    """Inside, pyllm finds an emulated GPU with so much memory; gives what `pyllm.device.open_device` opened."""
    path = str(cuda_host.library())
    loader = importlib.machinery.ExtensionFileLoader("_cuda", path)
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None
    kernels = importlib.util.module_from_spec(spec)
    loader.exec_module(kernels)
    library = _Library()
    before = library.limit_memory(memory, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyllm._cuda", kernels)
        patch.setattr("pyllm._cuda", kernels, raising=False)
        patch.setitem(sys.modules, "cuda.core", _core(library))
        patch.setattr("pyllm.tensor.DEVICE_KIND", 1)  # for DLPack it is memory of the CPU
        device.open_device.cache_clear()
        try:
            yield device.open_device()
        finally:
            device.open_device.cache_clear()
            library.limit_memory(0, before)
