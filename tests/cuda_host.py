"""The CUDA kernels compiled for the host, over the emulator in tests/cuda_host: what needs no GPU to be found wrong."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pyllm import ops

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / "tests" / "cuda_host"
DTYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 2}  # DType of core/types.h
ACTIVATIONS = {"none": 0, **{kind.value: number for kind, number in ops.ACTIVATIONS.items() if kind is not None}}


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


class SplitMatmulArgs(ctypes.Structure):
    """SplitMatmulArgs of cuda/matmul.h."""

    _fields_ = [("matmul", MatmulArgs), ("partial", ctypes.c_void_p), ("tickets", ctypes.c_void_p)]


class SplitPlan(ctypes.Structure):
    """SplitPlan of cuda/matmul.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("tiles", "splits", "steps")]


class WgmmaPlan(ctypes.Structure):
    """WgmmaPlan of cuda/matmul.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("columns", "pair", "splits", "row_units", "column_tiles", "blocks", "shared_bytes")
    ]


class SkinnyPlan(ctypes.Structure):
    """SkinnyPlan of cuda/matmul.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tiles", "blocks", "chunks", "stages", "shared_bytes")),
        ("streamed", ctypes.c_bool),
        ("fits", ctypes.c_bool),
    ]


class CacheView(ctypes.Structure):
    """CacheView of core/types.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "kv_heads", "head_size")),
        ("dtype", ctypes.c_int32),
    ]


class AttentionRule(ctypes.Structure):
    """AttentionRule of core/args.h."""

    _fields_ = [
        ("prefix", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_int64),
        ("causal", ctypes.c_bool),
    ]


class AttentionScores(ctypes.Structure):
    """AttentionScores of core/args.h."""

    _fields_ = [
        ("bias", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("reach", ctypes.c_int64),
        ("softcap", ctypes.c_float),
    ]


class AttentionArgs(ctypes.Structure):
    """AttentionArgs of cuda/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "lse", "q")),
        ("cache", CacheView),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "tables")),
        ("rule", AttentionRule),
        ("scores", AttentionScores),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "table_width", "q_stride", "out_stride")),
        ("most_queries", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("q_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("split_blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("partial", "tickets")),
    ]


class QkvArgs(ctypes.Structure):
    """QkvArgs of cuda/matmul.h."""

    _fields_ = [
        ("matmul", MatmulArgs),
        ("cache", CacheView),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots")),
        *((name, ctypes.c_int64) for name in ("heads", "half")),
    ]


class ArgmaxArgs(ctypes.Structure):
    """ArgmaxArgs of cuda/matmul.h."""

    _fields_ = [("matmul", MatmulArgs), *((name, ctypes.c_void_p) for name in ("tokens", "partial", "ticket"))]


class RowLists(ctypes.Structure):
    """RowLists of core/sampling.h."""

    _fields_ = [("starts", ctypes.c_void_p), ("ids", ctypes.c_void_p)]


class SampleArgs(ctypes.Structure):
    """SampleArgs of core/sampling.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tokens", "logits", "rows")),
        ("history", RowLists),
        ("history_counts", ctypes.c_void_p),
        ("bias", RowLists),
        ("bias_values", ctypes.c_void_p),
        ("allowed", RowLists),
        *((name, ctypes.c_int64) for name in ("count", "vocab", "stride")),
        ("workspace", ctypes.c_void_p),
    ]


class LogprobsArgs(ctypes.Structure):
    """LogprobsArgs of core/sampling.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("chosen", "ranks", "top", "top_ids", "logits", "ids")),
        *((name, ctypes.c_int64) for name in ("count", "vocab", "stride", "top_n")),
    ]


class NormArgs(ctypes.Structure):
    """NormArgs of cuda/layers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "sum", "x", "residual", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "dim")),
        *((name, ctypes.c_int64) for name in ("y_stride", "sum_stride", "x_stride", "residual_stride")),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
        ("y_dtype", ctypes.c_int32),
    ]


class ActivationArgs(ctypes.Structure):
    """ActivationArgs of cuda/layers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "x", "up")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "x_stride", "up_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("activation", "x_dtype", "y_dtype")),
    ]


class AxpbyArgs(ctypes.Structure):
    """AxpbyArgs of core/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "x", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "out_stride", "x_stride", "y_stride")),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
    ]


class GatherColumnsArgs(ctypes.Structure):
    """GatherColumnsArgs of core/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "x", "index")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "x_columns", "y_stride", "x_stride")),
    ]


class EmbeddingArgs(ctypes.Structure):
    """EmbeddingArgs of cuda/layers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "tokens", "positions", "table", "position_table")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "y_stride", "table_stride", "position_stride")),
        *((name, ctypes.c_int64) for name in ("vocab", "position_rows")),
        ("table_dtype", ctypes.c_int32),
    ]


class RopeAnglesArgs(ctypes.Structure):
    """RopeAnglesArgs of core/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "positions", "inv_freq", "table")),
        *((name, ctypes.c_int64) for name in ("rows", "half", "classes")),
        ("scaling", ctypes.c_float),
    ]


