"""Embeddings of many texts by a sentence encoder in float32, beside torch with transformers, if they are installed.

    pytest bench/bench_embed.py -s

The shape is that of all-MiniLM-L6-v2, with random weights. Texts have one length, so that a peer's batches hold no
padding; the peer has the best of several batch sizes, and both take turns in every round. Vectors must agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import Record, sized

from pyllm import LLM
from pyllm.models import family_of
from pyllm.ops import F32
from pyllm.ops_training import TrainingOps
from pyllm.train.checkpoint import save_model
from pyllm.train.initialise import initialise
from pyllm.train.parameters import Parameters

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30522,
}
LENGTHS = (16, 64, 256)
TOKENS = sized(4096, 256)  # of all texts
BATCHES = (8, 32, 128)
ROUNDS = sized(7, 1)
Embed = Callable[[list[list[int]]], F32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of that shape; weights are large enough for texts to differ."""
    made = tmp_path_factory.mktemp("encoder")
    parameters = Parameters(family_of(CONFIG).read(CONFIG), TrainingOps())
    initialise(parameters, {**CONFIG, "initializer_range": 0.05}, 0)
    save_model(made, parameters, CONFIG, None)
    (made / "tokenizer_config.json").write_text(json.dumps({}))
    return made


def torch_embed(folder: Path, threads: int) -> Embed | None:
    """Mean pooling by transformers, in batches of the size that was fastest."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(threads)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def embed(texts: list[list[int]], batch: int) -> F32:
        with torch.inference_mode():
            parts = [torch.tensor(texts[i : i + batch]) for i in range(0, len(texts), batch)]
            return torch.cat([model(part).last_hidden_state.mean(1) for part in parts]).numpy()

    def best(texts: list[list[int]]) -> F32:
        key = len(texts[0])
        if key not in chosen:
            taken = {}
            for batch in BATCHES:
                embed(texts, batch)
                began = time.perf_counter()
                embed(texts, batch)
                taken[batch] = time.perf_counter() - began
            chosen[key] = min(taken, key=taken.__getitem__)
        return embed(texts, chosen[key])

    chosen: dict[int, int] = {}
    return best


@pytest.mark.parametrize("length", LENGTHS)
def test_embed(benchmark: Any, record: Record, folder: Path, threads: int, length: int) -> None:
    llm = LLM(folder, threads=threads, skip_tokenizer_init=True, max_num_seqs=64)
    rng = np.random.default_rng(length)
    texts = rng.integers(5, 30000, (max(TOKENS // length, 2), length)).tolist()
    prompts = [{"prompt_token_ids": text} for text in texts]
    peer, seconds = torch_embed(folder, threads), []
    expected = peer(texts) if peer is not None else None

    def peers_turn() -> None:
        if peer is not None:
            began = time.perf_counter()
            peer(texts)
            seconds.append(time.perf_counter() - began)

    vectors = benchmark.pedantic(
        lambda: llm.embed(prompts, pooling="mean"), setup=peers_turn, rounds=ROUNDS, warmup_rounds=sized(1, 0)
    )
    if expected is not None:
        assert np.abs(vectors - expected).max() <= 2e-5 * max(1, np.abs(expected).max())
    taken = benchmark.stats.stats.median if benchmark.stats else float("nan")
    layers = llm.spec.operations(length) - 2 * llm.spec.outputs * llm.spec.head_width  # without a head
    record(
        operations=layers * len(texts),
        tokens_per_second=round(len(texts) * length / taken, 1),
        torch_tokens_per_second=round(len(texts) * length / median(seconds), 1) if seconds else None,
        times_torch=round(median(seconds) / taken, 2) if seconds else None,
    )
