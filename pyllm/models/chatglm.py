"""ChatGLM-6B: a bidirectional prefix, rotation by two positions, each of half a head, and a normed residual stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.prefix import PrefixSpec
from pyllm.rope import RopeSpec
from pyllm.spec import (
    Activation,
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
    Placement,
)
from pyllm.weight_names import NameTable, Row, Transform, linear

_LAYERS = 28  # that the residual scale was made for, whatever the model has


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a ChatGLM-6B config."""
    reader = ConfigReader(config, "chatglm")
    vocab_size = reader.integer("vocab_size", default=150528)
    hidden = reader.integer(*HIDDEN, default=4096)
    layers = reader.integer(*LAYERS, default=_LAYERS, maximum=10_000)
    heads = reader.integer(*HEADS, default=32)
    positions = reader.integer(*POSITIONS, default=2048)
    size = max(hidden // heads, 1)
    block = BlockSpec(
        norm=NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True),
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True),
        mlp=MlpSpec(reader.integer(*MLP_HIDDEN, default=16384), Activation.GELU_TANH, gated=False, bias=True),
        placement=Placement.NORMED,
        residual_scale=math.sqrt(2 * _LAYERS),
    )
    reader.only("position_encoding_2d", True)
    reader.only("pre_seq_len", None)
    reader.only("prefix_projection", False)
    reader.only("quantization_bit", 0, None)
    start = reader.token_id("bos_token_id", 150004, vocab_size)
    masks = [reader.token_id(name, default, vocab_size)
             for name, default in (("gmask_token_id", 150001), ("mask_token_id", 150000))]  # fmt: skip
    tied = reader.boolean("tie_word_embeddings", default=False)
    tokens = read_special_tokens(reader, vocab_size, start, (150005,), 3)
    dtype = reader.dtype()
    if hidden % heads or size % 4:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden} that leaves heads of 4 n")
    for name, value in (("bos_token_id", start), ("gmask_token_id", masks[0]), ("mask_token_id", masks[1])):
        if value is None:
            reader.refuse(name, reader.get(name), f"a token of the vocabulary of {vocab_size}")
    reader.finish()
    return ModelSpec(
        family="chatglm",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=block.norm,
        max_positions=positions,
        rope=RopeSpec(dim=size, max_positions=positions, sections=2, float16=True),
        head=HeadSpec(tied=tied),
        prefix=PrefixSpec(start, tuple((mask,) for mask in masks if mask is not None)),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.layers.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.word_embeddings.weight", ("embed.weight",)),
        *linear(f"{_AT}.input_layernorm", f"{_BLOCK}.attn_norm"),
        *linear(
            f"{_AT}.attention.query_key_value",
            *(f"{_BLOCK}.attn.{part}" for part in "qkv"),
            transform=Transform.PER_HEAD | Transform.SECTIONED,
        ),
        *linear(f"{_AT}.attention.dense", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.post_attention_layernorm", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_BLOCK}.mlp.down"),
        *linear("transformer.final_layernorm", "final_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("layers.*.attention.rotary_emb.inv_freq",),
)

CHATGLM = Family("chatglm", read, NAMES, key="position_encoding_2d")
