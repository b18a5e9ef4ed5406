"""What a run's objective makes of texts, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.errors import ConfigError, DataError
from pyllm.folder import resolve
from pyllm.generation_config import GenerationConfig
from pyllm.ops import Ops
from pyllm.spec import HeadKind, ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.train.begin import config_and_weights, spec_to_train
from pyllm.train.objectives.blanks import BlankedTokens, reserved_ids
from pyllm.train.objectives.denoising import CorruptedSpans, InfilledText, check_sentinels, spans_of
from pyllm.train.objectives.generator import Generator, generator_bytes
from pyllm.train.objectives.masked import MaskedTokens, ReplacedTokens
from pyllm.train.objectives.prefix import SplitTokens
from pyllm.train.objectives.ul2 import DENOISERS, MixedDenoisers
from pyllm.train.pairs import pair_form
from pyllm.train.report import Data
from pyllm.train.run_config import RunConfig
from pyllm.train.token_store import TokenStore
from pyllm.train.tokenizer_training import SENTINEL

OF_TEXTS = ("spans", "denoise", "ul2")  # these make pairs of texts
OF_ENCODER_DECODERS = ("seq2seq", *OF_TEXTS)
WITH_SENTINELS = ("spans", "ul2")  # also for decoders, which read both of a pair
WITH_MASK = ("mlm", "rtd", "denoise")  # these hide tokens behind the tokenizer's mask
READ_BY = {  # settings that only these objectives read
    "generator": ("rtd",),
    "mask_share": ("mlm", "rtd", "spans", "denoise"),
    "mean_span": ("spans", "denoise"),
    "random_share": ("denoise",),
    "mask_rule": ("mlm", "rtd"),
}
MASK_SHARES = {"denoise": 0.3}  # of a text; else:
MASK_SHARE = 0.15
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
CLOSING = " \n\"')]}\u00bb\u2019\u201d\u300d\u300f\uff09\u3011\u300b"  # what may follow the end in the same token
WORD_BEGINS = ("\u0120", "\u2581")  # a space before the word, as byte-level and SentencePiece vocabularies write it


class Aim:
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
        self._config, self._objective, self._seed = config, objective, seed
        self.spec = spec_to_train(*config_and_weights(model))
        check_objective(self.spec, objective, config)
        self._tokenizer = loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
        if objective == "rtd" and config.generator is None:
            raise ConfigError("generator: expected the folder of a model that fills masks, as rtd needs one, got none")
        if objective in WITH_MASK and (loaded is None or loaded.mask_token_id is None):
            raise ConfigError(
                f"objective: {objective} needs a tokenizer with a mask token (mask_token in tokenizer_config.json)"
            )
        self._sentinels = _sentinels(loaded) if objective in WITH_SENTINELS and loaded is not None else []
        self._modes: dict[str, list[int]] = {}
        self._context = context
        self._generator: Generator | None = None
        if objective in OF_ENCODER_DECODERS:
            own = GenerationConfig.read(model, self.spec.vocab_size) if isinstance(model, Path) else None
            self.form = pair_form(self.spec, self._tokenizer, own)
            if objective == "ul2" and loaded is not None:
                self._modes = {d.mode: loaded.encode(d.mode, add_special_tokens=False) for d in DENOISERS}
        if objective in WITH_SENTINELS:
            check_sentinels(self._sentinels, objective)
        least = 1 + (objective in OF_TEXTS)
        self.text_context = next((n for n in range(context, least - 1, -1) if self._grown(n) <= context), 0)
        if self.text_context < least:
            raise ConfigError(f"context: expected at least {self._grown(least)} tokens for {objective}, got {context}")

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
                token, document = int(store.tokens[place]), int(np.searchsorted(store.ends, place, "right"))
                spelt = None if self._tokenizer is None else self._tokenizer.token_of(token)
                raise DataError(
                    f"{store.name}: {store.document(document)} holds {spelt or 'a token'} (id {token}), "
                    f"which objective {self._objective} puts into texts itself: take it out of the document"
                )

    def generator_bytes(self, tokens: int, sequences: int) -> int:
        """What the model whose tokens are detected takes, for micro-batches of this size; 0 where there is none."""
        return 0 if self._objective != "rtd" else generator_bytes(*self._of_generator, tokens, sequences)

    def load_generator(self, tokens: int, sequences: int, threads: int | None) -> None:
        """Have that model, if there is one."""
        if self._objective == "rtd":
            self._generator = Generator(*self._of_generator, tokens, sequences, Ops(threads))

    def data(self, texts: Data, like: Data | None = None) -> Data:
        """Micro-batches of the objective, made of those of texts; of the shape of others that it made."""
        config, spec, seed, objective = self._config, self.spec, self._seed, self._objective
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
        if objective in OF_TEXTS:
            options: dict[str, Any] = {"context": self._context, "seed": seed, "like": like}
            if objective == "ul2":
                return MixedDenoisers(texts, self.form, self._sentinels, self._modes, **options)
            options |= {"share": self._share, "mean_span": config.mean_span}
            if objective == "spans":
                return CorruptedSpans(texts, self.form, self._sentinels, **options)
            return self._infilled(texts, options)
        return SplitTokens(texts, seed) if objective == "prefix" else texts

    def _grown(self, length: int) -> int:
        """Tokens of the longest sequence that may become of a text."""
        if self._objective not in OF_TEXTS:
            return length
        form, mode = self.form, max(map(len, self._modes.values()), default=0)
        if form.start is not None:
            return length + max(form.around_source + mode, form.around_target)
        amounts = [(self._share, self._config.mean_span)]
        if self._objective == "ul2":
            amounts = [(d.share, d.mean_span or float(length)) for d in DENOISERS]
        spans = max(spans_of(length, *amount, len(self._sentinels)) for amount in amounts)
        return length + 2 * spans + form.around_source + mode + form.around_target - 1

    @property
    def ordinary_token(self) -> int:
        """A token that texts may hold."""
        special = self._reserved if self._tokenizer is None else {*self._reserved, *self._tokenizer.special_ids}
        return next(token for token in range(self.spec.vocab_size) if token not in special)

    @property
    def _of_generator(self) -> tuple[Path, ModelSpec, int]:
        """Its folder, who reads what it proposes, and the longest text."""
        assert self._config.generator is not None
        return resolve(self._config.generator), self.spec, self._context

    @property
    def _reserved(self) -> list[int]:
        """Tokens that no text may hold."""
        if self._objective == "blanks":
            return reserved_ids(self.spec.prefix) if self.spec.prefix is not None else []
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
        share = self._config.random_share
        return InfilledText(
            texts, self.form, self._mask, ends, begins, random_share=share, ordinary=ordinary, **options
        )


def _sentinels(tokenizer: Tokenizer) -> list[int]:
    found: list[int] = []
    while (sentinel := tokenizer.id_of(SENTINEL.format(len(found)))) is not None:
        found.append(sentinel)
    return found


def check_objective(spec: ModelSpec, objective: str, config: RunConfig) -> None:
    """Raise `ConfigError` where the model does not predict what the objective makes labels of. A model that fills
    blanks predicts no token before its start token: of prompts and answers only answers count, with `mask_prompt`."""
    fitting = ("causal", "prefix", "blanks", *WITH_SENTINELS) if spec.encoder is None else OF_ENCODER_DECODERS
    if spec.is_encoder:
        fitting = (*{HeadKind.TOKENS: ("mlm",), HeadKind.EACH: ("rtd",)}.get(spec.head.kind, ()), "classify")
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
    if objective in ("seq2seq", "classify") and config.packing != "documents":
        each = "pair" if objective == "seq2seq" else "text with its label"
        raise ConfigError(
            f"packing: expected documents for {objective}, where each is a {each}, got {config.packing!r}"
        )
    if objective in ("classify", *WITH_SENTINELS) and config.mask_prompt:
        what = "labels" if objective == "classify" else "tokens that were taken out"
        raise ConfigError(f"mask_prompt: expected no for {objective}, where {what} alone count: leave it out")
    if spec.fills_blanks and objective != "blanks" and not (objective == "causal" and config.mask_prompt):
        raise ConfigError(
            f"objective: expected blanks for this {spec.family} model, got {objective!r}: it predicts what fills a "
            "blank, not every token. Train with objective=blanks, or causal with mask_prompt on prompts that end in "
            "its start token"
        )
