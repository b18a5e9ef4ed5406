"""Qwen3: LLaMA with RMS norms on each head of q and k, and windows as Qwen2 has them."""

from __future__ import annotations

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import Biases, Variant, llama_like
from pyllm.models.qwen2 import upper_windows


def _biases(reader: ConfigReader) -> Biases:
    attention = reader.boolean("attention_bias", default=False)
    reader.only("mlp_bias", False)
    return Biases(qkv=attention, out=attention, mlp=False)


QWEN3 = llama_like(
    Variant(
        model_type="qwen3",
        vocab_size=151936,
        intermediate_size=22016,
        max_positions=32768,
        biases=_biases,
        windows=upper_windows,
        kv_heads=32,
        head_dim=128,
        qk_norm=True,
    )
)
