"""Cohere's Command R: attention and feed-forward part read one layer norm without bias, rotated channels are
neighbours, and logits are scaled. With one key/value head this is PaLM's block."""

from __future__ import annotations

from dataclasses import replace

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import NAMES, Biases, Others, Variant, llama_like, no_windows
from pyllm.spec import NormKind, Placement
from pyllm.weight_names import Row, Transform


def _biases(reader: ConfigReader) -> Biases:
    attention = reader.boolean("attention_bias", default=False)
    return Biases(qkv=attention, out=attention, mlp=False)


def _others(reader: ConfigReader, hidden: int) -> Others:
    return Others(
        head={"scale": reader.number("logit_scale", default=0.0625)},
        qk_norm_each=reader.boolean("use_qk_norm", default=False),
    )


def _stored(row: Row) -> Row:
    if ".q_proj." in row.name or ".k_proj." in row.name:
        return replace(row, transform=Transform.INTERLEAVED)
    if ".q_norm." in row.name or ".k_norm." in row.name:
        return replace(row, transform=Transform.INTERLEAVED_NORMS)
    return row


COHERE = llama_like(
    Variant(
        model_type="cohere",
        vocab_size=256000,
        intermediate_size=22528,
        max_positions=8192,
        biases=_biases,
        windows=no_windows,
        hidden=8192,
        layers=40,
        heads=64,
        norm_kind=NormKind.LAYER,
        norm_eps=1e-5,
        placement=Placement.SHARED,
        theta=500_000.0,
        tied=True,
        others=_others,
        bos_token_id=5,
        eos_token_ids=(255001,),
        pad_token_id=0,
        names=replace(NAMES, rows=tuple(map(_stored, NAMES.rows))),
    )
)
