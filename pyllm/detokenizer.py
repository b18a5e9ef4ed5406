"""Ids back to text, whole or as they come.

A `Detokenizer` is a chain of stages. Each takes one token at a time and gives the text that no later token can change,
holding back no more than a few bytes, so a stream costs the same for every token however long it gets. `decode` of a
whole sequence runs the same stages, hence the joined stream always equals it. Half a character is never given out;
bytes that are no UTF-8 become U+FFFD once it is certain that they are none.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pyllm.errors import TokenizerError


class Stage(Protocol):
    """One step of decoding; keeps what it cannot give out yet."""

    def push(self, token: str) -> Sequence[str]:
        """What is certain after `token`."""
        ...

    def finish(self) -> Sequence[str]:
        """What was held back; no token follows."""
        ...


class Detokenizer:
    """Text of a growing list of ids.

    `token_of` gives the vocabulary entry of an id, or None for ids that have no text (special tokens that are skipped,
    rows a model's embedding has beyond its vocabulary).
    """

    def __init__(self, token_of: Callable[[int], str | None], stages: Sequence[Stage]) -> None:
        """`stages` are fresh, at least one: they keep the state of one text."""
        self._token_of = token_of
        self._first, *self._later = stages
        self._finished = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with `ids`; may be empty."""
        if self._finished:
            raise ValueError("Detokenizer.push after finish: make a new one for a new text")
        parts: list[str] = []
        for token_id in ids:
            token = self._token_of(token_id)
            if token is not None:
                tokens = self._first.push(token)
                parts += _through(self._later, tokens) if self._later else tokens
        return "".join(parts)

    def finish(self) -> str:
        """The rest of the text. Nothing can be pushed afterwards."""
        if self._finished:
            return ""
        self._finished = True
        parts: list[str] = []
        stages = [self._first, *self._later]
        for index, stage in enumerate(stages):
            parts += _through(stages[index + 1 :], stage.finish())
        return "".join(parts)


def _through(stages: Sequence[Stage], tokens: Sequence[str]) -> Sequence[str]:
    """What these stages make of tokens, one after the other."""
    for stage in stages:
        if not tokens:
            break
        tokens = [out for token in tokens for out in stage.push(token)]
    return tokens


def stages_of(decoder: dict[str, Any] | None) -> Callable[[], list[Stage]]:
    """A maker of fresh stages for the `decoder` section of a tokenizer.json, or `TokenizerError`."""
    if decoder is None:
        specs: list[dict[str, Any]] = [{"type": "Join"}]
    elif decoder.get("type") == "Sequence":
        specs = list(decoder["decoders"])
    else:
        specs = [decoder]

    makers: list[Callable[[], Stage]] = []
    fused = False
    for spec in specs:
        kind = spec.get("type")
        if kind == "Fuse":
            fused = True
            continue
        makers.append(_maker(kind, spec, fused))
        fused = fused or kind == "ByteLevel"
    if not makers:  # only Fuse, or a Sequence of none: the tokens as they are
        makers.append(lambda: _PerToken(lambda token: token))
    return lambda: [make() for make in makers]


def sentencepiece_stages(strips_first_space: bool, strips_all_spaces: bool) -> list[Stage]:
    """Stages for SentencePiece pieces."""
    return [_SentencePieceStage(strips_first_space, strips_all_spaces)]


def _maker(kind: str | None, spec: dict[str, Any], fused: bool) -> Callable[[], Stage]:
    if kind == "ByteLevel":
        return _ByteLevel
    if kind == "ByteFallback":
        return _ByteFallback
    if kind == "Join":
        return lambda: _Positional(lambda token: token, lambda token: " " + token)
    if kind in ("WordPiece", "Metaspace"):
        return _positional_maker(spec)
    if kind == "BPEDecoder":
        return lambda: _WordEnd(spec["suffix"])
    if kind == "Strip":
        content, start, stop = spec["content"], spec["start"], spec["stop"]
        if fused:
            return lambda: _StripText(content, start, stop)
        return lambda: _PerToken(lambda token: "".join(_StripText(content, start, stop).push(token)))
    if kind == "Replace":
        pattern = spec["pattern"]
        if fused and len(pattern.get("String", "")) != 1:
            raise TokenizerError(
                f"tokenizer.json: a Replace decoder with the pattern {pattern} after Fuse is not supported: it may "
                "match across tokens, so its text cannot be streamed"
            )
        if "String" in pattern:
            old, new = pattern["String"], spec["content"]
            return lambda: _PerToken(lambda token: token.replace(old, new))
        return _per_token_maker(spec)
    raise TokenizerError(
        f"tokenizer.json: decoder {kind!r} is not supported; known are ByteLevel, ByteFallback, WordPiece, Metaspace, "
        "BPEDecoder, Replace, Strip, Fuse and Sequence"
    )


def _library_decoder(spec: dict[str, Any]) -> Any:
    """The `tokenizers` decoder of `spec`."""
    import json

    from tokenizers import Tokenizer

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": spec}
    return Tokenizer.from_str(json.dumps(empty)).decoder


def _per_token_maker(spec: dict[str, Any]) -> Callable[[], Stage]:
    decoder = _library_decoder(spec)
    return lambda: _PerToken(lambda token: decoder.decode([token]))


def _positional_maker(spec: dict[str, Any]) -> Callable[[], Stage]:
    decoder = _library_decoder(spec)
    return lambda: _Positional(lambda token: decoder.decode([token]), lambda token: decoder.decode(["x", token])[1:])


class _PerToken:
    """Each token by itself."""

    def __init__(self, text_of: Callable[[str], str]) -> None:
        self._text_of = text_of

    def push(self, token: str) -> Sequence[str]:
        return (self._text_of(token),)

    def finish(self) -> Sequence[str]:
        return ()


class _Positional:
    """Each token by itself, the first one differently."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        self._first, self._later = first, later
        self._started = False

    def push(self, token: str) -> Sequence[str]:
        text = self._later(token) if self._started else self._first(token)
        self._started = True
        return (text,)

    def finish(self) -> Sequence[str]:
        return ()


class _WordEnd:
    """A suffix such as `</w>` becomes a space, except in the last token."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def push(self, token: str) -> Sequence[str]:
        held, self._held = self._held, token
        return () if held is None else (held.replace(self._suffix, " "),)

    def finish(self) -> Sequence[str]:
        return () if self._held is None else (self._held.replace(self._suffix, ""),)


class _StripText:
    """Up to `start` leading and `stop` trailing occurrences of a character of the whole text."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._to_strip, self._stop = content, start, stop
        self._tail = ""

    def push(self, token: str) -> Sequence[str]:
        while self._to_strip and token.startswith(self._content):
            token, self._to_strip = token[1:], self._to_strip - 1
        if not token:
            return ()
        self._to_strip = 0
        if not self._stop:
            return (token,)
        text = self._tail + token
        kept = len(text)
        while kept and len(text) - kept < self._stop and text[kept - 1] == self._content:
            kept -= 1
        self._tail = text[kept:]
        return (text[:kept],)

    def finish(self) -> Sequence[str]:
        return ()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


class _ByteLevel:
    """Characters that stand for bytes; a token with any other character stands for itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> Sequence[str]:
        try:
            data = bytes([_BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:
            data = token.encode()
        return (self._utf8.decode(data),)

    def finish(self) -> Sequence[str]:
        return (self._utf8.decode(b"", final=True),)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of(token: str) -> bytes | None:
    """The byte that a token stands for, if it is one of those."""
    if len(token) != len("<0x00>"):  # saves most of them the pattern
        return None
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else bytes([int(match.group(1), 16)])


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("pyllm.one_mark_per_byte", _one_mark_per_byte)


class _Bytes:
    """A character as its bytes come; what is no UTF-8 gives one U+FFFD for each byte."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("pyllm.one_mark_per_byte")
        self._begun = False

    def push(self, byte: bytes) -> Sequence[str]:
        """What the byte completes."""
        self._begun = True
        text = self._utf8.decode(byte)
        return (text,) if text else ()

    def end(self) -> Sequence[str]:
        """What is left where no further byte follows."""
        if not self._begun:
            return ()
        self._begun = False
        text = self._utf8.decode(b"", final=True)
        return (text,) if text else ()


class _ByteFallback:
    """Tokens `<0x00>` to `<0xFF>` are bytes."""

    def __init__(self) -> None:
        self._bytes = _Bytes()

    def push(self, token: str) -> Sequence[str]:
        byte = _byte_of(token)
        return (*self._bytes.end(), token) if byte is None else self._bytes.push(byte)

    def finish(self) -> Sequence[str]:
        return self._bytes.end()


class _SentencePieceStage:
    """Pieces: space marks become spaces, byte pieces characters; the space that encoding put in front goes."""

    def __init__(self, strips_first_space: bool, strips_all_spaces: bool) -> None:
        self._bytes = _Bytes()
        self._strips_first, self._strips_all = strips_first_space, strips_all_spaces
        self._at_start = True

    def push(self, token: str) -> Sequence[str]:
        byte = _byte_of(token)
        if byte is not None:
            self._at_start = False
            return self._bytes.push(byte)
        text = token.replace("\u2581", " ")
        if self._at_start:
            if self._strips_first and text.startswith(" "):
                text = text[1:]
                self._at_start = self._strips_all and not text
            else:
                self._at_start = False
        return (*self._bytes.end(), text)

    def finish(self) -> Sequence[str]:
        return self._bytes.end()
