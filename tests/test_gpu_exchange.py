"""Arrays that go to torch, cupy and jax on a GPU, and come from them, without a copy; skipped where there is none."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pyllm import device

bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
MISSING = device.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no GPU to run on: {MISSING}")]


@pytest.fixture(scope="module")
def gpu():
    return device.open_device()


def numbers(dtype):
    return np.random.default_rng(0).standard_normal((5, 12)).astype(dtype)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_exchange_with_torch(gpu, dtype):
    torch = pytest.importorskip("torch")
    there = gpu.upload(numbers(dtype))
    tensor = torch.from_dlpack(there[:, 2:7])
    assert tensor.shape == (5, 5) and tensor.data_ptr() == there.raw.pointer + 2 * dtype.itemsize
    assert np.array_equal(tensor.float().cpu().numpy(), numbers(dtype)[:, 2:7].astype("f4"))
    tensor.mul_(2)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    mine = gpu.from_dlpack(tensor)
    assert mine.raw.pointer == tensor.data_ptr() and mine.dtype == dtype
    assert np.array_equal(mine.numpy(), numbers(dtype)[:, 2:7] * dtype.type(2))


def test_exchange_with_cupy(gpu):
    cupy = pytest.importorskip("cupy")
    there = gpu.upload(numbers(float32))
    for theirs in (cupy.asarray(there), cupy.from_dlpack(there)):  # __cuda_array_interface__, then DLPack
        assert theirs.data.ptr == there.raw.pointer and np.array_equal(theirs.get(), numbers(float32))
    assert np.array_equal(gpu.from_dlpack(theirs * 2).numpy(), numbers(float32) * 2)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_exchange_with_jax(gpu, monkeypatch, dtype):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take three quarters of the memory
    jax = pytest.importorskip("jax")
    if gpu.upload(numbers(dtype)).__dlpack_device__()[0] == 2 and jax.default_backend() != "gpu":
        pytest.skip("jax without a GPU")
    theirs = jax.dlpack.from_dlpack(gpu.upload(numbers(dtype)))
    assert theirs.dtype == dtype and np.array_equal(np.asarray(theirs), numbers(dtype))
    assert np.array_equal(gpu.from_dlpack(theirs).numpy(), numbers(dtype))