class RopeArgs(ctypes.Structure):
    """RopeArgs of core/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "head_size", "half", "x_stride")),
        ("inverse", ctypes.c_bool),
    ]


class KvWriteArgs(ctypes.Structure):
    """KvWriteArgs of core/args.h."""

    _fields_ = [
        ("cache", CacheView),
        *((name, ctypes.c_void_p) for name in ("k", "v", "cos", "sin", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "half", "k_stride", "v_stride")),
    ]


class QkvWriteArgs(ctypes.Structure):
    """QkvWriteArgs of cuda/qkv_write.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "qkv")),
        ("cache", CacheView),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "half", "q_stride", "qkv_stride", "norm_stride")),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_int32),
        ("paired", ctypes.c_bool),
        ("q_dtype", ctypes.c_int32),
    ]


LAYERS = (
    NormArgs, ActivationArgs, AxpbyArgs, EmbeddingArgs, GatherColumnsArgs, RopeAnglesArgs, RopeArgs, KvWriteArgs,
    QkvWriteArgs,
)  # fmt: skip


@functools.cache
def library() -> Path:
    """Every kernel file of csrc/cuda over the emulator, compiled, with the bindings on top: also a module ``_cuda``.

    The test is skipped where there is no compiler, or no pybind11.

    It is made once for the sources as they are, in the build folder.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler is installed")
    pybind11 = pytest.importorskip("pybind11")
    command = [
        compiler,
        "-std=c++17",
        "-fPIC",
        "-w",
        "-Wno-psabi",
        "-U_FORTIFY_SOURCE",
        f"-I{HOST}",
        f"-I{ROOT / 'csrc'}",
    ]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += ['-DPYLLM_CUDA_ARCHITECTURES="host"', "-DPYLLM_WGMMA", "-x", "c++"]
    kernels = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HOST / "emulator.cc", HOST / "library.cc"]
    bindings = sorted((ROOT / "csrc/bindings").glob("cuda_*.cc"))
    read = [
        *kernels,
        *bindings,
        *HOST.rglob("*.*h"),
        *(ROOT / "csrc/cuda").glob("*.*h"),
        *(ROOT / "csrc/core").glob("*.h"),
    ]
    read += (ROOT / "csrc/bindings").glob("cuda_*.h")
    state = hashlib.sha256(repr((command, sys.version)).encode())
    for path in sorted(read):
        state.update(path.read_bytes())
    result = ROOT / "build" / "cuda_host" / state.hexdigest()[:16] / "_cuda.so"
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        objects = [f"{folder}/{source.name}.o" for source in [*bindings, *kernels]]
        jobs = [
            subprocess.Popen([*command, "-O0" if source in bindings else "-O1", "-c", str(source), "-o", to])
            for source, to in zip([*bindings, *kernels], objects, strict=True)
        ]
        assert [job.wait() for job in jobs] == [0] * len(jobs)
        subprocess.run([compiler, "-shared", "-o", f"{folder}/_cuda.so", *objects], check=True)
        os.replace(f"{folder}/_cuda.so", result)
    return result


@functools.cache
def build() -> ctypes.CDLL:
    """The launchers, for ctypes."""
    kernels = ctypes.CDLL(str(library()))
    arguments, number = ctypes.POINTER(MatmulArgs), ctypes.c_int64
    kernels.host_skinny_matmul.argtypes = [arguments, number]
    kernels.host_skinny_qkv.argtypes = [ctypes.POINTER(QkvArgs), number]
    kernels.host_skinny_argmax.argtypes = [ctypes.POINTER(ArgmaxArgs), number]
    kernels.host_mma_matmul.argtypes = kernels.host_plain_matmul.argtypes = [arguments]
    kernels.host_skinny_plan.argtypes = [number] * 3 + [ctypes.c_bool, number, number, ctypes.POINTER(SkinnyPlan)]
    kernels.host_wgmma_matmul.argtypes = [arguments, number]
    kernels.host_wgmma_plan.argtypes = [number] * 4 + [ctypes.POINTER(WgmmaPlan)]
    kernels.host_split_matmul.argtypes = [ctypes.POINTER(SplitMatmulArgs)]
    kernels.host_split_plan.argtypes = [number, number, ctypes.POINTER(SplitPlan)]
    kernels.host_last_block_first.argtypes = [ctypes.c_bool]
    kernels.host_limit_device.argtypes = [ctypes.c_int, ctypes.c_int]
    for attention in (
        kernels.host_prompt_attention,
        kernels.host_wgmma_attention,
        kernels.host_split_attention,
        kernels.host_plain_attention,
    ):
        attention.argtypes = [ctypes.POINTER(AttentionArgs)]
    for args in (*LAYERS, SampleArgs, LogprobsArgs):
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in args.__name__.removesuffix("Args"))
        getattr(kernels, f"host{name}").argtypes = [ctypes.POINTER(args)]
    return kernels


@contextmanager
def limited(shared_bytes: int, major: int = 9) -> Iterator[None]:
    """Inside, the emulated GPU's blocks have so much shared memory, and it is of that major compute capability."""
    build().host_limit_device(shared_bytes, major)
    try:
        yield
    finally:
        build().host_limit_device(227 * 1024, 9)


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
