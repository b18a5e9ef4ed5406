"""The CUDA matrix products on the host emulator, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_host import (
    ACTIVATIONS,
    DTYPES,
    ArgmaxArgs,
    CacheView,
    MatmulArgs,
    QkvArgs,
    SkinnyPlan,
    SplitMatmulArgs,
    SplitPlan,
    aligned,
    as_aligned,
    build,
    limited,
)
from emulated_cuda import emulated_gpu
from oracle.activation import activation as activation_formula
from oracle.rope import rope

from pyllm.cuda_ops import CudaOps

bfloat16 = ml_dtypes.bfloat16
PAGE = 64


@pytest.fixture(scope="module")
def kernels():
    return build()


def case(rows, n, k, *, x_dtype=bfloat16, w_dtype=bfloat16, gated=False, bias=True, residual=True, norm=None, seed=0):
    rng = np.random.default_rng(seed)
    columns = n // 2 if gated else n
    arrays = {
        "x": as_aligned(rng.standard_normal((rows, k)).astype(x_dtype)),
        "w": as_aligned((rng.standard_normal((n, k)) / np.sqrt(k)).astype(w_dtype)),
        "bias": rng.standard_normal(n).astype("f4") if bias else None,
        "residual": rng.standard_normal((rows, columns)).astype("f4") if residual else None,
        "norm_weight": rng.standard_normal(k).astype("f4") if norm else None,
        "norm_bias": rng.standard_normal(k).astype("f4") if norm == "layer" else None,
    }
    return arrays, columns


def call(run, arrays, columns, *, activation="none", gated=False, norm=None, y_dtype=np.float32, guard=3):
    """y[rows, columns] of a launcher; what lies between and behind its rows must stay as it was."""
    rows, k = arrays["x"].shape
    y = aligned((rows + 1, columns + guard), np.dtype(y_dtype))
    y[...] = np.nan
    pointers = {name: a.ctypes.data for name, a in arrays.items() if a is not None}
    args = MatmulArgs(
        y=y.ctypes.data, **pointers, rows=rows, n=len(arrays["w"]), k=k, x_stride=k, y_stride=columns + guard,
        residual_stride=columns, eps=1e-5, norm=int(norm == "rms"), activation=ACTIVATIONS[activation], gated=gated,
        x_dtype=DTYPES[arrays["x"].dtype], w_dtype=DTYPES[arrays["w"].dtype], y_dtype=DTYPES[np.dtype(y_dtype)],
    )  # fmt: skip
    assert run(args) == 0
    assert np.isnan(y[rows:].astype("f4")).all() and np.isnan(y[:, columns:].astype("f4")).all()
    return y[:rows, :columns].astype("f8")


def formula(arrays, *, activation="none", gated=False, norm=None):
    x, w = arrays["x"].astype("f8"), arrays["w"].astype("f8")
    if norm:
        x = x - x.mean(1, keepdims=True) * (norm == "layer")
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * arrays["norm_weight"]
        x = x + (0 if arrays["norm_bias"] is None else arrays["norm_bias"])
    y = x @ w.T + (0 if arrays["bias"] is None else arrays["bias"])
    act = y[:, 0::2] if gated else y
    act = act if activation == "none" else activation_formula(act, activation)
    y = act * y[:, 1::2] if gated else act
    return y + (0 if arrays["residual"] is None else arrays["residual"])


def close(got, expected, bound):
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= bound, error


def skinny(kernels, multiprocessors=3):
    return lambda args: kernels.host_skinny_matmul(args, multiprocessors)


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 1, 8), (1, 40, 1024), (3, 17, 1032), (8, 24, 2056), (9, 7, 264), (16, 33, 128), (1, 8, 6152)],
)
def test_skinny_matches_formula(kernels, rows, n, k):
    arrays, columns = case(rows, n, k, seed=rows)
    close(call(skinny(kernels), arrays, columns), formula(arrays), 1e-6)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_skinny_normalises_its_input(kernels, norm):
    arrays, columns = case(5, 18, 1160, x_dtype=np.float32, norm=norm, residual=False)
    got = call(skinny(kernels), arrays, columns, norm=norm)
    close(got, formula(arrays, norm=norm), 4e-3)  # the normalised row is rounded to bf16: 2^-9 each


def split(kernels):
    def run(args):
        partial, tickets = np.full(256 * 64 * 128, np.nan, "f4"), np.zeros(256, np.uint32)
        failed = kernels.host_split_matmul(SplitMatmulArgs(args, partial.ctypes.data, tickets.ctypes.data))
        assert not tickets.any()
        return failed

    return run


def launcher(kernels, name):
    if name in ("skinny", "split"):
        return (skinny if name == "skinny" else split)(kernels)
    return getattr(kernels, f"host_{name}_matmul")


@pytest.mark.parametrize("kernel", ["skinny", "split", "mma", "plain"])
@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "silu", "relu"])
def test_activations_and_gates(kernels, kernel, activation):
    run = launcher(kernels, kernel)
    for gated in (False, True):
        arrays, columns = case(4, 22, 72, gated=gated)
        got = call(run, arrays, columns, activation=activation, gated=gated)
        close(got, formula(arrays, activation=activation, gated=gated), 1e-6)


@pytest.mark.parametrize("guard", [0, 1])  # rows that lie at multiples of 16 bytes, and others
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("kernel", ["split", "mma"])
def test_epilogue_of_tiles(kernels, kernel, dtype, guard):
    run, bound = launcher(kernels, kernel), 1e-6 if dtype == np.float32 else 4e-3
    for gated in (False, True):
        arrays, columns = case(40, 152, 72, gated=gated)  # four warps' columns, and some of a fifth's
        got = call(run, arrays, columns, activation="silu", gated=gated, y_dtype=dtype, guard=guard)
        close(got, formula(arrays, activation="silu", gated=gated), bound)
        bare = {**arrays, "bias": None, "residual": None}
        close(call(run, bare, columns, gated=gated, y_dtype=dtype, guard=guard), formula(bare, gated=gated), bound)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 8), (17, 130, 64), (63, 5, 200), (65, 129, 72), (130, 31, 328)])
def test_mma_matches_formula(kernels, rows, n, k):
    arrays, columns = case(rows, n, k, seed=n)
    close(call(kernels.host_mma_matmul, arrays, columns), formula(arrays), 1e-6)


def test_mma_takes_every_tile_once(kernels):
    arrays, columns = case(
        9 * 128 + 1, 130, 8, bias=False, residual=False
    )  # more row tiles than a group, two column tiles
    close(call(kernels.host_mma_matmul, arrays, columns), formula(arrays), 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (17, 33, 31), (5, 64, 97)])
def test_plain_matches_formula(kernels, rows, n, k, dtype):
    arrays, columns = case(rows, n, k, x_dtype=dtype, w_dtype=dtype)
    close(call(kernels.host_plain_matmul, arrays, columns), formula(arrays), 1e-6)


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 1, 8), (17, 130, 64), (32, 7, 584), (33, 129, 1096), (64, 20, 776), (19, 300, 2824)]
)
def test_split_matches_formula(kernels, rows, n, k):
    arrays, columns = case(rows, n, k, seed=n)
    close(call(split(kernels), arrays, columns), formula(arrays), 1e-6)


def test_split_row_is_the_same_bits_in_any_batch(kernels):
    arrays, columns = case(64, 19, 840)  # three splits: 3 blocks and a half make a tree that is not full
    plan = SplitPlan()
    kernels.host_split_plan(19, 840, plan)
    assert plan.splits == 3
    whole = call(split(kernels), arrays, columns)
    kernels.host_last_block_first(True)
    try:
        assert (call(split(kernels), arrays, columns) == whole).all()
    finally:
        kernels.host_last_block_first(False)
    for rows in (17, 32, 33):
        part = {**arrays, "x": as_aligned(arrays["x"][:rows]), "residual": arrays["residual"][:rows].copy()}
        assert (call(split(kernels), part, columns) == whole[:rows]).all()


@pytest.mark.parametrize("k", [8, 64, 768, 2048, 4096, 14336, 65544])
@pytest.mark.parametrize("n", [1, 768, 2048, 4096, 16384, 28672, 128256])
def test_splits_take_every_step_once_within_the_workspace(kernels, n, k):
    plan, steps = SplitPlan(), -(-k // 64)
    kernels.host_split_plan(n, k, plan)
    assert plan.tiles * 128 >= n > (plan.tiles - 1) * 128
    assert plan.splits * plan.steps >= steps > (plan.splits - 1) * plan.steps
    assert plan.splits == 1 or (plan.tiles * plan.splits <= 256 and plan.steps >= 4)
    if k >= 2048 and n >= 1024:  # 132 multiprocessors, each of two blocks, have something to do
        assert plan.tiles * plan.splits >= 64


@pytest.mark.parametrize("kernel", ["skinny", "split", "mma", "plain"])
def test_bfloat16_output(kernels, kernel):
    run = launcher(kernels, kernel)
    arrays, columns = case(3, 20, 40)
    exact = call(run, arrays, columns)
    assert (call(run, arrays, columns, y_dtype=bfloat16) == exact.astype("f4").astype(bfloat16).astype("f8")).all()


def test_skinny_row_is_the_same_bits_in_any_batch_and_on_any_chip(kernels):
    arrays, columns = case(11, 19, 1304, x_dtype=np.float32, norm="rms")
    whole = call(skinny(kernels, 3), arrays, columns, norm="rms")
    for row in (0, 7, 10):
        alone = {
            **arrays,
            "x": as_aligned(arrays["x"][row : row + 1]),
            "residual": arrays["residual"][row : row + 1].copy(),
        }
        assert (call(skinny(kernels, 132), alone, columns, norm="rms")[0] == whole[row]).all()


def pairs_first(heads, size, half):
    """Order of a head's rows in which those that are rotated together are neighbours, for `heads` heads."""
    head = [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, size)]
    return np.concatenate([np.array(head, int) + h * size for h in range(heads)])


