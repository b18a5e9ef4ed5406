"""What an engine can do for the comparison, and which engines there are.

An engine takes and gives token ids and chooses the likeliest token. It is made for one model on disk in its own
format, which its `prepare` makes from a folder in the Hugging Face layout. Each is one file beside this one and is
imported only where it is used, by the process that runs it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

DTYPES = ("float32", "bfloat16", "int8", "int4")


class Unsupported(Exception):  # noqa: N818  # not an error: the cell stays empty, with this as the reason
    """The engine cannot do what was asked, for a reason of its own: its dtypes, its memory."""


class Decoded(NamedTuple):
    """What `decode` gives: the seconds its tokens took, and the tokens of each sequence."""

    seconds: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Settings:
    """How an engine is loaded: threads, and room for the largest cells it will be asked for."""

    dtype: str
    threads: int
    sequences: int = 1
    """Most sequences that run together."""
    length: int = 1024
    """Tokens of the longest sequence."""
    tokens: int = 1024
    """Most tokens that all sequences together hold."""


class Engine(Protocol):
    """A model loaded and ready."""

    weight_bytes: int | None
    """Bytes of weights that one decode step reads; None where they are a share of the file's that the shape gives."""
    cache_value_bytes: float
    """Bytes of one number among the cached keys and values."""

    def __init__(self, model: Path, settings: Settings) -> None: ...

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        """The model in `folder` in this engine's own format at `dtype`: a file or folder, made where it is missing."""

    def reserve(self, sequences: int, length: int) -> None:
        """Get ready for that many sequences of up to `length` tokens; what ran before ends."""

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts from nothing, all of one length; the next token of each."""

    def decode(self, steps: int) -> Decoded:
        """Generate `steps` further tokens of every sequence, going on where the last call ended.

        An engine that cannot go on generates from the prompts again and counts the seconds behind the first token.
        """


@dataclass(frozen=True)
class EngineInfo:
    """An engine by name: `module:Class`, the packages it needs, and the one whose version is stated."""

    name: str
    target: str
    needs: tuple[str, ...]
    distribution: str

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]

    def load(self) -> Any:
        """Its class; imports what it needs."""
        return pkgutil.resolve_name(self.target)


OURS = "pyllm"
ENGINES = {
    info.name: info
    for info in (
        EngineInfo(OURS, "pyllm.compare.ours:Pyllm", (), "pyllm"),
        EngineInfo("llama.cpp", "pyllm.compare.llama_cpp_engine:LlamaCpp", ("llama_cpp", "gguf"), "llama-cpp-python"),
        EngineInfo(
            "ctranslate2",
            "pyllm.compare.ctranslate2_engine:CTranslate2",
            ("ctranslate2", "transformers", "torch"),
            "ctranslate2",
        ),
        EngineInfo("torch", "pyllm.compare.torch_engine:Torch", ("torch", "transformers"), "torch"),
    )
}
PEERS = tuple(name for name in ENGINES if name != OURS)


def prompts(sequences: int, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids to run, of which no two sequences begin alike."""
    return [[(7 + 31 * sequence + at) % vocabulary for at in range(length)] for sequence in range(sequences)]
