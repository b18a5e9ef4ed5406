"""Training with a bidirectional prefix: gradients against torch, how texts are split, and runs of the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import goldens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training import GOLDEN, TINY, Batch, CountedData, at_hand, gradients, make_batch

from pyllm import LLM
from pyllm.errors import ConfigError, DataError, RequestError
from pyllm.models import open_checkpoint
from pyllm.ops_training import TrainingOps
from pyllm.prefix import PrefixSpec
from pyllm.train import TrainConfig, Trainer
from pyllm.train.objectives.blanks import BlankedTokens
from pyllm.train.objectives.prefix import SplitTokens
from pyllm.train.parameters import Parameters, load_values
from pyllm.train.run_config import settings
from pyllm.train.setup import plan_of_run, prepare
from pyllm.train.step import IGNORED
from pyllm.train.token_files import write_bin

BLANKS = ["chatglm", "glm2021"]


def blank_batch(name: str) -> Batch:
    """Three texts with a blank each, of which only the blank counts, and some padding."""
    config = goldens.variants()[name].config
    texts = [goldens.blank_prompt(config, length, length) for length in (20, 33, 27)]
    tokens = np.concatenate([*texts, np.zeros(10)]).astype(np.int32)
    starts = np.array([0, 20, 53, 80, 90], np.int32)
    labels = np.full(90, IGNORED, np.int32)
    for end in starts[1:4]:
        labels[end - 4 : end] = [*tokens[end - 3 : end], 7]
    return tokens, labels, starts


def torch_gradients(model: Any, batch: Batch, logits_of: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss over the counted labels, and gradients by the names of parameters."""
    import torch

    tokens, labels, starts = batch
    total: Any = 0
    for first, end in pairwise(starts):
        wanted = torch.from_numpy(labels[first:end].astype(np.int64))
        if (wanted != IGNORED).any():
            logits = logits_of(torch.from_numpy(tokens[first:end].astype(np.int64)), wanted)
            total = total + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    loss = total / int((labels != IGNORED).sum())
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in model.named_parameters()}


