"""ChatGLM2, ChatGLM3 and GLM-4 in their authors' layout: causal, q, k and v in one tensor, gate and up in another, half
of each head rotated, rotated channels being neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.rope import RopeSpec
from pyllm.spec import (
    MAX_HEAD_DIM,
    Activation,
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
)
from pyllm.weight_names import NameTable, Row, Transform, linear

_UNUSED = (  # of training and of precisions
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "classifier_dropout",
    "fp32_residual_connection",
    "hidden_dropout",
    "original_rope",
)


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a ChatGLM2 or ChatGLM3 config."""
    reader = ConfigReader(config, "chatglm")
    vocab_size = reader.integer("padded_vocab_size", default=reader.integer("vocab_size", default=65024))
    hidden = reader.integer(*HIDDEN, default=4096)
    layers = reader.integer(*LAYERS, default=28, maximum=10_000)
    heads = reader.integer(*HEADS, default=32)
    size = reader.integer("kv_channels", default=128, maximum=MAX_HEAD_DIM)
    positions = reader.integer(*POSITIONS, default=2048)
    kv_heads = reader.integer("multi_query_group_num", default=1)
    biased = reader.boolean("add_bias_linear", default=False)
    if not reader.boolean("multi_query_attention", default=False):
        reader.refuse("multi_query_attention", False, "true")
    reader.only("rmsnorm", True)
    reader.only("post_layer_norm", True)
    reader.only("apply_residual_connection_post_layernorm", False)
    reader.only("pre_seq_len", None)
    reader.only("prefix_projection", False)
    reader.only("quantization_bit", 0, None)
    block = BlockSpec(
        norm=NormSpec(NormKind.RMS, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=False),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads if heads % kv_heads == 0 else heads,
            head_dim=size,
            scale=size**-0.5,
            qkv_bias=reader.boolean("add_qkv_bias", default=False) or biased,
            out_bias=biased,
        ),
        mlp=MlpSpec(reader.integer(*MLP_HIDDEN, default=13696), Activation.SILU, gated=True, bias=biased),
    )
    theta = 10000.0 * reader.number("rope_ratio", default=1.0, minimum=1e-3, maximum=1e6)
    tied = reader.boolean("tie_word_embeddings", default=False)
    tokens = read_special_tokens(reader, vocab_size, None, (2,), 0)
    for name in (*_UNUSED, "apply_query_key_layer_scaling"):  # scores are divided by a number, then multiplied by it
        reader.get(name)
    dtype = reader.dtype()
    if heads % kv_heads:
        reader.refuse("multi_query_group_num", kv_heads, f"a divisor of num_attention_heads = {heads}")
    if size % 4:
        reader.refuse("kv_channels", size, "a multiple of 4")
    reader.finish()
    return ModelSpec(
        family="chatglm",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=block.norm,
        max_positions=positions,
        rope=RopeSpec(dim=size // 2, theta=theta, max_positions=positions),
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.encoder.layers.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.embedding.word_embeddings.weight", ("embed.weight",)),
        Row(f"{_AT}.input_layernorm.weight", (f"{_BLOCK}.attn_norm.weight",)),
        *linear(
            f"{_AT}.self_attention.query_key_value",
            *(f"{_BLOCK}.attn.{part}" for part in "qkv"),
            transform=Transform.INTERLEAVED,
        ),
        *linear(f"{_AT}.self_attention.dense", f"{_BLOCK}.attn.o"),
        Row(f"{_AT}.post_attention_layernorm.weight", (f"{_BLOCK}.mlp_norm.weight",)),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_BLOCK}.mlp.gate", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_BLOCK}.mlp.down"),
        Row("transformer.encoder.final_layernorm.weight", ("final_norm.weight",)),
        Row("transformer.output_layer.weight", ("head.weight",)),
    ),
    ignored=("rotary_pos_emb.inv_freq",),
)

CHATGLM2 = Family("chatglm", read, NAMES)
