"""What tests of training share: data made by counting, models at hand as parameters, the loss in float64."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import transformer

from pyllm.errors import CheckpointError
from pyllm.models import open_checkpoint
from pyllm.ops import Arena
from pyllm.ops_training import TrainingOps
from pyllm.spec import ModelSpec
from pyllm.train import step as step_module
from pyllm.train.head_loss import IGNORED, count_labels
from pyllm.train.memory import StepShape
from pyllm.train.parameters import Parameters, load_values
from pyllm.train.step import Step

GOLDEN = Path(__file__).resolve().parent / "golden"
Batch = tuple[NDArray[Any], ...]  # tokens, labels, starts, and what some models need more

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CountedData:
    """Micro-batches that are a function of their number and the seed: sequences in which each token follows from the
    one before, but for some that are random and some that do not count."""

    def __init__(self, vocab: int = 61, tokens: int = 96, sequences: int = 5, seed: int = 0) -> None:
        self.vocab, self.tokens, self.sequences, self.seed = vocab, tokens, sequences, seed
        self.position = 0

    def next_batch(self) -> Batch:
        batch = make_batch(self.vocab, self.tokens, self.sequences, [self.seed, self.position])
        self.position += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise CheckpointError(f"data: the run has seed {state['seed']}, now it is {self.seed}")
        self.position = state["position"]


def make_batch(vocab: int, tokens: int, sequences: int, seed: Any, longest: int = 40) -> Batch:
    """`tokens` tokens in at most `sequences` sequences, the last of which may be empty."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, tokens + 1, sequences - 1))
    if np.diff([0, *cuts, tokens]).max() > longest:  # even ones then
        cuts = np.arange(1, sequences) * tokens // sequences
    starts = np.array([0, *cuts, tokens], np.int32)
    ids = (np.cumsum(rng.integers(1, 4, tokens)) % vocab).astype(np.int32)
    labels = np.roll(ids, -1)
    labels[starts[1:][np.diff(starts) > 0] - 1] = IGNORED
    labels[rng.random(tokens) < 0.1] = IGNORED
    return ids, labels, starts


def sourced(batch: Batch, seed: int, start: int = 0, longest: int = 30) -> Batch:
    """The same with a source of random tokens for each sequence, some of one token, and `start` before each text."""
    tokens, labels, starts = batch
    rng = np.random.default_rng(seed)
    tokens = tokens.copy()
    tokens[starts[:-1][np.diff(starts) > 0]] = start
    lengths = rng.integers(1, longest, len(starts) - 1)
    source = rng.integers(3, tokens.max() + 1, lengths.sum()).astype(np.int32)
    return tokens, labels, starts, source, np.cumsum([0, *lengths]).astype(np.int32)


def at_hand(name: str, ops: TrainingOps, dtype: str = "float32") -> Parameters:
    """The weights of a golden model."""
    with open_checkpoint(GOLDEN / name) as checkpoint:
        parameters = Parameters(checkpoint.spec, ops, dtype)
        load_values(parameters, checkpoint.tensors)
    return parameters


def step_of(parameters: Parameters, batch: Batch, **options: Any) -> Step:
    """A step of the batch's shape, with the batch in it."""
    shape = {name: options.pop(name) for name in ("checkpoint_activations",) if name in options}
    step = Step(
        parameters,
        parameters.ops,
        StepShape(
            len(batch[0]),
            len(batch[2]) - 1,
            parameters.compute,
            options.get("dropout", 0) > 0,
            source=len(batch[3]) if len(batch) == 5 else 0,
            **shape,
        ),
        **options,
    )
    step.fill(*batch)
    return step


def gradients(parameters: Parameters, batch: Batch, seed: int = 0, **options: Any) -> tuple[float, dict[str, Any]]:
    """Mean loss and the gradient of every slot."""
    step = step_of(parameters, batch, **options)
    parameters.zero_gradients()
    counted = count_labels(batch[1])
    loss = step.accumulate(counted, seed) / counted
    return loss, {slot: parameters.gradient(slot) for slot in parameters.spec.slots()}


def values(parameters: Parameters) -> dict[str, NDArray[np.float64]]:
    """All weights in float64."""
    return {slot: parameters.get(slot).astype(np.float64) for slot in parameters.spec.slots()}


def oracle_loss(spec: ModelSpec, weights: Mapping[str, Any], batch: Batch) -> float:
    """Mean cross entropy over counted labels, in float64."""
    ids, labels, starts, *more = batch
    total, counted = 0.0, 0
    for index, (first, end) in enumerate(pairwise(starts)):
        if not (labels[first:end] != IGNORED).any():
            continue
        source = more[0][slice(*more[1][index : index + 2])] if more else None
        logits, _ = transformer.forward(spec, weights, ids[first:end], source=source)
        rows = np.flatnonzero(labels[first:end] != IGNORED)
        logits = logits[rows]
        top = logits.max(-1, keepdims=True)
        lse = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        total += float((lse - logits[np.arange(len(rows)), labels[first:end][rows]]).sum())
        counted += len(rows)
    return total / counted


def assert_gradients_of_float64(parameters: Parameters, batch: Batch, width: float = 1e-5) -> None:
    """The loss, and the gradient of every slot along random directions: by central differences of the float64 model
    over `width`, which has to be small where an activation has a kink."""
    loss, found = gradients(parameters, batch)
    weights, spec = values(parameters), parameters.spec
    expected = oracle_loss(spec, weights, batch)
    assert abs(loss - expected) <= 1e-6 * abs(expected)
    rng = np.random.default_rng(1)
    # Where a gradient is zero, as that of GPT-2's key biases is, there is only rounding.
    rounding = 1e-7 * float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in found.values())))
    for slot, gradient in found.items():
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            up = oracle_loss(spec, weights | {slot: weights[slot] + width * direction}, batch)
            down = oracle_loss(spec, weights | {slot: weights[slot] - width * direction}, batch)
            slope = (up - down) / (2 * width)
            assert abs(float((gradient * direction).sum()) - slope) <= 1e-4 * norm + rounding, slot


def assert_takes_what_is_laid_out(
    parameters: Parameters, batch: Batch, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """The arenas of a training step are filled exactly, and that of an evaluation is not overfilled."""
    arenas = []

    class Watched(Arena):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.most = 0
            arenas.append(self)

        def take(self, shape: Any) -> Any:
            array = super().take(shape)
            self.most = max(self.most, self.used)
            return array

    monkeypatch.setattr(step_module, "Arena", Watched)
    step_of(parameters, batch, **options)
    training = arenas[: len(arenas) // 2 - 1]  # a step is recorded twice, and each time an evaluation after it
    assert [arena.most for arena in training] == [arena.memory.size for arena in training]
    assert arenas[len(training)].most <= arenas[len(training)].memory.size
