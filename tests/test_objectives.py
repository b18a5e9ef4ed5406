"""Objectives of encoders: which tokens are hidden or replaced, and what their labels are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folder import encoder_folder
from safetensors.numpy import load_file, save_file

from pyllm import LLM
from pyllm.errors import ConfigError, DataError, NonFiniteError
from pyllm.models import read_spec
from pyllm.ops import Ops
from pyllm.planning import plan
from pyllm.train import TrainConfig, Trainer
from pyllm.train.head_loss import IGNORED
from pyllm.train.objectives.generator import Generator, generator_bytes
from pyllm.train.objectives.masked import MaskedTokens, ReplacedTokens
from pyllm.train.run_config import settings
from pyllm.train.setup import plan_of_run, prepare

SPECIAL, MASK, VOCAB = (0, 2, 3), 4, 500


class Texts:
    """Micro-batches of texts between 2 and 3, and padding of 0 that does not count; a function of their number."""

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self) -> Any:
        rng = np.random.default_rng(self.position)
        self.position += 1
        starts = np.array([0, 40, 40, 43, 700, 720], np.int32)
        tokens = rng.integers(5, VOCAB, 720).astype(np.int32)
        for first, end in pairwise(starts[:-1]):
            if first < end:
                tokens[first], tokens[end - 1] = 2, 3
        tokens[700:] = 0
        labels = tokens.copy()
        labels[700:] = IGNORED
        return tokens, labels, starts

    def state(self) -> Any:
        return {"position": self.position}

    def load_state(self, state: Any) -> None:
        self.position = state["position"]


def masked(**options: Any) -> MaskedTokens:
    return MaskedTokens(Texts(), mask=MASK, vocab_size=VOCAB, **{"special": SPECIAL, **options})


@pytest.mark.parametrize("rule", ["bert", "bernoulli"])
def test_what_is_hidden(rule: str) -> None:
    data, plain = masked(rule=rule, seed=3), Texts()
    chosen, kinds = 0, np.zeros(3)
    for _ in range(40):
        tokens, _, starts = plain.next_batch()
        hidden, labels, same = data.next_batch()
        assert np.array_equal(starts, same)
        counted = labels != IGNORED
        assert np.array_equal(labels[counted], tokens[counted])
        assert not np.isin(tokens[counted], SPECIAL).any()
        assert not counted[700:].any()
        assert np.array_equal(hidden[~counted], tokens[~counted])
        if rule == "bert":
            numbers = [int(counted[first:end].sum()) for first, end in pairwise(starts)]
            assert numbers == [6, 0, 1, round(0.15 * 657), 0]
        chosen += int(counted.sum())
        kept, hid = hidden[counted] == tokens[counted], hidden[counted] == MASK
        kinds += [hid.sum(), kept.sum(), (~hid & ~kept).sum()]
    assert chosen == pytest.approx(40 * 0.15 * 700, rel=0.05)
    np.testing.assert_allclose(kinds / chosen, [0.8, 0.1, 0.1], atol=0.02)


def test_masking_goes_on_where_it_stood() -> None:
    data = masked(seed=1)
    data.next_batch()
    state, after = data.state(), data.next_batch()
    other = masked(seed=1)
    other.load_state(state)
    for one, two in zip(after, other.next_batch(), strict=True):
        assert np.array_equal(one, two)
    with pytest.raises(DataError, match="the run masked tokens by"):
        masked(seed=2).load_state(state)
    with pytest.raises(ConfigError, match="mask_rule: expected bert or bernoulli, got 'all'"):
        masked(rule="all")
    with pytest.raises(ConfigError, match="mask_share: expected 0 < value < 1, got 1"):
        masked(share=1)


@pytest.mark.parametrize("special", [SPECIAL, SPECIAL[1:]])
def test_what_is_replaced(special: tuple[int, ...]) -> None:
    """Labels are 1 where a token is another than it was, 0 elsewhere, and nothing at special tokens and padding, which
    may be an ordinary token."""

    def propose(hidden: Any, starts: Any, places: Any, rng: Any) -> Any:
        seen.append(hidden.copy())
        given = np.full(len(places), 7, np.int32)
        given[::2] = originals[-1][places][::2]  # guessed right
        return given

    originals: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    data, plain = ReplacedTokens(masked(seed=5, special=special), propose), Texts()
    for _ in range(3):
        tokens, _, _ = plain.next_batch()
        originals.append(tokens)
        replaced, labels, _ = data.next_batch()
        assert (seen[-1] == MASK).any()
        assert labels.shape == (720, 1) and labels.dtype == np.float32
        ordinary = ~np.isin(tokens, SPECIAL)
        assert np.array_equal(labels[ordinary, 0], replaced[ordinary] != tokens[ordinary])
        assert np.isnan(labels[~ordinary]).all()
        assert MASK not in replaced
        assert labels[ordinary].sum() > 20
    state = data.state()
    assert state == masked(seed=5).state() | {"masked": 3, "data": {"position": 3}, "generator": ""}
    data.load_state(state)
    with pytest.raises(DataError, match="generator: the run's tokens were replaced by another one"):
        ReplacedTokens(masked(seed=5, special=special), propose, key="other").load_state(state)


GOLDEN = Path(__file__).parent / "golden"


def generator(threads: int = 2) -> Generator:
    reader = read_spec(GOLDEN / "electra-discriminator")
    return Generator(GOLDEN / "electra-generator", reader, 40, 120, 3, Ops(threads))


def test_a_generator_draws_by_its_probabilities() -> None:
    tokens = np.random.default_rng(0).integers(3, 67, 120).astype(np.int32)
    starts = np.array([0, 39, 80, 120], np.int32)
    llm = LLM(GOLDEN / "electra-generator", skip_tokenizer_init=True, threads=2, dtype="float32")
    logits = np.concatenate([llm.forward(tokens[a:b].tolist()).logits for a, b in pairwise(starts)])
    places, draws = [0, 38, 39, 70, 119], 4000
    drawn = generator().propose(tokens, starts, np.repeat(places, draws), seed=1)
    for place, found in zip(places, np.split(drawn, len(places)), strict=True):
        expected = np.exp(logits[place].astype(np.float64) - logits[place].max())
        expected /= expected.sum()
        frequency = np.bincount(found, minlength=67) / draws
        assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected / draws) + 1 / draws).all(), place
    one = generator(threads=1).propose(tokens, starts, np.repeat(places, draws), seed=1)
    np.testing.assert_array_equal(one, drawn)
    assert (generator().propose(tokens, starts, np.repeat(places, draws), seed=2) != drawn).any()


def test_a_generator_without_numbers_is_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "electra-generator", tmp_path / "generator"))
    weights = load_file(folder / "model.safetensors")
    weights["generator_predictions.dense.bias"][:] = np.nan
    save_file(weights, folder / "model.safetensors")
    broken = Generator(folder, read_spec(GOLDEN / "electra-discriminator"), 40, 40, 1, Ops(1))
    with pytest.raises(NonFiniteError, match="generator: its values are no numbers"):
        broken.propose(np.full(40, 5, np.int32), np.array([0, 40], np.int32), np.arange(3), seed=0)


def test_a_plan_counts_the_generator(tmp_path: Path) -> None:
    made, folder = generator(), GOLDEN / "electra-generator"
    weights = plan(folder, dtype="float32").weights
    taken = made._cache.nbytes + made._logits.nbytes + made._arena.memory.nbytes
    found = generator_bytes(folder, read_spec(GOLDEN / "electra-discriminator"), 40, 120, 3)
    assert found == weights + taken
    model = encoder_folder("electra-discriminator", tmp_path / "model")
    values = {"model": str(model), "objective": "rtd", "context": 16, "batch_tokens": 64, "generator": str(folder)}
    without = plan_of_run({"model": str(model), "context": 16, "batch_tokens": 64})
    planned = plan_of_run(values)
    assert planned.generator > weights and planned.total == without.total + planned.generator
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the red mat"}\n' * 9)
    data = {"data": [str(tmp_path / "texts.jsonl")], "data_cache": str(tmp_path / "cache"), "valid_share": 0}
    planned = plan_of_run({**values, **data})
    assert planned.generator > weights and planned.shape.tokens == 64


def test_generators_that_do_not_fit() -> None:
    reader = read_spec(GOLDEN / "electra-discriminator")
    for name in ("electra-discriminator", "gpt2"):
        with pytest.raises(ConfigError, match="generator: expected an encoder that fills masks"):
            Generator(GOLDEN / name, reader, 8, 8, 1, Ops(1))
    for other, context in ((replace(reader, vocab_size=68), 8), (reader, 4096)):
        with pytest.raises(ConfigError, match=r"generator: expected the model's .* tokens and a context of at least"):
            Generator(GOLDEN / "electra-generator", other, context, 8, 1, Ops(1))


def test_replaced_tokens_are_learnt_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    model = encoder_folder("electra-discriminator", tmp_path / "model")
    folder = encoder_folder("electra-generator", tmp_path / "generator")
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the red mat and the dog ran fast"}\n' * 40)
    given = {"out": str(tmp_path / "x"), "steps": 1, "model": str(model), "generator": str(folder), "context": 16,
             "data": [str(tmp_path / "texts.jsonl")], "data_cache": str(tmp_path / "cache"), "batch_tokens": 64,
             "valid_share": 0}  # fmt: skip

    def trainer(out: str, resume: bool = False, **values: Any) -> Trainer:
        config, theirs = settings({**given, "objective": "rtd", **values})
        setup = prepare(config, theirs.seed, None, theirs.objective, 2)
        run = TrainConfig(tmp_path / out, steps=30, learning_rate=5e-3, threads=2, objective="rtd")
        return Trainer(setup.model, setup.train, run, tokenizer=setup.tokenizer, resume=resume)

    whole = trainer("whole")
    losses = [whole.step().loss for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    stopped = trainer("stopped")
    for _ in range(15):
        stopped.step()
    stopped.save()
    trainer("stopped", resume=True).run()
    resumed = trainer("stopped", resume=True)
    np.testing.assert_array_equal(resumed.parameters.weights, whole.parameters.weights)
    for name, changed in [("weights", "model.safetensors"), ("config", "config.json")]:
        other = Path(shutil.copytree(folder, tmp_path / name))
        content = (other / changed).read_bytes()
        (other / changed).write_bytes(content + b"\n" if name == "config" else content[:-1] + b"\x3d")
        with pytest.raises(DataError, match="generator: the run's tokens were replaced by another one"):
            trainer("stopped", resume=True, generator=str(other))
    same = str(shutil.copytree(folder, tmp_path / "same"))
    trainer("stopped", resume=True, generator=same)
    for values, message in [
        ({"generator": None}, "generator: expected the folder of a model that fills masks, as rtd needs one"),
        ({"objective": "mlm"}, "objective: expected rtd or classify for this electra model, got 'mlm'"),
        ({"objective": "mlm", "model": str(folder)}, "generator: expected none for mlm"),
    ]:
        with pytest.raises(ConfigError, match=message):
            trainer("other", **values)
