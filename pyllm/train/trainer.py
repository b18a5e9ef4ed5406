"""The loop of a training run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pyllm.errors import CheckpointError, ConfigError, NonFiniteError, RequestError, listed
from pyllm.folder import read_config
from pyllm.generation_config import GenerationConfig
from pyllm.isa import default_threads
from pyllm.ops_training import TrainingOps
from pyllm.prefix import PrefixSpec
from pyllm.spec import HeadKind, ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.train.begin import load_body, load_weights, spec_to_train
from pyllm.train.checkpoint import Checkpoints, RunState
from pyllm.train.checks import GradientCheck, check_gradients
from pyllm.train.head_loss import Loss, count_labels
from pyllm.train.initialise import initialise
from pyllm.train.memory import StepShape, plan_training
from pyllm.train.parameters import Parameters
from pyllm.train.report import Callbacks, Data, EvalReport, Sample, StepReport, TrainResult
from pyllm.train.samples import Sampler
from pyllm.train.settings import WITH_PREFIX, TrainConfig, learning_rate
from pyllm.train.step import AdamW, Step
from pyllm.weights import resolve


class Trainer:
    """A training run: model, data and settings in, checkpoints out.

    Args:
        model: a folder or hub name, whose weights are trained on, or the content of a config.json, for a new model. It
            may be None when a run is resumed.
        data: micro-batches to train on; see :class:`Data`.
        config: settings.
        eval_data: held-out micro-batches of the same shape. Each evaluation begins where it stands now.
        tokenizer: folder with the tokenizer's files, which checkpoints get a copy of; default `model`, if a folder.
        callbacks: are told what happens.
        body: with a new model, a folder whose weights it begins with where they are no part of the head.
        resume: go on from the last checkpoint in ``config.out``; model, data and settings must be those of the run.

    Raises:
        pyllm.errors.PyllmError: something does not fit: the message says what.
        FileExistsError: there is a run in ``config.out`` already, and `resume` is not set.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mapping[str, Any] | None,
        data: Data,
        config: TrainConfig,
        *,
        eval_data: Data | None = None,
        tokenizer: Path | None = None,
        callbacks: Sequence[Callbacks] = (),
        resume: bool = False,
        body: Path | None = None,
    ) -> None:
        self.config, self.data, self.eval_data = config, data, eval_data
        self.callbacks = list(callbacks)
        self._checkpoints = Checkpoints(config.out, config.keep)
        if not resume and self._checkpoints.exist():
            raise FileExistsError(17, "holds a run already: resume it, or choose another folder", str(config.out))
        state = self._checkpoints.read_state() if resume else None
        folder = None if model is None or isinstance(model, Mapping) else resolve(model)
        self._model_config = _model_config(model, folder, state)
        self._tokenizer_folder = tokenizer or folder or (config.out / "last" if resume else None)
        if state is not None:
            _check_resumed(state, config, self._model_config)
            data.load_state(state.data)
        self._begun = config.out / "last" if state is not None else folder  # the model that training goes on from
        self.spec: ModelSpec = spec_to_train(self._model_config, self._begun)
        if config.objective == "prefix" and self.spec.encoder is not None:
            raise ConfigError(
                f"objective: expected none of a prefix for this {self.spec.family} model, whose encoder sees all of a "
                "source: train on sources and targets"
            )
        if config.objective in WITH_PREFIX and self.spec.encoder is None and self.spec.prefix is None:
            self.spec = replace(self.spec, prefix=PrefixSpec())
        self._eval_start = eval_data.state() if eval_data is not None else None
        self.shape = shape_of(data, eval_data, config)
        if self.spec.head.kind is HeadKind.NONE:
            raise ConfigError("model: expected one with a head to train, config.json names a class without one")
        if self.spec.is_encoder and config.sample_every > 0:
            raise ConfigError("sample_every: expected 0 for an encoder, which continues no text")
        self.plan = plan_training(self.spec, self.shape)
        self.plan.check()
        self.ops = TrainingOps(config.threads if config.threads is not None else default_threads())
        self.parameters = Parameters(self.spec, self.ops, config.dtype)
        self.steps_done = 0
        self._best: float | None = None
        self._last_loss: float | None = None
        self._saved: int | None = None  # step of the last checkpoint
        self._left_over = False  # gradients of a step that failed
        if state is not None:
            self._checkpoints.load(self.parameters)
            self.steps_done, self._best, self._last_loss = state.step, state.best_loss, state.last_loss
            self._saved = state.step
        elif folder is not None:
            load_weights(self.parameters, folder)
        else:
            initialise(self.parameters, self._model_config, config.seed)
            if body is not None:
                load_body(self.parameters, body)
        self._step = Step(
            self.parameters,
            self.ops,
            self.shape,
            loss=Loss(config.label_smoothing, config.z_loss),
            optimizer=AdamW(config.beta1, config.beta2, config.eps, config.weight_decay),
            dropout=config.dropout,
        )
        self._sampler = self._new_sampler() if config.sample_every > 0 else None
        self._stopping = False

    # The run

    def run(self) -> TrainResult:
        """Train up to ``config.steps``, or until :meth:`stop`; then evaluate, save, and say where the run stands."""
        config = self.config
        self._tell("started", self.steps_done, config.steps, self.spec.num_parameters())
        while self.steps_done < config.steps and not self._stopping:
            self._tell("stepped", self.step())
            done = self.steps_done
            last = done == config.steps
            if self.eval_data is not None and (last or _due(done, config.eval_every)):
                self._evaluate_and_keep()
            if _due(done, config.sample_every):
                self.sample()
            if last or self._stopping or _due(done, config.save_every):
                self.save()
        self.save()  # where `stop` came between the last look at it and the end of the loop
        folder = (config.out / "last").resolve()
        return TrainResult(self.steps_done, self.steps_done >= config.steps, self._last_loss, self._best, folder)

    def stop(self) -> None:
        """Ask `run` to save and return after the step that is being made."""
        self._stopping = True

    def step(self) -> StepReport:
        """Make one step.

        Raises `NonFiniteError`, and leaves the weights as they are, when loss or gradient are no numbers.
        """
        began = time.perf_counter()
        config, number = self.config, self.steps_done + 1
        batches = [self.data.next_batch() for _ in range(config.accumulation)]
        counted = sum(count_labels(labels) for _, labels, *_ in batches)
        if counted == 0:
            raise RequestError(f"step {number}: no token or label of its {len(batches)} micro-batches counts")
        if self._left_over:
            self.parameters.zero_gradients()
        self._left_over = True
        total = 0.0
        for i, batch in enumerate(batches):
            self._step.fill(*batch)
            drawn = (config.seed << 32) + self.steps_done * config.accumulation + i
            loss = self._step.accumulate(counted, drawn & ((1 << 64) - 1))
            if not math.isfinite(loss):
                raise NonFiniteError(f"step {number}: the loss is {loss}: {self._step.first_bad()}")
            total += loss
        norm = self._step.gradient_norm()
        if not math.isfinite(norm):
            where = self.parameters.first_bad(self.parameters.gradients)
            raise NonFiniteError(f"step {number}: the gradient's norm is {norm}, from {where or 'its size'} on. Lower "
                                 "the learning rate, or train in float32")  # fmt: skip
        rate = learning_rate(config, self.steps_done)
        scale = min(1.0, config.clip / (norm + 1e-6)) if config.clip > 0 else 1.0
        self._step.update(number, rate, scale)
        self._left_over = False
        self.steps_done, self._last_loss = number, total / counted
        tokens = len(batches) * self.shape.all_tokens
        return StepReport(number, self._last_loss, rate, norm, tokens, counted, time.perf_counter() - began)

    def evaluate(self) -> EvalReport:
        """Loss on ``config.eval_batches`` micro-batches of the evaluation data, from where it stood at first."""
        began = time.perf_counter()
        if self.eval_data is None or self._eval_start is None:
            raise RequestError("no evaluation data: give eval_data")
        self.eval_data.load_state(self._eval_start)
        total, counted, right = 0.0, 0, list[int | None]()
        for _ in range(self.config.eval_batches):
            batch = self.eval_data.next_batch()
            self._step.fill(*batch)
            total += self._step.evaluate()
            counted += count_labels(batch[1])
            right.append(self._step.right())
        if counted == 0:
            raise RequestError("no token of the evaluation data counts")
        loss = total / counted
        best = math.isfinite(loss) and (self._best is None or loss < self._best)
        if best:
            self._best = loss
        perplexity = math.exp(min(loss, 700.0))
        accuracy = None if None in right else sum(filter(None, right)) / counted
        return EvalReport(self.steps_done, loss, perplexity, counted, best, time.perf_counter() - began, accuracy)

    def sample(self) -> list[Sample]:
        """Continue ``config.sample_prompts`` with the weights as they are."""
        if self._sampler is None:
            self._sampler = self._new_sampler()
        config = self.config
        samples = [
            Sample(self.steps_done, prompt, text)
            for prompt, text in zip(
                config.sample_prompts,
                self._sampler.complete(
                    config.sample_prompts, config.sample_tokens, config.sample_temperature, config.seed
                ),
                strict=True,
            )
        ]
        for sample in samples:
            self._tell("sampled", sample)
        return samples

    def check_gradients(self) -> list[GradientCheck]:
        """Compare the gradient of every weight with the slope of the loss, on the next micro-batch, which stays next.

        Meant for a run that has not begun; see :func:`pyllm.train.checks.check_gradients`.
        """
        state = self.data.state()
        batch = self.data.next_batch()
        self.data.load_state(state)
        self._left_over = True
        return list(check_gradients(self.parameters, self._step, batch))

    def save(self, best: bool = False) -> Path:
        """Write a checkpoint of the run as it stands, unless there is one of this step; `best` makes it the best."""
        if self._saved == self.steps_done:
            folder = (self.config.out / "last").resolve()
            if best:
                self._checkpoints.mark_best(folder)
            return folder
        state = RunState(
            self.steps_done,
            self.config.fixed(),
            dict(self._model_config),
            self.data.state(),
            self._best,
            self._last_loss,
        )
        folder = self._checkpoints.save(self.parameters, state, self._tokenizer_folder, best)
        self._saved = self.steps_done
        self._tell("saved", self.steps_done, folder)
        return folder

    # Inside

    def _evaluate_and_keep(self) -> None:
        report = self.evaluate()
        self._tell("evaluated", report)
        if report.best:
            self.save(best=True)

    def _new_sampler(self) -> Sampler:
        if self._tokenizer_folder is None:
            raise RequestError("samples need a tokenizer: give its folder as tokenizer")
        own = None if self._begun is None else GenerationConfig.read(self._begun, self.spec.vocab_size)
        return Sampler(self._step.model, self.ops, Tokenizer.load(self._tokenizer_folder), own)

    def _tell(self, what: str, *values: object) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(*values)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _model_config(model: object, folder: Path | None, state: RunState | None) -> dict[str, Any]:
    """The config.json of the run's model."""
    if folder is not None:
        return read_config(folder)
    if isinstance(model, Mapping):
        return dict(model)
    if state is None:
        raise ConfigError("model: expected a folder or the content of a config.json; only a resumed run needs none")
    return state.model


