"""From settings to what a trainer takes: tokens, micro-batches and a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.errors import ConfigError
from pyllm.folder import read_config, resolve
from pyllm.models import family_of
from pyllm.spec import ModelSpec, Problem
from pyllm.tokenizer import Tokenizer
from pyllm.train.aim import OF_TEXTS, Aim, check_objective
from pyllm.train.architectures import new_config
from pyllm.train.begin import classifier_config, config_and_weights, spec_to_train
from pyllm.train.data import PackedData
from pyllm.train.labelled import LabelledTexts, LabelSet, encode_examples, read_examples
from pyllm.train.labelled_data import HeldOutTexts, LabelledData
from pyllm.train.memory import StepShape, TrainPlan, plan_training
from pyllm.train.pairs import PairedData
from pyllm.train.report import I32, Data
from pyllm.train.run_config import RunConfig, settings
from pyllm.train.token_store import TokenStore, open_tokens
from pyllm.train.trainer import shape_of

DEFAULT_CONTEXT = 256
CONTEXTS = 8  # in a micro-batch, unless told


@dataclass(frozen=True)
class Setup:
    """What a trainer takes: the folder of a model or the content of a config.json, and data.

    A new model may begin with the weights in `body`. `eval_batches` are those that hold all of `valid`, where it ends.
    `beside` are the bytes of another model that the data needs.
    """

    model: Path | dict[str, Any]
    spec: ModelSpec
    tokenizer: Path | None
    packed: PackedData | PairedData | LabelledData  # what `train` is made of
    train: Data
    valid: Data | None
    notes: tuple[str, ...]
    beside: int = 0
    body: Path | None = None
    eval_batches: int | None = None


def model_and_tokenizer(config: RunConfig) -> tuple[Path | dict[str, Any], Path | None, int]:
    """The model's folder or config.json, the tokenizer's folder, and the context."""
    folder = resolve(config.model) if config.model is not None else None
    tokenizer = Path(config.tokenizer) if config.tokenizer is not None else folder
    if tokenizer is not None and not tokenizer.is_dir():
        raise ConfigError(f"tokenizer: expected a folder with tokenizer.json, found no folder {tokenizer}")
    if folder is not None:
        limit = family_of(values := read_config(folder)).read(values).max_positions
        context = config.context if config.context is not None else min(DEFAULT_CONTEXT, limit)
        if context < 1:
            raise ConfigError(f"context: expected at least 1, got {context}")
        if context > limit:
            raise ConfigError(f"context: expected at most the model's {limit} positions, got {context}")
        return folder, tokenizer, context
    loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
    size = config.vocab_size
    if size is None and loaded is not None:
        size = loaded.vocab_size
    if size is None:
        raise ConfigError("tokenizer: a new model needs the folder of a tokenizer, or vocab_size and data of tokens")
    if loaded is not None and size < loaded.vocab_size:
        raise ConfigError(f"vocab_size: expected at least the tokenizer's {loaded.vocab_size}, got {size}")
    context = config.context if config.context is not None else DEFAULT_CONTEXT
    assert config.arch is not None
    values = new_config(
        config.arch,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        ffn=config.ffn,
        tie=config.tie,
        context=context,
        vocab_size=size,
        init_std=config.init_std,
        tokenizer=loaded,
    )
    return values, tokenizer, context


def prepare(
    config: RunConfig,
    seed: int,
    progress: Callable[[float], None] | None = None,
    objective: str = "causal",
    threads: int | None = None,
    planning: bool = False,
) -> Setup:
    """Tokenise what is not tokenised yet, and set up micro-batches; raises `PyllmError` for what does not fit.

    `threads` are those of a generator (default: the physical cores). For `planning` none is loaded: micro-batches have
    their shape only.
    """
    model, tokenizer, context = model_and_tokenizer(config)
    tokens = _batch_tokens(config, context)
    if not 0 <= config.valid_share < 1:
        raise ConfigError(f"valid_share: expected 0 <= value < 1, got {config.valid_share}")
    if objective == "classify":
        return _prepare_labels(config, model, tokenizer, context, tokens, seed, progress)
    aim = Aim(config, model, tokenizer, context, objective, seed)
    files = [*config.data, *config.valid]
    cache = Path(config.data_cache) if config.data_cache is not None else None

    def opened(index: int) -> TokenStore:
        def share(done: float) -> None:
            if progress is not None:
                progress((index + done) / len(files))

        return open_tokens(Path(files[index]), tokenizer, cache, share)

    stores = [opened(i) for i in range(len(files))]
    training, held = stores[: len(config.data)], stores[len(config.data) :]
    if not held and config.valid_share > 0:
        whole = objective == "seq2seq"
        training, held = map(list, zip(*(store.split(config.valid_share, whole) for store in training), strict=True))
    _check_ids(model, stores)
    aim.check_texts(stores)
    if objective == "seq2seq":
        pairs = PairedData(training, aim.form, context=context, tokens=tokens, weights=config.weights, seed=seed)
        others = PairedData(held, aim.form, context=context, tokens=tokens, seed=seed, like=pairs) if held else None
        return Setup(model, aim.spec, tokenizer, pairs, pairs, others, tuple(pairs.notes))

    def packed(chosen: Sequence[TokenStore], weights: Sequence[float] | None, sequences: int | None) -> PackedData:
        return PackedData(
            chosen,
            context=aim.text_context,
            tokens=aim.text_tokens(tokens),
            weights=weights,
            packing=config.packing,
            mask_prompt=config.mask_prompt,
            seed=seed,
            sequences=sequences,
            next_token=objective in ("causal", "prefix", "blanks"),
        )

    train = packed(training, config.weights, None)
    valid = packed(held, None, train.sequences) if held else None
    beside = aim.generator_bytes(train.tokens, train.sequences)
    if beside and planning:
        return Setup(model, aim.spec, tokenizer, train, train, valid, tuple(train.notes), beside)
    aim.load_generator(train.tokens, train.sequences, threads)
    made = aim.data(train)
    held_out = None if valid is None else aim.data(valid, made)
    return Setup(model, aim.spec, tokenizer, train, made, held_out, tuple(train.notes), beside)


def _prepare_labels(
    config: RunConfig,
    model: Path | dict[str, Any],
    tokenizer: Path | None,
    context: int,
    tokens: int,
    seed: int,
    progress: Callable[[float], None] | None,
) -> Setup:
    """Labelled texts, for the head of the model, or a new one where it has another."""
    values, folder = config_and_weights(model)
    spec = spec_to_train(values, folder)
    check_objective(spec, "classify", config)
    assert tokenizer is not None  # that of an encoder's folder, at least
    paths = [Path(name) for name in (*config.data, *config.valid)]
    read = [read_examples(path) for path in paths]
    problem, notes = read[0][0], list[str]()
    if spec.head.kind.is_pooled:
        labels = LabelSet.of_head(spec.head)
    else:
        labels = LabelSet.of_examples(problem, [e for _, examples in read[: len(config.data)] for e in examples])
        model = classifier_config(values, labels)
        spec = family_of(model).read(model)
        notes.append(f"a new head for {problem.value}, labels: {', '.join(labels.names)}")
    for path, (given, _) in zip(paths, read, strict=True):
        labels.check(given, str(path))
    loaded = Tokenizer.load(tokenizer)

    def encoded(index: int) -> LabelledTexts:
        def share(done: float) -> None:
            if progress is not None:
                progress((index + done) / len(paths))

        typed = spec.embedding.types > 1
        path, examples = paths[index], read[index][1]
        return encode_examples(path, examples, labels, loaded, tokenizer, context=context, types=typed, progress=share)

    files = [encoded(index) for index in range(len(paths))]
    files, held = files[: len(config.data)], files[len(config.data) :]
    if not held and config.valid_share > 0:
        files, held = map(list, zip(*(texts.split(config.valid_share, seed) for texts in files), strict=True))
    typed = any(texts.types is not None for texts in files + held)
    train = LabelledData(files, labels, context=context, tokens=tokens, types=typed, weights=config.weights, seed=seed)
    valid = HeldOutTexts(held, train) if held else None
    return Setup(
        model,
        spec,
        tokenizer,
        train,
        train,
        valid,
        (*notes, *train.notes),
        body=folder if notes else None,
        eval_batches=None if valid is None else valid.batches,
    )


class _Contexts:
    """Micro-batches of so many tokens, all of them `token`, in texts of the context's length and places for so many, in
    place of data that a plan does not have."""

    def __init__(self, tokens: int, sequences: int, context: int, token: int) -> None:
        starts = [*(min(i * context, tokens) for i in range(sequences)), tokens]
        self._batch = np.full(tokens, token, np.int32), np.array(starts, np.int32)

    def next_batch(self) -> tuple[I32, I32, I32]:
        """Texts."""
        tokens, starts = self._batch
        return tokens, tokens, starts

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing."""


