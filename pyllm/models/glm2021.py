"""GLM (Du et al. 2022): GPT-2 with a bidirectional prefix and two learned positions, which fills blanks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.prefix import PrefixSpec
from pyllm.spec import AttentionSpec, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec, ModelSpec, NormKind, NormSpec
from pyllm.weight_names import NameTable, Row, linear

_MASKS = ("gmask_token_id", "smask_token_id", "mask_token_id")  # a text without one is gone on with: the first
_UNUSED = (  # of training and of other heads, or neutral: scores are divided by attention_scale, then multiplied by it
    "attention_dropout_prob",
    "attention_scale",
    "checkpoint_activations",
    "checkpoint_num_layers",
    "embedding_dropout_prob",
    "output_dropout_prob",
    "output_predict",
    "parallel_output",
    "pool_token",
    "spell_func",
)


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GLM config, to which the ids of its tokenizer's special tokens are added."""
    reader = ConfigReader(config, "glm")
    vocab_size = reader.integer("vocab_size", default=30592)
    hidden = reader.integer(*HIDDEN, default=1024)
    layers = reader.integer(*LAYERS, default=24, maximum=10_000)
    heads = reader.integer(*HEADS, default=16)
    positions = reader.integer(*POSITIONS, default=512)
    size = max(hidden // heads, 1)
    norm = NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True)
    block = BlockSpec(
        norm=norm,
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True),
        mlp=MlpSpec(
            hidden=reader.integer(*MLP_HIDDEN, default=4 * hidden),
            activation=reader.choice("hidden_act", options=ACTIVATIONS, default="gelu_new"),
            gated=False,
            bias=True,
        ),
    )
    reader.only("block_position_encoding", True)
    reader.only("relative_encoding", False)
    reader.only("spell_length", None)
    start = reader.token_id("sop_token_id", None, vocab_size)
    masks = tuple(mask for name in _MASKS if (mask := reader.token_id(name, None, vocab_size)) is not None)
    if start is None:
        reader.refuse("sop_token_id", reader.get("sop_token_id"), "the id of <|startofpiece|> in the model's tokenizer")
    if not masks:
        reader.refuse("mask_token_id", reader.get("mask_token_id"), "the id of [MASK] in the model's tokenizer; and "
                      "those of [sMASK] and [gMASK] as smask_token_id and gmask_token_id")  # fmt: skip
    tied = reader.boolean("tie_word_embeddings", default=True)
    tokens = read_special_tokens(reader, vocab_size, None, ())
    for name in _UNUSED:
        reader.get(name)
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    return ModelSpec(
        family="glm",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=norm,
        max_positions=positions,
        embedding=EmbeddingSpec(positions=positions + 1, second_positions=positions + 1),
        head=HeadSpec(tied=tied),
        prefix=PrefixSpec(start, (masks,), restarts=True),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.layers.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="glm.",
    rows=(
        Row("word_embeddings.weight", ("embed.weight",)),
        Row("transformer.position_embeddings.weight", ("positions.weight",)),
        Row("transformer.block_position_embeddings.weight", ("second_positions.weight",)),
        *linear(f"{_AT}.input_layernorm", f"{_BLOCK}.attn_norm"),
        *linear(f"{_AT}.attention.query_key_value", *(f"{_BLOCK}.attn.{part}" for part in "qkv")),
        *linear(f"{_AT}.attention.dense", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.post_attention_layernorm", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_BLOCK}.mlp.down"),
        *linear("transformer.final_layernorm", "final_norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
)

GLM2021 = Family("glm", read, NAMES, key="block_position_encoding")
