"""Structured output, through llguidance: a grammar that an output must match, and the tokens that it lets come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import RequestError, TokenizerError, shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pyllm.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 1 << 16  # of a schema, regular expression, grammar, or all choices together
# What one call of llguidance may take: 5 million items are 0.25 s. With 50,257 tokens, grammars whose names are
# terminals need up to 5,000; with 30,000 that are all letters, one that spells names out letter by letter 3 million.
_PARSER_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 5_000_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# What all calls for a request may take together, in seconds of the processor: at the outset, and more with each token.
# An ordinary grammar takes 0.1 to 0.4 ms a token with vocabularies of 50,000 to 128,000.
_SECONDS, _SECONDS_A_TOKEN = 2.0, 0.01
# White space stands between JSON's tokens as in one line of text: free runs of it are where models get lost.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# [256, 8]: what the bits of a byte of a mask, lowest first, let logits be.
_CEILINGS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_CEILINGS = _CEILINGS.astype(np.float32)
_MAX_REASON = 400  # characters of llguidance's explanation that are passed on


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output must match; exactly one is given.

    `json` is a JSON schema (a mapping, a bool, or their JSON text), `json_object` True asks for any JSON object,
    `regex` is matched by the whole output, `choice` lists the possible outputs, and `grammar` is one in llguidance's
    form of Lark, with a rule `start`.

    A wrong type is a `TypeError`; none or several given, and text above 64 KiB, a `ValueError`. Whether a schema,
    expression or grammar makes sense shows when the request is added.
    """

    json: Mapping[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a tokenizer."""
        if not isinstance(self.json_object, bool):
            raise TypeError(f"structured_outputs: json_object: expected True or False, got {shown(self.json_object)}")
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and f.name != "json_object"]
        given += ["json_object"] * self.json_object
        if len(given) != 1:
            expected = "json, json_object, regex, choice or grammar"
            raise ValueError(
                f"structured_outputs: expected exactly one of {expected}, got {', '.join(given) or 'none'}"
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"structured_outputs: {name}: expected a string, got {shown(value)}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        texts = [value for value in (self.json, self.regex, self.grammar, *(self.choice or ())) if value is not None]
        size = sum(len(str(text).encode(errors="replace")) for text in texts)
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"structured_outputs: {given[0]}: expected at most {MAX_GRAMMAR_BYTES} bytes, got {size}")


@dataclass
class _Cost:
    """What a request's grammar took so far: seconds of the processor, whatever else runs on it, and tokens."""

    seconds: float = 0.0
    tokens: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is done in this thread meanwhile."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.thread_time() - began

    @property
    def error(self) -> str | None:
        """That it is too much."""
        if self.seconds <= _SECONDS + _SECONDS_A_TOKEN * self.tokens:
            return None
        return f"it is too costly to match: {self.seconds:.1f} s for {self.tokens} tokens"


class Matcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, cost: _Cost) -> None:
        """Made by `GrammarCompiler`; all outputs of a request share `cost`."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._cost = cost

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on, as when it takes more than it may; None while it can."""
        return _first_lines(self._matcher.get_error()) if self._matcher.is_error() else self._cost.error

    def ceiling(self) -> NDArray[np.float32]:
        """[V]: +inf for tokens that may come next, ends exactly where the grammar accepts, -inf for all others; none
        may come after an error."""
        with self._cost.counted():
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or self._cost.error is not None:
            return np.full(self._vocabulary, -np.inf, np.float32)
        return np.take(_CEILINGS, mask, axis=0).reshape(-1)[: self._vocabulary]

    def append(self, token: int) -> None:
        """The token was chosen."""
        with self._cost.counted():
            self._matcher.consume_token(token)
        self._cost.tokens += 1

    def fork(self) -> Matcher:
        """One that goes on by itself from here."""
        with self._cost.counted():
            twin = self._matcher.deep_copy()
        return Matcher(twin, self._vocabulary, self._cost)


class GrammarCompiler:
    """Makes matchers for outputs of one model, of `vocabulary` tokens of which `end_ids` end a text."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, end_ids: Iterable[int]) -> None:
        """Raises `RequestError` where llguidance is missing or the tokenizer cannot be used."""
        ends = [token for token in end_ids if token < vocabulary]
        if tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer; this model was loaded with skip_tokenizer_init")
        if not ends:
            raise RequestError("structured_outputs need a token that ends a text, and this model names none")
        self._vocabulary = vocabulary
        self._tokenizer = _token_table(tokenizer, vocabulary, ends)

    def compile(self, wanted: StructuredOutputs) -> Matcher:
        """A matcher at the beginning of an output; `ValueError` with the reason for what is malformed or too costly."""
        from llguidance import LLMatcher, LLParserLimits

        cost, limits = _Cost(), LLParserLimits(**_PARSER_LIMITS)
        try:
            with cost.counted():
                matcher = LLMatcher(self._tokenizer, _grammar(wanted), log_level=0, limits=limits)
        except ValueError as error:
            raise ValueError(f"structured_outputs: {_first_lines(str(error))}") from error
        made = Matcher(matcher, self._vocabulary, cost)
        possible = bool((made.ceiling() > 0).any())  # the first mask is a part of the check
        if made.error is not None or not possible:
            raise ValueError(f"structured_outputs: {made.error or 'no output of this model can match'}")
        return made


def _token_table(tokenizer: Tokenizer, vocabulary: int, ends: list[int]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise RequestError(
            "structured_outputs need the package llguidance: install it with pip install 'pyllm[structured]'"
        ) from error
    try:
        text = tokenizer.to_json()
        return LLTokenizer(text, n_vocab=max(vocabulary, tokenizer.vocab_size), eos_token=ends)
    except (TokenizerError, ValueError) as error:
        raise RequestError(f"structured_outputs cannot be used with this tokenizer: {error}") from error


def _grammar(wanted: StructuredOutputs) -> str:
    """In the form that llguidance reads."""
    from llguidance import LLMatcher

    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', _JSON_OPTIONS)
    if wanted.json is not None:
        assert isinstance(wanted.json, str)
        return LLMatcher.grammar_from_json_schema(wanted.json, _JSON_OPTIONS)
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    assert wanted.choice is not None
    return LLMatcher.grammar_from_regex("|".join(map(_literal, wanted.choice)))


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _schema_text(schema: Any) -> str:
    expected = "structured_outputs: json: expected a JSON schema, as a mapping, a bool or JSON text"
    if not isinstance(schema, str | Mapping | bool):
        raise TypeError(f"{expected}, got {shown(schema)}")
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        if len(text) <= MAX_GRAMMAR_BYTES and not isinstance(json.loads(text), dict | bool):
            raise ValueError("it is neither an object nor a bool")
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{expected}, got {shown(schema)}: {error}") from error
    return text


def _choices(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"structured_outputs: choice: expected a list of strings, got {shown(values)}")
    if not values or not all(values):
        raise ValueError(f"structured_outputs: choice: expected at least one text, none empty, got {shown(values)}")
    return tuple(values)


def _first_lines(reason: str) -> str:
    return " ".join(reason.split())[:_MAX_REASON] or "llguidance gives no reason"
