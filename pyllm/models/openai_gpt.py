"""GPT-1: GPT-2's layout, with norms behind parts and none at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import HEADS, HIDDEN, LAYERS, NORM_EPS, POSITIONS, read_special_tokens
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
    Placement,
)
from pyllm.weight_names import NameTable, Row, Transform, linear

ACTIVATIONS = {  # the "gelu" of this family is the one by tanh
    "gelu": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-1 config."""
    reader = ConfigReader(config, "openai-gpt")
    vocab_size = reader.integer("vocab_size", default=40478)
    hidden = reader.integer(*HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    positions = reader.integer(*POSITIONS, default=512)
    size = max(hidden // heads, 1)
    block = BlockSpec(
        norm=NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True),
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True),
        mlp=MlpSpec(
            hidden=4 * hidden,
            activation=reader.choice("afn", options=ACTIVATIONS, default="gelu"),
            gated=False,
            bias=True,
        ),
        placement=Placement.POST,
    )
    tied = reader.boolean("tie_word_embeddings", default=True)
    reader.only("n_special", 0)
    for dropped in ("n_ctx", "predict_special_tokens"):  # of the stored mask and of the first training code
        reader.get(dropped)
    tokens = read_special_tokens(reader, vocab_size, None, ())
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_head", heads, f"a divisor of n_embd = {hidden}")
    reader.finish()
    return ModelSpec(
        family="openai-gpt",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=None,
        max_positions=positions,
        embedding=EmbeddingSpec(positions=positions),
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.h.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.tokens_embed.weight", ("embed.weight",)),
        Row("transformer.positions_embed.weight", ("positions.weight",)),
        *linear(f"{_AT}.attn.c_attn", *(f"{_BLOCK}.attn.{part}" for part in "qkv"), transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.attn.c_proj", f"{_BLOCK}.attn.o", transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.ln_1", f"{_BLOCK}.attn_norm"),
        *linear(f"{_AT}.mlp.c_fc", f"{_BLOCK}.mlp.up", transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.mlp.c_proj", f"{_BLOCK}.mlp.down", transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.ln_2", f"{_BLOCK}.mlp_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("h.*.attn.bias", "position_ids", "multiple_choice_head.*"),
)

OPENAI_GPT = Family("openai-gpt", read, NAMES)
