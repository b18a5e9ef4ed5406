"""GPT-2: learned positions, layer norms, one fused q/k/v projection, matrices stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.spec import AttentionSpec, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec, ModelSpec, NormKind, NormSpec
from pyllm.weight_names import NameTable, Row, Transform, linear


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-2 config."""
    reader = ConfigReader(config, "gpt2")
    vocab_size = reader.integer("vocab_size", default=50257)
    hidden = reader.integer(*HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    positions = reader.integer(*POSITIONS, default=1024)
    norm = NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True)
    mlp = MlpSpec(
        hidden=reader.integer(*MLP_HIDDEN, default=4 * hidden),
        activation=reader.choice("activation_function", options=ACTIVATIONS, default="gelu_new"),
        gated=False,
        bias=True,
    )
    scaled = reader.boolean("scale_attn_weights", default=True)
    by_layer = reader.boolean("scale_attn_by_inverse_layer_idx", default=False)
    tied = reader.boolean("tie_word_embeddings", default=True)
    reader.get("n_ctx")  # size of the causal mask, which is not stored here
    tokens = read_special_tokens(reader, vocab_size, 50256, (50256,))
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_head", heads, f"a divisor of n_embd = {hidden}")
    reader.finish()

    def block(layer: int) -> BlockSpec:
        head_dim = hidden // heads
        scale = (head_dim**-0.5 if scaled else 1.0) / (layer + 1 if by_layer else 1)
        return BlockSpec(norm, AttentionSpec(heads, heads, head_dim, scale, qkv_bias=True, out_bias=True), mlp)

    return ModelSpec(
        family="gpt2",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=tuple(block(layer) for layer in range(layers)),
        final_norm=norm,
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
        Row("transformer.wte.weight", ("embed.weight",)),
        Row("transformer.wpe.weight", ("positions.weight",)),
        *linear(f"{_AT}.ln_1", f"{_BLOCK}.attn_norm"),
        *linear(f"{_AT}.attn.c_attn", *(f"{_BLOCK}.attn.{part}" for part in "qkv"), transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.attn.c_proj", f"{_BLOCK}.attn.o", transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.ln_2", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.mlp.c_fc", f"{_BLOCK}.mlp.up", transform=Transform.TRANSPOSED),
        *linear(f"{_AT}.mlp.c_proj", f"{_BLOCK}.mlp.down", transform=Transform.TRANSPOSED),
        *linear("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias", "multiple_choice_head.*"),
)

GPT2 = Family("gpt2", read, NAMES)
