"""From settings to what a trainer takes: tokens, micro-batches and a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.errors import ConfigError, DataError
from pyllm.folder import read_config, resolve
from pyllm.generation_config import GenerationConfig
from pyllm.models import family_of
from pyllm.ops import Ops
from pyllm.ops_training import IGNORED_LABEL
from pyllm.spec import HeadKind, ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.train.architectures import new_config
from pyllm.train.data import PackedData
from pyllm.train.memory import StepShape, TrainPlan, plan_training
from pyllm.train.objectives.blanks import BlankedTokens, reserved_ids
from pyllm.train.objectives.denoising import CorruptedSpans, InfilledText, check_sentinels
from pyllm.train.objectives.generator import Generator
from pyllm.train.objectives.masked import MaskedTokens, ReplacedTokens
from pyllm.train.objectives.prefix import SplitTokens
from pyllm.train.pairs import PairedData, pair_form
from pyllm.train.report import I32, Data
from pyllm.train.run_config import RunConfig, settings
from pyllm.train.token_store import TokenStore, open_tokens
from pyllm.train.tokenizer_training import SENTINEL
from pyllm.train.trainer import shape_of

DEFAULT_CONTEXT = 256
CONTEXTS = 8  # in a micro-batch, unless told
OF_ENCODER_DECODERS = ("seq2seq", "spans", "denoise")
WITH_MASK = ("mlm", "rtd", "denoise")  # these hide tokens behind the tokenizer's mask
READ_BY = {  # settings that only these objectives read
    "generator": ("rtd",),
    "mask_share": ("mlm", "rtd", "spans", "denoise"),
    "mean_span": ("spans", "denoise"),
    "mask_rule": ("mlm", "rtd"),
}
MASK_SHARES = {"denoise": 0.3}  # of a text; else:
MASK_SHARE = 0.15
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
CLOSING = " \n\"')]}\u00bb\u2019\u201d\u300d\u300f\uff09\u3011\u300b"  # what may follow the end in the same token
WORD_BEGINS = ("\u0120", "\u2581")  # a space before the word, as byte-level and SentencePiece vocabularies write it


@dataclass(frozen=True)
class Setup:
    """What a trainer takes: the folder of a model or the content of a config.json, and data."""

    model: Path | dict[str, Any]
    tokenizer: Path | None
    packed: PackedData | PairedData  # what `train` is made of
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
    config: RunConfig,
    seed: int,
    progress: Callable[[float], None] | None = None,
    objective: str = "causal",
    threads: int | None = None,
) -> Setup:
    """Tokenise what is not tokenised yet, and set up micro-batches; raises `PyllmError` for what does not fit.

    `threads` are those of a generator (default: the physical cores).
    """
    model, tokenizer, context = model_and_tokenizer(config)
    aim = _Aim(config, model, tokenizer, context, objective, seed)
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
        whole = objective == "seq2seq"
        training, held = map(list, zip(*(store.split(config.valid_share, whole) for store in training), strict=True))
    _check_ids(model, stores)
    aim.check_texts(stores)
    if objective == "seq2seq":
        pairs = PairedData(training, aim.form, context=context, tokens=tokens, weights=config.weights, seed=seed)
        others = PairedData(held, aim.form, context=context, tokens=tokens, seed=seed, like=pairs) if held else None
        return Setup(model, tokenizer, pairs, pairs, others, tuple(pairs.notes))

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
    if objective == "rtd":
        aim.load_generator(train, threads)
    return Setup(
        model, tokenizer, train, aim.data(train), None if valid is None else aim.data(valid), tuple(train.notes)
    )


class _Aim:
    """What a run's objective makes of micro-batches of texts; raises `ConfigError` for one that does not fit the model.

    `text_context` is the longest text, which becomes a sequence of the run's context.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Path | dict[str, Any],
        tokenizer: Path | None,
        context: int,
        objective: str,
        seed: int,
    ) -> None:
        values = model if isinstance(model, dict) else read_config(model)
        self._config, self._objective, self._seed = config, objective, seed
        self._spec = family_of(values).read(values)
        _check_objective(self._spec, objective, config)
        self._tokenizer = loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
        if objective == "rtd" and config.generator is None:
            raise ConfigError("generator: expected the folder of a model that fills masks, as rtd needs one, got none")
        if objective in WITH_MASK and (loaded is None or loaded.mask_token_id is None):
            raise ConfigError(
                f"objective: {objective} needs a tokenizer with a mask token (mask_token in tokenizer_config.json)"
            )
        self._sentinels = _sentinels(loaded) if objective == "spans" and loaded is not None else []
        self._context, around = context, 0
        self._generator: Generator | None = None
        if objective in OF_ENCODER_DECODERS:
            own = GenerationConfig.read(model, self._spec.vocab_size) if isinstance(model, Path) else None
            self.form = pair_form(self._spec, self._tokenizer, own)
            around = max(self.form.around_source, self.form.around_target) if objective != "seq2seq" else 0
        if objective == "spans":
            check_sentinels(self._sentinels)
        self.text_context = context - around
        if self.text_context < 1 + bool(around):
            raise ConfigError(f"context: expected at least {around + 2} tokens for {objective}, got {context}")

    def text_tokens(self, tokens: int) -> int:
        """Tokens of texts that become a micro-batch of `tokens`."""
        return tokens - tokens // self._context * (self._context - self.text_context)

    def check_texts(self, stores: Sequence[TokenStore]) -> None:
        """Raise `DataError` for a text that holds what the objective puts in place of what it hides."""
        reserved, step = self._reserved, 1 << 20
        for store in stores if reserved else ():
            for first in range(0, len(store.tokens), step):
                held = np.isin(store.tokens[first : first + step], reserved)
                if not held.any():
                    continue
                place = first + int(held.argmax())
                token, document = int(store.tokens[place]), int(np.searchsorted(store.ends, place, "right")) + 1
                spelt = None if self._tokenizer is None else self._tokenizer.token_of(token)
                raise DataError(
                    f"{store.name}: document {document} of {len(store.ends)} holds {spelt or 'a token'} (id {token}), "
                    f"which objective {self._objective} puts into texts itself: take it out of the document"
                )

    def load_generator(self, texts: PackedData, threads: int | None) -> None:
        """Have the model whose tokens are detected, for micro-batches like these."""
        assert self._config.generator is not None
        self._generator = Generator(
            resolve(self._config.generator),
            self._spec,
            Ops(threads),
            tokens=texts.tokens,
            sequences=texts.sequences,
            context=self._context,
        )

    def data(self, texts: Data) -> Data:
        """Micro-batches of the objective, made of those of texts."""
        config, spec, seed, objective = self._config, self._spec, self._seed, self._objective
        if objective == "mlm":
            return self._masked(texts)
        if objective == "rtd":
            assert self._generator is not None
            return ReplacedTokens(self._masked(texts), self._generator.propose, seed, self._generator.key)
        if objective == "blanks":
            end = next(iter(spec.eos_token_ids), None)
            return BlankedTokens(
                texts, spec.prefix, end, context=self._context, positions=spec.max_positions, seed=seed
            )
        if objective in ("spans", "denoise"):
            options = {"context": self.text_context, "share": self._share, "mean_span": config.mean_span, "seed": seed}
            if objective == "spans":
                return CorruptedSpans(texts, self.form, self._sentinels, **options)
            return self._infilled(texts, options)
        return SplitTokens(texts, seed) if objective == "prefix" else texts

    @property
    def _reserved(self) -> list[int]:
        """Tokens that no text may hold."""
        if self._objective == "blanks":
            return reserved_ids(self._spec.prefix) if self._spec.prefix is not None else []
        if self._objective == "denoise":
            return [self._mask]
        return self._sentinels

    @property
    def _mask(self) -> int:
        assert self._tokenizer is not None and self._tokenizer.mask_token_id is not None
        return self._tokenizer.mask_token_id

    @property
    def _share(self) -> float:
        share = self._config.mask_share
        return MASK_SHARES.get(self._objective, MASK_SHARE) if share is None else share

    def _masked(self, texts: Data) -> MaskedTokens:
        loaded = self._tokenizer
        assert loaded is not None
        return MaskedTokens(
            texts,
            mask=self._mask,
            special=loaded.special_ids,
            vocab_size=loaded.vocab_size,
            share=self._share,
            rule=self._config.mask_rule,
            seed=self._seed,
        )

    def _infilled(self, texts: Data, options: Mapping[str, Any]) -> InfilledText:
        loaded = self._tokenizer
        assert loaded is not None
        ordinary = [i for i in range(loaded.vocab_size) if i not in loaded.special_ids]
        ends = [i for i in ordinary if loaded.decode([i]).rstrip(CLOSING).endswith(SENTENCE_ENDS)]
        begins = [i for i in ordinary if (loaded.token_of(i) or "").startswith(WORD_BEGINS)]
        return InfilledText(texts, self.form, self._mask, ends, begins, **options)


