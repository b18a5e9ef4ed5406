"""Quantized checkpoints: every stored layout against its oracle, what config.json may say, and files that are wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import quantization as oracle
from safetensors.numpy import save_file
from test_weights import GPT2, LLAMA, refusal, weights, write

from pyllm import LLM
from pyllm.errors import ConfigError
from pyllm.models import open_checkpoint
from pyllm.models.quantization import read_quantization
from pyllm.ops import Ops
from pyllm.packed import pack_weights, precision_of
from pyllm.quantization import KernelForm, Layout, Quantization, QuantizedTensor, Scheme, collect
from pyllm.safetensors_file import SafetensorsFile, StoredTensor

Parts = dict[str, np.ndarray]
DTYPES: dict[str, Any] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def stored(path: Path, parts: Parts) -> Any:
    """The parts as the one quantized weight of a file."""
    save_file({f"m.{name}": value for name, value in parts.items()}, path)
    file = SafetensorsFile(path)
    found, rest = collect({name: StoredTensor(file, name) for name in file.entries})
    assert list(found) == ["m.weight"]
    assert rest == {}
    return found["m.weight"]


def read(path: Path, parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    weight = stored(path, parts)
    matched, problems = weight.match(Quantization("any", (scheme,)), *shape)
    assert problems == []
    assert matched == scheme
    return weight.read(scheme, *shape)


CASES: dict[str, tuple[Layout, int, bool]] = {
    "pack-quantized int4": (Layout.PACK_QUANTIZED, 4, True),
    "pack-quantized int4, zero points": (Layout.PACK_QUANTIZED, 4, False),
    "pack-quantized int8": (Layout.PACK_QUANTIZED, 8, True),
    "pack-quantized int8, zero points": (Layout.PACK_QUANTIZED, 8, False),
    "int-quantized": (Layout.INT_QUANTIZED, 8, True),
    "int-quantized, zero points": (Layout.INT_QUANTIZED, 8, False),
    "gptq int4": (Layout.GPTQ, 4, False),
    "gptq int8": (Layout.GPTQ, 8, False),
    "gptq_v2 int4": (Layout.GPTQ_V2, 4, False),
    "awq": (Layout.AWQ, 4, False),
}


def as_stored(weight: oracle.Weight, layout: Layout, symmetric: bool) -> Parts:
    if layout is Layout.PACK_QUANTIZED:
        return oracle.pack_quantized(weight, symmetric=symmetric)
    if layout is Layout.INT_QUANTIZED:
        return oracle.int_quantized(weight, symmetric=symmetric)
    if layout is Layout.AWQ:
        return oracle.awq(weight)
    return oracle.gptq(weight, version=1 if layout is Layout.GPTQ else 2)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    group_size=st.sampled_from([0, 1, 7, 16, 32, 64, 96, 128, 256]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 1 << 30),
)
def test_layouts_equal_the_oracle(
    tmp_path: Path, case: str, n: int, k: int, group_size: int, dtype: str, seed: int
) -> None:
    layout, bits, symmetric = CASES[case]
    if group_size and k > group_size:
        k -= k % group_size
    weight = oracle.random_weight(
        np.random.default_rng(seed), n, k, bits, group_size, symmetric=symmetric, dtype=DTYPES[dtype]
    )
    scheme = Scheme(layout, bits, group_size, symmetric or layout not in (Layout.PACK_QUANTIZED, Layout.INT_QUANTIZED))
    tensor = read(tmp_path / "a.safetensors", as_stored(weight, layout, symmetric), scheme, (n, k))
    expected = weight.dequantized().astype(np.float32)
    assert tensor.shape == (n, k)
    np.testing.assert_array_equal(tensor.dequantize(), expected)
    for place in (slice(n // 3, n // 2), np.arange(n)[::-2]):
        np.testing.assert_array_equal(tensor.rows(place).dequantize(), expected[place])
    form = tensor.for_kernels()
    if form is None:
        assert group_size % 32 or dtype == "F32"
        return
    assert form.group_size in (32, 64, 128) or (bits == 8 and group_size == 0)
    assert form.scales.shape == (n, -(-k // form.group_size) if form.group_size else 1)
    assert form.zeros is None or form.zeros.shape == form.scales.shape
    np.testing.assert_array_equal(form.dequantize(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", [Layout.GPTQ, Layout.PACK_QUANTIZED])
def test_activation_order(tmp_path: Path, layout: Layout, bits: int) -> None:
    weight = oracle.random_weight(
        np.random.default_rng(3), 24, 96, bits, 32, symmetric=True, dtype=np.float16, shuffled=True
    )
    parts = as_stored(weight, layout, True)
    if layout is Layout.PACK_QUANTIZED:
        parts["weight_g_idx"] = weight.order.astype(np.int32)
    tensor = read(tmp_path / "a.safetensors", parts, Scheme(layout, bits, 32), (24, 96))
    np.testing.assert_array_equal(tensor.dequantize(), weight.dequantized().astype(np.float32))
    assert tensor.for_kernels() is None


@pytest.mark.parametrize("unset", [False, True])
def test_an_order_that_orders_nothing(tmp_path: Path, unset: bool) -> None:
    weight = oracle.random_weight(np.random.default_rng(3), 8, 64, 4, 32, symmetric=True, dtype=np.float16)
    parts = oracle.pack_quantized(weight, symmetric=True)
    parts["weight_g_idx"] = np.full(64, -1, np.int32) if unset else weight.order.astype(np.int32)
    tensor = read(tmp_path / "a.safetensors", parts, Scheme(Layout.PACK_QUANTIZED, 4, 32), (8, 64))
    assert tensor.order is None
    assert tensor.zeros is None


def test_packed_values_are_a_view_of_the_file(tmp_path: Path) -> None:
    weight = oracle.random_weight(np.random.default_rng(3), 8, 64, 4, 32, symmetric=True, dtype=np.float16)
    parts = oracle.pack_quantized(weight, symmetric=True)
    tensor = read(tmp_path / "a.safetensors", parts, Scheme(Layout.PACK_QUANTIZED, 4, 32), (8, 64))
    assert not tensor.values.flags.owndata
    assert not tensor.values.flags.writeable


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(-128, 128, (5, 9)).astype(np.int8)
    parts = {"weight": values, "weight_scale": np.full(shape, 0.25, np.float16)}
    scheme = Scheme(Layout.INT_QUANTIZED, 8, 0, per_tensor=True)
    tensor = read(tmp_path / "a.safetensors", parts, scheme, (5, 9))
    np.testing.assert_array_equal(tensor.dequantize(), values * np.float32(0.25))


# Whole models


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def compressed_config(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "compressed": compressed_config(),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}
BIG = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 40}


def quantized_model(
    config: dict[str, Any], method: str, rng: np.random.Generator, skip: tuple[str, ...] = ()
) -> tuple[Parts, Parts]:
    """Stored tensors of a model whose layers are quantized but for those that end so, and what they stand for."""
    tensors, expected = {}, {}
    for name, value in weights(config, dtype=np.float16).items():
        is_layer = value.ndim == 2 and name.startswith(("layers.", "h.")) and not name.endswith(skip or ("-",))
        if not is_layer:
            tensors[name] = expected[name] = value
            continue
        n, k = value.shape[::-1] if config["model_type"] == "gpt2" else value.shape
        weight = oracle.random_weight(rng, n, k, 4, 32, symmetric=method == "compressed", dtype=np.float16)
        pack: Callable[[oracle.Weight], Parts] = {
            "compressed": lambda w: oracle.pack_quantized(w, symmetric=True),
            "gptq": oracle.gptq,
            "awq": oracle.awq,
        }[method]
        tensors |= {f"{name.removesuffix('weight')}{part}": array for part, array in pack(weight).items()}
        expected[name] = weight.dequantized().astype(np.float32)
    return tensors, expected


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_of_each_method(tmp_path: Path, method: str) -> None:
    tensors, expected = quantized_model(BIG, method, np.random.default_rng(5), skip=("1.mlp.down_proj.weight",))
    with open_checkpoint(write(tmp_path, {**BIG, "quantization_config": CONFIGS[method]}, tensors)) as model:
        assert set(model.tensors).isdisjoint(model.quantized)
        assert {*model.tensors, *model.quantized} == set(model.spec.slots())
        assert "blocks.1.mlp.down.weight" in model.tensors
        for slot, name in (
            ("attn.q", "self_attn.q_proj"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            tensor = model.quantized[f"blocks.0.{slot}.weight"]
            np.testing.assert_array_equal(tensor.dequantize(), expected[f"layers.0.{name}.weight"])
            form = model.kernel_form(f"blocks.0.{slot}.weight")
            assert form == KernelForm(4, 32, "float16", zeros=method != "compressed")
        for slot in model.spec.slots():
            model.release(slot)


def test_fused_rows_are_cut_from_one_weight(tmp_path: Path) -> None:
    config = {**GPT2, "n_embd": 32}
    tensors, expected = quantized_model(config, "gptq", np.random.default_rng(5))
    with open_checkpoint(write(tmp_path, {**config, "quantization_config": CONFIGS["gptq"]}, tensors)) as model:
        for part, name in enumerate("qkv"):
            np.testing.assert_array_equal(
                model.quantized[f"blocks.1.attn.{name}.weight"].dequantize(),
                expected["h.1.attn.c_attn.weight"][32 * part : 32 * part + 32],
            )


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_the_model_lacks_must_be_zero(tmp_path: Path, value: float) -> None:
    tensors, _ = quantized_model(BIG, "gptq", np.random.default_rng(5))
    tensors["layers.0.self_attn.q_proj.bias"] = np.full(64, value, np.float16)
    folder = write(tmp_path, {**BIG, "quantization_config": CONFIGS["gptq"]}, tensors)
    if value == 0:
        open_checkpoint(folder).close()
    else:
        assert "'layers.0.self_attn.q_proj.bias' is not a weight" in refusal(folder)


def test_a_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    config = {**BIG, "tie_word_embeddings": True, "quantization_config": CONFIGS["compressed"]}
    tensors, _ = quantized_model({**BIG, "tie_word_embeddings": True}, "compressed", np.random.default_rng(5))
    weight = oracle.random_weight(np.random.default_rng(6), 40, 64, 4, 32, symmetric=True, dtype=np.float16)
    head = {f"lm_head.{name}": part for name, part in oracle.pack_quantized(weight, symmetric=True).items()}
    with open_checkpoint(write(tmp_path, config, {**tensors, **head})) as model:
        assert not model.spec.head.tied
        np.testing.assert_array_equal(model.quantized["head.weight"].dequantize(), weight.dequantized())
        np.testing.assert_array_equal(model.tensors["embed.weight"], tensors["embed_tokens.weight"])
    del tensors["embed_tokens.weight"]
    with open_checkpoint(write(tmp_path, config, {**tensors, **head})) as model:
        assert model.spec.head.tied
        np.testing.assert_array_equal(model.quantized["embed.weight"].dequantize(), weight.dequantized())


def test_schemes_are_told_apart_by_shape(tmp_path: Path) -> None:
    config = compressed_config()
    eight = {"targets": ["re:.*down_proj"], "weights": {**WEIGHTS, "num_bits": 8, "group_size": 96}}
    config["config_groups"]["group_1"] = eight
    tensors, _ = quantized_model(BIG, "compressed", np.random.default_rng(5), skip=("down_proj.weight",))
    for layer in range(2):
        name = f"layers.{layer}.mlp.down_proj."
        del tensors[f"{name}weight"]
        weight = oracle.random_weight(np.random.default_rng(6), 64, 96, 8, 96, symmetric=True, dtype=np.float16)
        tensors |= {name + part: value for part, value in oracle.pack_quantized(weight, symmetric=True).items()}
    with open_checkpoint(write(tmp_path, {**BIG, "quantization_config": config}, tensors)) as model:
        assert model.quantized["blocks.0.mlp.down.weight"].bits == 8
        assert model.quantized["blocks.0.mlp.up.weight"].bits == 4


# What is wrong is said


def damaged(tmp_path: Path, change: Callable[[Parts], None], **config: Any) -> str:
    tensors, _ = quantized_model(BIG, "compressed", np.random.default_rng(5))
    change(tensors)
    return refusal(write(tmp_path, {**BIG, "quantization_config": compressed_config(**config)}, tensors))


UP = "layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "found nan"), (0, "found 0.0"), (-np.inf, "found -inf"), (np.inf, "found inf")]
)
def test_scales_that_are_none(tmp_path: Path, value: float, said: str) -> None:
    def change(tensors: Parts) -> None:
        tensors[UP + "weight_scale"][3:5, 1] = value

    message = damaged(tmp_path, change)
    assert f"{UP}weight_scale': expected finite scales other than 0, {said} at [3, 1] and 1 more" in message


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("weight_packed", np.zeros((96, 7), np.int32), "expected shape [96, 8], found [96, 7]"),
        ("weight_packed", np.zeros((96, 8), np.int64), "expected dtype I32, found I64"),
        ("weight_scale", np.ones((96, 3), np.float16), "expected shape [96, 2], found [96, 3]"),
        ("weight_scale", np.ones((96, 2), np.int32), "expected dtype F16, BF16, F32, found I32"),
        ("weight_scale", None, "missing weight_scale beside it, expected shape [96, 2]"),
        ("weight_shape", np.array([96, 63]), "expected [96, 64], found [96, 63]"),
        ("weight_g_idx", np.full(64, 2, np.int32), "expected groups from 0 to 1, found 2 to 2"),
        ("weight_zero_point", np.zeros((12, 2), np.int32), "not part of this layout"),
        ("weight", np.zeros((96, 64), np.float16), "stands beside its quantized form"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, part: str, value: np.ndarray | None, said: str) -> None:
    def change(tensors: Parts) -> None:
        if value is None:
            del tensors[UP + part]
        else:
            tensors[UP + part] = value

    message = damaged(tmp_path, change)
    assert said in message
    assert UP in message


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    def change(tensors: Parts) -> None:
        tensors[UP + "weight_scale"][0, 0] = np.nan
        del tensors["layers.0.mlp.up_proj.weight_shape"], tensors["norm.weight"]
        tensors["layers.0.mlp.gate_proj.weight_packed"] = np.zeros((4, 4), np.int32)

    message = damaged(tmp_path, change)
    assert "4 problems" in message


def test_group_size_that_the_files_do_not_have(tmp_path: Path) -> None:
    assert "groups of 48 do not divide its 64 inputs" in damaged(tmp_path, lambda tensors: None, group_size=48)
    assert "expected shape [96, 4], found [96, 2]" in damaged(tmp_path, lambda tensors: None, group_size=16)


def test_truncated_file(tmp_path: Path) -> None:
    tensors, _ = quantized_model(BIG, "compressed", np.random.default_rng(5))
    folder = write(tmp_path, {**BIG, "quantization_config": compressed_config()}, tensors)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    assert "not a valid safetensors file" in refusal(folder)


def test_quantized_without_a_config(tmp_path: Path) -> None:
    tensors, _ = quantized_model(BIG, "gptq", np.random.default_rng(5))
    message = refusal(write(tmp_path, BIG, tensors))
    assert "config.json has no quantization_config" in message


REFUSED: dict[str, tuple[Any, str]] = {
    "not an object": ([], "expected an object"),
    "no method": ({}, "quant_method: expected compressed-tensors, gptq, awq, found None"),
    "unknown method": ({"quant_method": "fp8"}, "found 'fp8'"),
    "unknown format": ({**compressed_config(), "format": "marlin-24"}, "format = 'marlin-24': expected one of"),
    "no groups": ({**compressed_config(), "config_groups": {}}, "config_groups = {}: expected an object with one"),
    "a group without weights": (
        {**compressed_config(), "config_groups": {"a": {"targets": []}}},
        "config_groups.a = {'targets': []}",
    ),
    "3 bits": (compressed_config(num_bits=3), "weights.num_bits = 3: expected 4 or 8"),
    "floats": (compressed_config(type="float"), "weights.type = 'float': expected one of int"),
    "blocks": (compressed_config(strategy="block"), "weights.strategy = 'block': expected one of"),
    "group of 0": (compressed_config(group_size=0), "weights.group_size = 0"),
    "group of -3": (compressed_config(group_size=-3), "weights.group_size = -3"),
    "no group": (compressed_config(group_size=None), "weights.group_size"),
    "quantized cache": ({**compressed_config(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "sparse": ({**compressed_config(), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    "rotated": ({**compressed_config(), "transform_config": {"a": 1}}, "transform_config"),
    "unknown key": ({**CONFIGS["gptq"], "bit": 4}, "not a known key"),
    "gptq of 3 bits": ({**CONFIGS["gptq"], "bits": 3}, "bits = 3: expected 4 or 8"),
    "gptq of true bits": ({**CONFIGS["gptq"], "bits": True}, "bits = True"),
    "gptq of marlin": ({**CONFIGS["gptq"], "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    "gptq by module": ({**CONFIGS["gptq"], "dynamic": {"a": {"bits": 8}}}, "dynamic"),
    "awq of 8 bits": ({**CONFIGS["awq"], "bits": 8}, "bits = 8: expected 4"),
    "awq gemv": ({**CONFIGS["awq"], "version": "gemv"}, "version = 'gemv': expected gemm"),
    "awq without zero points": ({**CONFIGS["awq"], "zero_point": False}, "zero_point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case: str) -> None:
    config, said = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        read_quantization({"quantization_config": config})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (compressed_config(), Scheme(Layout.PACK_QUANTIZED, 4, 32)),
        (compressed_config(symmetric=False), Scheme(Layout.PACK_QUANTIZED, 4, 32, symmetric=False)),
        (compressed_config(strategy="channel", group_size=None), Scheme(Layout.PACK_QUANTIZED, 4, 0)),
        ({**compressed_config(num_bits=8), "format": "int-quantized"}, Scheme(Layout.INT_QUANTIZED, 8, 32)),
        (CONFIGS["gptq"], Scheme(Layout.GPTQ, 4, 32)),
        ({**CONFIGS["gptq"], "checkpoint_format": "gptq_v2", "group_size": -1}, Scheme(Layout.GPTQ_V2, 4, 0)),
        ({**CONFIGS["awq"], "version": "GEMM"}, Scheme(Layout.AWQ, 4, 32)),
    ],
)
def test_configs(config: dict[str, Any], scheme: Scheme) -> None:
    assert read_quantization({"quantization_config": config}) == Quantization(config["quant_method"], (scheme,))


def test_no_quantization() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None}) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(CONFIGS)), st.data())
def test_any_value_is_read_or_refused(method: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(CONFIGS[method]))
    place = data.draw(st.sampled_from([config, *([config["config_groups"]["group_0"], config["config_groups"]["group_0"]
                                                  ["weights"]] if method == "compressed" else [])]))  # fmt: skip
    place[data.draw(st.sampled_from(list(place)))] = data.draw(JSON)
    with contextlib.suppress(ConfigError):
        assert isinstance(read_quantization({"quantization_config": config}), Quantization)


# Packed and run


def rows_of(matrix: Any) -> np.ndarray:
    """The weights that a packed matrix holds, row by row."""
    return Ops(1).embedding(np.arange(matrix.shape[0], dtype=np.int32), matrix)


@pytest.mark.parametrize("method", CONFIGS)
def test_packed_integers_are_those_of_the_file(tmp_path: Path, method: str) -> None:
    tensors, expected = quantized_model(BIG, method, np.random.default_rng(5))
    with open_checkpoint(write(tmp_path, {**BIG, "quantization_config": CONFIGS[method]}, tensors)) as model:
        precision = precision_of(model)
        weights = pack_weights(model, Ops(1), precision)
    assert precision.stored == "int4"
    assert weights.embed.dtype == weights.head.dtype == "int8"
    block = weights.blocks[1]
    assert [m.dtype for m in (block.qkv, block.out, block.up, block.down)] == ["int4"] * 4
    assert {m.group_size for m in (block.qkv, block.out, block.up, block.down)} == {32}
    at = "layers.1."
    qkv = np.concatenate([expected[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"])
    np.testing.assert_array_equal(rows_of(block.qkv), qkv)
    np.testing.assert_array_equal(rows_of(block.out), expected[f"{at}self_attn.o_proj.weight"])
    np.testing.assert_array_equal(rows_of(block.down), expected[f"{at}mlp.down_proj.weight"])


def test_activation_order_is_expanded_to_the_dtype(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors, expected = quantized_model(BIG, "gptq", rng, skip=("down_proj.weight",))
    for layer in range(2):
        name = f"layers.{layer}.mlp.down_proj."
        del tensors[f"{name}weight"]
        weight = oracle.random_weight(rng, 64, 96, 4, 32, symmetric=False, dtype=np.float16, shuffled=True)
        tensors |= {name + part: value for part, value in oracle.gptq(weight).items()}
        expected[f"{name}weight"] = weight.dequantized().astype(np.float32)
    config = {**BIG, "quantization_config": {**CONFIGS["gptq"], "desc_act": True}}
    with open_checkpoint(write(tmp_path, config, tensors)) as model:
        for dtype in ("float32", "auto"):
            weights = pack_weights(model, Ops(1), precision_of(model, dtype))
            down = weights.blocks[0].down
            assert down.dtype == ("float16" if dtype == "auto" else dtype)
            want = expected["layers.0.mlp.down_proj.weight"].astype(down.dtype)
            np.testing.assert_array_equal(rows_of(down), want.astype(np.float32))
            assert weights.blocks[0].up.dtype == "int4"


def test_weights_of_two_kinds_in_one_matrix_are_expanded(tmp_path: Path) -> None:
    config = compressed_config()
    config["config_groups"]["group_1"] = {"targets": ["re:.*v_proj"], "weights": {**WEIGHTS, "num_bits": 8}}
    rng = np.random.default_rng(5)
    tensors, expected = quantized_model(BIG, "compressed", rng, skip=("v_proj.weight",))
    for layer in range(2):
        name = f"layers.{layer}.self_attn.v_proj."
        del tensors[f"{name}weight"]
        weight = oracle.random_weight(rng, 32, 64, 8, 32, symmetric=True, dtype=np.float16)
        tensors |= {name + part: value for part, value in oracle.pack_quantized(weight, symmetric=True).items()}
        expected[f"{name}weight"] = weight.dequantized().astype(np.float32)
    with open_checkpoint(write(tmp_path, {**BIG, "quantization_config": config}, tensors)) as model:
        weights = pack_weights(model, Ops(1), precision_of(model, "float32"))
    assert weights.blocks[0].qkv.dtype == "float32"
    want = np.concatenate([expected[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"])
    np.testing.assert_array_equal(rows_of(weights.blocks[0].qkv), want)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_plan_covers_what_is_packed(tmp_path: Path, method: str) -> None:
    tensors, _ = quantized_model(BIG, method, np.random.default_rng(5))
    folder = write(tmp_path, {**BIG, "quantization_config": CONFIGS[method]}, tensors)
    llm = LLM(str(folder), skip_tokenizer_init=True)
    assert llm.plan.weights == llm.model.weights.nbytes
    assert llm.plan.dtype == "int4 (as stored; embedding and head int8)"


@pytest.mark.parametrize("method", CONFIGS)
def test_logits_are_near_those_of_the_dequantized_model(tmp_path: Path, method: str) -> None:
    """But for the rounding of activations to 8 bits."""
    tensors, expected = quantized_model(BIG, method, np.random.default_rng(5))
    (tmp_path / "q").mkdir()
    (tmp_path / "f").mkdir()
    write(tmp_path / "q", {**BIG, "quantization_config": CONFIGS[method]}, tensors)
    write(tmp_path / "f", BIG, expected)
    keep = {"quantization_skip": ["embed.weight", "head.weight"], "dtype": "float32"}
    ids = [3, 9, 27, 4, 12, 36, 31]
    ours = LLM(str(tmp_path / "q"), skip_tokenizer_init=True, **keep).forward(ids).logits
    exact = LLM(str(tmp_path / "f"), skip_tokenizer_init=True, dtype="float32").forward(ids).logits
    assert np.linalg.norm(ours - exact) < 0.03 * np.linalg.norm(exact)