def _check_resumed(state: RunState, config: TrainConfig, model: Mapping[str, Any]) -> None:
    settings = {**{f.name: f.default for f in fields(config)}, **state.settings}  # a run may be older than a setting
    problems = [
        f"{name}: the run has {settings.get(name)!r}, now it is {value!r}"
        for name, value in config.fixed().items()
        if settings.get(name) != value
    ]
    problems += [
        f"model: {name}: the run has {state.model.get(name)!r}, now it is {model.get(name)!r}"
        for name in {**state.model, **model}
        if state.model.get(name) != model.get(name)
    ]
    if problems:
        raise CheckpointError(
            listed(f"{config.out}: the run cannot go on with other settings (start another run instead)", problems)
        )


def shape_of(data: Data, eval_data: Data | None, config: TrainConfig) -> StepShape:
    """That of the micro-batches; the data stands where it stood."""
    shapes = []
    for source in (data, eval_data):
        if source is None:
            continue
        state = source.state()
        tokens, _, starts, *more = source.next_batch()
        source.load_state(state)
        read = len(more[0]) if len(more) == 2 else 0
        made = StepShape(
            len(tokens), len(starts) - 1, config.dtype, config.dropout > 0, config.checkpoint_activations, read
        )
        shapes.append(made)
    if len(set(shapes)) > 1:
        said = [f"{s.tokens} tokens, {s.sequences} sequences and {s.source} tokens of sources" for s in shapes]
        raise ConfigError(
            f"eval_data: expected micro-batches of at most {said[0]}, like the training data, got {said[1]}"
        )
    return shapes[0]
