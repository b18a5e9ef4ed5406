"""DistilBERT: BERT without token types, with names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.encoders import encoder_block, read_head
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, POSITIONS, read_special_tokens
from pyllm.spec import Activation, EmbeddingSpec, HeadKind, ModelSpec, TransformSpec
from pyllm.weight_names import NameTable, Row, linear

CLASSES = {
    "DistilBertModel": HeadKind.NONE,
    "DistilBertForMaskedLM": HeadKind.TOKENS,
    "DistilBertForSequenceClassification": HeadKind.POOLED,
    "DistilBertForTokenClassification": HeadKind.LABELS,
}


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a DistilBERT config."""
    reader = ConfigReader(config, "distilbert")
    vocab_size = reader.integer("vocab_size", default=30522)
    hidden = reader.integer("dim", *HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=6, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    positions = reader.integer(*POSITIONS, default=512)
    inner = reader.integer("hidden_dim", default=3072)
    activation = reader.choice("activation", options=ACTIVATIONS, default="gelu")
    block = encoder_block(hidden, heads, inner, activation, 1e-12)
    transforms = {
        HeadKind.TOKENS: TransformSpec(activation, block.norm),
        HeadKind.POOLED: TransformSpec(Activation.RELU),
    }
    head = read_head(reader, CLASSES, transforms)
    tokens = read_special_tokens(reader, vocab_size, None, (), 0)
    reader.only("is_decoder", False)
    for dropped in ("dropout", "qa_dropout", "seq_classif_dropout"):
        reader.get(dropped)  # of training
    reader.get("sinusoidal_pos_embds")  # how positions began: they are stored all the same
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_heads", heads, f"a divisor of dim = {hidden}")
    reader.finish()
    return ModelSpec(
        family="distilbert",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=None,
        max_positions=positions,
        embedding=EmbeddingSpec(positions=positions, norm=block.norm),
        head=head,
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "distilbert.transformer.layer.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="distilbert.",
    rows=(
        Row("distilbert.embeddings.word_embeddings.weight", ("embed.weight",)),
        Row("distilbert.embeddings.position_embeddings.weight", ("positions.weight",)),
        *linear("distilbert.embeddings.LayerNorm", "embed.norm"),
        *(row for part in "qkv" for row in linear(f"{_AT}.attention.{part}_lin", f"{_BLOCK}.attn.{part}")),
        *linear(f"{_AT}.attention.out_lin", f"{_BLOCK}.attn.o"),
        *linear(f"{_AT}.sa_layer_norm", f"{_BLOCK}.attn_norm"),
        *linear(f"{_AT}.ffn.lin1", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.ffn.lin2", f"{_BLOCK}.mlp.down"),
        *linear(f"{_AT}.output_layer_norm", f"{_BLOCK}.mlp_norm"),
        *linear("vocab_transform", "head.transform"),
        *linear("vocab_layer_norm", "head.norm"),
        *linear("vocab_projector", "head"),
        *linear("pre_classifier", "pooled_head.transform"),
        *linear("classifier", "pooled_head"),
        *linear("classifier", "labels_head"),
    ),
    ignored=("embeddings.position_ids",),
)

DISTILBERT = Family("distilbert", read, NAMES)
