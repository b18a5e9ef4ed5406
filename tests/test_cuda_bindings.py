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
        ({"activation": 5}, "activation: expected 0 to 4, got 5"),
        ({"y": array(4, 7), "w": array(15, 64), "gated": True}, "even number"),
    ],
)
def test_matmul_refuses_what_it_cannot_take(changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        _cuda.mma_matmul(**matmul_args(**changed))


def test_skinny_matmul_refuses_what_does_not_fit():
    rest = {"norm_weight": None, "norm_bias": None, "norm": 0, "eps": 0.0, "multiprocessors": 132, "overlapped": True}
    many = {"y": array(17, 16, dtype="float32"), "x": array(17, 64)}
    for changed, expected in (
        (many, "at most 16 rows"),
        ({"norm_bias": array(64, dtype="float32")}, "None where norm_weight is None"),
        ({"multiprocessors": 0}, "multiprocessors: expected 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            _cuda.skinny_matmul(**{**matmul_args(), **rest, **changed})


def attention_args(**changed):
    args = {
        "out": array(3, 8, 64), "q": array(3, 8, 64), "cache": array(5, 2, 2, 64, 64),
        "starts": array(3, dtype="int32"), "lengths": array(2, dtype="int32"), "tables": array(2, 3, dtype="int32"),
    }  # fmt: skip
    return {**args, "head_size": 64, "scale": 1.0, "window": 0, "most_queries": 2, "stream": 0, **changed}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"q": array(3, 7, 64)}, "a multiple of the cache's 2 heads, got 7"),
        ({"head_size": 300}, "head_size: expected 1 to 256"),
        ({"cache": array(5, 2, 2, 64, 80)}, "cache: expected shape"),
        ({"starts": array(2, dtype="int32")}, r"starts: expected shape \[3\]"),
        ({"most_queries": 4}, "most_queries: expected 0 to 3"),
        ({"q": array(3, 8, 64, pointer=2)}, "q: expected an address"),
        ({"q": array(3, 8, 64, dtype="float32")}, "q: expected bfloat16"),
        ({"window": -1}, "window: expected 0"),
    ],
)
def test_attention_refuses_what_it_cannot_take(changed, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        _cuda.prompt_attention(**attention_args(**changed))


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


@pytest.mark.skipif(device.unavailable() is None, reason="there is a GPU")
def test_a_launch_without_a_driver_is_an_error_that_names_the_kernel():
    with pytest.raises(RuntimeError, match="mma_matmul: cudaError"):
        _cuda.mma_matmul(**matmul_args())
    empty = {"y": array(0, 16, dtype="float32"), "x": array(0, 64)}
    _cuda.mma_matmul(**matmul_args(**empty))  # nothing to launch
