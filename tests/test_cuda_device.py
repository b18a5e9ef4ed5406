"""Memory, arrays, streams and graphs of `pyllm.device` on the emulated GPU."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import cuda_host
import emulated_cuda
import ml_dtypes
import numpy as np
import pytest

from pyllm import device as device_module
from pyllm.cuda_ops import CudaOps
from pyllm.errors import InsufficientMemoryError
from pyllm.ops import Ops
from pyllm.tensor import DTYPES

bfloat16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def gpu():
    with emulated_cuda.emulated_gpu() as gpu:
        yield gpu


def numbers(*shape, dtype=np.float32):
    return np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 1001)])
def test_arrays_go_there_and_back(gpu, shape, dtype):
    host = np.asarray(numbers(*shape) * 100).astype(dtype)
    there = gpu.upload(host)
    assert (there.shape, there.dtype, there.nbytes) == (host.shape, host.dtype, host.nbytes)
    assert np.array_equal(there.numpy(), host) and np.array_equal(np.asarray(there), host)


def test_views_are_those_of_numpy(gpu):
    host = numbers(5, 12)
    there = gpu.upload(host)
    for view in (
        lambda a: a[1:4], lambda a: a[:, 3:7], lambda a: a[2], lambda a: a[-1:], lambda a: a[1:3, :8],
        lambda a: a.reshape(-1, 3), lambda a: a.reshape(5, 2, 6), lambda a: a[:, 4:10].reshape(5, 2, 3),
        lambda a: a[:, 4:10].reshape(5, 2, -1).reshape(5, 6), lambda a: a[[4, 0, 4]], lambda a: a[1:4].copy(),
        lambda a: a[5:, 2:4], lambda a: a[2:, 3:3], lambda a: a.reshape(5, 3, 4)[1:3, :2, :2],
    ):  # fmt: skip
        assert np.array_equal(view(there).numpy(), view(host))
    there[1] = there[3]
    there[0] = numbers(12)
    assert np.array_equal(there[1].numpy(), host[3]) and np.array_equal(there[0].numpy(), numbers(12))


def test_what_a_view_cannot_be_is_an_error(gpu):
    there = gpu.upload(numbers(4, 6))
    for error, wrong in (
        (IndexError, lambda: there[4]), (IndexError, lambda: there[::2]), (ValueError, lambda: there.reshape(5, -1)),
        (ValueError, lambda: there[:, :3].reshape(-1)), (ValueError, lambda: there.__setitem__(0, numbers(5))),
        (TypeError, lambda: gpu.empty([2], np.float64)),
    ):  # fmt: skip
        with pytest.raises(error, match=r"expected|cannot"):
            wrong()


def test_exchange_through_dlpack(gpu):
    host = numbers(3, 8)
    there = gpu.upload(host)
    assert np.array_equal(np.from_dlpack(there), host)
    other = np.from_dlpack(there[:, 2:5])  # strided, over the same memory, which it keeps
    there[1] = np.zeros(8, np.float32)
    gpu.synchronize()
    del there
    assert np.array_equal(other[0], host[0, 2:5]) and not other[1].any()
    theirs = numbers(4, 5)
    mine = gpu.from_dlpack(theirs)
    theirs[2, 2] = 7
    assert mine.shape == (4, 5) and np.array_equal(mine.numpy(), theirs)
    with pytest.raises(TypeError, match="type code 2 of 64 bits"):
        gpu.from_dlpack(theirs.astype("f8"))


def test_a_read_only_index_is_copied_once_and_no_longer_than_it_lives(gpu):
    ops, x, index = CudaOps(gpu, np.float32, threads=1), gpu.upload(numbers(2, 5)), np.array([4, 0], np.int32)
    for fresh in (index, index[::-1].copy()):  # what may be written is read anew
        index[...] = fresh
        assert np.array_equal(ops.gather_columns(x, index).numpy(), numbers(2, 5)[:, fresh])
    index.flags.writeable = False
    gpu.synchronize()
    free = gpu.memory()[0]
    kept = [ops.gather_columns(x, index) for _ in range(3)]
    assert free - gpu.memory()[0] == index.nbytes + sum(y.nbytes for y in kept)
    del index, kept
    gpu.synchronize()
    assert gpu.memory()[0] == free


def test_what_is_lent_is_freed_after_every_stream(gpu):
    """The other library drops its array while a copy out of it has not run yet."""
    theirs, found = gpu._core.create_stream(), np.zeros((3, 8), np.float32)
    there = np.from_dlpack(gpu.upload(numbers(3, 8)))
    buffer = sys.modules["cuda.core"].Buffer
    buffer.from_handle(there.ctypes.data, there.nbytes).copy_to(
        buffer.from_handle(found.ctypes.data, found.nbytes), stream=theirs
    )
    del there
    gpu.synchronize()
    theirs.sync()
    assert np.array_equal(found, numbers(3, 8))


@pytest.mark.parametrize("end", ["end_graph", "drop_graph"])
def test_what_is_lent_outlives_the_recordings_of_every_thread(gpu, end):
    """The other library drops its array while graphs are recorded, which a wait for all streams would break."""
    gpu.synchronize()
    free = gpu.memory()[0]
    there = np.from_dlpack(gpu.upload(numbers(64)))
    begun, dropped = threading.Event(), threading.Event()

    def beside():
        gpu.begin_graph()
        begun.set()
        dropped.wait(60)
        getattr(gpu, end)()

    other = threading.Thread(target=beside)
    other.start()
    assert begun.wait(60)
    gpu.begin_graph()
    del there
    gpu.end_graph()
    gpu.synchronize()
    kept = gpu.memory()[0]
    dropped.set()
    other.join()
    gpu.synchronize()
    assert kept == free - 256 and gpu.memory()[0] == free


def test_what_is_borrowed_is_given_back_after_what_reads_it(gpu):
    memory, y = numbers(2, 8), gpu.empty((2, 8), np.float32)
    theirs = memory[:]
    weakref.finalize(theirs, memory.fill, np.nan)  # as an owner that hands its memory out again
    mine = gpu.from_dlpack(theirs)
    del theirs
    gpu.kernels.activation(y.raw, mine.raw, None, 4, gpu.stream)
    del mine
    assert np.isnan(memory).all() and np.array_equal(y.numpy(), np.maximum(numbers(2, 8), 0))


def test_a_capsule_nobody_takes_frees_what_it_holds(gpu):
    gpu.synchronize()
    free = gpu.memory()[0]
    capsule = gpu.empty([1 << 20], np.uint8).__dlpack__()
    assert gpu.memory()[0] == free - (1 << 20)
    del capsule
    gpu.synchronize()
    assert gpu.memory()[0] == free


def test_bfloat16_goes_to_torch_and_back(gpu):
    torch = pytest.importorskip("torch")
    host = numbers(3, 4, dtype=bfloat16)
    tensor = torch.from_dlpack(gpu.upload(host))
    assert tensor.dtype == torch.bfloat16 and np.array_equal(tensor.float().numpy(), host.astype("f4"))
    assert gpu.from_dlpack(tensor).dtype == bfloat16


def test_the_array_interface_says_shape_strides_and_stream(gpu):
    there = gpu.upload(numbers(3, 8))
    face = there[:, 2:4].__cuda_array_interface__
    assert face == {
        "version": 3, "shape": (3, 2), "typestr": "<f4", "data": (there.raw.pointer + 8, False), "strides": (32, 4),
        "stream": gpu.stream,
    }  # fmt: skip
    with pytest.raises(AttributeError, match="use DLPack"):
        _ = gpu.upload(numbers(2, dtype=bfloat16)).__cuda_array_interface__


def test_memory_comes_back_and_its_lack_is_said_with_what_to_do():
    with emulated_cuda.emulated_gpu(memory=1 << 20) as gpu:
        free = gpu.memory()[0]
        array = gpu.empty([free // 2], np.uint8)
        with pytest.raises(InsufficientMemoryError, match=r"needed .* GB, free .* Lower max_model_len \(--ctx-size\)"):
            gpu.empty([free], np.uint8)
        del array
        gpu.synchronize()
        assert gpu.memory()[0] == free


def test_memory_that_the_pool_keeps_can_be_taken(gpu, monkeypatch):
    free, total = gpu.memory()
    pool = SimpleNamespace(attributes=SimpleNamespace(reserved_mem_current=1000, used_mem_current=300))
    monkeypatch.setattr(type(gpu._core), "memory_resource", pool)
    assert gpu.memory() == (free + 700, total)
    monkeypatch.setattr(type(gpu._core), "memory_resource", SimpleNamespace())
    assert gpu.memory() == (free, total)


def test_what_is_freed_during_a_recording_is_not_freed_by_the_graph(gpu):
    array = gpu.empty([64], np.float32)
    gpu.synchronize()
    free = gpu.memory()[0]
    gpu.begin_graph()
    del array
    graph = gpu.end_graph()
    assert graph.nodes == 0
    gpu.synchronize()
    assert gpu.memory()[0] == free + 256


def test_a_graph_holds_what_its_own_thread_gave(gpu):
    x, y, z = gpu.upload(numbers(2, 8)), *(gpu.empty((2, 8), np.float32) for _ in range(2))
    relu = partial(gpu.kernels.activation, y.raw, x.raw, None, 4)
    gpu.begin_graph()
    relu(gpu.stream)
    found = []

    def beside():
        assert not gpu.recording
        gpu.kernels.activation(z.raw, x.raw, None, 5, gpu.stream)
        found.append((z.numpy(), gpu.upload(numbers(3)).numpy()))

    other = threading.Thread(target=beside)
    other.start()
    other.join()
    graph = gpu.end_graph()
    assert graph.nodes == 1 and np.isnan(y.numpy()).all()
    assert np.allclose(found[0][0], np.tanh(numbers(2, 8)), atol=1e-6) and np.array_equal(found[0][1], numbers(3))
    gpu.replay(graph)
    assert np.array_equal(y.numpy(), np.maximum(numbers(2, 8), 0))


@pytest.mark.parametrize("step", ["begin_building", "end_building", "complete"])
def test_a_recording_that_fails_leaves_nothing_behind(gpu, monkeypatch, step):
    """Nothing is recorded after it, its builder is closed, and the next one works."""
    closed, close = [], emulated_cuda.GraphBuilder.close
    monkeypatch.setattr(emulated_cuda.GraphBuilder, "close", lambda builder: closed.append(builder) or close(builder))
    with monkeypatch.context() as patch:
        patch.setattr(emulated_cuda.GraphBuilder, step, lambda builder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gpu.begin_graph()
            gpu.end_graph()
        assert not gpu.recording and len(closed) == 1
        if step == "end_building":
            gpu.begin_graph()
            gpu.drop_graph()  # does not hide what made the caller drop it
            assert not gpu.recording and len(closed) == 2
    x = gpu.upload(numbers(2, 8))
    gpu.begin_graph()
    with pytest.raises(RuntimeError, match="begin_graph: expected no graph"):
        gpu.begin_graph()
    with pytest.raises(RuntimeError, match="memory cannot be taken while a graph is recorded"):
        gpu.empty([1], np.float32)
    gpu.kernels.activation(x.raw, x.raw, None, 4, gpu.stream)
    assert gpu.end_graph().nodes == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda gpu, x, y: gpu.write(x, y), lambda gpu, x, y: gpu.synchronize(), lambda gpu, x, y: gpu.record(),
        lambda gpu, x, y: gpu.stream, lambda gpu, x, y: y.numpy(), lambda gpu, x, y: gpu.upload(numbers(2)),
    ],
    ids=["write", "synchronize", "record", "stream", "read", "upload"],
)  # fmt: skip
def test_a_new_thread_makes_the_device_current_first(gpu, monkeypatch, call):
    made, x, y = [], *(gpu.upload(numbers(2)) for _ in range(2))
    monkeypatch.setattr(gpu._core, "set_current", lambda: made.append(threading.get_ident()))
    other = threading.Thread(target=call, args=(gpu, x, y))
    other.start()
    other.join()
    assert made == [other.ident]


def test_an_event_waits_for_what_was_before_it_and_no_more(gpu):
    source, targets = gpu.upload(numbers(3)), [np.zeros(3, np.float32) for _ in range(2)]
    gpu.fetch(targets[0], source)
    event = gpu.record()
    gpu.fetch(targets[1], source)
    event.sync()
    assert np.array_equal(targets[0], numbers(3)) and not targets[1].any()
    gpu.synchronize()
    assert np.array_equal(targets[1], numbers(3))


@pytest.mark.parametrize("threads", [1, 3])
def test_large_arrays_are_loaded_piece_by_piece(gpu, monkeypatch, threads):
    monkeypatch.setattr(device_module, "STAGING_BYTES", 4096)
    monkeypatch.setattr(device_module, "default_threads", lambda: threads)
    monkeypatch.setattr(gpu, "_staging", [])
    host = numbers(1000, 30, dtype=bfloat16)
    assert np.array_equal(gpu.upload(host).numpy(), host)
    pieces = []

    def write(first, rows):
        pieces.append(len(rows))
        rows[...] = host[first : first + len(rows)]

    assert np.array_equal(gpu.load(host.shape, bfloat16, write).numpy(), host)
    assert sum(pieces) == 1000 and max(pieces) == -(-(4096 // 60) // threads)

    def fail(first, rows):
        raise KeyError("a tensor that is not there")

    with pytest.raises(KeyError, match="not there"):
        gpu.load(host.shape, bfloat16, fail)
    assert np.array_equal(gpu.load(host.shape, bfloat16, write).numpy(), host)


def test_a_graph_runs_what_was_recorded_on_what_its_arrays_hold_then(gpu):
    x, y = gpu.upload(numbers(2, 8)), gpu.empty((2, 8), np.float32)
    gpu.begin_graph()
    gpu.kernels.activation(y.raw, x.raw, None, 4, gpu.stream)
    graph = gpu.end_graph()
    gpu.synchronize()
    for scale in (1, -2):
        gpu.write(x, numbers(2, 8) * scale)
        gpu.replay(graph)
        assert np.array_equal(y.numpy(), np.maximum(numbers(2, 8) * scale, 0))
    gpu.begin_graph()
    gpu.drop_graph()
    assert not gpu.recording


def test_the_emulation_has_the_signatures_of_cuda_core(monkeypatch):
    monkeypatch.delitem(sys.modules, "cuda.core", raising=False)  # that of the emulation, if it is there
    core = pytest.importorskip("cuda.core")
    graph = pytest.importorskip("cuda.core.graph")
    pairs = [(emulated_cuda._core(None).Device, core.Device)]
    for module, names in ((core, ("Event", "Stream", "Buffer", "LegacyPinnedMemoryResource")),
                          (graph, ("GraphBuilder", "Graph"))):  # fmt: skip
        pairs += [(getattr(emulated_cuda, name), getattr(module, name)) for name in names]
    compared = 0
    for fake, real in pairs:
        name = fake.__name__
        for method, function in vars(fake).items():
            if method.startswith("_"):
                continue
            function = getattr(function, "__func__", function)
            assert hasattr(real, method), f"{name}.{method}"
            if not callable(function):
                continue
            try:
                theirs = inspect.signature(getattr(real, method))
            except ValueError:  # compiled, without a text of its signature
                continue
            mine = inspect.signature(function)
            for parameter in mine.parameters.values():
                if parameter.name != "self":
                    assert theirs.parameters[parameter.name].kind == parameter.kind, f"{name}.{method}"
                    compared += 1
            needed = {p.name for p in theirs.parameters.values() if p.default is p.empty and p.kind not in (2, 4)}
            assert needed <= {"self", *mine.parameters}, f"{name}.{method}"
    assert compared > 15
    device = emulated_cuda._core(None).Device
    assert {*vars(device.properties)} <= {*dir(core._device.DeviceProperties)}
    assert {*vars(device.memory_resource.attributes)} <= {*dir(core._memory._memory_pool._MemPoolAttributes)}


def test_the_kernels_of_hopper_can_be_left_alone(gpu, monkeypatch):
    assert gpu.has_wgmma and CudaOps(gpu)._has_wgmma
    monkeypatch.setenv("PYLLM_WGMMA", "off")
    assert not gpu.has_wgmma and not CudaOps(gpu)._has_wgmma
    monkeypatch.setenv("PYLLM_WGMMA", "no")
    with pytest.raises(ValueError, match="PYLLM_WGMMA: expected on or off, got 'no'"):
        CudaOps(gpu)


def test_launches_overlap_unless_they_are_told_not_to(monkeypatch):
    overlapping = cuda_host.build().host_overlapping
    for asked, expected in (("off", 0), ("on", 1)):
        monkeypatch.setenv("PYLLM_PDL", asked)
        with emulated_cuda.emulated_gpu() as gpu:
            before = overlapping()
            gpu.kernels.empty_probe(True, gpu.stream)
            gpu.kernels.empty_probe(False, gpu.stream)
            assert overlapping() - before == expected


def test_the_cpus_ops_ask_nothing_of_a_gpu():
    ops = Ops(1)
    array = numbers(3)
    assert ops.place(array) is array and not ops.on_gpu and ops.loop is None
    stage = ops.stage([array, None])
    stage.send()
    stage.wait()
    assert stage.placed[0] is array is stage.host[0]
