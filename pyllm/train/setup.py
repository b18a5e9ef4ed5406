"""From settings to what a trainer takes: tokens, micro-batches and a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError
from pyllm.folder import read_config, resolve
from pyllm.models import family_of
from pyllm.spec import HeadKind, ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.train.architectures import new_config
from pyllm.train.data import PackedData
from pyllm.train.memory import StepShape, TrainPlan, plan_training
from pyllm.train.objectives.blanks import BlankedTokens, blanked_shape
from pyllm.train.objectives.masked import MaskedTokens
from pyllm.train.objectives.prefix import SplitTokens
from pyllm.train.report import Data
from pyllm.train.run_config import RunConfig, settings
from pyllm.train.token_store import TokenStore, open_tokens

DEFAULT_CONTEXT = 256
CONTEXTS = 8  # in a micro-batch, unless told


@dataclass(frozen=True)
class Setup:
    """What a trainer takes: the folder of a model or the content of a config.json, and data."""

    model: Path | dict[str, Any]
    tokenizer: Path | None
    packed: PackedData  # what `train` is made of
    train: Data
    valid: Data | None
    notes: tuple[str, ...]


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
    config: RunConfig, seed: int, progress: Callable[[float], None] | None = None, objective: str = "causal"
) -> Setup:
    """Tokenise what is not tokenised yet, and set up micro-batches; raises `PyllmError` for what does not fit."""
    model, tokenizer, context = model_and_tokenizer(config)
    tokens = _batch_tokens(config, context)
    files = [*config.data, *config.valid]
    cache = Path(config.data_cache) if config.data_cache is not None else None

    def opened(index: int) -> TokenStore:
        def share(done: float) -> None:
            if progress is not None:
                progress((index + done) / len(files))

        return open_tokens(Path(files[index]), tokenizer, cache, share)

    stores = [opened(i) for i in range(len(files))]
    training, held = stores[: len(config.data)], stores[len(config.data) :]
    if not 0 <= config.valid_share < 1:
        raise ConfigError(f"valid_share: expected 0 <= value < 1, got {config.valid_share}")
    if not held and config.valid_share > 0:
        training, held = map(list, zip(*(store.split(config.valid_share) for store in training), strict=True))
    _check_ids(model, stores)

    def packed(chosen: Sequence[TokenStore], weights: Sequence[float] | None, sequences: int | None) -> PackedData:
        return PackedData(
            chosen,
            context=context,
            tokens=tokens,
            weights=weights,
            packing=config.packing,
            mask_prompt=config.mask_prompt,
            seed=seed,
            sequences=sequences,
            next_token=objective != "mlm",
        )

    values = model if isinstance(model, dict) else read_config(model)
    spec = family_of(values).read(values)
    _check_objective(spec, objective, config.mask_prompt)
    train = packed(training, config.weights, None)
    valid = packed(held, None, train.sequences) if held else None

    def aimed(data: PackedData) -> Data:
        if objective == "mlm":
            return _masked(data, config, tokenizer, seed)
        if objective == "blanks":
            end = next(iter(spec.eos_token_ids), None)
            return BlankedTokens(data, spec.prefix, end, context=context, positions=spec.max_positions, seed=seed)
        return SplitTokens(data, seed) if objective == "prefix" else data

    return Setup(model, tokenizer, train, aimed(train), None if valid is None else aimed(valid), tuple(train.notes))


def _check_objective(spec: ModelSpec, objective: str, mask_prompt: bool) -> None:
    """Raise `ConfigError` where the model does not predict what the objective makes labels of. A model that fills
    blanks predicts no token before its start token: of prompts and answers only answers count, with `mask_prompt`."""
    if spec.head.kind is not HeadKind.TOKENS:
        raise ConfigError(
            "model: expected one that predicts tokens, config.json names a class with another head or none: train "
            "others from Python, with data that has their labels"
        )
    if spec.is_encoder != (objective == "mlm"):
        expected = "mlm" if spec.is_encoder else "causal, prefix or blanks"
        raise ConfigError(f"objective: expected {expected} for this {spec.family} model, got {objective!r}")
    if spec.fills_blanks and objective != "blanks" and not (objective == "causal" and mask_prompt):
        raise ConfigError(
            f"objective: expected blanks for this {spec.family} model, got {objective!r}: it predicts what fills a "
            "blank, not every token. Train with objective=blanks, or causal with mask_prompt on prompts that end in "
            "its start token"
        )


def _masked(data: PackedData, config: RunConfig, tokenizer: Path | None, seed: int) -> MaskedTokens:
    loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
    if loaded is None or loaded.mask_token_id is None:
        raise ConfigError("objective: mlm needs a tokenizer with a mask token (mask_token in tokenizer_config.json)")
    return MaskedTokens(
        data,
        mask=loaded.mask_token_id,
        special=loaded.special_ids,
        vocab_size=loaded.vocab_size,
        share=config.mask_share,
        rule=config.mask_rule,
        seed=seed,
    )


def plan_of_run(values: Mapping[str, Any], progress: Callable[[float], None] | None = None) -> TrainPlan:
    """The memory of a run with these settings; without data, for documents of about the context's length."""
    needed = {"steps": 1, "out": ".", "data": ("none.bin",)}
    config, theirs = settings({**needed, **values})
    model, _, context = model_and_tokenizer(config)
    config_json = model if isinstance(model, dict) else read_config(model)
    tokens = _batch_tokens(config, context)
    if "data" in values:
        sequences = prepare(config, theirs.seed, progress, theirs.objective).packed.sequences
    else:
        sequences = -(-tokens // context) * (1 if config.packing == "plain" else 3) + 8 * (config.packing != "plain")
    if theirs.objective == "blanks":
        tokens, sequences = blanked_shape(tokens, sequences, context)
    shape = StepShape(tokens, sequences, theirs.dtype, theirs.dropout > 0, theirs.checkpoint_activations)
    return plan_training(family_of(config_json).read(config_json), shape)


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
