"""The choice of a token from a 128,256-entry row, and log-probabilities.

The row stays in the caches, and one thread works on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops import Ops
from pyllm.sampling import SamplingParams, SamplingState, sample_inputs

VOCAB = sized(128256, 1000)
CHAINS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top_k 40, top_p 0.95": {"top_k": 40, "top_p": 0.95},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
}


def logits(spread: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, spread, (1, VOCAB)).astype(np.float32)


def numpy_sample(x: np.ndarray, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> int:
    if temperature == 0:
        return int(x.argmax())
    order = np.argsort(-x)[: top_k or None]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    p = p[np.cumsum(p) - p < top_p]
    p = p[p >= min_p * p[0]]
    return int(order[np.searchsorted(np.cumsum(p), 0.5 * p.sum())])


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("spread", [3.0, 0.01], ids=["peaked", "flat"])
@pytest.mark.parametrize("peer", ["pyllm", "numpy", "torch"])
def test_sample(benchmark: Any, record: Any, peer: str, spread: float, chain: str) -> None:
    x = logits(spread)
    values = CHAINS[chain]
    if peer == "pyllm":
        inputs = sample_inputs([SamplingState(SamplingParams(**values), [], seed=1)])
        token = int(benchmark(Ops(1).sample, x, inputs)[0])
    elif peer == "numpy":
        token = benchmark(numpy_sample, x[0], **values)
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        row = torch.from_numpy(x[0])

        def sample() -> int:
            if "temperature" in values:
                return int(row.argmax())
            kept, ids = torch.topk(row, values["top_k"]) if "top_k" in values else torch.sort(row, descending=True)
            p = torch.softmax(kept, 0)
            p = torch.where(torch.cumsum(p, 0) - p < values.get("top_p", 1), p, 0)
            p = torch.where(p >= values.get("min_p", 0) * p[0], p, 0)
            return int(ids[torch.multinomial(p, 1)])

        token = benchmark(sample)
    record(bytes=x.nbytes, kernel_threads=1, vocabulary=VOCAB)
    assert 0 <= token < VOCAB
    if chain == "greedy":
        assert token == x.argmax()
    if "top_k" in values:
        assert x[0, token] >= np.sort(x[0])[-40]


@pytest.mark.parametrize("peer", ["pyllm", "numpy", "torch"])
def test_logprobs(benchmark: Any, record: Any, peer: str) -> None:
    x, ids = logits(3.0), np.array([77], np.int32)
    oracle = x[0, 77] - np.log(np.exp(x.astype(np.float64)).sum())
    if peer == "pyllm":
        value = float(benchmark(Ops(1).logprobs, x, ids, 20)[0][0])
    elif peer == "numpy":

        def logprob() -> float:
            shifted = x[0] - x[0].max()
            np.argpartition(-x[0], 20)[:20]
            return float(shifted[77] - np.log(np.exp(shifted).sum()))

        value = benchmark(logprob)
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        row = torch.from_numpy(x[0])

        def best() -> float:
            y = torch.log_softmax(row, 0)
            torch.topk(y, 20)
            return float(y[77])

        value = benchmark(best)
    record(bytes=x.nbytes, kernel_threads=1, vocabulary=VOCAB)
    assert abs(value - oracle) < 1e-5
