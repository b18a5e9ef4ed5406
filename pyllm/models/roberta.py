"""RoBERTa and XLM-RoBERTa: BERT's blocks; positions begin behind the padding's row, heads are laid out otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.bert import body_rows
from pyllm.models.config_reader import ConfigReader
from pyllm.models.encoders import encoder_block, read_head
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.spec import Activation, EmbeddingSpec, HeadKind, ModelSpec, TransformSpec
from pyllm.weight_names import NameTable, Row, linear

CLASSES = {
    f"{name}{suffix}": kind
    for name in ("Roberta", "XLMRoberta")
    for suffix, kind in (
        ("Model", HeadKind.NONE),
        ("ForMaskedLM", HeadKind.TOKENS),
        ("ForSequenceClassification", HeadKind.POOLED),
        ("ForTokenClassification", HeadKind.LABELS),
    )
}


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a RoBERTa config."""
    reader = ConfigReader(config, "roberta")
    vocab_size = reader.integer("vocab_size", default=50265)
    hidden = reader.integer(*HIDDEN, default=768)
    layers = reader.integer(*LAYERS, default=12, maximum=10_000)
    heads = reader.integer(*HEADS, default=12)
    rows = reader.integer(*POSITIONS, default=512)
    types = reader.integer("type_vocab_size", default=2)
    inner = reader.integer(*MLP_HIDDEN, default=3072)
    activation = reader.choice("hidden_act", options=ACTIVATIONS, default="gelu")
    block = encoder_block(hidden, heads, inner, activation, reader.number(*NORM_EPS, default=1e-12, maximum=0.1))
    transforms = {
        HeadKind.TOKENS: TransformSpec(Activation.GELU_ERF, block.norm),
        HeadKind.POOLED: TransformSpec(Activation.TANH),
    }
    head = read_head(reader, CLASSES, transforms)
    tokens = read_special_tokens(reader, vocab_size, 0, (2,), 1)
    pad = tokens["pad_token_id"]
    offset = 0 if pad is None else pad + 1  # the table's rows up to that of padding belong to no position
    reader.only("position_embedding_type", "absolute")
    reader.only("is_decoder", False)
    for dropped in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        reader.get(dropped)  # of training
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    if pad is None or offset >= rows:
        reader.refuse("pad_token_id", pad, f"a token below {rows - 1}, behind which positions begin")
    reader.finish()
    return ModelSpec(
        family="roberta",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=None,
        max_positions=rows - offset,
        embedding=EmbeddingSpec(positions=rows, position_offset=offset, types=types, norm=block.norm),
        head=head,
        dtype=dtype,
        **tokens,
    )


NAMES = NameTable(
    prefix="roberta.",
    rows=(
        *body_rows("roberta"),
        *linear("lm_head.dense", "head.transform"),
        *linear("lm_head.layer_norm", "head.norm"),
        Row("lm_head.decoder.weight", ("head.weight",)),
        Row("lm_head.bias", ("head.bias",)),
        *linear("classifier.dense", "pooled_head.transform"),
        *linear("classifier.out_proj", "pooled_head"),
        *linear("classifier", "labels_head"),
    ),
    ignored=("embeddings.position_ids", "pooler.dense.*", "lm_head.decoder.bias"),
)

ROBERTA = Family("roberta", read, NAMES)
XLM_ROBERTA = Family("xlm-roberta", read, NAMES)
