"""The product of Hopper's wgmma on the host emulator, with its barriers, boxes and clusters, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_host import MatmulArgs, WgmmaPlan, as_aligned, build, limited
from emulated_cuda import emulated_gpu
from test_cuda_matmul import call, case, close, formula

from pyllm.cuda_ops import CudaOps

bfloat16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def kernels():
    return build()


def wgmma(kernels, multiprocessors=4):
    return lambda args: kernels.host_wgmma_matmul(args, multiprocessors)


def plan_of(kernels, rows, n, multiprocessors=132):
    plan = WgmmaPlan()
    kernels.host_wgmma_plan(rows, n, multiprocessors, plan)
    return plan


@pytest.mark.parametrize(
    ("rows", "n", "k", "multiprocessors", "columns", "cluster"),
    [
        (1, 1, 8, 1, 128, 1),
        (258, 300, 200, 1, 128, 1),  # one block, nine tiles
        (130, 200, 456, 1, 256, 1),  # more steps than a ring has stages
        (130, 300, 328, 8, 128, 2),
        (200, 400, 584, 2, 256, 2),  # one cluster, two tiles
        (65, 600, 72, 4, 256, 1),
        (2304, 300, 8, 2, 128, 2),  # more units than a group has
    ],
)
def test_every_tile_matches_formula(kernels, rows, n, k, multiprocessors, columns, cluster):
    plan = plan_of(kernels, rows, n, multiprocessors)
    assert (plan.columns, plan.cluster) == (columns, cluster)
    arrays, width = case(rows, n, k, seed=n)
    close(call(wgmma(kernels, multiprocessors), arrays, width), formula(arrays), 1e-6)


@pytest.mark.parametrize("guard", [0, 3])  # rows that lie at multiples of 16 bytes, and others
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_epilogue(kernels, gated, dtype, guard):
    for n in (136, 150):
        arrays, width = case(66, n, 72, gated=gated)
        got = call(
            wgmma(kernels), arrays, width, activation="silu", gated=gated, y_dtype=dtype, guard=guard
        )  # fmt: skip
        expected = formula(arrays, activation="silu", gated=gated)
        close(got, expected, 1e-6 if dtype == np.float32 else 4e-3)
        bare = {**arrays, "bias": None, "residual": None}
        close(call(wgmma(kernels), bare, width, gated=gated, guard=guard), formula(bare, gated=gated), 1e-6)


def test_a_row_is_the_same_bits_in_any_tile_and_on_any_chip(kernels):
    arrays, columns = case(257, 150, 200)
    whole = call(wgmma(kernels, 132), arrays, columns)
    part = {**arrays, "x": as_aligned(arrays["x"][60:130]), "residual": arrays["residual"][60:130].copy()}
    for multiprocessors in (1, 2, 7):
        assert (call(wgmma(kernels, multiprocessors), arrays, columns) == whole).all()
        assert (call(wgmma(kernels, multiprocessors), part, columns) == whole[60:130]).all()


@pytest.mark.parametrize("multiprocessors", [1, 2, 78, 114, 132])
@pytest.mark.parametrize("n", [1, 768, 4096, 28672, 128256])
@pytest.mark.parametrize("rows", [65, 128, 257, 512, 2048, 8192, 8193])
def test_plans_use_the_chip(kernels, rows, n, multiprocessors):
    plan = plan_of(kernels, rows, n, multiprocessors)
    assert plan.blocks % plan.cluster == 0 and 1 <= plan.blocks <= multiprocessors
    assert plan.row_units * plan.cluster * 128 >= rows > (plan.row_units - 1) * plan.cluster * 128
    assert plan.column_tiles * plan.columns >= n > (plan.column_tiles - 1) * plan.columns
    assert plan.shared_bytes <= 227 * 1024
    if plan.row_units * plan.column_tiles * plan.cluster >= multiprocessors:
        assert plan.blocks == multiprocessors // plan.cluster * plan.cluster


def test_small_products_have_smaller_tiles(kernels):
    assert plan_of(kernels, 512, 4096).columns == 128  # 128 tiles instead of 64
    assert plan_of(kernels, 8192, 8192).columns == plan_of(kernels, 4096, 4096).columns == 256
    assert plan_of(kernels, 128, 4096).cluster == 1  # nobody to share W with
    assert plan_of(kernels, 2048, 4096).cluster == 2


def test_it_runs_on_hopper_alone(kernels):
    args = MatmulArgs(rows=128, n=8, k=16, x_stride=16, x_dtype=2, w_dtype=2)
    with limited(163 * 1024, major=8):
        assert kernels.host_wgmma_matmul(args, 8) == 801  # cudaErrorNotSupported
    with limited(227 * 1024, major=10):
        assert kernels.host_wgmma_matmul(args, 8) == 801
    assert kernels.host_wgmma_matmul(MatmulArgs(rows=128, n=8, k=15, x_stride=16), 8) == 1  # cudaErrorInvalidValue


@pytest.mark.parametrize("major", [8, 9])
def test_the_op_takes_it_where_there_is_one(major):
    arrays, _ = case(70, 24, 136, bias=False, residual=False)
    with limited((227 if major == 9 else 163) * 1024, major), emulated_gpu() as gpu:
        assert gpu.kernels.has_wgmma() == (major == 9)
        ops = CudaOps(gpu)
        close(ops.matmul(gpu.upload(arrays["x"]), ops.pack(arrays["w"])).numpy().astype("f8"), formula(arrays), 1e-6)
