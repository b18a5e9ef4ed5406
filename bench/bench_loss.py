"""Cross-entropy with its gradient over the vocabularies of GPT-2 and Llama 3, and dropout, from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm import _cpu
from pyllm.ops_training import TrainingOps

RNG = np.random.default_rng(0)
ROWS = sized(256, 8)


@pytest.mark.parametrize("by", ["pyllm", "torch"])
@pytest.mark.parametrize("vocab", sized([50257, 128256], [5000]))
def test_cross_entropy(benchmark: Any, record: Callable[..., None], threads: int, vocab: int, by: str) -> None:
    start = RNG.normal(size=(ROWS, vocab)).astype(np.float32)
    labels = RNG.integers(0, vocab, ROWS).astype(np.int32)
    logits = _cpu.allocate(start.nbytes).view(np.float32).reshape(start.shape)
    logits[...] = start
    scale = np.ones(1, np.float32)
    if by == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        leaf, targets = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels).long()

        def call() -> Any:
            loss = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
            return loss.detach().numpy(), torch.autograd.grad(loss.sum(), leaf)[0].numpy()

        loss, gradient = benchmark.pedantic(call, warmup_rounds=1, rounds=7)
    else:
        ops, loss = TrainingOps(threads), np.empty(ROWS, np.float32)
        benchmark.pedantic(
            lambda: ops.cross_entropy(logits, labels, scale, loss=loss),
            setup=lambda: logits.__setitem__(..., start),
            rounds=7,
        )
        gradient = logits
    record(bytes=2 * start.nbytes, by=by, state="in memory")
    exact = start.astype(np.float64)
    log_sum = np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(loss, (log_sum - np.take_along_axis(exact, labels[:, None], -1))[:, 0], rtol=1e-6)
    exact = np.exp(exact - log_sum)
    exact[np.arange(ROWS), labels] -= 1
    assert np.abs(gradient - exact).max() < 1e-6


@pytest.mark.parametrize("by", ["pyllm", "torch"])
def test_dropout(benchmark: Any, record: Callable[..., None], threads: int, by: str) -> None:
    shape, rate = sized((1 << 14, 1024), (64, 100)), 0.1
    x = np.ones(shape, np.float32)
    if by == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        given = torch.from_numpy(x)
        y = benchmark.pedantic(lambda: torch.nn.functional.dropout(given, rate), warmup_rounds=1, rounds=7).numpy()
    else:
        ops, out, seed = TrainingOps(threads), np.empty_like(x), np.ones(1, np.uint64)
        y = benchmark.pedantic(lambda: ops.dropout(x, rate, seed, 1, out=out), warmup_rounds=1, rounds=7)
    record(bytes=2 * x.nbytes, by=by, state="in memory")
    assert abs(y.mean(dtype=np.float64) - 1) < 5 * (rate / x.size) ** 0.5
