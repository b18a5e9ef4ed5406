"""Steps: what the machine is, and the package built for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from gpu.process import ROOT, Check, Row, place, python, run_aloud
from gpu.timing import device

PACKAGES = ("cuda-core", "cuda-bindings", "torch", "transformers", "numpy", "pytest")


def facts(check: Check) -> Row:
    """What this machine is, as far as it says so without the package."""
    found: Row = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    return found | {"nvidia-smi": nvidia_smi(query) or None, "nvcc": nvcc_version()}


def build(check: Check) -> Row:
    """The package with its CUDA kernels, compiled for this GPU alone where nvidia-smi names it, unless it is there;
    and what the package sees."""
    built = check.emulated or install_missing()
    with device(check.emulated) as gpu:
        kernels = gpu.kernels
        return {
            "already built": not built,
            "gpu": gpu.name,
            "multiprocessors": gpu.multiprocessors,
            "memory": gpu.memory(),
            "cuda": kernels.RUNTIME_VERSION,
            "driver": kernels.driver_version(),
            "architectures": kernels.ARCHITECTURES,
            "wgmma": gpu.has_wgmma,
            # wgmma_plan counts on 66, 32 and 16 of them on 132 multiprocessors.
            "clusters at once": {size: kernels.wgmma_clusters(size) for size in (2, 4, 8)} if gpu.has_wgmma else None,
        }


def install_missing() -> bool:
    """Build and install the package unless it can use the GPU as it is; whether that was needed."""
    reason = missing()
    if reason is None:
        return False
    command = python("-m", "pip", "install", "--no-build-isolation", "--no-index", "--no-deps", str(ROOT))
    if architecture := architecture_here():
        command.append(f"-Ccmake.define.PYLLM_CUDA_ARCHITECTURES={architecture}")
    settings = {"PYLLM_CUDA": "on", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    status, said = run_aloud([*command, "-v"], **settings)
    if status:
        raise RuntimeError(f"{reason}; then pip said: {said[-4000:]}")
    if (still := missing()) is not None:
        raise RuntimeError(f"built, but {still}")
    return True


def missing() -> str | None:
    """Why the pyllm that a fresh process imports cannot use a GPU here; None where it can."""
    code = "from pyllm.device import unavailable; print(unavailable() or '')"
    done = subprocess.run(python("-c", code), capture_output=True, text=True, **place())
    if done.returncode:
        return f"pyllm cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return done.stdout.strip() or None


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the GPUs, a line for each; nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def nvcc_version() -> str | None:
    """The release of nvcc, where it is on PATH or named by CUDACXX."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not shutil.which(compiler):
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout
    release = re.search(r"release ([\d.]+)", said)
    return release[1] if release else None


def architecture_here() -> str | None:
    """The first GPU's architecture as the build takes it, such as 80 or 90a; None where nvidia-smi does not say."""
    found = re.match(r"(\d+)\.(\d)", nvidia_smi("compute_cap"))
    if found is None:
        return None
    return "90a" if found[0] == "9.0" else found[1] + found[2]