@pytest.mark.parametrize("cache_dtype", [np.float32, bfloat16])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size", "half"),
    [(1, 2, 1, 16, 8), (5, 3, 2, 20, 6), (16, 1, 1, 2, 1), (3, 2, 2, 64, 0)],
)
def test_qkv_rotates_and_writes(kernels, rows, heads, kv_heads, size, half, cache_dtype):
    n, k, blocks = (heads + 2 * kv_heads) * size, 72, 2
    arrays, _ = case(rows, n, k, x_dtype=np.float32, norm="rms", residual=False, seed=size)
    plain = call(skinny(kernels), arrays, n, norm="rms").reshape(rows, heads + 2 * kv_heads, size)
    rng = np.random.default_rng(1)
    cos, sin = rng.standard_normal((2, rows, half)).astype("f4")
    slots = rng.permutation(blocks * PAGE)[:rows].astype(np.int64)
    if rows > 1:
        slots[1] = -1
        slots[-1] = blocks * PAGE
    rotated = heads + kv_heads
    order = np.concatenate([pairs_first(rotated, size, half), np.arange(rotated * size, n)])
    w, bias = as_aligned(arrays["w"][order]), arrays["bias"][order].copy()
    cache = np.full((blocks + 1, kv_heads, 2, PAGE, -(-size // 16) * 16), np.nan, cache_dtype)
    q = np.full((rows + 1, heads * size + 3), np.nan, "f4")
    matmul = MatmulArgs(
        y=q.ctypes.data, x=arrays["x"].ctypes.data, w=w.ctypes.data, bias=bias.ctypes.data,
        norm_weight=arrays["norm_weight"].ctypes.data, rows=rows, n=n, k=k, x_stride=k, y_stride=heads * size + 3,
        eps=1e-5, norm=1, x_dtype=0, w_dtype=2, y_dtype=0,
    )  # fmt: skip
    args = QkvArgs(
        matmul=matmul, cache=CacheView(cache.ctypes.data, blocks, kv_heads, size, DTYPES[np.dtype(cache_dtype)]),
        cos=cos.ctypes.data if half else 0, sin=sin.ctypes.data, slots=slots.ctypes.data, heads=heads, half=half,
    )  # fmt: skip
    assert kernels.host_skinny_qkv(args, 3) == 0
    turned = rope(plain[:, :rotated], cos.astype("f8"), sin.astype("f8"))
    close(q[:rows, : heads * size].astype("f8"), turned[:, :heads].reshape(rows, -1), 1e-6)
    assert np.isnan(q[rows:]).all()
    assert np.isnan(q[:, heads * size :]).all()
    bound = 1e-6 if cache_dtype == np.float32 else 4e-3
    for row, slot in enumerate(slots):
        if 0 <= slot < blocks * PAGE:
            written = cache[slot // PAGE, :, :, slot % PAGE].astype("f8")
            close(written[:, 0, :size], turned[row, heads:], bound)
            close(written[:, 1, :size], plain[row, rotated:], bound)
            assert (written[..., size:] == 0).all()
            cache[slot // PAGE, :, :, slot % PAGE] = np.nan
    assert np.isnan(cache.astype("f4")).all()


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (16, 100), (5, 333)])
def test_argmax_is_that_of_the_outputs(kernels, rows, n):
    arrays, _ = case(rows, n, 136, x_dtype=np.float32, norm="layer", residual=False, seed=n)
    arrays["w"][n // 2 :] = arrays["w"][: n - n // 2]  # every largest stands twice
    arrays["bias"][n // 2 :] = arrays["bias"][: n - n // 2]
    if rows > 1:
        arrays["x"][1] = np.nan
    for multiprocessors in (1, 3, 132):
        logits = call(skinny(kernels, multiprocessors), {**arrays, "residual": None}, n, norm="layer")
        tokens, ticket = np.full(rows + 1, -7, np.int32), np.zeros(1, np.uint32)
        partial = np.full((multiprocessors, rows), -1, np.int64)
        pointers = {name: a.ctypes.data for name, a in arrays.items() if a is not None}
        matmul = MatmulArgs(**pointers, rows=rows, n=n, k=136, x_stride=136, eps=1e-5, norm=0, x_dtype=0, w_dtype=2)
        args = ArgmaxArgs(matmul, tokens.ctypes.data, partial.ctypes.data, ticket.ctypes.data)
        assert kernels.host_skinny_argmax(args, multiprocessors) == 0
        expected = np.where(np.isnan(logits).any(1), -1, logits.argmax(1))
        assert tokens.tolist() == [*expected, -7]
        assert ticket[0] == 0


def test_what_a_kernel_cannot_take_is_an_error(kernels):
    args = MatmulArgs(rows=17, n=8, k=16, x_stride=16)
    assert kernels.host_skinny_matmul(args, 132) != 0  # 17 rows
    assert kernels.host_mma_matmul(MatmulArgs(rows=4, n=8, k=15, x_stride=16)) != 0
    assert kernels.host_plain_matmul(MatmulArgs(rows=4, n=8, k=15, w_dtype=2)) != 0
    assert split(kernels)(MatmulArgs(rows=65, n=8, k=16, x_stride=16)) != 0
    assert split(kernels)(MatmulArgs(rows=4, n=8, k=15, x_stride=16)) != 0
    assert kernels.host_skinny_argmax(ArgmaxArgs(args), 132) != 0
    assert kernels.host_skinny_qkv(QkvArgs(MatmulArgs(rows=1, n=8, k=16), CacheView(0, 1, 1, 4, 0), heads=1), 132) != 0
    assert kernels.host_mma_matmul(MatmulArgs(rows=0, n=8, k=16, x_stride=16)) == 0  # nothing to do


def plan_of(kernels, rows, n, k, *, whole=False, multiprocessors=132, shared=227):
    plan = SkinnyPlan()
    kernels.host_skinny_plan(rows, n, k, whole, multiprocessors, shared * 1024, plan)
    return plan


SHAPES = [(2304, 768), (3072, 2048), (2048, 8192), (6144, 4096), (4096, 14336), (128256, 2048)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_two_decode_kernels_share_a_multiprocessor(kernels, n, k):
    plan = plan_of(kernels, 1, n, k, whole=True)
    assert plan.fits and plan.blocks <= 132 and plan.tiles * 8 >= n > (plan.tiles - 1) * 8 and plan.chunks * 1024 >= k
    assert 2 * (plan.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("shared", [227, 163, 99])  # Hopper, A100, the others
def test_decoding_fits_every_chip(kernels, n, k, shared):
    for rows in range(1, 17 if shared > 99 else 16):
        plan = plan_of(kernels, rows, n, k, shared=shared)
        assert plan.fits and plan.shared_bytes <= shared * 1024 and 2 <= plan.stages <= 5
        assert plan.streamed or plan.stages == 5
    assert not plan_of(kernels, 17, n, k).fits and not plan_of(kernels, 1, n, k + 4).fits


def test_skinny_gives_the_same_bits_where_x_is_streamed(kernels):
    arrays, columns = case(16, 75, 2056, seed=5)  # tiles in groups of 4 and of fewer, three chunks
    whole = call(skinny(kernels, 2), arrays, columns)
    close(whole, formula(arrays), 1e-6)
    assert not plan_of(kernels, 16, 75, 2056).streamed
    for shared, stages in ((163, 3), (102, 2)):
        plan = plan_of(kernels, 16, 75, 2056, shared=shared)
        assert plan.streamed and plan.stages == stages
        with limited(shared * 1024):
            assert (call(skinny(kernels, 2), arrays, columns) == whole).all()
            assert (call(skinny(kernels, 13), arrays, columns) == whole).all()
    alone = {**arrays, "x": as_aligned(arrays["x"][15:]), "residual": arrays["residual"][15:].copy()}
    assert (call(skinny(kernels, 2), alone, columns)[0] == whole[15]).all()


def test_many_rows_of_a_long_inner_dimension_are_streamed(kernels):
    arrays, columns = case(16, 20, 14344, seed=6)
    assert plan_of(kernels, 16, 20, 14344).streamed
    close(call(skinny(kernels), arrays, columns), formula(arrays), 1e-6)
    args = MatmulArgs(rows=16, n=20, k=14344, x_stride=14344, x_dtype=0, w_dtype=2)
    assert kernels.host_skinny_matmul(args, 3) != 0  # float32 rows would have to lie there as a whole


def test_shared_memory_is_allowed_once_for_a_kernel(kernels):
    arrays, columns = case(2, 16, 1032)
    call(skinny(kernels), arrays, columns)
    before = kernels.host_allowances()
    call(skinny(kernels), arrays, columns)
    arrays, columns = case(16, 16, 4096)
    call(skinny(kernels), arrays, columns)
    assert kernels.host_allowances() == before


def test_launches_on_older_chips_are_not_programmatic(kernels):
    arrays, columns = case(3, 20, 40)
    with limited(163 * 1024, major=8):
        close(call(skinny(kernels), arrays, columns), formula(arrays), 1e-6)


def test_the_op_rounds_what_must_be_streamed_first():
    arrays, _ = case(16, 20, 14344, x_dtype=np.float32, bias=False, residual=False)
    with emulated_gpu() as gpu:
        ops = CudaOps(gpu)
        x, w = gpu.upload(arrays["x"]), ops.pack(arrays["w"])
        got = ops.matmul(x, w).numpy()
        assert (got[3:5] == ops.matmul(x[3:5], w).numpy()).all()  # the same kernel for fewer rows
    rounded = {**arrays, "x": arrays["x"].astype(bfloat16)}
    close(got.astype("f8"), formula(rounded), 1e-6)


def test_tokens_of_any_number_of_rows_come_to_the_host():
    with emulated_gpu() as gpu:
        ops = CudaOps(gpu)
        few, many = np.arange(3, dtype=np.int32), np.arange(5000, dtype=np.int32)
        pending = [ops.fetch(gpu.upload(tokens)) for tokens in (few, many, few)]
        for tokens, there in zip((few, many, few), pending, strict=True):
            assert there.wait().tolist() == tokens.tolist()
