"""BART and mBART: an encoder and a decoder with learned positions that begin at row 2, layer norms after each part in
BART and before it in mBART, and a bias on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, POSITIONS, read_special_tokens
from pyllm.spec import (
    ENCODER,
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
    Placement,
)
from pyllm.weight_names import NameTable, Row, Transform, linear

_OFFSET = 2  # rows of the position tables that no position has
_DROPPED = (  # of training, or said elsewhere
    "activation_dropout", "classifier_dropout", "classif_dropout", "dropout", "encoder_layerdrop", "decoder_layerdrop",
    "init_std", "num_hidden_layers", "force_bos_token_to_be_generated",
)  # fmt: skip
_NORM = NormSpec(NormKind.LAYER, 1e-5, bias=True)


def _read(config: Mapping[str, Any], family: str, placement: Placement, start_default: int | None) -> ModelSpec:
    reader = ConfigReader(config, family)
    vocab_size = reader.integer("vocab_size", default=50265)
    hidden = reader.integer("d_model", "hidden_size", default=1024)
    positions = reader.integer(*POSITIONS, default=1024)
    activation = reader.choice("activation_function", options=ACTIVATIONS, default="gelu")
    scale = hidden**0.5 if reader.boolean("scale_embedding", default=False) else 1.0
    reader.only("is_encoder_decoder", True)
    tied = reader.boolean("tie_word_embeddings", default=True)

    def blocks(part: str, causal: bool) -> tuple[BlockSpec, ...]:
        count = reader.integer(f"{part}_layers", default=12, maximum=10_000)
        heads = reader.integer(f"{part}_attention_heads", default=16)
        if hidden % heads:
            reader.refuse(f"{part}_attention_heads", heads, f"a divisor of d_model = {hidden}")
        size = max(hidden // heads, 1)
        attention = AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True, causal=causal)
        mlp = MlpSpec(reader.integer(f"{part}_ffn_dim", default=4096), activation, gated=False, bias=True)
        return (BlockSpec(_NORM, attention, mlp, placement),) * count

    encoder, decoder = blocks("encoder", causal=False), blocks("decoder", causal=True)
    crossed = replace(decoder[0], cross=replace(decoder[0].attention, causal=False))
    tokens = read_special_tokens(reader, vocab_size, 0, (2,), 1)
    start = reader.token_id("decoder_start_token_id", start_default, vocab_size)
    for dropped in _DROPPED:
        reader.get(dropped)
    reader.only("add_bias_logits", False)
    reader.only("static_position_embeddings", False)
    reader.only("add_final_layer_norm", placement is Placement.PRE)
    reader.only("normalize_before", placement is Placement.PRE)
    reader.only("normalize_embedding", True)
    dtype = reader.dtype()
    reader.finish()
    shape: dict[str, Any] = {
        "family": family,
        "vocab_size": vocab_size,
        "hidden": hidden,
        "final_norm": _NORM if placement is Placement.PRE else None,
        "max_positions": positions,
        "embedding": EmbeddingSpec(positions=positions + _OFFSET, position_offset=_OFFSET, norm=_NORM, scale=scale),
        "dtype": dtype,
    }
    return ModelSpec(
        **shape,
        blocks=(crossed,) * len(decoder),
        head=HeadSpec(tied=tied, bias=True),
        encoder=ModelSpec(**shape, blocks=encoder, head=HeadSpec(tied=True)),
        decoder_start_token_id=start,
        **tokens,
    )


def _part(part: str, at: str) -> tuple[Row, ...]:
    """Rows of one of the two stacks, under the name that transformers gives it and under ours."""
    block = f"model.{part}.layers.{{i}}"
    return (
        Row(f"model.{part}.embed_positions.weight", (f"{at}positions.weight",)),
        *linear(f"model.{part}.layernorm_embedding", f"{at}embed.norm"),
        *_attention(f"{block}.self_attn", f"{at}blocks.{{i}}.attn"),
        *linear(f"{block}.self_attn_layer_norm", f"{at}blocks.{{i}}.attn_norm"),
        *_attention(f"{block}.encoder_attn", f"{at}blocks.{{i}}.cross"),
        *linear(f"{block}.encoder_attn_layer_norm", f"{at}blocks.{{i}}.cross_norm"),
        *linear(f"{block}.fc1", f"{at}blocks.{{i}}.mlp.up"),
        *linear(f"{block}.fc2", f"{at}blocks.{{i}}.mlp.down"),
        *linear(f"{block}.final_layer_norm", f"{at}blocks.{{i}}.mlp_norm"),
        *linear(f"model.{part}.layer_norm", f"{at}final_norm"),
    )


def _attention(name: str, slot: str) -> tuple[Row, ...]:
    parts = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
    return tuple(row for theirs, ours in parts for row in linear(f"{name}.{theirs}", f"{slot}.{ours}"))


NAMES = NameTable(
    prefix="model.",
    rows=(
        Row("model.shared.weight", ("embed.weight",)),
        *_part("encoder", ENCODER),
        *_part("decoder", ""),
        Row("lm_head.weight", ("head.weight",)),
        Row("final_logits_bias", ("head.bias",), Transform.ONE_ROW),
    ),
    ignored=("encoder.version", "decoder.version"),
    aliases={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
)


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a BART config."""
    return _read(config, "bart", Placement.POST, 2)


def read_mbart(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an mBART config."""
    return _read(config, "mbart", Placement.PRE, None)


BART = Family("bart", read, NAMES)
MBART = Family("mbart", read_mbart, NAMES)
