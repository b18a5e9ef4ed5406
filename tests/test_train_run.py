"""Training runs on tiny models: the optimizer's steps, checkpoints, going on, and what stops a run."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from training import TINY, CountedData, at_hand, make_batch, oracle_loss, step_of, values

from pyllm import LLM
from pyllm.errors import CheckpointError, ConfigError, InsufficientMemoryError, NonFiniteError, RequestError
from pyllm.ops_training import TrainingOps
from pyllm.train import Callbacks, RepeatedData, StepReport, TrainConfig, Trainer
from pyllm.train import trainer as trainer_module
from pyllm.train.head_loss import IGNORED
from pyllm.train.step import AdamW

HERE = Path(__file__).resolve().parent


class Log(Callbacks):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.events: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)

    def evaluated(self, report: Any) -> None:
        self.events.append(f"evaluated {report.step}{' best' if report.best else ''}")

    def sampled(self, sample: Any) -> None:
        self.events.append(f"sampled {sample.step} {sample.prompt!r}")

    def saved(self, step: int, folder: Path) -> None:
        self.events.append(f"saved {step}")


def config(out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "dropout": 0.1,
        "accumulation": 2,
        "threads": 2,
    }
    return TrainConfig(out, **{**defaults, **settings})


def train(out: Path, data: Any = None, **options: Any) -> tuple[Trainer, Log]:
    settings = {name: options.pop(name) for name in list(options) if name in TrainConfig.__dataclass_fields__}
    log = Log()
    trainer = Trainer(
        options.pop("model", TINY), data or CountedData(), config(out, **settings), callbacks=[log], **options
    )
    return trainer, log


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes() + (folder / "training_state.safetensors").read_bytes()


# Steps


def test_adamw_follows_its_formula_in_float64() -> None:
    """20 steps with gradients of the float32 kernels; moments and update in float64."""
    parameters, optimizer = at_hand("qwen3", TrainingOps(threads=2)), AdamW(0.9, 0.95, 1e-8, 0.1)
    expected = values(parameters)
    moments = {slot: (np.zeros_like(value), np.zeros_like(value)) for slot, value in expected.items()}
    step = step_of(parameters, make_batch(67, 90, 4, 0), optimizer=optimizer)
    for number in range(1, 21):
        batch = make_batch(67, 90, 4, number)
        step.fill(*batch)
        parameters.zero_gradients()
        step.accumulate(int((batch[1] != IGNORED).sum()), 0)
        norm = step.gradient_norm()
        every = [parameters.gradient(slot).astype(np.float64) for slot in expected]
        assert norm == pytest.approx(math.sqrt(sum((g * g).sum() for g in every)), rel=1e-6)
        scale, rate = min(1.0, 0.5 / (norm + 1e-6)), 1e-3 * number
        for (slot, weight), gradient in zip(expected.items(), every, strict=True):
            first, second = moments[slot]
            first += (1 - 0.9) * (gradient * scale - first)
            second += (1 - 0.95) * ((gradient * scale) ** 2 - second)
            if weight.ndim == 2 and slot != "positions.weight":
                weight *= 1 - rate * 0.1
            weight -= rate * (first / (1 - 0.9**number)) / (np.sqrt(second / (1 - 0.95**number)) + 1e-8)
        step.update(number, rate, scale)
    for slot, weight in expected.items():
        assert np.abs(parameters.get(slot) - weight).max() <= 1e-5 * max(1, np.abs(weight).max()), slot


def test_how_a_step_is_split_does_not_matter(tmp_path: Path) -> None:
    """1 x 8 = 2 x 4 = 8 x 1: the loss is divided by all counted tokens of the step."""
    whole = [make_batch(61, 32, 2, i) for i in range(8)]

    class Split(CountedData):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def next_batch(self) -> Any:
            parts = [whole[(self.position * self.size + i) % 8] for i in range(self.size)]
            self.position += 1
            starts = np.concatenate([[0], *(p[2][1:] + 32 * i for i, p in enumerate(parts))]).astype(np.int32)
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), starts

    runs = []
    for size in (8, 4, 1):
        trainer, _ = train(tmp_path / str(size), Split(size), accumulation=8 // size, dropout=0.0, steps=20, clip=0.5)
        reports = [trainer.step() for _ in range(3)]
        runs.append((reports, trainer.parameters))
    for reports, parameters in runs[1:]:
        for one, other in zip(reports, runs[0][0], strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-6)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
        assert np.abs(parameters.weights - runs[0][1].weights).max() <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_fits_one_batch(dtype: str, tmp_path: Path) -> None:
    data = CountedData()
    trainer, log = train(
        tmp_path / "run", RepeatedData(data, 1), steps=80, accumulation=1, dropout=0.0, dtype=dtype,
        learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0,
    )  # fmt: skip
    result = trainer.run()
    assert abs(log.steps[0].loss - math.log(61)) < 0.1
    assert result.finished and result.last_loss is not None and result.last_loss < 0.5
    assert data.position == 0


def test_first_weights_are_as_published(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 400, "n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 64}
    trainer, _ = train(tmp_path / "run", CountedData(vocab=400), model=gpt2)
    for slot in trainer.spec.slots():
        value = trainer.parameters.get(slot)
        if value.ndim == 1:
            assert (value == (0 if slot.endswith("bias") else 1)).all()
            continue
        residual = slot.endswith(("attn.o.weight", "mlp.down.weight"))
        assert value.std() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), slot
        assert abs(value.mean()) < 1e-3
    llama, _ = train(tmp_path / "other", model={**TINY, "initializer_range": 0.5})
    assert llama.parameters.get("blocks.1.mlp.down.weight").std() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ConfigError, match="initializer_range"):
        train(tmp_path / "third", model={**TINY, "initializer_range": -1})


@pytest.mark.parametrize("initial", [0.02, 0.3])
def test_gradients_that_are_only_rounding_are_no_errors(initial: float, tmp_path: Path) -> None:
    """Those of key biases: all scores of a query move together."""
    sizes = {"vocab_size": 61, "initializer_range": initial, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **sizes}
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64, **sizes}  # fmt: skip
    for model in (gpt2, bert):
        trainer, _ = train(tmp_path / str(model["model_type"]), model=model, dropout=0.0)
        checks = {check.slot: check for check in trainer.check_gradients()}
        assert max(check.error for check in checks.values()) < 0.02
        keys = checks["blocks.0.attn.k.bias"]
        assert keys.gradient < 1e-3 * keys.scale, "only rounding"


def test_check_gradients_agrees_and_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path / "run", model={**TINY, "initializer_range": 0.3}, dropout=0.0)
    before = trainer.parameters.weights.copy()
    checks = trainer.check_gradients()
    assert {check.slot for check in checks} == set(trainer.spec.slots())
    assert max(check.error for check in checks) < 0.02
    assert (trainer.parameters.weights == before).all()
    assert trainer.data.state()["position"] == 0
    rounded, _ = train(tmp_path / "other", dtype="bfloat16")
    with pytest.raises(RequestError, match="float32 only"):
        rounded.check_gradients()


# Checkpoints


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_checkpoint_is_a_model_that_loads(model_type: str, tmp_path: Path) -> None:
    model = {
        "llama": TINY,
        "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                 "bos_token_id": 1, "eos_token_id": 2},
        "qwen3": {**TINY, "model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    }[model_type]  # fmt: skip
    trainer, _ = train(tmp_path / "run", model=model)
    result = trainer.run()
    llm = LLM(result.folder, skip_tokenizer_init=True, threads=2)
    batch = make_batch(61, 40, 1, 3)
    logits = llm.forward(batch[0].tolist()).logits
    rows = np.flatnonzero(batch[1] != IGNORED)
    top = logits[rows].astype(np.float64)
    loss = (np.log(np.exp(top).sum(-1)) - top[np.arange(len(rows)), batch[1][rows]]).mean()
    assert loss == pytest.approx(oracle_loss(trainer.spec, values(trainer.parameters), batch), rel=1e-5)
    assert llm.plan.dtype == "float32"

    again, _ = train(tmp_path / "again", model=result.folder)  # train on from it
    assert again.parameters.weights.tobytes() == trainer.parameters.weights.tobytes()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 9, "save_every": 2, "eval_every": 3, "eval_batches": 2}
    whole, log = train(tmp_path / "whole", eval_data=CountedData(seed=9), **settings)
    whole.run()

    class Stop(Callbacks):
        def stepped(self, report: StepReport) -> None:
            if report.step == 5:
                first.stop()

    first, _ = train(tmp_path / "parts", eval_data=CountedData(seed=9), **settings)
    first.callbacks.append(Stop())
    result = first.run()
    assert not result.finished and result.step == 5
    second, rest = train(
        tmp_path / "parts", eval_data=CountedData(seed=9), model=None, resume=True, **{**settings, "threads": 1}
    )
    assert second.run().finished
    assert [report.loss for report in rest.steps] == [report.loss for report in log.steps[5:]]
    assert weights_of(tmp_path / "parts/last") == weights_of(tmp_path / "whole/last")
    assert (tmp_path / "parts/best").resolve().name == (tmp_path / "whole/best").resolve().name


def test_two_runs_of_one_seed_are_identical(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, seed=seed, steps=3)[0].run()
    assert weights_of(tmp_path / "a/last") == weights_of(tmp_path / "b/last")
    assert weights_of(tmp_path / "a/last") != weights_of(tmp_path / "c/last")


def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at random moments, 20 times; what comes out is what an undisturbed run gives."""
    steps = 600  # more than the fastest machine makes in the second that all kills leave it
    train(tmp_path / "whole", steps=steps, save_every=1, accumulation=1)[0].run()
    out, script = tmp_path / "killed", HERE / "train_endlessly.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    rng, kills, finished = random.Random(0), 0, False
    while not finished:
        process = subprocess.Popen(
            [sys.executable, str(script), str(out), str(steps)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("step"), "the run could not go on"
        if kills < 20:
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            finished = process.stdout.read().endswith("done\n")
            assert finished
        process.stdout.close()
        process.wait()
    assert weights_of(out / "last") == weights_of(tmp_path / "whole/last")
    assert not list(out.glob(".*.partial"))


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    trainer, log = train(
        tmp_path / "run", steps=8, save_every=1, keep=2, eval_every=2, eval_batches=1, eval_data=CountedData(seed=3)
    )
    losses = iter([3.0, 1.0, 2.0, 2.5])
    trainer._step.evaluate = lambda: next(losses) * int((trainer._step.head_loss.labels != IGNORED).sum())  # type: ignore
    result = trainer.run()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best", "last", "step-00000004", "step-00000007", "step-00000008"]
    assert (tmp_path / "run/best").resolve().name == "step-00000004"
    assert result.best_loss == 1.0
    assert [event for event in log.events if event.startswith("evaluated")] == [
        "evaluated 2 best",
        "evaluated 4 best",
        "evaluated 6",
        "evaluated 8",
    ]


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    others = ["step-0-data", "step-00000000", "step-1", ".mine.partial"]
    for name in others:
        (out / name).mkdir(parents=True)
        (out / name / "precious").write_text("x")
    left = out / ".step-00000001.0123abcd.partial"  # by a run that was killed
    left.mkdir()
    train(out, steps=4, save_every=1, keep=1)[0].run()
    assert sorted(path.name for path in out.iterdir()) == sorted([*others, "last", "step-00000004"])
    assert all((out / name / "precious").is_file() for name in others)
    (tmp_path / "taken" / "step-00000001").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        train(tmp_path / "taken", steps=1, warmup_steps=0)[0].run()


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    out = tmp_path / "run"
    trainer, _ = train(out, save_every=1, keep=1)
    trainer.step()
    trainer.save()
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.save()
    assert [path.name for path in out.glob("step-*")] == ["step-00000002"]
    train(out, save_every=1, keep=1, resume=True)[0].run()
    assert sorted(path.name for path in out.iterdir()) == ["last", "step-00000006"]


def test_the_best_is_marked_before_a_resumed_run_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = train(tmp_path / "run", eval_data=CountedData(seed=3), eval_batches=1)
    order: list[str] = []
    monkeypatch.setattr(trainer._checkpoints, "_link", lambda name, folder: order.append(name))
    trainer.step()
    trainer._evaluate_and_keep()
    assert order == ["best", "last"]


def test_a_stop_at_the_end_of_a_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, log = train(tmp_path / "run", steps=9, save_every=2)

    def due(step: int, every: int) -> bool:
        if step == 3 and every == 2:
            trainer.stop()  # a signal that comes when the loop has looked already
        return every > 0 and step % every == 0

    monkeypatch.setattr(trainer_module, "_due", due)
    result = trainer.run()
    assert not result.finished and result.folder.name == "step-00000003"
    assert log.events == ["saved 2", "saved 3"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = train(tmp_path / "run", save_every=2)
    trainer.step()
    trainer.step()
    good = weights_of(trainer.save())
    trainer.step()
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="the last one is intact"):
            trainer.save()
    with monkeypatch.context() as patch:  # it fills up on the way
        from pyllm.safetensors_writer import SafetensorsWriter

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.save()
    assert weights_of(tmp_path / "run/last") == good
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last", "step-00000002"]
    trainer.save()
    assert (tmp_path / "run/last").resolve().name == "step-00000003"


def test_a_run_does_not_go_on_as_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        train(out, resume=True)
    train(out, steps=2)[0].run()
    with pytest.raises(FileExistsError, match="resume"):
        train(out, steps=2)
    with pytest.raises(CheckpointError) as error:
        train(out, steps=3, learning_rate=1.0, resume=True)
    assert "steps: the run has 2, now it is 3" in str(error.value)
    assert "learning_rate: the run has 0.003, now it is 1.0" in str(error.value)
    with pytest.raises(CheckpointError, match="model: hidden_size: the run has 32, now it is 64"):
        train(out, steps=2, model={**TINY, "hidden_size": 64}, resume=True)
    with pytest.raises(CheckpointError, match="data: the run has seed 0"):
        train(out, CountedData(seed=1), steps=2, resume=True)
    train(tmp_path / "fit", RepeatedData(CountedData(), 1), steps=2)[0].run()
    with pytest.raises(RequestError, match="the run repeats 1 micro-batches, now it is 2"):
        train(tmp_path / "fit", RepeatedData(CountedData(), 2), steps=2, resume=True)
    (out / "last/training_state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="training state of format"):
        train(out, steps=2, resume=True)


# What stops a run


def test_values_that_are_no_numbers_stop_it(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path / "run")
    trainer.step()
    trainer.parameters.set("blocks.1.mlp.down.weight", np.full((32, 44), np.nan, np.float32))
    with pytest.raises(NonFiniteError, match=r"step 2: .*blocks\.1\.mlp\.down\.weight"):
        trainer.step()
    trainer.parameters.set("blocks.1.mlp.down.weight", np.full((32, 44), 1, np.float32))
    trainer.parameters.set("blocks.1.mlp.gate.weight", np.full((44, 32), 3e38, np.float32))
    trainer.parameters.set("blocks.1.mlp.up.weight", np.full((44, 32), 3e38, np.float32))
    with pytest.raises(NonFiniteError, match=r"step 2: .*layer 1"):
        trainer.step()
    assert trainer.steps_done == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, y, s: (np.where(t == t[0], 61, t).astype(np.int32), y, s), "token 61 lies outside"),
        (lambda t, y, s: (t, np.where(y == y[5], -5, y).astype(np.int32), s), "label -5 lies outside"),
        (lambda t, y, s: (t.astype(np.int64), y, s), "tokens: expected int32"),
        (lambda t, y, s: (t, y[:-1], s), "labels: expected int32"),
        (
            lambda t, y, s: (t, y, np.array([0, 90, 90, 90, 90, 96], np.int32)),
            "64 positions, got one of 90",
        ),
        (lambda t, y, s: (t, y, np.array([0, 50, 20, 60, 90, 96], np.int32)), "starts: expected to rise"),
        (lambda t, y, s: (t, np.full_like(y, IGNORED), s), r"no token .* counts"),
    ],
)
def test_a_batch_that_cannot_be_run_is_told(change: Any, message: str, tmp_path: Path) -> None:
    class Bad(CountedData):
        def next_batch(self) -> Any:
            batch = super().next_batch()
            return batch if self.position == 1 else change(*batch)

    data = Bad()
    trainer, _ = train(tmp_path / "run", data, accumulation=1)
    data.position = 1
    with pytest.raises(RequestError, match=message):
        trainer.step()