def assert_gradients(folder: Path, found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    from test_train_oracle import by_slot

    assert abs(found[0] - expected[0]) <= 1e-6 * expected[0]
    slots = by_slot(folder, expected[1])
    assert set(slots) == set(found[1])
    rounding = 1e-7 * max(float(np.abs(gradient).max()) for gradient in slots.values())
    for slot, gradient in slots.items():
        assert np.abs(found[1][slot] - gradient).max() <= 1e-4 * np.abs(gradient).max() + rounding, slot


@pytest.mark.oracle
@pytest.mark.parametrize("name", BLANKS)
def test_gradients_of_models_that_fill_blanks(name: str) -> None:
    import torch
    from oracle.glm import Reference
    from safetensors.torch import load_file

    model = Reference(goldens.variants()[name].config)
    model.load_state_dict(load_file(GOLDEN / name / "model.safetensors"))
    batch = blank_batch(name)
    expected = torch_gradients(model, batch, lambda ids, labels: model(ids)[0])
    assert isinstance(expected[0], float) and torch.is_grad_enabled()
    assert_gradients(GOLDEN / name, gradients(at_hand(name, TrainingOps(threads=2)), batch), expected)


@pytest.mark.parametrize("name", BLANKS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_again_gives_the_same_gradients(name: str, dropout: float) -> None:
    batch = blank_batch(name)
    options: dict[str, Any] = {"dropout": dropout, "seed": 7}
    kept = gradients(at_hand(name, TrainingOps(threads=2)), batch, **options)
    again = gradients(at_hand(name, TrainingOps(threads=2)), batch, checkpoint_activations=True, **options)
    assert kept[0] == again[0]
    for slot, gradient in kept[1].items():
        np.testing.assert_array_equal(again[1][slot], gradient)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_of_a_causal_decoder_with_a_prefix(name: str) -> None:
    """Against transformers with the mask and the positions given to it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, attn_implementation="eager").float()
    model.train(False)

    def logits_of(ids: Any, labels: Any) -> Any:
        prefix, rows = int((labels != IGNORED).nonzero()[0]) + 1, torch.arange(len(ids))
        seen = (rows[None] <= rows[:, None]) | (rows[None] < prefix)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        return model(ids[None], attention_mask=mask, position_ids=rows[None]).logits[0]

    tokens, labels, starts = make_batch(67, 90, 4, 0)
    labels = labels.copy()
    for first, end in pairwise(starts):
        labels[first : first + (end - first) // 2] = IGNORED
    batch = tokens, labels, starts
    expected = torch_gradients(model, batch, logits_of)
    assert_gradients(GOLDEN / name, gradients(prefix_model(name), batch), expected)
    causal, _ = gradients(at_hand(name, TrainingOps(threads=2)), batch)
    assert abs(causal - expected[0]) > 1e-3


def prefix_model(name: str) -> Parameters:
    """A golden model that is trained with a prefix."""
    with open_checkpoint(GOLDEN / name) as checkpoint:
        parameters = Parameters(replace(checkpoint.spec, prefix=PrefixSpec()), TrainingOps(threads=2))
        load_values(parameters, checkpoint.tensors)
    return parameters


def test_labels_inside_a_prefix_are_refused() -> None:
    tokens, labels, starts = blank_batch("chatglm")
    labels[3] = 5
    with pytest.raises(RequestError, match="stands in the prefix"):
        gradients(at_hand("chatglm", TrainingOps(threads=1)), (tokens, labels, starts))
    labels[3], tokens[6] = IGNORED, 5  # the mask of the first text
    with pytest.raises(RequestError, match="mask before its start token"):
        gradients(at_hand("chatglm", TrainingOps(threads=1)), (tokens, labels, starts))


def test_splits_leave_the_end_of_each_sequence_and_are_repeated_by_a_resumed_run() -> None:
    data = SplitTokens(CountedData(), 3)
    shares = []
    for _ in range(30):
        plain = CountedData()
        plain.load_state(data.state()["data"])
        _, whole, _ = plain.next_batch()
        _, labels, starts = data.next_batch()
        for first, end in pairwise(starts):
            if first == end:
                continue
            differ = np.flatnonzero(labels[first:end] != whole[first:end])
            split = differ[-1] + 1 if len(differ) else 0
            assert (labels[first : first + split] == IGNORED).all()
            assert (labels[first + split : end] == whole[first + split : end]).all()
            shares.append(split / (end - first))
    assert 0.35 < np.mean(shares) < 0.6
    again = SplitTokens(CountedData(), 3)
    again.load_state(json.loads(json.dumps(data.state())))
    for found, expected in zip(again.next_batch(), data.next_batch(), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match="seed"):
        SplitTokens(CountedData(), 4).load_state(data.state())


def test_a_run_with_a_prefix_learns(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path / "run", steps=60, learning_rate=1e-2, objective="prefix", threads=2)
    trainer = Trainer(TINY, SplitTokens(CountedData(), 0), config)
    losses = [trainer.step().loss for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    folder = trainer.save()
    ids = make_batch(61, 30, 1, 5)[0].tolist()
    causal, prefix = (LLM(folder, skip_tokenizer_init=True, prefix=flag, threads=2) for flag in (False, True))
    assert not np.array_equal(prefix.forward(ids).logits, causal.forward(ids).logits)
    resumed = Trainer(None, SplitTokens(CountedData(), 0), config, resume=True)
    assert resumed.spec.prefix == PrefixSpec()


def test_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. the dog sat on the cat. " * 40)
    command = [sys.executable, "-m", "pyllm", "train", text, "-m", tiny_folder, "-o", tmp_path / "run", "-c", 16]
    command += ["--steps", 3, "--packing", "plain", "--objective", "prefix", "--valid-share", 0.2, "--quiet"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["objective"] == "prefix"
    wrong = subprocess.run([*map(str, command[:-3]), "--objective", "suffix"], capture_output=True)
    assert wrong.returncode == 1 and b"causal, prefix, blanks" in wrong.stderr


def blanked(name: str = "glm2021", seed: int = 0) -> BlankedTokens:
    rule = open_checkpoint(GOLDEN / name).spec.prefix
    return BlankedTokens(CountedData(vocab=50), rule, 63, context=40, positions=128, seed=seed)


@pytest.mark.parametrize("name", BLANKS)
def test_blanks_hold_what_was_taken_from_the_text(name: str) -> None:
    data, plain = blanked(name), CountedData(vocab=50)
    spans, orders = [], set()
    for _ in range(40):
        tokens, labels, starts, positions = data.next_batch()
        assert len(tokens) == data.tokens and len(starts) == data.sequences + 1 and starts[-1] == data.tokens
        texts, counted, bounds = plain.next_batch()
        whole = [texts[a:b].tolist() for a, b in pairwise(bounds) if (counted[a:b] != IGNORED).any()]
        for (first, end), text in zip(pairwise(starts.tolist()), whole, strict=False):
            ids, aims, places = tokens[first:end].tolist(), labels[first:end], positions[first:end].tolist()
            prefix = ids.index(62)
            assert (aims[:prefix] == IGNORED).all() and places[:prefix] == list(range(prefix))
            begins = [i for i in range(prefix, len(ids)) if ids[i] == 62] + [len(ids)]
            content = {}
            for a, b in pairwise(begins):
                assert len(set(places[a:b])) == 1 and ids[places[a]] == 60
                assert aims[a:b].tolist() == [*ids[a + 1 : b], 63]
                content[places[a]] = ids[a + 1 : b]
            masks = [i for i in range(prefix) if ids[i] == 60]
            assert sorted(content) == masks and all(b - a > 1 for a, b in pairwise(masks))
            filled = [token for i, given in enumerate(ids[:prefix]) for token in content.get(i, [given])]
            assert filled == text
            spans.append(sum(map(len, content.values())) / len(text))
            if len(masks) > 1:
                orders.add(list(content) == masks)
    assert 0.12 < np.mean(spans) < 0.25  # of short texts at least one token is blanked
    assert orders == ({True, False} if name == "glm2021" else set())


def test_blanks_are_repeated_by_a_resumed_run() -> None:
    data = blanked()
    data.next_batch()
    again = blanked()
    again.load_state(json.loads(json.dumps(data.state())))
    for found, expected in zip(again.next_batch(), data.next_batch(), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match="seed"):
        blanked(seed=1).load_state(data.state())


def test_what_blanks_refuse() -> None:
    rule = open_checkpoint(GOLDEN / "glm2021").spec.prefix
    with pytest.raises(ConfigError, match="fills blanks"):
        BlankedTokens(CountedData(), PrefixSpec(), 1, context=40, positions=128, seed=0)
    with pytest.raises(ConfigError, match="context"):
        BlankedTokens(CountedData(), rule, 63, context=40, positions=44, seed=0)
    with pytest.raises(DataError, match="already"):
        BlankedTokens(CountedData(vocab=67), rule, 63, context=40, positions=128, seed=0).next_batch()


def test_a_run_needs_the_objective_that_its_model_was_made_for(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "glm2021", tmp_path / "glm"))
    words = WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    base = {"model": str(folder), "data": [str(tmp_path / "data.bin")], "context": 32, "valid_share": 0}
    write_bin(tmp_path / "data.bin", np.random.default_rng(0).integers(3, 58, 2000))
    for objective in ("causal", "prefix"):
        with pytest.raises(ConfigError, match="objective: expected blanks for this glm model"):
            plan_of_run({**base, "objective": objective})
    planned = plan_of_run({**base, "objective": "blanks"}).shape
    config, theirs = settings({**base, "objective": "blanks", "steps": 1, "out": "x"})
    data = prepare(config, theirs.seed, objective="blanks").train
    tokens, _, starts, *_ = data.next_batch()
    assert (planned.tokens, planned.sequences) == (len(tokens), len(starts) - 1)
    write_bin(tmp_path / "data.bin", np.append(np.arange(3, 58), 60))
    with pytest.raises(DataError, match=r"data.bin: document 1 of 1 holds w60 \(id 60\), which objective blanks puts"):
        prepare(config, theirs.seed, objective="blanks")
    assert planned.tokens > 32 * 8


def test_an_array_that_nothing_reads_is_refused() -> None:
    batch = make_batch(61, 30, 1, 5)
    with pytest.raises(RequestError, match="expected three arrays for this llama model, got a fourth"):
        gradients(at_hand("llama", TrainingOps(threads=1)), (*batch, np.zeros(30, np.int32)))


def test_both_positions_are_dropped_with_the_token() -> None:
    """With one mask: where each position is that of one token, the gradients of both are those of the token."""
    tokens = np.array([5, 6, 60, 9, 62, 7, 8], np.int32)
    labels = np.array([IGNORED] * 4 + [7, 8, 63], np.int32)
    batch = (tokens, labels, np.array([0, 7], np.int32), np.arange(7, dtype=np.int32))
    _, found = gradients(at_hand("glm2021", TrainingOps(threads=1)), batch, dropout=0.4, seed=3)
    first, second = found["positions.weight"][4:7], found["second_positions.weight"][1:4]
    np.testing.assert_array_equal(first, second)
    assert 0 < (first == 0).mean() < 1


@pytest.mark.oracle
def test_gradients_of_blanks_in_another_order() -> None:
    """The written-out model is told the positions that the batch has."""
    import torch
    from oracle.glm import Reference
    from safetensors.torch import load_file

    tokens, labels, starts, positions = blanked().next_batch()
    model = Reference(goldens.variants()["glm2021"].config)
    model.load_state_dict(load_file(GOLDEN / "glm2021" / "model.safetensors"))
    own, given = model.places, {}
    for first, end in pairwise(starts.tolist()):
        given[tuple(tokens[first:end].tolist())] = positions[first:end]
    model.places = lambda ids, start: (torch.from_numpy(given[tuple(ids)]).long(), own(ids, start)[1])
    expected = torch_gradients(model, (tokens, labels, starts), lambda ids, labels: model(ids)[0])
    found = gradients(at_hand("glm2021", TrainingOps(threads=2)), (tokens, labels, starts, positions))
    assert_gradients(GOLDEN / "glm2021", found, expected)


def test_a_run_that_fills_blanks_learns(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path / "run", steps=40, learning_rate=3e-3, objective="blanks", threads=2)
    trainer = Trainer(GOLDEN / "glm2021", blanked(), config)
    losses = [trainer.step().loss for _ in range(40)]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
    llm = LLM(trainer.save(), skip_tokenizer_init=True, threads=2)
    [output] = llm.generate({"prompt_token_ids": [5, 6, 60, 9, 62]}, temperature=0, max_tokens=4)
    assert 1 <= len(output.outputs[0].token_ids) <= 4
    with pytest.raises(RequestError, match="start token"):
        llm.generate({"prompt_token_ids": [5, 6, 60, 9]})
