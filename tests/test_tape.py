"""Gradients of whole models, and that the tape changes nothing of what it runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracle.harness import ISAS, at_isa
from test_train_prefix import BLANKS, blank_batch
from training import (
    GOLDEN,
    assert_gradients_of_float64,
    assert_takes_what_is_laid_out,
    at_hand,
    gradients,
    make_batch,
    step_of,
)

from pyllm import _cpu
from pyllm.batch import Batch
from pyllm.cache import KVCache
from pyllm.model import Model
from pyllm.ops import Arena
from pyllm.ops_training import TrainingOps
from pyllm.tape import Tape, TapeMemory
from pyllm.train.head_loss import IGNORED

MODELS = [
    "bloom-normed",
    "gemma3",
    "gpt2",
    "gpt2-scaled-relu",
    "llama",
    "llama-tied-biased",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen3",
]
VOCAB = 67


def batch_for(seed: int = 0, tokens: int = 90, sequences: int = 4) -> Any:
    return make_batch(VOCAB, tokens, sequences, seed)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_float64(name: str) -> None:
    """Of every weight, along random directions: by central differences of the float64 model."""
    assert_gradients_of_float64(at_hand(name, TrainingOps(threads=2)), batch_for())


@pytest.mark.parametrize("isa", ISAS)
def test_every_level_gives_the_gradients(isa: str) -> None:
    batch = batch_for(3)
    expected = gradients(at_hand("qwen3", TrainingOps(threads=2)), batch)
    with at_isa(isa):
        found = gradients(at_hand("qwen3", TrainingOps(threads=2)), batch)
    assert abs(found[0] - expected[0]) <= 1e-6 * expected[0]
    for slot, gradient in expected[1].items():
        error = np.linalg.norm(found[1][slot] - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-9, slot


@pytest.mark.parametrize("name", MODELS)
def test_a_tape_computes_the_bits_of_inference(name: str) -> None:
    ops, batch = TrainingOps(threads=2), batch_for()
    parameters = at_hand(name, ops)
    step = step_of(parameters, batch)
    model = Model(parameters.spec, parameters.model_weights)
    memory = TapeMemory(Arena(1 << 20), None, Arena(1 << 20))
    tape = Tape(ops, memory, parameters.gradient_of)
    taped = model.final_norm(tape, model.forward(tape, step.batch, step._cache))
    plain = model.final_norm(ops, model.forward(ops, step.batch, step._cache))
    assert taped.tobytes() == plain.tobytes()

    ids, _, starts = batch
    first, end = int(starts[0]), int(starts[1])
    alone = Batch.empty(end - first, 1, 1, parameters.spec)  # as a prompt by itself
    alone.tokens[:] = ids[first:end]
    alone.positions[:] = np.arange(end - first)
    alone.slots[:] = np.arange(end - first)
    alone.starts[:], alone.lengths[:] = [0, end - first], end - first
    prompt = model.forward(ops, alone, KVCache(parameters.spec, 1, "float32"))
    assert model.final_norm(ops, prompt).tobytes() == taped[first:end].tobytes()


@pytest.mark.parametrize("name", ["glm4", "gpt2", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_again_gives_the_same_gradients(name: str, dropout: float) -> None:
    batch = batch_for(1)
    options: dict[str, Any] = {"dropout": dropout, "seed": 7}
    kept = gradients(at_hand(name, TrainingOps(threads=2)), batch, **options)
    again = gradients(at_hand(name, TrainingOps(threads=2)), batch, checkpoint_activations=True, **options)
    assert_same(kept, again)


def test_dropout_is_a_function_of_its_seed() -> None:
    batch = batch_for(1)
    runs = [gradients(at_hand("gpt2", TrainingOps(threads=2)), batch, dropout=0.2, seed=s) for s in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert runs[0][0] != runs[2][0]


def test_gradients_through_dropout() -> None:
    """The loss is a function of the weights for one seed: its slope along the gradient."""
    parameters, batch = at_hand("gpt2", TrainingOps(threads=2)), batch_for(1)
    _, found = gradients(parameters, batch, dropout=0.25, seed=3)
    counted = int((batch[1] != IGNORED).sum())
    step = step_of(parameters, batch, dropout=0.25)
    for slot in ("embed.weight", "blocks.0.attn.q.weight", "blocks.1.attn.v.bias", "blocks.1.mlp.down.weight"):
        before, norm = parameters.get(slot), np.linalg.norm(found[slot])
        losses = []
        for sign in (1, -1):
            parameters.set(slot, (before + sign * 1e-2 * found[slot] / norm).astype(np.float32))
            losses.append(step.accumulate(counted, 3) / counted)
        parameters.set(slot, before)
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=0.01), slot


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_threads_do_not_change_the_bits(name: str) -> None:
    batch = batch_for(2, tokens=180, sequences=6)
    runs = [gradients(at_hand(name, TrainingOps(threads)), batch) for threads in (1, 2, 2)]
    assert_same(runs[0], runs[1])
    assert_same(runs[1], runs[2])


def test_packed_sequences_do_not_see_each_other() -> None:
    """The gradient of a packed batch is the sum of those of its sequences alone."""
    parameters, batch = at_hand("qwen3", TrainingOps(threads=2)), batch_for(5)
    loss, packed = gradients(parameters, batch)
    ids, labels, starts = batch
    counted = int((labels != IGNORED).sum())
    total, summed = 0.0, {slot: np.zeros(value.shape) for slot, value in packed.items()}
    for first, end in pairwise(starts):
        if not (labels[first:end] != IGNORED).any():
            continue
        alone = ids[first:end], labels[first:end], np.array([0, end - first], np.int32)
        own, parts = gradients(parameters, alone)
        weight = int((alone[1] != IGNORED).sum()) / counted
        total += own * weight
        for slot, value in parts.items():
            summed[slot] += weight * value
    assert total == pytest.approx(loss, rel=1e-6)
    for slot, value in packed.items():
        assert np.linalg.norm(summed[slot] - value) <= 1e-5 * np.linalg.norm(value) + 1e-9, slot


@pytest.mark.parametrize("name", ["chatglm", "gemma3", "glm2021", "glm4", "gpt2", "llama", "qwen3", "llama-dynamic"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"checkpoint_activations": True}])
def test_a_step_takes_the_memory_that_was_laid_out(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = blank_batch(name) if name in BLANKS else make_batch(VOCAB, 37, 3, 0, longest=20)
    assert_takes_what_is_laid_out(at_hand(name, TrainingOps(threads=1)), batch, monkeypatch, **options)


def test_golden_models_are_at_hand() -> None:
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} >= set(MODELS)
    assert _cpu.BLOCK_TOKENS == 64


def assert_same(first: tuple[float, dict[str, Any]], second: tuple[float, dict[str, Any]]) -> None:
    assert first[0] == second[0]
    for slot, gradient in first[1].items():
        assert gradient.tobytes() == second[1][slot].tobytes(), slot
