"""GLM-4 in Hugging Face's layout: LLaMA with biases of q, k and v, half of each head rotated, rotated channels being
neighbours, and gate and up in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import NAMES, Biases, Variant, llama_like, no_windows
from pyllm.weight_names import Row, Transform


def _biases(reader: ConfigReader) -> Biases:
    return Biases(qkv=reader.boolean("attention_bias", default=True), out=False, mlp=False)


def _rows() -> Iterator[Row]:
    """LLaMA's rows, but for what is stored in another way."""
    for row in NAMES.rows:
        if ".q_proj." in row.name or ".k_proj." in row.name:
            yield replace(row, transform=Transform.INTERLEAVED)
        elif ".gate_proj." not in row.name and ".up_proj." not in row.name:
            yield row
    gate_up = ("blocks.{i}.mlp.gate.weight", "blocks.{i}.mlp.up.weight")
    yield Row("model.layers.{i}.mlp.gate_up_proj.weight", gate_up)


VARIANT = Variant(
    model_type="glm",
    vocab_size=151552,
    intermediate_size=13696,
    max_positions=131072,
    biases=_biases,
    windows=no_windows,
    kv_heads=2,
    head_dim=128,
    norm_eps=1.5625e-7,
    rotated_part=0.5,
    eos_token_ids=(151329, 151336, 151338),
    pad_token_id=151329,
    names=replace(NAMES, rows=tuple(_rows())),
)

GLM = llama_like(VARIANT)
