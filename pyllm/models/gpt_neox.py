"""GPT-NeoX and Pythia: attention and feed-forward part side by side, q, k and v of each head together in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import (
    ACTIVATIONS,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP_HIDDEN,
    NORM_EPS,
    POSITIONS,
    read_rope,
    read_special_tokens,
)
from pyllm.spec import AttentionSpec, BlockSpec, HeadSpec, MlpSpec, ModelSpec, NormKind, NormSpec, Placement
from pyllm.weight_names import NameTable, Row, Transform, linear


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-NeoX config."""
    reader = ConfigReader(config, "gpt_neox")
    vocab_size = reader.integer("vocab_size", default=50432)
    hidden = reader.integer(*HIDDEN, default=6144)
    layers = reader.integer(*LAYERS, default=44, maximum=10_000)
    heads = reader.integer(*HEADS, default=64)
    positions = reader.integer(*POSITIONS, default=2048)
    biased = reader.boolean("attention_bias", default=True)
    block = BlockSpec(
        norm=NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=max(hidden // heads, 1),
            scale=max(hidden // heads, 1) ** -0.5,
            qkv_bias=biased,
            out_bias=biased,
        ),
        mlp=MlpSpec(
            hidden=reader.integer(*MLP_HIDDEN, default=24576),
            activation=reader.choice("hidden_act", options=ACTIVATIONS, default="gelu"),
            gated=False,
            bias=True,
        ),
        placement=Placement.PARALLEL if reader.boolean("use_parallel_residual", default=True) else Placement.PRE,
    )
    rope = read_rope(reader, block.attention.head_dim, positions, default_part=0.25)
    tied = reader.boolean("tie_word_embeddings", default=False)
    tokens = read_special_tokens(reader, vocab_size, 0, (2,))
    for dropped in ("classifier_dropout", "hidden_dropout"):
        reader.get(dropped)  # of training
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    return ModelSpec(
        family="gpt_neox",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=block.norm,
        max_positions=rope.stretched_positions,
        rope=rope,
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "gpt_neox.layers.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="gpt_neox.",
    rows=(
        Row("gpt_neox.embed_in.weight", ("embed.weight",)),
        *linear(f"{_AT}.input_layernorm", f"{_BLOCK}.attn_norm"),
        *linear(
            f"{_AT}.attention.query_key_value",
            *(f"{_BLOCK}.attn.{part}" for part in "qkv"),
            transform=Transform.PER_HEAD,
        ),
        *linear(f"{_AT}.attention.dense", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.post_attention_layernorm", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_BLOCK}.mlp.down"),
        *linear("gpt_neox.final_layer_norm", "final_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("layers.*.attention.bias", "layers.*.attention.masked_bias", "*rotary_emb.inv_freq"),
    renamed={"embed_out.weight": "lm_head.weight"},
)

GPT_NEOX = Family("gpt_neox", read, NAMES)
