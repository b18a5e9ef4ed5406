"""ELECTRA: BERT whose embedding may be narrower, as generator, discriminator of replaced tokens, or classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.bert import body_rows
from pyllm.models.config_reader import ConfigReader
from pyllm.models.encoders import encoder_block, read_head
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.spec import Activation, EmbeddingSpec, HeadKind, ModelSpec, TransformSpec
from pyllm.weight_names import NameTable, linear

CLASSES = {
    "ElectraModel": HeadKind.NONE,
    "ElectraForMaskedLM": HeadKind.TOKENS,
    "ElectraForPreTraining": HeadKind.EACH,
    "ElectraForSequenceClassification": HeadKind.POOLED,
    "ElectraForTokenClassification": HeadKind.LABELS,
}


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an ELECTRA config."""
    reader = ConfigReader(config, "electra")
    vocab_size = reader.integer("vocab_size", default=30522)
    hidden = reader.integer(*HIDDEN, default=256)
    width = reader.integer("embedding_size", default=128)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=4)
    positions = reader.integer(*POSITIONS, default=512)
    types = reader.integer("type_vocab_size", default=2)
    inner = reader.integer(*MLP_HIDDEN, default=1024)
    activation = reader.choice("hidden_act", options=ACTIVATIONS, default="gelu")
    block = encoder_block(hidden, heads, inner, activation, reader.number(*NORM_EPS, default=1e-12, maximum=0.1))
    transforms = {
        HeadKind.TOKENS: TransformSpec(Activation.GELU_ERF, block.norm),
        HeadKind.EACH: TransformSpec(activation),
        HeadKind.POOLED: TransformSpec(Activation.GELU_ERF),
    }
    head = read_head(reader, CLASSES, transforms)
    tokens = read_special_tokens(reader, vocab_size, None, (), 0)
    reader.only("position_embedding_type", "absolute")
    reader.only("is_decoder", False)
    for dropped in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        reader.get(dropped)  # of training
    reader.get("summary_last_dropout")  # of multiple choice
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    reader.finish()
    narrow = width != hidden
    return ModelSpec(
        family="electra",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=None,
        max_positions=positions,
        embedding=EmbeddingSpec(
            width=width if narrow else None,
            projects_sum=narrow,
            project_bias=narrow,
            positions=positions,
            types=types,
            norm=block.norm,
        ),
        head=head,
        dtype=dtype,
        **tokens,
    )


NAMES = NameTable(
    prefix="electra.",
    rows=(
        *body_rows("electra"),
        *linear("electra.embeddings_project", "embed.project"),
        *linear("generator_predictions.dense", "head.transform"),
        *linear("generator_predictions.LayerNorm", "head.norm"),
        *linear("generator_lm_head", "head"),
        *linear("discriminator_predictions.dense", "each_head.transform"),
        *linear("discriminator_predictions.dense_prediction", "each_head"),
        *linear("classifier.dense", "pooled_head.transform"),
        *linear("classifier.out_proj", "pooled_head"),
        *linear("classifier", "labels_head"),
    ),
    ignored=("embeddings.position_ids",),
)

ELECTRA = Family("electra", read, NAMES)
