"""What a machine without a GPU is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from pyllm import LLM, device
from pyllm.errors import CudaUnavailable

BUILT = importlib.util.find_spec("pyllm._cuda") is not None
built = pytest.mark.skipif(not BUILT, reason="this build has no CUDA kernels")
driverless = pytest.mark.skipif(device.unavailable() is None, reason="there is a GPU")


@driverless
def test_what_is_missing_is_said_and_nothing_hangs():
    """In a process of its own, twice: a lock that cuda.core leaves held would stop the second call."""
    code = "from pyllm import device; print(device.unavailable()); print(device.unavailable())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first == second and ("driver" if BUILT else "PYLLM_CUDA=on") in first


@driverless
def test_cuda_is_one_clear_error(tiny_folder):
    with pytest.raises(CudaUnavailable, match=r"device='cuda': .*(driver|PYLLM_CUDA=on).* use device='cpu'"):
        LLM(tiny_folder, device="cuda")


@driverless
def test_auto_uses_the_cpu(tiny_folder):
    llm = LLM(tiny_folder, device="auto")
    assert llm.device == "cpu" and llm.generate("one", max_tokens=1)


@built
@pytest.mark.parametrize(
    ("driver", "core", "expected"),
    [
        (0, None, "no NVIDIA driver was found"),
        (12040, None, "supports CUDA 12.4, these kernels need 13.0"),
        (13000, "missing", "cuda-python 1.x is not installed"),
        (13000, "0.7.0", "cuda-core 1.0 or later is needed, 0.7.0 found"),
        (13000, "no device", "no usable NVIDIA GPU was found: none here"),
        (13000, (7, 5), "compute capability 7.5: the kernels need 8.0"),
    ],
)
def test_every_reason_has_a_sentence(monkeypatch, driver, core, expected):
    from pyllm import _cuda

    class Core:
        name = "Some GPU"
        compute_capability = core

        def __init__(self, number):
            if core == "no device":
                raise RuntimeError("none here")

        def set_current(self):
            pass

    monkeypatch.setattr(_cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(_cuda, "RUNTIME_VERSION", 13000)
    module = type(sys)("cuda.core")
    if core != "missing":
        module.Device = Core
        module.__version__ = core if isinstance(core, str) and core[0].isdigit() else "1.2.2"
    monkeypatch.setitem(sys.modules, "cuda.core", module)
    device.open_device.cache_clear()
    assert expected in (device.unavailable() or "")


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyllm._cuda", None)
    monkeypatch.delattr("pyllm._cuda", raising=False)
    device.open_device.cache_clear()
    assert "with PYLLM_CUDA=on" in (device.unavailable() or "")
