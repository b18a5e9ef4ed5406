"""Mistral: LLaMA with grouped heads by default and one sliding window in every layer."""

from __future__ import annotations

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import Biases, Variant, llama_like
from pyllm.models.shared import read_layer_windows, read_window


def _biases(reader: ConfigReader) -> Biases:
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    return Biases(qkv=False, out=False, mlp=False)


def _windows(reader: ConfigReader, layers: int) -> list[int | None]:
    window = read_window(reader, default=4096)
    windows = read_layer_windows(reader, layers, window)
    if len(set(windows)) > 1:
        reader.refuse("layer_types", reader.get("layer_types"), "the same type for every layer")
    return windows


MISTRAL = llama_like(
    Variant(
        model_type="mistral",
        vocab_size=32000,
        intermediate_size=14336,
        max_positions=131072,
        biases=_biases,
        windows=_windows,
        kv_heads=8,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
)