def test_a_batch_that_does_not_fit_memory_is_told_before_it_is_laid_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyllm.train import memory

    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(InsufficientMemoryError, match="accumulate more"):
        train(tmp_path / "run")


def test_evaluation_data_has_the_same_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_data"):
        train(tmp_path / "run", eval_data=CountedData(tokens=90))
    trainer, _ = train(tmp_path / "run")
    with pytest.raises(RequestError, match="no evaluation data"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="model: expected"):
        train(tmp_path / "run", model=None)


def test_evaluation_is_the_loss_and_leaves_training_as_it_was(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path / "run", eval_data=CountedData(seed=4), eval_batches=3, label_smoothing=0.2)
    plain, _ = train(tmp_path / "other", label_smoothing=0.2)
    trainer.step()
    plain.step()
    report = trainer.evaluate()
    batches = [make_batch(61, 96, 5, [4, i]) for i in range(3)]
    counts = [int((batch[1] != IGNORED).sum()) for batch in batches]
    losses = [oracle_loss(trainer.spec, values(trainer.parameters), batch) for batch in batches]
    assert report.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.tokens == sum(counts) and report.best
    assert not trainer.evaluate().best
    assert trainer.step().loss == plain.step().loss


def test_samples_are_what_the_engine_gives(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "model")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    trainer, log = train(
        tmp_path / "run", CountedData(vocab=vocab), model=folder, steps=4, sample_every=2,
        sample_prompts=("Once upon", ""), sample_tokens=12, sample_temperature=0.0,
    )  # fmt: skip
    result = trainer.run()
    assert [event for event in log.events if event.startswith("sampled")] == [
        "sampled 2 'Once upon'",
        "sampled 2 ''",
        "sampled 4 'Once upon'",
        "sampled 4 ''",
    ]
    text = trainer.sample()[0].text
    [output] = LLM(result.folder, threads=2).generate("Once upon", temperature=0, max_tokens=12)
    assert text == output.outputs[0].text
    without, _ = train(tmp_path / "other")
    with pytest.raises(RequestError, match="tokenizer"):
        without.sample()
    with pytest.raises(RequestError, match="samples need a tokenizer"):  # before any step
        train(tmp_path / "third", sample_every=500)


def test_a_run_is_described_by_its_reports(tmp_path: Path) -> None:
    trainer, log = train(tmp_path / "run", steps=3, clip=0.0)
    trainer.run()
    assert [report.step for report in log.steps] == [1, 2, 3]
    for report in log.steps:
        assert report.tokens == 192
        assert 0 < report.counted_tokens < 192
        assert report.gradient_norm > 0 and report.tokens_per_second > 0
    assert log.events == ["saved 3"]
    assert replace(trainer.config, threads=1).fixed() == trainer.config.fixed()
    assert trainer_module.__doc__
