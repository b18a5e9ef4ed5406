"""The argument checks of the CUDA bindings, which need no GPU."""

from __future__ import annotations

import pytest

from pyllm import device

_cuda = pytest.importorskip("pyllm._cuda", reason="this build has no CUDA kernels")


def array(*shape, dtype="bfloat16", pointer=1 << 20, strides=None):
    return _cuda.Array(pointer, shape, dtype, strides=strides)


def test_an_array_knows_its_layout():
    a = array(2, 3, 8, dtype="float32")
    assert (a.shape, a.strides, a.nbytes, a.dtype) == ((2, 3, 8), (24, 8, 1), 192, "float32")
    for wrong in (
        {"dtype": "float64"}, {"pointer": 3}, {"strides": [1]}, {"strides": [1, -1, 1]},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="expected"):
            array(2, 3, 8, **wrong)
    with pytest.raises(ValueError, match="2\\^60"):
        array(1 << 40, 1 << 40)


def matmul_args(**changed):
    args = {"y": array(4, 16, dtype="float32"), "x": array(4, 64), "w": array(16, 64), "bias": None, "residual": None}
    return {**args, "activation": 0, "gated": False, "stream": 0, **changed}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"x": object()}, "x: expected a pyllm._cuda.Array"),
        ({"x": array(4, 65)}, r"x: expected shape \[any, 64\], got \[4, 65\]"),
        ({"y": array(4, 8, dtype="float32")}, r"y: expected shape \[4, 16\]"),
        ({"w": array(16, 64, dtype="int32")}, r"w: expected float32\|bfloat16, got int32"),
        ({"w": array(16, 64, strides=[128, 1])}, "w: expected contiguous memory"),
        ({"x": array(4, 64, strides=[8, 1])}, "x: expected rows that do not overlap"),
        ({"x": array(4, 64, strides=[68, 1])}, "multiple of 8 elements apart, got 68"),
        ({"x": array(4, 64, dtype="float32")}, "x: expected bfloat16"),
        ({"w": array(16, 64, pointer=2)}, "w: expected an address that is a multiple of 16"),
        ({"bias": array(15, dtype="float32")}, r"bias: expected shape \[16\]"),
        ({"activation": 9}, "activation: expected 0 to 8, got 9"),
        ({"y": array(4, 7), "w": array(15, 64), "gated": True}, "even number"),
    ],
)
def test_matmul_refuses_what_it_cannot_take(changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        _cuda.mma_matmul(**matmul_args(**changed))


def test_other_products_refuse_what_they_cannot_take():
    split = {"partial": array(256 * 64 * 128, dtype="float32"), "tickets": array(256, dtype="uint32")}
    many = {"y": array(65, 16, dtype="float32"), "x": array(65, 64)}
    for kernel, changed, expected in (
        ("split_matmul", {**split, **many}, "x: rows: expected 0 to 64, got 65"),
        ("split_matmul", {**split, "partial": array(8, dtype="float32")}, "partial: expected shape"),
        ("split_matmul", {**split, "tickets": array(8, dtype="uint32")}, "tickets: expected shape"),
        ("split_matmul", {**split, "x": array(4, 64, dtype="float32")}, "x: expected bfloat16"),
        ("wgmma_matmul", {"multiprocessors": 0}, "multiprocessors: expected 1"),
        ("wgmma_matmul", {"multiprocessors": 8, "x": array(4, 64, strides=[68, 1])}, "multiple of 8 elements apart"),
        ("wgmma_matmul", {"multiprocessors": 8, "x": array(4, 64, dtype="float32")}, "x: expected bfloat16"),
    ):
        with pytest.raises((TypeError, ValueError), match=expected):
            getattr(_cuda, kernel)(**{**matmul_args(), **changed})


def test_skinny_matmul_refuses_what_does_not_fit():
    rest = {"norm_weight": None, "norm_bias": None, "norm": 0, "eps": 0.0, "multiprocessors": 132}
    many = {"y": array(17, 16, dtype="float32"), "x": array(17, 64)}
    for changed, expected in (
        (many, "x: rows: expected 0 to 16, got 17"),
        ({"norm_bias": array(64, dtype="float32")}, "None where norm_weight is None"),
        ({"multiprocessors": 0}, "multiprocessors: expected 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            _cuda.skinny_matmul(**{**matmul_args(), **rest, **changed})


SKINNY = {
    "x": array(4, 64), "w": array(64, 64), "bias": None, "norm_weight": None, "norm_bias": None, "norm": 0, "eps": 0.0,
    "multiprocessors": 132, "stream": 0,
}  # fmt: skip
QKV = {
    **SKINNY, "q": array(4, 32), "cache": array(5, 1, 2, 64, 16), "cos": array(4, 8, dtype="float32"),
    "sin": array(4, 8, dtype="float32"), "slots": array(4, dtype="int64"), "head_size": 16,
}  # fmt: skip
ARGMAX = {
    **SKINNY, "tokens": array(4, dtype="int32"), "partial": array(132, 4, dtype="int64"),
    "ticket": array(1, dtype="uint32"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "args", "changed", "expected"),
    [
        ("skinny_qkv", QKV, {"q": array(4, 48)}, "w: expected rows for the heads of q and twice those of the cache"),
        ("skinny_qkv", QKV, {"head_size": 15}, "head_size: expected an even number, got 15"),
        ("skinny_qkv", QKV, {"cos": array(4, 9, dtype="float32")}, "cos: twice its columns: expected 0 to 16, got 18"),
        ("skinny_qkv", QKV, {"slots": array(3, dtype="int64")}, r"slots: expected shape \[4\]"),
        ("skinny_qkv", QKV, {"sin": None}, "cos, sin: expected both or neither"),
        ("skinny_argmax", ARGMAX, {"partial": array(131, 4, dtype="int64")}, r"partial: expected shape \[132, 4\]"),
        ("skinny_argmax", ARGMAX, {"w": array(64, 64, dtype="float32")}, "w: expected bfloat16, got float32"),
    ],
)
def test_fused_decode_kernels_refuse_what_they_cannot_take(kernel, args, changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        getattr(_cuda, kernel)(**{**args, **changed})


def attention_args(**changed):
    args = {
        "out": array(3, 8, 64), "q": array(3, 8, 64), "cache": array(5, 2, 2, 64, 64),
        "starts": array(3, dtype="int32"), "lengths": array(2, dtype="int32"), "tables": array(2, 3, dtype="int32"),
        "head_size": 64, "scale": 1.0, "causal": True, "prefix": None, "window": 0, "sinks": 0, "bias": None,
        "slopes": None, "softcap": 0.0, "lse": None, "most_queries": 2, "stream": 0,
    }  # fmt: skip
    return {**args, **changed}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"q": array(3, 7, 64)}, "a multiple of the cache's 2 heads, got 7"),
        ({"head_size": 300}, "head_size: expected 1 to 256"),
        ({"cache": array(5, 2, 2, 64, 80)}, "cache: expected shape"),
        ({"starts": array(2, dtype="int32")}, r"starts: expected shape \[3\]"),
        ({"most_queries": 4}, "most_queries: expected 0 to 3"),
        ({"q": array(3, 8, 64, pointer=2)}, "q: expected an address"),
        ({"q": array(3, 8, 64, dtype="int32")}, "q: expected float32"),
        ({"cache": array(5, 2, 2, 64, 64, dtype="float32")}, "cache: expected bfloat16, got float32"),
        ({"lse": array(3, 2, dtype="float32")}, r"lse: expected shape \[3, 8\]"),
        ({"prefix": array(2, dtype="int32"), "causal": False}, "None where causal is False"),
        ({"sinks": -1}, "sinks: expected 0"),
        ({"bias": array(8, 4, dtype="float32")}, "each distance from -reach to reach, got 4"),
        ({"slopes": array(2, dtype="float32")}, r"slopes: expected shape \[8\]"),
        ({"softcap": -1.0}, "softcap: expected at least 0"),
        ({"window": -1}, "window: expected 0"),
        (
            {
                "wgmma": True,
                "head_size": 48,
                "q": array(3, 8, 48),
                "out": array(3, 8, 48),
                "cache": array(5, 2, 2, 64, 48),
            },
            "head_size: expected 64 or 128 with wgmma, got 48",
        ),
        (
            {"wgmma": True, "cache": array(1 << 25, 2, 2, 64, 64)},
            "cache: blocks times heads: expected 0 to",
        ),
    ],
)
def test_attention_refuses_what_it_cannot_take(changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        _cuda.prompt_attention(**{"wgmma": False, **attention_args(**changed)})


def test_split_attention_checks_its_workspace():
    work = {"partial": array(2, 2, 2, 16, 66, dtype="float32"), "tickets": array(2, 2, dtype="uint32")}
    for changed, expected in (
        ({"split_blocks": 1}, r"partial: expected shape \[2, 2, 3, 16, 66\]"),
        ({"split_blocks": 0}, "split_blocks: expected 1"),
        ({"q": array(3, 32, 64), "out": array(3, 32, 64)}, "most_queries times heads of a group: expected 0 to 16"),
        ({"tickets": array(2, 1, dtype="uint32")}, "tickets: expected shape"),
    ):
        with pytest.raises(ValueError, match=expected):
            _cuda.split_attention(**{**attention_args(), **work, "split_blocks": 2, **changed})


def float32(*shape):
    return array(*shape, dtype="float32")


def int32(*shape):
    return array(*shape, dtype="int32")


NORM = {
    "y": array(3, 2, 8), "x": float32(3, 2, 8), "weight": float32(8), "bias": None, "residual": None, "sum": None,
    "eps": 1e-5, "kind": 0,
}  # fmt: skip
ACTIVATION = {"y": array(3, 8), "x": float32(3, 8), "up": None, "activation": 3}
AXPBY = {"out": float32(3, 8), "x": float32(3, 8), "a": 1.0, "y": None, "b": 1.0}
GATHER_COLUMNS = {"y": float32(3, 7), "x": float32(3, 8), "index": int32(7)}
EMBEDDING = {"y": float32(3, 8), "tokens": int32(3), "table": array(9, 8), "positions": None, "position_table": None}
ANGLES = {
    "cos": float32(3, 4), "sin": float32(3, 4), "positions": int32(3), "inv_freq": float32(1, 4), "table": None,
    "scaling": 1.0,
}  # fmt: skip
ROPE = {"x": float32(3, 16), "cos": float32(3, 4), "sin": float32(3, 4), "head_size": 8, "inverse": False}
KV_WRITE = {
    "cache": array(5, 2, 2, 64, 16), "k": float32(3, 16), "v": float32(3, 16), "slots": array(3, dtype="int64"),
    "head_size": 8, "cos": float32(3, 4), "sin": float32(3, 4),
}  # fmt: skip
QKV_WRITE = {
    "q": array(3, 32), "cache": array(5, 2, 2, 64, 16), "qkv": float32(3, 64), "slots": array(3, dtype="int64"),
    "head_size": 8, "paired": True, "cos": float32(3, 4), "sin": float32(3, 4), "q_norm": float32(4, 8),
    "k_norm": float32(2, 8), "norm": 0, "eps": 1e-5,
}  # fmt: skip
SAMPLE = {
    "tokens": int32(3), "logits": float32(3, 50), "rows": array(3, 48, dtype="uint8"), "history_starts": None,
    "history_ids": None, "history_counts": None, "bias_starts": None, "bias_ids": None, "bias_values": None,
    "allowed_starts": None, "allowed_ids": None, "workspace": None,
}  # fmt: skip
LOGPROBS = {
    "chosen": float32(3), "ranks": int32(3), "top": float32(3, 5), "top_ids": int32(3, 5), "logits": float32(3, 50),
    "ids": int32(3),
}  # fmt: skip
LISTS = {"allowed_starts": array(4, dtype="int64"), "allowed_ids": int32(7)}


@pytest.mark.parametrize(
    ("kernel", "args", "changed", "expected"),
    [
        ("norm", NORM, {"x": array(3, 2, 8)}, "x: expected float32, got bfloat16"),
        ("norm", NORM, {"y": array(3, 16)}, "y: expected the shape of x"),
        ("norm", NORM, {"x": float32(3), "y": float32(3)}, "x: expected shape"),
        ("norm", NORM, {"weight": float32(16)}, r"weight: expected shape \[8\]"),
        ("norm", NORM, {"x": array(3, 2, 8, dtype="float32", strides=[32, 16, 1])}, "x: expected heads side by side"),
        ("norm", NORM, {"kind": 2}, "kind: expected 0 to 1"),
        (
            "norm",
            NORM,
            {"x": float32(3, 25001), "y": float32(3, 25001), "weight": None},
            "x: columns: expected 0 to 25000",
        ),
        ("activation", ACTIVATION, {"up": array(3, 8)}, "up: expected float32, got bfloat16"),
        ("activation", ACTIVATION, {"y": array(3, 9)}, r"y: expected shape \[3, 8\]"),
        ("axpby", AXPBY, {"y": float32(3, 9)}, r"y: expected shape \[3, 8\]"),
        ("axpby", AXPBY, {"out": array(3, 8)}, "out: expected float32, got bfloat16"),
        ("gather_columns", GATHER_COLUMNS, {"y": float32(3, 8)}, r"y: expected shape \[3, 7\]"),
        ("embedding", EMBEDDING, {"positions": int32(3)}, "both or neither"),
        ("embedding", EMBEDDING, {"y": float32(4, 8)}, r"y: expected shape \[3, 8\]"),
        ("rope_angles", ANGLES, {"inv_freq": float32(0, 4)}, "at least one row"),
        ("rope_angles", ANGLES, {"sin": float32(3, 5)}, "sin: expected shape"),
        ("rope", ROPE, {"head_size": 7}, "whole heads of 7, got 16 columns"),
        ("rope", ROPE, {"head_size": 4}, "at most half as many columns as a head has, got 4 for heads of 4"),
        ("kv_write", KV_WRITE, {"cache": array(5, 2, 2, 64, 8)}, "cache: expected shape"),
        ("kv_write", KV_WRITE, {"slots": int32(3)}, "slots: expected int64"),
        ("kv_write", KV_WRITE, {"sin": None}, "cos, sin: expected both or neither"),
        ("qkv_write", QKV_WRITE, {"q": array(3, 33)}, "q: expected whole heads of 8, got 33 columns"),
        ("qkv_write", QKV_WRITE, {"qkv": float32(3, 56)}, r"qkv: expected shape \[3, 64\], got \[3, 56\]"),
        ("qkv_write", QKV_WRITE, {"sin": None}, "cos, sin: expected both or neither"),
        ("qkv_write", QKV_WRITE, {"q_norm": float32(8)}, r"k_norm: expected shape \[8\], got \[2, 8\]"),
        ("qkv_write", QKV_WRITE, {"k_norm": None}, "q_norm, k_norm: expected both or neither"),
        ("qkv_write", QKV_WRITE, {"norm": 2}, "norm: expected 0 to 1, got 2"),
        ("sample", SAMPLE, {"rows": array(3, 40, dtype="uint8")}, r"rows: expected shape \[3, 48\]"),
        ("sample", SAMPLE, {"allowed_ids": int32(7)}, "allowed: expected starts and ids, or neither"),
        ("sample", SAMPLE, {**LISTS, "workspace": float32(6)}, r"workspace: expected shape \[7\]"),
        ("logprobs", LOGPROBS, {"top": float32(3, 257), "top_ids": int32(3, 257)}, "top: columns: expected 0 to 256"),
        ("logprobs", LOGPROBS, {"top_ids": int32(3, 4)}, "top_ids: expected shape"),
    ],
)
def test_small_kernels_refuse_what_they_cannot_take(kernel, args, changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        getattr(_cuda, kernel)(**{**args, "stream": 0, **changed})


@pytest.mark.skipif(device.unavailable() is None, reason="there is a GPU")
def test_a_launch_without_a_driver_is_an_error_that_names_the_kernel():
    with pytest.raises(RuntimeError, match="mma_matmul: cudaError"):
        _cuda.mma_matmul(**matmul_args())
    empty = {"y": array(0, 16, dtype="float32"), "x": array(0, 64)}
    _cuda.mma_matmul(**matmul_args(**empty))  # nothing to launch


def test_what_is_beside_the_kernels_checks_its_arguments():
    ids, places = array(3, dtype="int32"), array(3, dtype="int64")
    draws = array(3, 48, dtype="uint8")
    with pytest.raises(ValueError, match=r"slots: expected shape \[3\]"):
        _cuda.advance(ids, ids, array(2, dtype="int64"), ids, draws, ids, 0)
    with pytest.raises(ValueError, match=r"rows: expected shape \[3, 48\]"):
        _cuda.advance(ids, ids, places, ids, array(3, 40, dtype="uint8"), ids, 0)
    with pytest.raises(ValueError, match="multiple of 16 bytes, got 24"):
        _cuda.read_probe(array(1, dtype="uint32"), array(24, dtype="uint8"), 0)
    with pytest.raises(TypeError, match="an unused DLPack capsule"):
        _cuda.from_dlpack(object(), 2, 0)
