"""T5 and mT5 (and FLAN-T5, UL2): RMS norms before each part, attention scores as they are but for a learned bias by
distance, which all layers of a stack share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import read_special_tokens
from pyllm.position_bias import Buckets
from pyllm.spec import (
    ENCODER,
    Activation,
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
)
from pyllm.weight_names import NameTable, Row, Transform

_CONTEXT = 2048  # tokens of a text, at least: distances have no end, only memory has one
_FEED_FORWARD = {  # activation, and whether it is a gate
    "relu": (Activation.RELU, False),
    "gelu": (Activation.GELU_ERF, False),
    "silu": (Activation.SILU, False),
    "gated-relu": (Activation.RELU, True),
    "gated-gelu": (Activation.GELU_TANH, True),
    "gated-silu": (Activation.SILU, True),
}


def _read(config: Mapping[str, Any], family: str, feed_forward: str, tie: bool) -> ModelSpec:
    """`feed_forward` and `tie` are what the config class defaults to."""
    reader = ConfigReader(config, family)
    vocab_size = reader.integer("vocab_size", default=32128)
    hidden = reader.integer("d_model", "hidden_size", default=512)
    heads = reader.integer("num_heads", "num_attention_heads", default=8 if family == "t5" else 6)
    layers = reader.integer("num_layers", "num_hidden_layers", default=6 if family == "t5" else 8, maximum=10_000)
    decoder_layers = reader.integer("num_decoder_layers", default=layers, maximum=10_000)
    norm = NormSpec(NormKind.RMS, reader.number("layer_norm_epsilon", default=1e-6, maximum=0.1), bias=False)
    activation, gated = reader.choice("feed_forward_proj", options=_FEED_FORWARD, default=feed_forward)
    buckets = Buckets(
        reader.integer("relative_attention_num_buckets", default=32, minimum=4),
        reader.integer("relative_attention_max_distance", default=128),
    )
    attention = AttentionSpec(heads, heads, reader.integer("d_kv", "head_dim", default=64), 1.0, bias=buckets)
    mlp = MlpSpec(reader.integer("d_ff", default=2048 if family == "t5" else 1024), activation, gated, bias=False)
    block = BlockSpec(norm, attention, mlp, cross=replace(attention, causal=False, bias=None))
    tied = reader.boolean("tie_word_embeddings", default=tie)
    untied = reader.get("tie_word_embeddings") is False  # in files from before scale_decoder_outputs was written down
    scaled = family == "t5" and reader.boolean("scale_decoder_outputs", default=not untied)
    tokens = read_special_tokens(reader, vocab_size, None, (1,), 0)
    start = reader.token_id("decoder_start_token_id", tokens["pad_token_id"], vocab_size)
    positions = reader.integer("n_positions", default=512)
    reader.only("is_encoder_decoder", True)
    for name in ("dense_act_fn", "is_gated_act", "dropout_rate", "classifier_dropout", "initializer_factor"):
        reader.get(name)  # said by feed_forward_proj, or of training
    dtype = reader.dtype()
    reader.finish()
    shape: dict[str, Any] = {
        "family": family,
        "vocab_size": vocab_size,
        "hidden": hidden,
        "final_norm": norm,
        "max_positions": max(positions, _CONTEXT),
        "dtype": dtype,
    }
    encoder = BlockSpec(norm, replace(attention, causal=False), mlp)
    return ModelSpec(
        **shape,
        blocks=(block,) * decoder_layers,
        head=HeadSpec(tied=tied, scale=hidden**-0.5 if scaled else 1.0),
        encoder=ModelSpec(**shape, blocks=(encoder,) * layers, head=HeadSpec(tied=True)),
        decoder_start_token_id=start,
        **tokens,
    )


def _part(part: str, at: str) -> tuple[Row, ...]:
    """Rows of one of the two stacks, under the name that transformers gives it and under ours."""
    layer, block = f"{part}.block.{{i}}.layer", f"{at}blocks.{{i}}"
    feed_forward = 1 if part == "encoder" else 2
    dense = f"{layer}.{feed_forward}.DenseReluDense"
    rows = [
        Row(
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{at}relative_bias.weight",),
            Transform.TRANSPOSED,
        ),
        *(Row(f"{layer}.0.SelfAttention.{name}.weight", (f"{block}.attn.{name}.weight",)) for name in "qkvo"),
        Row(f"{layer}.0.layer_norm.weight", (f"{block}.attn_norm.weight",)),
        Row(f"{dense}.wi.weight", (f"{block}.mlp.up.weight",), without=f"{block}.mlp.gate.weight"),
        Row(f"{dense}.wi_0.weight", (f"{block}.mlp.gate.weight",)),
        Row(f"{dense}.wi_1.weight", (f"{block}.mlp.up.weight",)),
        Row(f"{dense}.wo.weight", (f"{block}.mlp.down.weight",)),
        Row(f"{layer}.{feed_forward}.layer_norm.weight", (f"{block}.mlp_norm.weight",)),
        Row(f"{part}.final_layer_norm.weight", (f"{at}final_norm.weight",)),
    ]
    if part == "decoder":
        rows += [Row(f"{layer}.1.EncDecAttention.{name}.weight", (f"{block}.cross.{name}.weight",)) for name in "qkvo"]
        rows.append(Row(f"{layer}.1.layer_norm.weight", (f"{block}.cross_norm.weight",)))
    return tuple(rows)


NAMES = NameTable(
    prefix="",
    rows=(
        Row("shared.weight", ("embed.weight",)),
        *_part("encoder", ENCODER),
        *_part("decoder", ""),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    aliases={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
)


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a T5 config."""
    return _read(config, "t5", "relu", tie=True)


def read_mt5(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an mT5 config."""
    return _read(config, "mt5", "gated-gelu", tie=False)


T5 = Family("t5", read, NAMES)
MT5 = Family("mt5", read_mt5, NAMES)
