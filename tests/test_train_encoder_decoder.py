"""Training encoder-decoders: gradients, the bits of inference, memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_families import goldens
from training import (
    Batch,
    CountedData,
    assert_gradients_of_float64,
    assert_takes_what_is_laid_out,
    at_hand,
    gradients,
    make_batch,
    sourced,
    step_of,
)

from pyllm import LLM
from pyllm.errors import ConfigError, RequestError
from pyllm.models import family_of, open_checkpoint
from pyllm.ops_training import TrainingOps
from pyllm.train import StepShape, TrainConfig, Trainer, plan_training
from pyllm.train.architectures import new_config
from pyllm.train.head_loss import IGNORED
from pyllm.train.initialise import initialise
from pyllm.train.parameters import Parameters

GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = ["bart", "mbart", "mt5", "t5", "t5-gated"]
VOCAB = 67


def batch_of(seed: int = 0) -> Batch:
    """90 tokens in five sequences and as many sources, of which one is padding."""
    tokens, labels, starts, source, bounds = sourced(make_batch(VOCAB, 90, 5, seed), seed, start=2)
    labels[starts[1] : starts[2]] = IGNORED
    bounds[2:] -= (gone := bounds[2] - bounds[1])  # its source is empty
    return tokens, labels, starts, source[:-gone], bounds


@pytest.mark.parametrize("name", ["bart", "t5", "t5-gated"])
def test_gradients_are_those_of_float64(name: str) -> None:
    assert_gradients_of_float64(at_hand(name, TrainingOps(threads=2)), batch_of(), width=1e-7)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_all_gradients_are_those_of_torch(name: str, tmp_path: Path) -> None:
    """In float64, with three blocks in each stack, whose gradients meet in one table of biases and in the encoder's
    states."""
    import torch
    import transformers
    from test_train_oracle import by_slot, parameters_of

    variant = goldens.variants()[name]
    layers = ("encoder_layers", "decoder_layers") if "bart" in name else ("num_layers", "num_decoder_layers")
    deep = replace(variant, config={**variant.config, **dict.fromkeys(layers, 3)})
    goldens.save_model(goldens.random_model(deep, 1), tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float64
    ).train(False)
    if hasattr(model, "final_logits_bias"):  # no parameter there
        model.final_logits_bias.requires_grad_()
    tokens, labels, starts, source, bounds = batch = batch_of()
    total: Any = 0
    for (first, end), (begin, stop) in zip(pairwise(starts), pairwise(bounds), strict=True):
        wanted = torch.from_numpy(labels[first:end].astype(np.int64))
        if (wanted != IGNORED).any():
            ids, texts = (torch.from_numpy(a.astype(np.int64))[None] for a in (tokens[first:end], source[begin:stop]))
            logits = model(texts, decoder_input_ids=ids).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    loss = total / int((labels != IGNORED).sum())
    loss.backward()
    loss = float(loss.detach())
    named = {name: p.grad.numpy() for name, p in model.named_parameters()}
    if hasattr(model, "final_logits_bias"):
        named["final_logits_bias"] = model.final_logits_bias.grad.numpy()
    expected = by_slot(tmp_path, named)
    found_loss, found = gradients(parameters_of(tmp_path), batch)
    assert abs(found_loss - loss) <= 1e-6 * loss
    assert set(found) == set(expected)
    if "bart" in name:  # torch leaves out what comes to this row through the embedding
        pad = model.config.pad_token_id
        expected["embed.weight"][pad] = found["embed.weight"][pad]
    rounding = 1e-7 * max(float(np.abs(gradient).max()) for gradient in expected.values())
    for slot, gradient in expected.items():
        assert np.abs(found[slot] - gradient).max() <= 1e-4 * np.abs(gradient).max() + rounding, slot


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_threads_and_computing_again_give_the_same_gradients(name: str, dropout: float) -> None:
    expected = gradients(at_hand(name, TrainingOps(threads=2)), batch_of(), seed=7, dropout=dropout)
    for threads, again in ((1, False), (2, True)):
        found = gradients(
            at_hand(name, TrainingOps(threads=threads)), batch_of(), seed=7, dropout=dropout,
            checkpoint_activations=again,
        )  # fmt: skip
        assert found[0] == expected[0]
        for slot, gradient in expected[1].items():
            np.testing.assert_array_equal(found[1][slot], gradient, slot)


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_is_that_of_inference(name: str) -> None:
    """Log-probabilities that the engine gives of each text are the losses, bit for bit."""
    tokens, labels, starts, source, bounds = batch = batch_of()
    step = step_of(at_hand(name, TrainingOps(threads=2)), batch)
    step.evaluate()
    evaluated = step.head_loss.losses.copy()
    step.accumulate(1, 0)
    np.testing.assert_array_equal(step.head_loss.losses, evaluated)
    llm = LLM(GOLDEN / name, skip_tokenizer_init=True, threads=2, dtype="float32")
    for index, (first, end) in enumerate(pairwise(starts)):
        read = source[bounds[index] : bounds[index + 1]]
        if end - first < 2 or len(read) == 0:
            continue
        logits = llm.forward(tokens[first:end].tolist(), source_token_ids=read.tolist()).logits
        counted = np.flatnonzero(labels[first:end] != IGNORED)
        losses = np.empty(len(counted), np.float32)
        TrainingOps(threads=1).cross_entropy(logits[counted], labels[first:end][counted], None, loss=losses)
        np.testing.assert_array_equal(losses, evaluated[first:end][counted])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"dropout": 0.1}], ids=str)
def test_memory_is_laid_out_exactly(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_takes_what_is_laid_out(at_hand(name, TrainingOps(threads=2)), batch_of(), monkeypatch, **options)


def test_bfloat16_is_as_near_to_float32_as_that_of_a_decoder() -> None:
    def error(name: str, batch: Batch) -> float:
        """Of all gradients together, relative to them."""
        expected, found = (
            gradients(at_hand(name, TrainingOps(threads=2), dtype), batch)[1] for dtype in ("float32", "bfloat16")
        )
        difference = sum(float(((found[slot] - g) ** 2).sum()) for slot, g in expected.items())
        return float((difference / sum(float((g**2).sum()) for g in expected.values())) ** 0.5)

    assert 0 < error("bart", batch_of()) < 2 * error("gpt2", batch_of()[:3])


class SourcedData(CountedData):
    """The same batches with sources."""

    def next_batch(self) -> Batch:
        self.position += 1
        return sourced(make_batch(VOCAB, 90, 4, [self.seed, self.position]), self.position, start=2)[:3] + self.source

    @property
    def source(self) -> Batch:
        """The same for every batch, as their shape must be."""
        return np.arange(3, 63, dtype=np.int32), np.array([0, 10, 11, 40, 60], np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    config = TrainConfig(tmp_path / "run", steps=8, learning_rate=3e-3, threads=2)
    source = GOLDEN / name
    trainer = Trainer(source, SourcedData(vocab=VOCAB), config)
    losses = [trainer.step().loss for _ in range(8)]
    assert losses[-1] < losses[0]
    folder = trainer.save()
    with open_checkpoint(folder) as made, open_checkpoint(source) as before:
        assert made.spec.slots() == before.spec.slots()
        for slot in made.tensors:
            np.testing.assert_array_equal(np.asarray(made.tensors[slot]), trainer.parameters.get(slot))
    resumed = Trainer(None, SourcedData(vocab=VOCAB), config, resume=True)
    np.testing.assert_array_equal(resumed.parameters.weights, trainer.parameters.weights)
    with pytest.raises(ConfigError, match="expected none of a prefix for this"):
        Trainer(source, SourcedData(vocab=VOCAB), replace(config, out=tmp_path / "other", objective="prefix"))
    with pytest.raises(ConfigError, match=f"with sources for this {trainer.spec.family} model"):
        Trainer(source, CountedData(vocab=VOCAB), replace(config, out=tmp_path / "other"))


@pytest.mark.oracle
@pytest.mark.parametrize(("arch", "tie"), [("t5", True), ("bart", True)])
def test_first_weights_are_spread_as_those_of_transformers(arch: str, tie: bool) -> None:
    import torch
    import transformers

    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": None, "ffn": 160, "context": 96, "vocab_size": 200}
    ends = SimpleNamespace(eos_token_ids=(1,), bos_token_id=0, pad_token_id=2)
    config = new_config(arch, tie=tie, tokenizer=ends, **sizes)  # type: ignore[arg-type]
    parameters = Parameters(family_of(config).read(config), TrainingOps(threads=1))
    initialise(parameters, config, seed=0)
    torch.manual_seed(0)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(arch, **fields))
    spec, tensors = parameters.spec, {name: value.numpy() for name, value in model.state_dict().items()}
    for row in family_of(config).names.expand(spec):
        values = row.read(tensors[row.name])
        for slot, place in row.places(spec).items():
            ours, theirs = parameters.get(slot), values[place]
            assert ours.shape == theirs.shape
            tolerance = 5 / ours.size**0.5  # of standard deviations of so many numbers
            assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=tolerance, abs=1e-7), slot
            assert float(ours.mean()) == pytest.approx(
                float(theirs.mean()), abs=tolerance * float(ours.std()) + 1e-7
            ), slot


def test_micro_batches_that_do_not_fit() -> None:
    parameters = at_hand("bart", TrainingOps(threads=1))
    tokens, labels, starts, source, bounds = batch_of()
    step = step_of(parameters, batch_of())
    for given, message in [
        ((), r"expected five arrays for this bart model, .* got 3"),
        ((source,), r"expected five arrays .* got 4"),
        ((source[1:], bounds), r"tokens of sources: expected int32 \[\d+\]"),
        ((source, bounds[1:]), r"starts of sources: expected int32 \[6\]"),
        ((source, bounds + np.int32(1)), "starts of sources: expected to rise from 0"),
        ((source + np.int32(VOCAB), bounds), "token of a source .* lies outside the model's 67"),
        ((source, np.array([0, 0, 0, *bounds[3:]], np.int32)), "sequence 0 has labels that count and an empty source"),
    ]:
        with pytest.raises(RequestError, match=message):
            step.fill(tokens, labels, starts, *given)
    long = np.full(90, 5, np.int32), np.array([0, 90, 90, 90, 90, 90], np.int32)
    with pytest.raises(RequestError, match="sources of at most the model's 80 positions, got one of 90 tokens"):
        step_of(parameters, (tokens, labels, starts, *long))
    with pytest.raises(ConfigError, match="with sources for this bart model, which has an encoder"):
        plan_training(parameters.spec, StepShape(8, 1))
    with pytest.raises(ConfigError, match="without sources for this gpt2 model, which has no encoder"):
        plan_training(at_hand("gpt2", TrainingOps(threads=1)).spec, StepShape(8, 1, source=8))


def test_where_values_stop_being_numbers() -> None:
    parameters = at_hand("t5", TrainingOps(threads=1))
    step = step_of(parameters, batch_of())
    parameters.set("encoder.blocks.1.mlp.down.weight", np.full((20, 28), 3e38, np.float32))
    assert step.first_bad().startswith("values are not finite from layer 1 of the encoder on")