def _sentinels(tokenizer: Tokenizer) -> list[int]:
    found: list[int] = []
    while (sentinel := tokenizer.id_of(SENTINEL.format(len(found)))) is not None:
        found.append(sentinel)
    return found


def _check_objective(spec: ModelSpec, objective: str, config: RunConfig) -> None:
    """Raise `ConfigError` where the model does not predict what the objective makes labels of. A model that fills
    blanks predicts no token before its start token: of prompts and answers only answers count, with `mask_prompt`."""
    detects = spec.head.kind is HeadKind.EACH
    if spec.head.kind is not HeadKind.TOKENS and not detects:
        raise ConfigError(
            "model: expected one that predicts tokens or detects replaced ones, config.json names a class with another "
            "head or none: train others from Python, with data that has their labels"
        )
    fitting = ("mlm",) if spec.is_encoder else ("causal", "prefix", "blanks")
    if detects:
        fitting = ("rtd",)
    elif spec.encoder is not None:
        fitting = OF_ENCODER_DECODERS
    if objective not in fitting:
        expected = " or ".join((", ".join(fitting[:-1]), fitting[-1])) if len(fitting) > 1 else fitting[0]
        raise ConfigError(f"objective: expected {expected} for this {spec.family} model, got {objective!r}")
    for name, readers in READ_BY.items():
        if getattr(config, name) != getattr(RunConfig, name) and objective not in readers:
            raise ConfigError(f"{name}: expected none for {objective}, which has no use for it: leave it out")
    if spec.encoder is not None and config.mask_prompt:
        raise ConfigError(
            "mask_prompt: expected no for a model with an encoder, whose targets alone count: leave it out"
        )
    if objective == "seq2seq" and config.packing != "documents":
        raise ConfigError(f"packing: expected documents for seq2seq, where each is a pair, got {config.packing!r}")
    if spec.fills_blanks and objective != "blanks" and not (objective == "causal" and config.mask_prompt):
        raise ConfigError(
            f"objective: expected blanks for this {spec.family} model, got {objective!r}: it predicts what fills a "
            "blank, not every token. Train with objective=blanks, or causal with mask_prompt on prompts that end in "
            "its start token"
        )


