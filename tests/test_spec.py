"""Specs: what they refuse, which weights they ask for, and rotary frequencies against transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllm.errors import ConfigError
from pyllm.models.shared import NEEDED, OF_KIND
from pyllm.rope import RopeKind, RopeSpec
from pyllm.spec import (
    Activation,
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
)

RMS = NormSpec(NormKind.RMS, 1e-6, bias=False)
ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=6, scale=6**-0.5, qk_norm=RMS)
BLOCK = BlockSpec(RMS, ATTENTION, MlpSpec(20, Activation.SILU, gated=True, bias=False))
MODEL = ModelSpec(
    "llama", vocab_size=11, hidden=16, blocks=(BLOCK, BLOCK), final_norm=RMS, max_positions=32, rope=RopeSpec(dim=6)
)


def test_slots_of_a_gated_model() -> None:
    slots = MODEL.slots()
    assert slots["embed.weight"] == slots["head.weight"] == (11, 16)
    assert slots["blocks.1.attn.q.weight"] == (24, 16)
    assert slots["blocks.1.attn.k.weight"] == slots["blocks.1.attn.v.weight"] == (12, 16)
    assert slots["blocks.1.attn.o.weight"] == (16, 24)
    assert slots["blocks.0.attn.q_norm.weight"] == slots["blocks.0.attn.k_norm.weight"] == (6,)
    assert slots["blocks.0.mlp.gate.weight"] == slots["blocks.0.mlp.up.weight"] == (20, 16)
    assert slots["blocks.0.mlp.down.weight"] == (16, 20)
    assert not [name for name in slots if name.endswith("bias")]
    assert len(slots) == 3 + 2 * 11
    assert MODEL.num_parameters() == sum(math.prod(shape) for shape in slots.values())


def test_slots_of_a_plain_model_with_biases_and_positions() -> None:
    norm = NormSpec(NormKind.LAYER, 1e-5, bias=True)
    attention = AttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=1.0, qkv_bias=True, out_bias=True)
    block = BlockSpec(norm, attention, MlpSpec(20, Activation.RELU, gated=False, bias=True))
    slots = ModelSpec(
        "gpt2", 11, 16, (block,), norm, max_positions=9, embedding=EmbeddingSpec(positions=9), head=HeadSpec(tied=True)
    ).slots()
    assert slots["positions.weight"] == (9, 16)
    assert slots["blocks.0.attn.q.bias"] == (16,)
    assert slots["blocks.0.mlp.up.bias"] == (20,)
    assert slots["final_norm.bias"] == (16,)
    assert "head.weight" not in slots
    assert not [name for name in slots if "gate" in name]


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (MODEL, {"vocab_size": 0}),
        (MODEL, {"hidden": -1}),
        (MODEL, {"blocks": ()}),
        (MODEL, {"max_positions": 0}),
        (MODEL, {"embedding": EmbeddingSpec(positions=31)}),
        (MODEL, {"rope": RopeSpec(dim=8)}),
        (ATTENTION, {"heads": 0}),
        (ATTENTION, {"kv_heads": 3}),
        (ATTENTION, {"kv_heads": 0}),
        (ATTENTION, {"head_dim": 257}),
        (ATTENTION, {"scale": math.nan}),
        (ATTENTION, {"window": 0}),
        (ATTENTION, {"qk_norm": NormSpec(NormKind.LAYER, 1e-5, bias=True)}),
        (RMS, {"eps": math.nan}),
        (RMS, {"eps": -1e-6}),
        (BLOCK.mlp, {"hidden": 0}),
        (RopeSpec(dim=8), {"dim": 7}),
        (RopeSpec(dim=8), {"theta": math.inf}),
        (RopeSpec(dim=8), {"theta": 1.0}),
        (RopeSpec(dim=8), {"factor": math.nan}),
        (RopeSpec(dim=8), {"max_positions": 0}),
        (RopeSpec(dim=8), {"kind": RopeKind.DYNAMIC, "dim": 2}),
        (RopeSpec(dim=8), {"kind": RopeKind.LLAMA3, "low_freq_factor": 4.0}),
        (RopeSpec(dim=8), {"kind": RopeKind.YARN, "beta_slow": 64.0}),
        (RopeSpec(dim=8), {"kind": RopeKind.LONGROPE, "short_factor": (1.0,) * 4, "long_factor": (1.0,) * 3}),
        (RopeSpec(dim=8), {"kind": RopeKind.LONGROPE, "short_factor": (1.0,) * 4, "long_factor": (0.0,) * 4}),
    ],
)
def test_impossible_values_are_refused(spec: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected .* found"):
        replace(spec, **change)


ROPES = {
    "default": RopeSpec(128, theta=1e6),
    "linear": RopeSpec(64, kind=RopeKind.LINEAR, factor=3.0),
    "dynamic": RopeSpec(64, kind=RopeKind.DYNAMIC, max_positions=4096, factor=2.5),
    "llama3": RopeSpec(64, 5e5, RopeKind.LLAMA3, 131072, original_max_positions=8192, factor=32.0),
    "yarn": RopeSpec(128, 1e6, RopeKind.YARN, 131072, original_max_positions=32768, factor=4.0),
    "yarn-mscale": RopeSpec(
        128, 1e6, RopeKind.YARN, 131072, 32768, factor=4.0, truncate=False, mscale=0.7, mscale_all_dim=1.1
    ),
    "yarn-given": RopeSpec(64, 1e4, RopeKind.YARN, 8192, 2048, factor=4.0, beta_fast=16.0, attention_factor=1.25),
    "longrope": RopeSpec(
        96,
        1e4,
        RopeKind.LONGROPE,
        131072,
        original_max_positions=4096,
        factor=32.0,
        short_factor=tuple(np.linspace(1, 2, 48).tolist()),
        long_factor=tuple(np.linspace(1, 30, 48).tolist()),
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [1, 4096, 4097, 20000])
def test_rope_equals_transformers(name: str, length: int) -> None:
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spec = ROPES[name]
    values = {name: getattr(spec, name) for name in (*NEEDED.get(spec.kind, ()), *OF_KIND.get(spec.kind, ()))}
    parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if spec.original_max_positions is not None:
        parameters["original_max_position_embeddings"] = spec.original_max_positions
    config = transformers.LlamaConfig(
        hidden_size=4 * spec.dim,
        num_attention_heads=4,
        head_dim=spec.dim,
        max_position_embeddings=spec.max_positions,
        rope_parameters={"rope_type": spec.kind.value, "rope_theta": spec.theta, **parameters},
    )
    if spec.kind is RopeKind.DEFAULT:
        expected, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:  # while it generates, transformers passes the length as a tensor once it passes the trained one
        grown = spec.kind is RopeKind.DYNAMIC and length > spec.max_positions
        init = ROPE_INIT_FUNCTIONS[spec.kind.value]
        expected, scaling = init(config, None, seq_len=torch.tensor(length) if grown else length)
    found = spec.inv_freq(length)
    assert found.dtype == np.float32
    steps = np.abs(found.view(np.int32) - expected.numpy().view(np.int32))
    assert steps.max() <= 2, "at most two steps of float32, where the two powers round differently"
    assert (steps > 0).mean() <= 0.1
    assert spec.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_length_class_says_when_frequencies_change(name: str) -> None:
    spec = ROPES[name]
    lengths = [1, 4095, 4096, 4097, 5000, 131072]
    for left in lengths:
        for right in lengths:
            same = np.array_equal(spec.inv_freq(left), spec.inv_freq(right))
            assert same == (spec.length_class(left) == spec.length_class(right))


def test_every_scaling_changes_the_frequencies() -> None:
    for name, spec in ROPES.items():
        plain = replace(spec, kind=RopeKind.DEFAULT).inv_freq(20000)
        assert np.array_equal(spec.inv_freq(20000), plain) == (name == "default")


def test_stretched_positions() -> None:
    assert ROPES["default"].stretched_positions == 2048
    assert ROPES["linear"].stretched_positions == 3 * 2048
    assert ROPES["dynamic"].stretched_positions == 10240
    assert ROPES["yarn"].stretched_positions == 131072
    assert ROPES["longrope"].stretched_positions == 131072


def test_operations_are_those_of_matrices_attention_and_one_head() -> None:
    projections = 24 * 16 + 2 * 12 * 16 + 16 * 24  # q, k and v, o
    spec = replace(MODEL, blocks=(BLOCK,) * 3)
    assert spec.block_weights == 3 * (projections + 3 * 16 * 20)
    head = 2 * 11 * 16
    seen = 1 + 2 + 3 + 4 + 5  # keys that five queries see; each takes a product with a key and one with a value
    assert spec.operations(5) == 5 * 2 * spec.block_weights + 3 * 4 * 24 * seen + head
    assert spec.operations(1, past=5) == 2 * spec.block_weights + 3 * 4 * 24 * 6 + head
    assert spec.operations(2) + spec.operations(3, past=2) == spec.operations(5) + head
