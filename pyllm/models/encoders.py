"""Pieces of config reading that encoders share: their blocks, and the heads of their classes."""

from __future__ import annotations

from collections.abc import Mapping

from pyllm.models.config_reader import ConfigReader
from pyllm.spec import (
    Activation,
    AttentionSpec,
    BlockSpec,
    HeadKind,
    HeadSpec,
    MlpSpec,
    NormKind,
    NormSpec,
    Placement,
    Problem,
    TransformSpec,
)

NEXT_LABELS = ("next", "random")  # of the second text of a pair
PROBLEMS = {problem.value: problem for problem in Problem}


def encoder_block(hidden: int, heads: int, inner: int, activation: Activation, eps: float) -> BlockSpec:
    """Attention in both directions and a feed-forward part, each with biases and a layer norm behind it."""
    size = max(hidden // heads, 1)
    return BlockSpec(
        norm=NormSpec(NormKind.LAYER, eps, bias=True),
        attention=AttentionSpec(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True, causal=False),
        mlp=MlpSpec(inner, activation, gated=False, bias=True),
        placement=Placement.POST,
    )


def read_head(
    reader: ConfigReader, classes: Mapping[str, HeadKind], transforms: Mapping[HeadKind, TransformSpec]
) -> HeadSpec:
    """The head of the class that `architectures` names, which is one of `classes`; none where it names none."""
    tied = reader.boolean("tie_word_embeddings", default=True)
    names = reader.get("architectures")
    kind: HeadKind | None = HeadKind.NONE
    if names is not None:
        known = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
        kind = classes.get(names[0]) if known else None
        if kind is None:
            reader.refuse("architectures", names, f"one of {', '.join(classes)}")
    labels, problem = _read_labels(reader)
    if kind is HeadKind.TOKENS:
        return HeadSpec(tied=tied, bias=True, transform=transforms[kind])
    if kind is HeadKind.EACH:
        return HeadSpec(
            bias=True, kind=kind, transform=transforms[kind], labels=("replaced",), problem=Problem.MULTI_LABEL
        )
    if kind is HeadKind.POOLED:
        return HeadSpec(bias=True, kind=kind, transform=transforms[kind], labels=labels, problem=problem)
    if kind is HeadKind.LABELS:
        return HeadSpec(bias=True, kind=kind, labels=labels, problem=Problem.SINGLE_LABEL)
    if kind is HeadKind.NEXT:
        return HeadSpec(
            bias=True, kind=kind, transform=transforms[kind], labels=NEXT_LABELS, problem=Problem.SINGLE_LABEL
        )
    return HeadSpec(tied=True, kind=HeadKind.NONE)


def _read_labels(reader: ConfigReader) -> tuple[tuple[str, ...], Problem]:
    """Names of the labels, by default two, and what scores mean: of one label a value, else that one of them holds."""
    names = reader.get("id2label")
    count = reader.integer("num_labels", "_num_labels", default=2, maximum=100_000)
    labels = tuple(f"LABEL_{index}" for index in range(count))
    if names is not None:
        keys = [str(index) for index in range(len(names))] if isinstance(names, dict) else []
        if not keys or set(map(str, names)) != set(keys) or not all(isinstance(name, str) for name in names.values()):
            reader.refuse("id2label", names, "an object that names the labels 0, 1, ...")
        elif len(set(names.values())) < len(names):
            reader.refuse("id2label", names, "a name of its own for each label")
        else:
            by_index = {str(key): name for key, name in names.items()}
            labels = tuple(by_index[key] for key in keys)
    default = Problem.REGRESSION if len(labels) == 1 else Problem.SINGLE_LABEL
    return labels, reader.choice("problem_type", options=PROBLEMS, default=default.value)