class _Contexts:
    """Micro-batches of so many tokens in so many sequences, in place of data that a plan does not have."""

    def __init__(self, tokens: int, sequences: int) -> None:
        self._tokens, self._sequences = tokens, sequences

    def next_batch(self) -> tuple[I32, I32, I32]:
        """Padding."""
        starts = np.linspace(0, self._tokens, self._sequences + 1).astype(np.int32)
        return np.zeros(self._tokens, np.int32), np.full(self._tokens, IGNORED_LABEL, np.int32), starts

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing."""


def plan_of_run(values: Mapping[str, Any], progress: Callable[[float], None] | None = None) -> TrainPlan:
    """The memory of a run with these settings; without data, for documents of about the context's length, and for
    sources as long as their targets."""
    needed = {"steps": 1, "out": ".", "data": ("none.bin",)}
    config, theirs = settings({**needed, **values})
    model, tokenizer, context = model_and_tokenizer(config)
    config_json = model if isinstance(model, dict) else read_config(model)
    spec = family_of(config_json).read(config_json)
    tokens = _batch_tokens(config, context)
    if "data" in values:
        shape = shape_of(prepare(config, theirs.seed, progress, theirs.objective).train, None, theirs)
    else:
        sequences = -(-tokens // context) * (1 if config.packing == "plain" else 3) + 8 * (config.packing != "plain")
        shape = StepShape(tokens, sequences, theirs.dtype, theirs.dropout > 0, theirs.checkpoint_activations)
        if theirs.objective in ("blanks", "spans", "denoise"):
            aim = _Aim(config, model, tokenizer, context, theirs.objective, theirs.seed)
            shape = shape_of(aim.data(_Contexts(aim.text_tokens(tokens), sequences)), None, theirs)
        elif spec.encoder is not None:
            shape = replace(shape, tokens=tokens - tokens // 2, source=tokens // 2)
    return plan_training(spec, shape)


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
