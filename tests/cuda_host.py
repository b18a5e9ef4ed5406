"""The CUDA kernels compiled for the host, over the emulator in tests/cuda_host: what needs no GPU to be found wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / "tests" / "cuda_host"
DTYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 2}  # DType of core/types.h
ACTIVATIONS = {"none": 0, "gelu_erf": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


class MatmulArgs(ctypes.Structure):
    """MatmulArgs of cuda/matmul.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "x", "w", "bias", "residual", "norm_weight", "norm_bias")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "k", "x_stride", "y_stride", "residual_stride")),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_bool),
        *((name, ctypes.c_int32) for name in ("x_dtype", "w_dtype", "y_dtype")),
    ]


class SkinnyPlan(ctypes.Structure):
    """SkinnyPlan of cuda/matmul.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tiles", "blocks", "chunks", "x_pitch", "shared_bytes")),
        ("fits", ctypes.c_bool),
    ]


class CacheView(ctypes.Structure):
    """CacheView of core/types.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "kv_heads", "head_size")),
        ("dtype", ctypes.c_int32),
    ]


class AttentionArgs(ctypes.Structure):
    """AttentionArgs of cuda/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "q")),
        ("cache", CacheView),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "tables")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "table_width", "q_stride", "out_stride", "window")),
        ("most_queries", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("split_blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("partial", "tickets")),
    ]


def build(folder: Path) -> ctypes.CDLL:
    """Compile every kernel file of csrc/cuda and the emulator into a library under `folder`."""
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-w", f"-I{HOST}", f"-I{ROOT / 'csrc'}"]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HOST / "emulator.cc", HOST / "library.cc"]
    jobs = [
        subprocess.Popen([*compiler, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.name}.o")])
        for source in sources
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    library = folder / "kernels.so"
    objects = [str(folder / f"{source.name}.o") for source in sources]
    subprocess.run([compiler[0], "-shared", "-o", str(library), *objects], check=True)
    kernels = ctypes.CDLL(str(library))
    arguments, number = ctypes.POINTER(MatmulArgs), ctypes.c_int64
    kernels.host_skinny_matmul.argtypes = [arguments, number]
    kernels.host_mma_matmul.argtypes = kernels.host_plain_matmul.argtypes = [arguments]
    kernels.host_skinny_plan.argtypes = [number] * 4 + [ctypes.POINTER(SkinnyPlan)]
    for attention in (kernels.host_prompt_attention, kernels.host_split_attention, kernels.host_plain_attention):
        attention.argtypes = [ctypes.POINTER(AttentionArgs)]
    return kernels


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a 16-byte boundary, as device memory is."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + count].view(dtype).reshape(shape)


def as_aligned(a: np.ndarray) -> np.ndarray:
    """A copy at a 16-byte boundary."""
    copy = aligned(a.shape, a.dtype)
    copy[...] = a
    return copy