def plan_of_run(values: Mapping[str, Any], progress: Callable[[float], None] | None = None) -> TrainPlan:
    """The memory of a run with these settings; without data, for documents of about the context's length, sources as
    long as their targets, and two labels."""
    needed = {"steps": 1, "out": ".", "data": ("none.bin",)}
    config, theirs = settings({**needed, **values})
    if "data" in values:
        setup = prepare(config, theirs.seed, progress, theirs.objective, planning=True)
        return plan_training(setup.spec, shape_of(setup.train, None, theirs), setup.beside)
    model, tokenizer, context = model_and_tokenizer(config)
    tokens = _batch_tokens(config, context)
    sequences = -(-tokens // context) * (1 if config.packing == "plain" else 3) + 8 * (config.packing != "plain")
    shape = StepShape(tokens, sequences, theirs.dtype, theirs.dropout > 0, theirs.checkpoint_activations)
    spec, generator = spec_to_train(*config_and_weights(model)), 0
    if theirs.objective == "classify":
        check_objective(spec, "classify", config)
        if not spec.head.kind.is_pooled:
            head = classifier_config(config_and_weights(model)[0], LabelSet(Problem.SINGLE_LABEL, ("0", "1")))
            spec = family_of(head).read(head)
    elif "objective" in values:
        aim = Aim(config, model, tokenizer, context, theirs.objective, theirs.seed)
        generator = aim.generator_bytes(tokens, sequences)
    if theirs.objective in ("blanks", *OF_TEXTS):
        texts = _Contexts(aim.text_tokens(tokens), sequences, aim.text_context, aim.ordinary_token)
        shape = shape_of(aim.data(texts), None, theirs)
    elif spec.encoder is not None:
        shape = replace(shape, tokens=tokens - tokens // 2, source=tokens // 2)
    return plan_training(spec, shape, generator)


def _batch_tokens(config: RunConfig, context: int) -> int:
    """Tokens of a micro-batch."""
    if config.batch_tokens is None:
        return CONTEXTS * context
    if config.batch_tokens < context:
        raise ConfigError(f"batch_tokens: expected at least the context of {context}, got {config.batch_tokens}")
    return config.batch_tokens


def _check_ids(model: Path | dict[str, Any], stores: Sequence[TokenStore]) -> None:
    """Raise for tokens that the model has no embedding of."""
    values = model if isinstance(model, dict) else read_config(model)
    size = family_of(values).read(values).vocab_size
    for store in stores:
        step = 1 << 24
        largest = max(int(store.tokens[i : i + step].max()) for i in range(0, len(store.tokens), step))
        if largest >= size:
            raise ConfigError(
                f"{store.name}: holds token {largest}, and the model has {size}: was it made with another tokenizer?"
            )
