"""What a folder says of generation: generation_config.json, and config.json where older files say it there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
_OF_BEAMS = ("length_penalty", "early_stopping")
_NOT_WITH_A_GRAMMAR = ("num_beams", *_OF_BEAMS, "min_tokens", "no_repeat_ngram_size")
_UNSUPPORTED: dict[str, Any] = {  # what changes the output and is not there, with the values that change nothing
    "do_sample": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "exponential_decay_length_penalty": [],
    "penalty_alpha": 0,
}


@dataclass(frozen=True)
class GenerationConfig:
    """Tokens that the folder names: what a decoder beside an encoder begins with, and what every output begins and, at
    its longest, ends with; and `search`, how an encoder-decoder was meant to be searched, as the folder has it."""

    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def read(cls, folder: Path, vocab_size: int) -> GenerationConfig:
        """That of a model's folder; raises `ConfigError` for tokens that the model does not have."""
        path = folder / FILE
        given = {**read_config(folder), **(read_json(path, MAX_BYTES, ConfigError) if path.exists() else {})}
        tokens = {name: _token(folder, name, given.get(name), vocab_size) for name in _TOKENS}
        known = (*_SEARCH, *_LENGTHS, *_UNSUPPORTED)
        search = {name: given[name] for name in known if given.get(name) is not None}
        return cls(**tokens, search=search, folder=folder)

    def params(self, given: Mapping[str, Any] | None = None) -> SamplingParams:
        """How to search with an encoder-decoder: as its folder says, greedily where that says nothing, but for `given`
        keywords of `SamplingParams`.

        Raises `ConfigError` for what the folder says and is wrong or not supported, `ValueError` for given values that
        are wrong or do not go together with it.
        """
        given = given or {}
        drawn = {"do_sample"} if "temperature" in given else set()
        refused = {
            name: self.search[name]
            for name, neutral in _UNSUPPORTED.items()
            if name not in drawn and self.search.get(name, neutral) != neutral
        }
        if refused:
            raise ConfigError(
                f"{self.folder}: {FILE} or config.json asks for what is not supported when it says how to generate: "
                f"expected none of {', '.join(refused)}, found {shown(refused)}: give SamplingParams of your own, or "
                "take them out of the file"
            )
        asked: dict[str, Any] = {ours: self.search[name] for name, ours in _SEARCH.items() if name in self.search}
        for name, ours in _LENGTHS.items():
            length = self.search.get(name)
            if isinstance(length, int) and not isinstance(length, bool) and length > 0:
                asked.setdefault(ours, length - 1)
        dropped: Collection[str] = _OF_BEAMS if given.get("num_beams", asked.get("num_beams", 1)) == 1 else ()
        if given.get("structured_outputs") is not None:
            dropped = _NOT_WITH_A_GRAMMAR
        asked = {name: value for name, value in asked.items() if name not in dropped}
        longest = given.get("max_tokens")
        if isinstance(longest, int) and isinstance(asked.get("min_tokens"), int):
            asked["min_tokens"] = min(asked["min_tokens"], longest)
        try:
            return SamplingParams(**{"temperature": 0, **asked, **given})
        except (TypeError, ValueError) as error:
            if given:
                said = ", ".join(f"{name}={shown(value)}" for name, value in asked.items() if name not in given)
                raise ValueError(
                    f"{error}; the model's folder says {said or 'nothing'} for what is not given"
                ) from None
            raise ConfigError(
                f"{self.folder}: how to generate, in {FILE} or config.json: {error}. Give SamplingParams of your own, "
                "or mend the file"
            ) from None


def _token(folder: Path, name: str, value: Any, vocab_size: int) -> int | None:
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ConfigError(f"{folder}: {name}: expected a token id below {vocab_size}, or null, found {shown(value)}")
    return value
