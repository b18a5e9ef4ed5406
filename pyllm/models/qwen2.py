"""Qwen2: LLaMA with biases on q, k and v, and a sliding window that upper layers may use."""

from __future__ import annotations

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import Biases, Variant, llama_like
from pyllm.models.shared import read_layer_windows, read_window


def _biases(reader: ConfigReader) -> Biases:
    reader.only("attention_bias", True)
    reader.only("mlp_bias", False)
    return Biases(qkv=True, out=False, mlp=False)


def upper_windows(reader: ConfigReader, layers: int) -> list[int | None]:
    """Layers from `max_window_layers` on have the window, if `use_sliding_window` says that it is in use."""
    in_use = reader.boolean("use_sliding_window", default=False)
    window = read_window(reader, default=4096)
    first = reader.integer("max_window_layers", default=28, minimum=0)
    return read_layer_windows(reader, layers, window if in_use else None, first)


QWEN2 = llama_like(
    Variant(
        model_type="qwen2",
        vocab_size=151936,
        intermediate_size=22016,
        max_positions=32768,
        biases=_biases,
        windows=upper_windows,
        kv_heads=32,
    )
)
