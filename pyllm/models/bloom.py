"""BLOOM: linear biases in place of positions, a norm behind the embedding, q, k and v of each head together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import HEADS, HIDDEN, LAYERS, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.position_bias import Alibi
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

# Of training, or of how its kernels were fused.
_DROPPED = """
    attention_softmax_in_fp32 bias_dropout_fusion hidden_dropout masked_softmax_fusion offset_alibi skip_bias_add
    skip_bias_add_qkv slow_but_exact unk_token_id
    """.split()  # noqa: SIM905


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a BLOOM config."""
    reader = ConfigReader(config, "bloom")
    vocab_size = reader.integer("vocab_size", default=250880)
    hidden = reader.integer(*HIDDEN, default=64)
    layers = reader.integer(*LAYERS, default=2, maximum=10_000)
    heads = reader.integer(*HEADS, default=8)
    positions = reader.integer(*POSITIONS, default=2048)  # of its training: biases know no limit
    normed_residual = reader.boolean("apply_residual_connection_post_layernorm", default=False)
    size = max(hidden // heads, 1)
    norm = NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True)
    block = BlockSpec(
        norm=norm,
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True, bias=Alibi()),
        mlp=MlpSpec(4 * hidden, Activation.GELU_TANH, gated=False, bias=True),
        placement=Placement.NORMED if normed_residual else Placement.PRE,
    )
    reader.only("n_inner", None, 4 * hidden)
    tied = reader.boolean("tie_word_embeddings", default=True)
    tokens = read_special_tokens(reader, vocab_size, 1, (2,))
    for dropped in _DROPPED:
        reader.get(dropped)
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_head", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    return ModelSpec(
        family="bloom",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=norm,
        max_positions=positions,
        embedding=EmbeddingSpec(norm=norm),
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.h.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.word_embeddings.weight", ("embed.weight",)),
        *linear("transformer.word_embeddings_layernorm", "embed.norm"),
        *linear(f"{_AT}.input_layernorm", f"{_BLOCK}.attn_norm"),
        *linear(
            f"{_AT}.self_attention.query_key_value",
            *(f"{_BLOCK}.attn.{part}" for part in "qkv"),
            transform=Transform.PER_HEAD,
        ),
        *linear(f"{_AT}.self_attention.dense", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.post_attention_layernorm", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_BLOCK}.mlp.down"),
        *linear("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
)

BLOOM = Family("bloom", read, NAMES)
