"""What a folder says of generation: generation_config.json, and config.json where older files say it there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError, shown
from pyllm.folder import read_config, read_json
from pyllm.sampling import SamplingParams

FILE = "generation_config.json"
MAX_BYTES = 1 << 20
_TOKENS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
_SEARCH = {  # their names in `SamplingParams`
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_LENGTHS = {"max_length": "max_tokens", "min_length": "min_tokens"}  # these count the decoder's start token


@dataclass(frozen=True)
class GenerationConfig:
    """Tokens that the folder names: what a decoder beside an encoder begins with, and what every output begins and, at
    its longest, ends with; and how an encoder-decoder was meant to be searched, where nothing is asked for."""

    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))

    @classmethod
    def read(cls, folder: Path, vocab_size: int) -> GenerationConfig:
        """That of a model's folder; raises `ConfigError` for values that mean nothing."""
        path = folder / FILE
        given = {**read_config(folder), **(read_json(path, MAX_BYTES, ConfigError) if path.exists() else {})}
        tokens = {name: _token(folder, name, given.get(name), vocab_size) for name in _TOKENS}
        asked: dict[str, Any] = {ours: given[name] for name, ours in _SEARCH.items() if given.get(name) is not None}
        for name, ours in _LENGTHS.items():
            length = given.get(name)
            if isinstance(length, int) and not isinstance(length, bool) and length > 0:
                asked.setdefault(ours, length - 1)
        if asked.get("num_beams", 1) == 1:
            asked = {name: value for name, value in asked.items() if name not in ("length_penalty", "early_stopping")}
        try:
            return cls(**tokens, params=SamplingParams(temperature=0, **asked))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{folder}: how to generate, in {FILE} or config.json: {error}") from None


def _token(folder: Path, name: str, value: Any, vocab_size: int) -> int | None:
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ConfigError(f"{folder}: {name}: expected a token id below {vocab_size}, or null, found {shown(value)}")
    return value
