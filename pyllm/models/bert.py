"""BERT: learned positions and token types, a norm behind the embedding and behind every part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.encoders import encoder_block, read_head
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.spec import Activation, EmbeddingSpec, HeadKind, ModelSpec, TransformSpec
from pyllm.weight_names import NameTable, Row, linear

CLASSES = {
    "BertModel": HeadKind.NONE,
    "BertForMaskedLM": HeadKind.TOKENS,
    "BertForPreTraining": HeadKind.TOKENS,
    "BertForNextSentencePrediction": HeadKind.NEXT,
    "BertForSequenceClassification": HeadKind.POOLED,
    "BertForTokenClassification": HeadKind.LABELS,
}


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a BERT config."""
    reader = ConfigReader(config, "bert")
    vocab_size = reader.integer("vocab_size", default=30522)
    hidden = reader.integer(*HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    positions = reader.integer(*POSITIONS, default=512)
    types = reader.integer("type_vocab_size", default=2)
    inner = reader.integer(*MLP_HIDDEN, default=3072)
    activation = reader.choice("hidden_act", options=ACTIVATIONS, default="gelu")
    block = encoder_block(hidden, heads, inner, activation, reader.number(*NORM_EPS, default=1e-12, maximum=0.1))
    transforms = {
        HeadKind.TOKENS: TransformSpec(activation, block.norm),
        HeadKind.POOLED: TransformSpec(Activation.TANH),
        HeadKind.NEXT: TransformSpec(Activation.TANH),
    }
    head = read_head(reader, CLASSES, transforms)
    tokens = read_special_tokens(reader, vocab_size, None, (), 0)
    reader.only("position_embedding_type", "absolute")
    reader.only("is_decoder", False)
    for dropped in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        reader.get(dropped)  # of training
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    return ModelSpec(
        family="bert",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=None,
        max_positions=positions,
        embedding=EmbeddingSpec(positions=positions, types=types, norm=block.norm),
        head=head,
        dtype=dtype,
        **tokens,
    )


def body_rows(base: str) -> tuple[Row, ...]:
    """The rows of embeddings and layers under the name of the base model."""
    at, block = f"{base}.encoder.layer.{{i}}", "blocks.{i}"
    return (
        Row(f"{base}.embeddings.word_embeddings.weight", ("embed.weight",)),
        Row(f"{base}.embeddings.position_embeddings.weight", ("positions.weight",)),
        Row(f"{base}.embeddings.token_type_embeddings.weight", ("types.weight",)),
        *linear(f"{base}.embeddings.LayerNorm", "embed.norm"),
        *(
            row
            for name, part in (("query", "q"), ("key", "k"), ("value", "v"))
            for row in linear(f"{at}.attention.self.{name}", f"{block}.attn.{part}")
        ),
        *linear(f"{at}.attention.output.dense", f"{block}.attn.o"),
        *linear(f"{at}.attention.output.LayerNorm", f"{block}.attn_norm"),
        *linear(f"{at}.intermediate.dense", f"{block}.mlp.up"),
        *linear(f"{at}.output.dense", f"{block}.mlp.down"),
        *linear(f"{at}.output.LayerNorm", f"{block}.mlp_norm"),
    )


NAMES = NameTable(
    prefix="bert.",
    rows=(
        *body_rows("bert"),
        *linear("cls.predictions.transform.dense", "head.transform"),
        *linear("cls.predictions.transform.LayerNorm", "head.norm"),
        Row("cls.predictions.decoder.weight", ("head.weight",)),
        Row("cls.predictions.bias", ("head.bias",)),
        *linear("bert.pooler.dense", "pooled_head.transform"),
        *linear("classifier", "pooled_head"),
        *linear("bert.pooler.dense", "next_head.transform"),
        *linear("cls.seq_relationship", "next_head"),
        *linear("classifier", "labels_head"),
    ),
    # A model of one head leaves the other of the two that BERT was trained with; its own is named above.
    ignored=(
        "embeddings.position_ids",
        "pooler.dense.*",
        "cls.predictions.transform.*",
        "cls.predictions.bias",
        "cls.predictions.decoder.*",
        "cls.seq_relationship.*",
    ),
)

BERT = Family("bert", read, NAMES)
