"""The product of Hopper's wgmma on the host emulator, with its barriers, boxes and clusters, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_host import ACTIVATIONS, MatmulArgs, WgmmaPlan, as_aligned, build, limited
from emulated_cuda import emulated_gpu
from test_cuda_matmul import call, case, close, formula
from test_gpu import SIZES, TILE_SIZES

from pyllm.cuda_ops import CudaOps

bfloat16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def kernels():
    return build()


def wgmma(kernels, multiprocessors=4):
    return lambda args: kernels.host_wgmma_matmul(args, multiprocessors)


def plan_of(kernels, rows, n, k, multiprocessors=132):
    plan = WgmmaPlan()
    kernels.host_wgmma_plan(rows, n, k, multiprocessors, plan)
    return plan


@pytest.mark.parametrize(
    ("rows", "n", "k", "multiprocessors", "columns", "pair", "splits"),
    [
        (1, 1, 8, 1, 128, 1, 1),
        (258, 500, 200, 1, 256, 1, 1),  # one block, six tiles
        (130, 330, 200, 8, 128, 2, 1),
        (200, 500, 200, 2, 256, 2, 1),  # one pair, two tiles
        (65, 600, 72, 4, 192, 1, 1),
        (2304, 300, 8, 2, 192, 2, 1),  # more units than a group has
        (130, 200, 328, 4, 256, 1, 4),  # six steps, of which two splits take two
        (65, 130, 1032, 4, 192, 1, 8),  # 17 steps
        (300, 120, 5128, 1, 128, 1, 8),  # more steps of a split than stages, three tiles
    ],
)
def test_every_tile_matches_formula(kernels, rows, n, k, multiprocessors, columns, pair, splits):
    plan = plan_of(kernels, rows, n, k, multiprocessors)
    assert (plan.columns, plan.pair, plan.splits) == (columns, pair, splits)
    arrays, width = case(rows, n, k, seed=n)
    close(call(wgmma(kernels, multiprocessors), arrays, width), formula(arrays), 1e-6)


def test_the_sizes_that_a_gpu_is_tested_with_reach_all_of_it(kernels):
    """Pairs whose blocks take more steps than their ring has stages, and tiles of each width for the same rows."""
    stages, round_again, widths = {256: 4, 192: 5, 128: 6}, set(), set()
    for multiprocessors in (132, 2, 1):
        for rows, n, k in SIZES:
            plan = plan_of(kernels, rows, n, k, multiprocessors)
            tiles = -(-plan.row_units * plan.column_tiles * plan.pair * plan.splits // plan.blocks)
            if plan.pair == 2 and tiles * -(-k // 64) > stages[plan.columns]:
                round_again.add(plan.columns)
        widths |= {(size, plan_of(kernels, *size, multiprocessors).columns) for size in TILE_SIZES}
    assert round_again == {128, 192, 256} == {columns for _, columns in widths}
    assert all(len({columns for of, columns in widths if of == size}) > 1 for size in TILE_SIZES)


@pytest.mark.parametrize("guard", [0, 3])  # rows that lie at multiples of 16 bytes, and others
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_epilogue(kernels, gated, dtype, guard):
    bound = 1e-6 if dtype == np.float32 else 4e-3
    for n, k, splits in ((384, 72, 1), (150, 72, 1), (384, 392, 4)):  # whole tiles, parts of them, and sums of splits
        assert plan_of(kernels, 66, n, k, 4).splits == splits
        arrays, width = case(66, n, k, gated=gated)
        got = call(
            wgmma(kernels), arrays, width, activation="silu", gated=gated, y_dtype=dtype, guard=guard
        )  # fmt: skip
        close(got, formula(arrays, activation="silu", gated=gated), bound)
        bare = {**arrays, "bias": None, "residual": None}
        got = call(wgmma(kernels), bare, width, gated=gated, y_dtype=dtype, guard=guard)
        close(got, formula(bare, gated=gated), bound)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none", "silu"}))
def test_activations_of_whole_tiles(kernels, activation):
    arrays, width = case(66, 256, 72, gated=True)
    got = call(wgmma(kernels), arrays, width, activation=activation, gated=True, guard=0)
    close(got, formula(arrays, activation=activation, gated=True), 1e-6)
    arrays, width = case(66, 128, 72)
    close(
        call(wgmma(kernels), arrays, width, activation=activation, guard=0),
        formula(arrays, activation=activation),
        1e-6,
    )


def test_what_lies_askew_is_finished_all_the_same(kernels):
    for gated in (False, True):
        arrays, width = case(66, 128, 72, gated=gated)
        askew = dict(arrays)
        for name in ("bias", "residual"):
            raw = np.empty(arrays[name].size + 1, "f4")[1:]
            raw[...] = arrays[name].ravel()
            askew[name] = raw.reshape(arrays[name].shape)
        close(call(wgmma(kernels), askew, width, gated=gated, guard=0), formula(arrays, gated=gated), 1e-6)


@pytest.mark.parametrize(("k", "splits"), [(200, 1), (1032, 8)])
def test_a_row_is_the_same_bits_in_any_tile_and_on_any_chip(kernels, k, splits):
    arrays, columns = case(257, 150, k)
    whole = call(wgmma(kernels, 132), arrays, columns)
    part = {**arrays, "x": as_aligned(arrays["x"][60:130]), "residual": arrays["residual"][60:130].copy()}
    assert plan_of(kernels, 257, 150, k).splits == plan_of(kernels, 70, 150, k).splits == splits
    for multiprocessors in (1, 2, 7):
        assert (call(wgmma(kernels, multiprocessors), arrays, columns) == whole).all()
        assert (call(wgmma(kernels, multiprocessors), part, columns) == whole[60:130]).all()


@pytest.mark.parametrize("multiprocessors", [1, 2, 78, 114, 132])
@pytest.mark.parametrize("n", [1, 768, 4096, 28672, 128256])
@pytest.mark.parametrize("rows", [65, 128, 257, 512, 2048, 8193])
def test_plans_use_the_chip(kernels, rows, n, multiprocessors):
    for k in (8, 2048, 14336):
        plan = plan_of(kernels, rows, n, k, multiprocessors)
        tiles, cluster = plan.row_units * plan.column_tiles, plan.pair * plan.splits
        assert plan.row_units * plan.pair * 128 >= rows > (plan.row_units - 1) * plan.pair * 128
        assert plan.column_tiles * plan.columns >= n > (plan.column_tiles - 1) * plan.columns
        assert plan.shared_bytes <= 227 * 1024 and cluster in (1, 2, 4, 8) and 1 in (plan.pair, plan.splits)
        assert plan.splits <= max(k // 64, 1) and plan.splits == plan_of(kernels, rows, n, k).splits
        assert plan.splits == 1 or rows <= 1024
        if plan.splits > 1:
            assert plan.blocks == tiles * plan.splits  # one with splits makes one tile
        else:
            assert plan.blocks == min(tiles, multiprocessors // plan.pair) * plan.pair


LLAMA = {
    "1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate and up": (16384, 2048), "down": (2048, 8192)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)},
}


@pytest.mark.parametrize("rows", [65, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("model", LLAMA)
def test_few_rows_leave_few_multiprocessors_without_work(kernels, model, rows):
    for n, k in LLAMA[model].values():
        plan = plan_of(kernels, rows, n, k)
        clusters = 132 // (plan.pair * plan.splits)
        rounds = -(-plan.row_units * plan.column_tiles // clusters)
        busy = plan.row_units * plan.column_tiles * plan.pair * plan.splits / (rounds * 132)
        # Work of 96 tiles that nothing makes more of, and splits of 11 tiles, whose number has to be a power of two.
        assert busy >= (0.66 if rows < 1024 else 0.96)


def test_more_rows_than_1024_cut_nothing(kernels):
    for n, k in ((768, 3072), (2048, 8192), (128, 14336)):
        assert plan_of(kernels, 1024, 128, k).splits > 1
        for rows in (1025, 1408, 1920, 4736):
            assert plan_of(kernels, rows, n, k).splits == 1


def test_clusters_of_4_and_8_have_128_multiprocessors_of_132(kernels):
    for rows in range(65, 1025, 64):
        for n in (768, 1408, 2048, 3072, 4096, 4224, 6144):
            for k in (768, 2048, 3072, 14336):
                plan = plan_of(kernels, rows, n, k)
                if plan.splits >= 4 and plan.row_units * plan.column_tiles * plan.splits <= 132:
                    assert plan.row_units * plan.column_tiles * plan.splits <= 128


def test_a_pair_has_rows_for_both(kernels):
    assert plan_of(kernels, 16, 34, 128).pair == plan_of(kernels, 257, 1000, 72).pair == 1
    assert plan_of(kernels, 256, 1000, 72).pair == 2


def test_large_products_have_large_tiles_and_no_splits(kernels):
    for size in (4096, 8192):
        plan = plan_of(kernels, size, size, size)
        assert (plan.columns, plan.pair, plan.splits) == (256, 2, 1)
    assert plan_of(kernels, 2048, 3072, 2048).columns == 192  # 128 blocks of 132, in two rounds
    assert plan_of(kernels, 512, 4096, 4096).columns == 128


def test_it_runs_on_hopper_alone(kernels):
    args = MatmulArgs(rows=128, n=8, k=16, x_stride=16, x_dtype=2, w_dtype=2)
    with limited(163 * 1024, major=8):
        assert kernels.host_wgmma_matmul(args, 8) == 801  # cudaErrorNotSupported
    with limited(227 * 1024, major=10):
        assert kernels.host_wgmma_matmul(args, 8) == 801
    assert kernels.host_wgmma_matmul(MatmulArgs(rows=128, n=8, k=15, x_stride=16), 8) == 1  # cudaErrorInvalidValue


def test_a_gpu_says_how_many_clusters_it_runs_at_once():
    with emulated_gpu() as gpu:
        assert [gpu.kernels.wgmma_clusters(size) for size in (2, 4, 8)] == [64, 32, 16]
        with pytest.raises(ValueError, match="expected 2, 4 or 8 blocks, got 3"):
            gpu.kernels.wgmma_clusters(3)
        with limited(163 * 1024, 8), pytest.raises(RuntimeError, match="wgmma_clusters"):
            gpu.kernels.wgmma_clusters(2)


@pytest.mark.parametrize("major", [8, 9])
def test_the_op_takes_it_where_there_is_one(major):
    arrays, _ = case(70, 24, 136, bias=False, residual=False)
    with limited((227 if major == 9 else 163) * 1024, major), emulated_gpu() as gpu:
        assert gpu.kernels.has_wgmma() == (major == 9)
        ops = CudaOps(gpu)
        close(ops.matmul(gpu.upload(arrays["x"]), ops.pack(arrays["w"])).numpy().astype("f8"), formula(arrays), 1e-6)
