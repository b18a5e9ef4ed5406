"""MPT: linear biases in place of positions, no bias anywhere else, q, k and v one after the other in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import HARMLESS, ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import HEADS, HIDDEN, LAYERS, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.position_bias import Alibi
from pyllm.spec import Activation, AttentionSpec, BlockSpec, HeadSpec, MlpSpec, ModelSpec, NormKind, NormSpec
from pyllm.weight_names import NameTable, Row

# Of training, or of a choice between kernels.
_DROPPED = ("emb_pdrop", "embedding_fraction", "init_config", "init_device", "tokenizer_name", "verbose")
_ATTENTION_DROPPED = ("attn_impl", "dtype", "is_encoder_decoder")


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an MPT config. What transformers does not compute for this family is refused."""
    reader = ConfigReader(config, "mpt")
    vocab_size = reader.integer("vocab_size", default=50368)
    hidden = reader.integer(*HIDDEN, default=2048)
    layers = reader.integer(*LAYERS, default=24, maximum=10_000)
    heads = reader.integer(*HEADS, default=16)
    positions = reader.integer(*POSITIONS, default=2048)
    size = max(hidden // heads, 1)
    norm = NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=False)
    block = BlockSpec(
        norm=norm,
        attention=_read_attention(reader, heads, size),
        mlp=MlpSpec(4 * hidden, Activation.GELU_ERF, gated=False, bias=False),
    )
    reader.only("expansion_ratio", 4)
    reader.only("no_bias", True)
    reader.only("norm_type", "low_precision_layernorm", "layernorm")
    reader.only("logit_scale", None)
    reader.get("learned_pos_emb")  # true by default, but there is no table where there are linear biases
    tied = reader.boolean("tie_word_embeddings", default=True)
    tokens = read_special_tokens(reader, vocab_size, None, ())
    for dropped in _DROPPED:
        reader.get(dropped)
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_heads", heads, f"a divisor of d_model = {hidden}")
    reader.finish()
    return ModelSpec(
        family="mpt",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=norm,
        max_positions=positions,
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


def _read_attention(reader: ConfigReader, heads: int, size: int) -> AttentionSpec:
    value = reader.get("attn_config")
    if value is not None and not isinstance(value, dict):
        reader.refuse("attn_config", value, "an object or null")
        value = None
    inner = reader.nested("attn_config", value or {})
    inner.only("attn_type", "multihead_attention")
    clip = None if inner.get("clip_qkv") is None else inner.number("clip_qkv", default=1.0, minimum=1e-6)
    inner.only("prefix_lm", False)
    inner.only("qk_ln", False)
    inner.only("attn_uses_sequence_id", False)
    inner.only("alibi", True)
    scale = inner.number("softmax_scale", default=size**-0.5, minimum=1e-6)
    bias = Alibi(inner.number("alibi_bias_max", default=8.0, minimum=1e-3))
    for dropped in _ATTENTION_DROPPED:
        inner.get(dropped)
    inner.check_unused(HARMLESS)
    return AttentionSpec(heads, heads, size, scale, bias=bias, clip=clip)


_AT, _BLOCK = "transformer.blocks.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.wte.weight", ("embed.weight",)),
        Row(f"{_AT}.norm_1.weight", (f"{_BLOCK}.attn_norm.weight",)),
        Row(f"{_AT}.attn.Wqkv.weight", tuple(f"{_BLOCK}.attn.{part}.weight" for part in "qkv")),
        Row(f"{_AT}.attn.out_proj.weight", (f"{_BLOCK}.attn.o.weight",)),
        Row(f"{_AT}.norm_2.weight", (f"{_BLOCK}.mlp_norm.weight",)),
        Row(f"{_AT}.ffn.up_proj.weight", (f"{_BLOCK}.mlp.up.weight",)),
        Row(f"{_AT}.ffn.down_proj.weight", (f"{_BLOCK}.mlp.down.weight",)),
        Row("transformer.norm_f.weight", ("final_norm.weight",)),
        Row("lm_head.weight", ("head.weight",)),
    ),
)

MPT = Family("mpt", read, NAMES)
