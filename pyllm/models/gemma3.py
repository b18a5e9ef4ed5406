"""Gemma 3, its text model: Gemma 2 with norms on each head of q and k in place of soft caps, and two rotary bases."""

from __future__ import annotations

from dataclasses import replace

from pyllm.models import gemma2
from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import Others, llama_like


def _others(reader: ConfigReader, hidden: int) -> Others:
    reader.only("attn_logit_softcapping", None)
    return replace(gemma2.read_others(reader, hidden, score_cap=None, logit_cap=None), local_rope=True)


def _windows(reader: ConfigReader, layers: int) -> list[int | None]:
    key = "sliding_window_pattern" if reader.has("sliding_window_pattern") else "_sliding_window_pattern"
    return gemma2.windows(reader, layers, reader.integer(key, default=6, minimum=1))


GEMMA3_TEXT = llama_like(
    replace(
        gemma2.VARIANT,
        model_type="gemma3_text",
        vocab_size=262208,
        max_positions=131072,
        windows=_windows,
        qk_norm=True,
        theta=1_000_000.0,
        is_stretched=True,
        others=_others,
    )
)
