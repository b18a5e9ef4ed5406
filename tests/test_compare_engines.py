"""Engines beside ours: the same weights and prompts give the same tokens, each where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from pyllm.compare.engine import ENGINES, PEERS, Settings, Unsupported, prompts
from pyllm.compare.ours import Pyllm
from pyllm.compare.worker import Worker

VOCABULARY = 67  # the smallest one's
LLAMA = dict(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, max_position_embeddings=16384, tokenizer=False
)
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model(name: str, folder: Path) -> Path:
    """A tiny model with random weights."""
    if name == "llama":
        return tiny_model.make(folder, **LLAMA)
    if name == "llama-3":
        return tiny_model.make(folder, rope_theta=500000.0, rope_scaling=LLAMA_3, tie_word_embeddings=True, **LLAMA)
    shutil.copytree(Path(__file__).parent / "golden" / "gpt2", folder)
    return folder


def tokens(engine: Any, sequences: int, length: int) -> list[list[int]]:
    """What an engine makes of prompts of `length` tokens."""
    engine.reserve(sequences, length + 8)
    first = engine.start(prompts(sequences, length, VOCABULARY))
    seconds, rows = engine.decode(4)
    assert seconds > 0
    return [[token, *row] for token, row in zip(first, rows, strict=True)]


class Remote:
    """An engine in a worker, called as if it were here."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self.worker.call(method, *arguments).result


@contextmanager
def loaded(peer: str, folder: Path, dtype: str) -> Iterator[Remote]:
    """The peer with that model, where it is installed."""
    if ENGINES[peer].missing:
        pytest.skip(f"{peer} is not installed")
    with Worker(ENGINES[peer], 2) as worker:  # the memory of a conversion does not matter here: one process for both
        facts = worker.load(worker.prepare(folder, dtype), settings(dtype)).result
        assert facts["cache_value_bytes"] >= 1
        yield Remote(worker)


def settings(dtype: str, gpt2: bool = False) -> Settings:
    return Settings(dtype, 2, sequences=3, length=96 if gpt2 else 512, tokens=1536)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("name", "length"), [("llama", 40), ("llama-3", 400), ("gpt2", 40)])
def test_peers_give_our_tokens(tmp_path: Path, request: pytest.FixtureRequest, name: str, length: int, peer: str):
    if (name, peer) == ("llama-3", "ctranslate2"):
        reason = "CTranslate2 4.8 leaves the scaling of Llama 3's rotary frequencies out"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    folder = model(name, tmp_path / name)
    with loaded(peer, folder, "float32") as engine:
        ours = Pyllm(folder, settings("float32", name == "gpt2"))
        for sequences in (1, 3):
            assert tokens(engine, sequences, length) == tokens(ours, sequences, length)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_other_dtypes_run_or_are_refused(tmp_path: Path, peer: str, dtype: str):
    try:
        with loaded(peer, model("llama", tmp_path / "llama"), dtype) as engine:
            assert [len(row) for row in tokens(engine, 3, 12)] == [5, 5, 5]
    except Unsupported as reason:
        assert str(reason)
