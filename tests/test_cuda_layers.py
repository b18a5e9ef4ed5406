"""The small CUDA kernels of a forward pass on the host emulator, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_host import (
    ACTIVATIONS,
    DTYPES,
    ActivationArgs,
    AxpbyArgs,
    CacheView,
    EmbeddingArgs,
    GatherColumnsArgs,
    KvWriteArgs,
    NormArgs,
    QkvWriteArgs,
    RopeAnglesArgs,
    RopeArgs,
    build,
)
from oracle.activation import activation as activation_formula
from oracle.norm import norm as norm_formula
from oracle.rope import rope as rope_formula
from oracle.rope import rope_angles as angles_formula

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
F32_ERROR, BF16_ERROR = 1e-6, 4e-3  # bf16 rounds to 2^-9 of each value
rng = np.random.default_rng


@pytest.fixture(scope="module")
def kernels():
    return build()


def frame(rows, width, dtype=float32, gap=3):
    """NaN [rows + 1, width + gap]; results are its upper left part."""
    return np.full((rows + 1, width + gap), np.nan, dtype)


def inside(memory, rows, width):
    """The results, float64; what lies around them must be as it was."""
    assert np.isnan(memory[rows:].astype("f4")).all()
    assert np.isnan(memory[:, width:].astype("f4")).all()
    return memory[:rows, :width].astype("f8")


def close(got, expected, bound=F32_ERROR):
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= bound, error


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (9, 31), (3, 33), (2, 512), (2, 513), (3, 1000), (1, 2053)])
def test_norm_matches_formula(kernels, rows, dim, kind):
    x = (rng(dim).standard_normal((rows, dim)) * 3 + 5).astype("f4")
    weight, bias = rng(1).standard_normal((2, dim)).astype("f4")
    residual = rng(2).standard_normal((rows, dim)).astype("f4")
    for parts in ((None, None, None), (weight, None, None), (weight, bias, residual)):
        for dtype in (float32, bfloat16):
            y, total = frame(rows, dim, dtype), frame(rows, dim, gap=1)
            w, b, r = (0 if part is None else part.ctypes.data for part in parts)
            args = NormArgs(
                y=y.ctypes.data, x=x.ctypes.data, weight=w, bias=b, residual=r, sum=total.ctypes.data if r else 0,
                rows=rows, heads=1, dim=dim, y_stride=dim + 3, x_stride=dim, residual_stride=dim, sum_stride=dim + 1,
                eps=1e-5, kind=int(kind == "rms"), y_dtype=DTYPES[dtype],
            )  # fmt: skip
            assert kernels.host_norm(args) == 0
            summed = x if parts[2] is None else x + residual
            expected = norm_formula(summed.astype("f8"), parts[0], parts[1], kind, 1e-5)
            close(inside(y, rows, dim), expected, F32_ERROR if dtype == float32 else BF16_ERROR)
            if r:
                assert (inside(total, rows, dim) == summed).all()


def test_norm_of_heads_in_place(kernels):
    x = rng(0).standard_normal((5, 7, 3, 24)).astype("f4")  # rows of 7 parts of 3 heads, of which one is normed
    weight, before = rng(1).standard_normal(24).astype("f4"), x.copy()
    view = x[:, 2]
    args = NormArgs(
        y=view.ctypes.data, x=view.ctypes.data, weight=weight.ctypes.data, rows=5, heads=3, dim=24,
        y_stride=7 * 72, x_stride=7 * 72, eps=1e-6, kind=1,
    )  # fmt: skip
    assert kernels.host_norm(args) == 0
    close(view, norm_formula(before[:, 2].astype("f8"), weight, None, "rms", 1e-6))
    view[...] = before[:, 2]
    assert (x == before).all()


def test_norm_vector_is_the_same_bits_among_any_others(kernels):
    for dim in (64, 700):
        x = rng(dim).standard_normal((5, dim)).astype("f4")
        results = []
        for rows in (x, x[3:4]):
            y = frame(len(rows), dim)
            args = NormArgs(
                y=y.ctypes.data, x=rows.ctypes.data, rows=len(rows), heads=1, dim=dim, y_stride=dim + 3, x_stride=dim
            )
            assert kernels.host_norm(args) == 0
            results.append(inside(y, len(rows), dim))
        assert (results[0][3] == results[1][0]).all()


def test_norm_refuses_a_vector_that_does_not_fit(kernels):
    assert kernels.host_norm(NormArgs(rows=1, heads=1, dim=25001)) != 0
    assert kernels.host_norm(NormArgs(rows=0, heads=1, dim=25001)) == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_formula(kernels, name):
    for rows, dim in ((1, 1), (3, 31), (2, 1027)):
        for x_dtype in (float32, bfloat16):
            for y_dtype in (float32, bfloat16):
                x, up = (2 * rng(dim).standard_normal((2, rows, dim))).astype(x_dtype)
                for gate in (False, True):
                    y = frame(rows, dim, y_dtype)
                    args = ActivationArgs(
                        y=y.ctypes.data, x=x.ctypes.data, up=up.ctypes.data if gate else 0, rows=rows, dim=dim,
                        x_stride=dim, up_stride=dim, y_stride=dim + 3, activation=ACTIVATIONS[name],
                        x_dtype=DTYPES[x_dtype], y_dtype=DTYPES[y_dtype],
                    )  # fmt: skip
                    assert kernels.host_activation(args) == 0
                    wide = x.astype("f8")
                    expected = wide if name == "none" else activation_formula(wide, name)
                    expected = expected * up.astype("f8") if gate else expected
                    close(inside(y, rows, dim), expected, F32_ERROR if y_dtype == float32 else BF16_ERROR)


@pytest.mark.parametrize("dim", [1, 33, 1030])
def test_axpby_scales_and_adds(kernels, dim):
    x, other = rng(dim).standard_normal((2, 3, dim)).astype("f4")
    for added in (False, True):
        out = frame(3, dim)
        args = AxpbyArgs(
            out=out.ctypes.data, x=x.ctypes.data, y=other.ctypes.data if added else 0, rows=3, dim=dim,
            out_stride=dim + 3, x_stride=dim, y_stride=dim, a=1.5, b=-0.3,
        )  # fmt: skip
        assert kernels.host_axpby(args) == 0
        expected = 1.5 * x.astype("f8") - (np.float64(np.float32(0.3)) * other if added else 0)
        close(inside(out, 3, dim), expected)


def test_gather_columns_takes_columns(kernels):
    x, index = rng(0).standard_normal((3, 32)).astype("f4"), rng(1).integers(0, 32, 1030).astype(np.int32)
    y = frame(3, 1030)
    args = GatherColumnsArgs(
        y=y.ctypes.data, x=x.ctypes.data, index=index.ctypes.data, rows=3, columns=1030, x_columns=32, y_stride=1033,
        x_stride=32,
    )  # fmt: skip
    assert kernels.host_gather_columns(args) == 0
    assert (inside(y, 3, 1030) == x[:, index]).all()


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("dim", [1, 65, 1030])
def test_embedding_takes_rows(kernels, dtype, dim):
    table = rng(0).standard_normal((11, dim)).astype(dtype)
    places = rng(1).standard_normal((5, dim)).astype("f4")
    tokens, positions = np.array([10, 0, 3, 3], np.int32), np.array([0, 4, 2, 1], np.int32)
    for added in (False, True):
        y = frame(4, dim)
        args = EmbeddingArgs(
            y=y.ctypes.data, tokens=tokens.ctypes.data, positions=positions.ctypes.data, table=table.ctypes.data,
            position_table=places.ctypes.data if added else 0, rows=4, dim=dim, y_stride=dim + 3, table_stride=dim,
            position_stride=dim, vocab=11, position_rows=5, table_dtype=DTYPES[dtype],
        )  # fmt: skip
        assert kernels.host_embedding(args) == 0
        expected = table[tokens].astype("f4") + (places[positions] if added else np.float32(0))
        assert (inside(y, 4, dim) == expected).all()


def test_embedding_of_an_id_that_is_none_is_nan(kernels):
    table, places = np.ones((3, 4), "f4"), np.ones((2, 4), "f4")
    tokens, positions = np.array([-1, 2, 3, 0, 0], np.int32), np.array([0, 1, 0, 2, -1], np.int32)
    y = np.zeros((5, 4), "f4")
    args = EmbeddingArgs(
        y=y.ctypes.data, tokens=tokens.ctypes.data, positions=positions.ctypes.data, table=table.ctypes.data,
        position_table=places.ctypes.data, rows=5, dim=4, y_stride=4, table_stride=4, position_stride=4, vocab=3,
        position_rows=2,
    )  # fmt: skip
    assert kernels.host_embedding(args) == 0
    assert np.isnan(y).all(1).tolist() == [True, False, True, True, True]
    assert (y[1] == 2).all()


def angles(kernels, positions, inv_freq, rows=None, scaling=1.0):
    half = inv_freq.shape[1]
    cos, sin = frame(len(positions), half, gap=0), frame(len(positions), half, gap=0)
    args = RopeAnglesArgs(
        cos=cos.ctypes.data, sin=sin.ctypes.data, positions=positions.ctypes.data, inv_freq=inv_freq.ctypes.data,
        table=0 if rows is None else rows.ctypes.data, rows=len(positions), half=half, classes=len(inv_freq),
        scaling=scaling,
    )  # fmt: skip
    assert kernels.host_rope_angles(args) == 0
    return inside(cos, len(positions), half), inside(sin, len(positions), half)


def test_rope_angles_match_formula(kernels):
    inv_freq = (10000.0 ** -(np.arange(33) / 33)).astype("f4")[None] * np.array([[1], [0.25]], "f4")
    positions, rows = np.array([0, 1, 7, 4095, 131071, 1 << 20], np.int32), np.array([0, 1, 0, 1, 0, 1], np.int32)
    for got, expected in zip(
        angles(kernels, positions, inv_freq, rows, 1.5), angles_formula(positions, inv_freq[rows], 1.5), strict=True
    ):
        assert np.abs(got - expected).max() <= 1.5 * 2**-23  # rounding, of the value and of its product


@pytest.mark.parametrize(("heads", "head_size", "half"), [(1, 2, 1), (3, 8, 3), (5, 64, 32), (17, 80, 40)])
def test_rope_and_its_inverse(kernels, heads, head_size, half):
    x = rng(half).standard_normal((3, heads, head_size)).astype("f4")
    cos, sin = rng(1).standard_normal((2, 3, half)).astype("f4")
    for inverse in (False, True):
        memory = frame(3, heads * head_size)
        memory[:3, : heads * head_size] = x.reshape(3, -1)
        args = RopeArgs(
            x=memory.ctypes.data, cos=cos.ctypes.data, sin=sin.ctypes.data, rows=3, heads=heads, head_size=head_size,
            half=half, x_stride=heads * head_size + 3, inverse=inverse,
        )  # fmt: skip
        assert kernels.host_rope(args) == 0
        expected = rope_formula(x.astype("f8"), cos.astype("f8"), sin.astype("f8") * (-1 if inverse else 1))
        close(inside(memory, 3, heads * head_size), expected.reshape(3, -1))


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_size", "half"), [(1, 1, 0), (2, 24, 12), (3, 40, 7), (8, 128, 64)])
def test_kv_write_fills_slots(kernels, dtype, kv_heads, head_size, half):
    rows, blocks, padded = 4, 3, -(-head_size // 16) * 16
    k, v = rng(head_size).standard_normal((2, rows, kv_heads, head_size)).astype("f4")
    cos, sin = rng(1).standard_normal((2, rows, half)).astype("f4")
    slots = np.array([2 * 64 + 63, -1, 0, blocks * 64], np.int64)  # the second and the last are no slots
    cache = np.full((blocks + 1, kv_heads, 2, 64, padded), np.nan, dtype)
    args = KvWriteArgs(
        cache=CacheView(cache.ctypes.data, blocks, kv_heads, head_size, DTYPES[dtype]), k=k.ctypes.data,
        v=v.ctypes.data, cos=cos.ctypes.data if half else 0, sin=sin.ctypes.data, slots=slots.ctypes.data, rows=rows,
        half=half, k_stride=kv_heads * head_size, v_stride=kv_heads * head_size,
    )  # fmt: skip
    assert kernels.host_kv_write(args) == 0
    keys = rope_formula(k.astype("f8"), cos.astype("f8"), sin.astype("f8")) if half else k.astype("f8")
    for row, (block, offset) in ((0, (2, 63)), (2, (0, 0))):
        written = cache[block, :, :, offset].astype("f8")
        close(written[:, 0, :head_size], keys[row], F32_ERROR if dtype == float32 else BF16_ERROR)
        assert (written[:, 1, :head_size] == v[row].astype(dtype).astype("f8")).all()
        assert (written[:, :, head_size:] == 0).all()
        cache[block, :, :, offset] = np.nan
    assert np.isnan(cache.astype("f4")).all()


@pytest.mark.parametrize("norm", [None, "rms", "layer-each"])
@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "half"), [(1, 1, 1, 0), (1, 1, 2, 1), (5, 2, 35, 6), (9, 3, 128, 64)]
)
def test_qkv_write_norms_rotates_and_fills_slots(kernels, dtype, heads, kv_heads, head_size, half, norm):
    rows, blocks, padded, keyed = 4, 3, -(-head_size // 16) * 16, heads + kv_heads
    width = (keyed + kv_heads) * head_size
    x = rng(head_size).standard_normal((rows, keyed + kv_heads, head_size)).astype("f4")
    cos, sin = rng(1).standard_normal((2, rows, half)).astype("f4")
    slots = np.array([2 * 64 + 63, -1, 0, blocks * 64], np.int64)  # the second and the last are no slots
    each = norm == "layer-each"
    weights = rng(2).standard_normal((keyed, head_size)).astype("f4")
    q_norm, k_norm = (np.ascontiguousarray(w if each else w[0]) for w in (weights[:heads], weights[heads:]))
    order = [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, head_size)]
    for paired in (False, True):
        given = x.copy()
        if paired:
            given[:, :keyed] = x[:, :keyed, order]
        qkv = frame(rows, width)
        qkv[:rows, :width] = given.reshape(rows, -1)
        cache = np.full((blocks + 1, kv_heads, 2, 64, padded), np.nan, dtype)
        q = frame(rows, heads * head_size, dtype=dtype)
        args = QkvWriteArgs(
            q=q.ctypes.data, qkv=qkv.ctypes.data,
            cache=CacheView(cache.ctypes.data, blocks, kv_heads, head_size, DTYPES[dtype]),
            cos=cos.ctypes.data if half else 0, sin=sin.ctypes.data, slots=slots.ctypes.data,
            q_norm=q_norm.ctypes.data if norm else 0, k_norm=k_norm.ctypes.data if norm else 0, rows=rows, heads=heads,
            half=half, q_stride=heads * head_size + 3, qkv_stride=width + 3, norm_stride=head_size * each, eps=1e-5,
            norm=int(norm == "rms"), paired=paired, q_dtype=DTYPES[dtype],
        )  # fmt: skip
        assert kernels.host_qkv_write(args) == 0
        turned = x[:, :keyed].astype("f8")
        if norm:
            parts = (turned[:, :heads], q_norm), (turned[:, heads:], k_norm)
            kind = norm.removesuffix("-each")
            turned = np.concatenate([norm_formula(part, w.astype("f8"), None, kind, 1e-5) for part, w in parts], axis=1)
        turned = rope_formula(turned, cos.astype("f8"), sin.astype("f8"))
        bound = F32_ERROR if dtype == float32 else BF16_ERROR
        close(inside(q, rows, heads * head_size), turned[:, :heads].reshape(rows, -1), bound)
        for row, (block, offset) in ((0, (2, 63)), (2, (0, 0))):
            written = cache[block, :, :, offset].astype("f8")
            close(written[:, 0, :head_size], turned[row, heads:], bound)
            assert (written[:, 1, :head_size] == x[row, keyed:].astype(dtype).astype("f8")).all()
            assert (written[:, :, head_size:] == 0).all()
            cache[block, :, :, offset] = np.nan
        assert np.isnan(cache.astype("f4")).all()


def test_kv_write_refuses_other_caches(kernels):
    assert kernels.host_qkv_write(QkvWriteArgs(cache=CacheView(0, 1, 1, 16, 3), rows=1, heads=1)) != 0
    assert kernels.host_kv_write(KvWriteArgs(cache=CacheView(0, 1, 1, 16, 3), rows=1)) != 0
