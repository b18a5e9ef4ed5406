"""How CMake decides about the CUDA kernels, and what the module that it makes needs of a machine."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = importlib.util.find_spec("pyllm._cuda")
OF_EVERY_MACHINE = (
    "libc.so",
    "libm.so",
    "libstdc++.so",
    "libgcc_s.so",
    "libdl.so",
    "librt.so",
    "libpthread.so",
    "ld-linux",
)


def configure(folder, monkeypatch, cuda, compiler):
    """CMake's status and words with PYLLM_CUDA=`cuda` and CUDACXX=`compiler`."""
    pybind11 = pytest.importorskip("pybind11")
    if not all(map(shutil.which, ("cmake", "ninja", "c++"))):
        pytest.skip("cmake, ninja or a C++ compiler is not installed")
    monkeypatch.setenv("CUDACXX", compiler)
    options = [
        f"-DPYLLM_CUDA={cuda}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        ("off", None),
        ("auto", None),
        ("on", "PYLLM_CUDA=on, but there is no working nvcc: put it on PATH, set CUDACXX to it, or use PYLLM_CUDA=off"),
        ("yes", "PYLLM_CUDA: expected auto, on or off, got yes"),
    ],
)
def test_without_nvcc(tmp_path, monkeypatch, cuda, expected):
    """CUDACXX is honoured: there is nothing where it points to, so that no nvcc is found elsewhere either."""
    status, said = configure(tmp_path, monkeypatch, cuda, "/nowhere/nvcc")
    if expected is None:
        assert status == 0 and "_cuda" not in (tmp_path / "build.ninja").read_text()
    else:
        assert status and expected in said


@pytest.mark.skipif(BUILT is None, reason="this build has no CUDA kernels")
def test_the_module_needs_nothing_of_cuda():
    """The runtime is inside, the driver is looked for when it is used."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    told = subprocess.run(["readelf", "-d", BUILT.origin], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", told)
    assert needed and all(name.startswith(OF_EVERY_MACHINE) for name in needed), needed
