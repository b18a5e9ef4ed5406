"""Embeddings of many texts by a sentence encoder in float32, beside torch with transformers and onnxruntime, if they
are installed.

    pytest bench/bench_embed.py -s

The shape is that of all-MiniLM-L6-v2, with random weights. Texts have one length, so that a peer's batches hold no
padding; a peer has the best of several batch sizes, and all take turns in every round. Vectors must agree. onnxruntime
runs what torch exports of the model, which needs onnxscript too.
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
from numpy.typing import NDArray

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
BATCHES = (1, 8, 32, 128)
ROUNDS = sized(7, 1)
PAUSE = sized(0.3, 0.0)  # seconds after a turn: threads that wait for more work go on spinning for a while
States = Callable[[NDArray[np.int64]], F32]  # hidden states [B, L, D] of token ids [B, L]
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


@pytest.fixture(scope="module")
def peers(folder: Path, threads: int) -> dict[str, Embed]:
    """Those at hand, mean pooling their hidden states, each in batches of the size that is fastest for it."""
    states = {"torch": torch_states(folder, threads), "onnxruntime": onnx_states(folder, threads)}
    return {name: in_best_batches(found) for name, found in states.items() if found is not None}


def torch_states(folder: Path, threads: int) -> States | None:
    """Hidden states by transformers."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(threads)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def states(ids: NDArray[np.int64]) -> F32:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)).last_hidden_state.numpy()  # type: ignore[no-any-return]

    return states


def onnx_states(folder: Path, threads: int) -> States | None:
    """Hidden states by onnxruntime, of the model as torch exports it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
        import torch
        import transformers
    except ImportError:
        return None
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    some = torch.randint(5, 1000, (2, 16))
    free = {"input_ids": {0: torch.export.Dim("texts", max=4096), 1: torch.export.Dim("tokens", min=2, max=512)}}
    torch.onnx.export(model, (), folder / "model.onnx", kwargs={"input_ids": some}, dynamic_shapes=free, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": ids})[0]  # type: ignore[no-any-return]


def in_best_batches(states: States) -> Embed:
    """Vectors of texts, by mean pooling."""
    chosen: dict[int, int] = {}

    def embed(texts: list[list[int]], batch: int) -> F32:
        parts = [np.array(texts[i : i + batch], np.int64) for i in range(0, len(texts), batch)]
        return np.concatenate([states(part).mean(1) for part in parts])

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

    return best


@pytest.mark.parametrize("length", LENGTHS)
def test_embed(
    benchmark: Any, record: Record, folder: Path, peers: dict[str, Embed], threads: int, length: int
) -> None:
    llm = LLM(folder, threads=threads, skip_tokenizer_init=True, max_num_seqs=64)
    rng = np.random.default_rng(length)
    texts = rng.integers(5, 30000, (max(TOKENS // length, 2), length)).tolist()
    prompts = [{"prompt_token_ids": text} for text in texts]
    expected = {name: embed(texts) for name, embed in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def peers_turn() -> None:
        for name, embed in peers.items():
            began = time.perf_counter()
            embed(texts)
            seconds[name].append(time.perf_counter() - began)
            time.sleep(PAUSE)

    vectors = benchmark.pedantic(
        lambda: llm.embed(prompts, pooling="mean"), setup=peers_turn, rounds=ROUNDS, warmup_rounds=sized(1, 0)
    )
    for values in expected.values():
        assert np.abs(vectors - values).max() <= 2e-5 * max(1, np.abs(values).max())
    taken = benchmark.stats.stats.median if benchmark.stats else float("nan")
    layers = llm.spec.operations(length) - 2 * llm.spec.outputs * llm.spec.head_width  # without a head
    rates = {name: round(len(texts) * length / median(each), 1) for name, each in seconds.items() if each}
    record(
        operations=layers * len(texts),
        tokens_per_second=round(len(texts) * length / taken, 1),
        **{f"{name}_tokens_per_second": rate for name, rate in rates.items()},
        **{f"times_{name}": round(median(each) / taken, 2) for name, each in seconds.items() if each},
    )
