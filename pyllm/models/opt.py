"""OPT: learned positions that begin at row 2, ReLU, and norms before each part or, in OPT-350m, after it, where the
embedding is narrower than the model too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, POSITIONS, read_special_tokens
from pyllm.spec import (
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
from pyllm.weight_names import NameTable, Row, linear

_OFFSET = 2  # rows of the position table that no position has


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an OPT config."""
    reader = ConfigReader(config, "opt")
    vocab_size = reader.integer("vocab_size", default=50272)
    hidden = reader.integer(*HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    positions = reader.integer(*POSITIONS, default=2048)
    biased = reader.boolean("enable_bias", default=True)
    before = reader.boolean("do_layer_norm_before", default=True)
    removed = reader.boolean("_remove_final_layer_norm", default=False)
    reader.only("layer_norm_elementwise_affine", True)
    width = reader.integer("word_embed_proj_dim", default=hidden)
    size = max(hidden // heads, 1)
    norm = NormSpec(NormKind.LAYER, 1e-5, bias=True)
    block = BlockSpec(
        norm=norm,
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=biased, out_bias=biased),
        mlp=MlpSpec(
            hidden=reader.integer(*MLP_HIDDEN, default=3072),
            activation=reader.choice("activation_function", options=ACTIVATIONS, default="relu"),
            gated=False,
            bias=biased,
        ),
        placement=Placement.PRE if before else Placement.POST,
    )
    tied = reader.boolean("tie_word_embeddings", default=True)
    tokens = read_special_tokens(reader, vocab_size, 2, (2,), 1)
    for dropped in ("activation_dropout", "dropout", "layerdrop", "init_std"):
        reader.get(dropped)  # of training
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    return ModelSpec(
        family="opt",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=norm if before and not removed else None,
        max_positions=positions,
        embedding=EmbeddingSpec(
            width=None if width == hidden else width, positions=positions + _OFFSET, position_offset=_OFFSET
        ),
        head=HeadSpec(tied=tied),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "model.decoder.layers.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="model.",
    rows=(
        Row("model.decoder.embed_tokens.weight", ("embed.weight",)),
        Row("model.decoder.project_in.weight", ("embed.project.weight",)),
        Row("model.decoder.embed_positions.weight", ("positions.weight",)),
        *linear(f"{_AT}.self_attn_layer_norm", f"{_BLOCK}.attn_norm"),
        *(row for part in "qkv" for row in linear(f"{_AT}.self_attn.{part}_proj", f"{_BLOCK}.attn.{part}")),
        *linear(f"{_AT}.self_attn.out_proj", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.final_layer_norm", f"{_BLOCK}.mlp_norm"),
        *linear(f"{_AT}.fc1", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.fc2", f"{_BLOCK}.mlp.down"),
        *linear("model.decoder.final_layer_norm", "final_norm"),
        Row("model.decoder.project_out.weight", ("head.project.weight",)),
        Row("lm_head.weight", ("head.weight",)),
    ),
)

OPT = Family("opt", read, NAMES)
