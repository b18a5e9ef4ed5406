"""SentencePiece models (`tokenizer.model`): a bounds-checked reader, the normalizer, and exact encoding.

The ids are those of the sentencepiece library. BPE merges run in `tokenizers`; what differs between the two libraries
is done here: the normalization rules, which pieces may match text, the order of equally good merges, and the bytes that
stand for unknown characters. The Unigram search is done here as a whole, since its choice between equally good
segmentations depends on how the library rounds the sums (float32; beyond some 200,000 characters in one text, where the
sums have lost the digits that decide, single pieces may differ from the library's).
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

from pyllm.errors import TokenizerError

SPACE_MARK = "\u2581"  # stands for a space inside pieces

_MAX_FILE_BYTES = 64 << 20
_MAX_PIECE_CHARS = 256  # merges are found by trying every split of a piece; published models stay below 130
_SMALLEST_FLOAT32 = 1.1754943508222875e-38  # the library's initial maximum when it looks for the best piece score
_UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the worst piece


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """`TrainerSpec.ModelType`."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its place in the file."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a `tokenizer.model` file, as far as encoding and decoding need it."""

    pieces: tuple[Piece, ...]
    model_type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    whitespace_as_suffix: bool = False
    charsmap: bytes = field(default=b"", repr=False)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @classmethod
    def load(cls, path: Path) -> SentencePieceModel:
        """Read and check the file; `TokenizerError` says what is wrong with it."""
        try:
            size = path.stat().st_size
            if size > _MAX_FILE_BYTES:
                raise TokenizerError(f"{path}: {size} bytes; a SentencePiece model has at most {_MAX_FILE_BYTES}")
            return cls.parse(path.read_bytes())
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from error
        except _MalformedError as error:
            raise TokenizerError(
                f"{path}: not a valid SentencePiece model: {error}. Fetch the file again, or use a tokenizer.json."
            ) from error

    @classmethod
    def parse(cls, data: bytes) -> SentencePieceModel:
        """The model in `data`, a serialized `ModelProto`."""
        values: dict[str, Any] = {}
        pieces: list[Piece] = []
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_parse_piece(_as_bytes(value, "piece"), len(pieces)))
            elif number in _SPEC_FIELDS:
                known = _SPEC_FIELDS[number]
                for inner, inner_value in _fields(_as_bytes(value, "spec")):
                    if inner in known:
                        name, convert = known[inner]
                        values[name] = convert(inner_value, name)
        model = cls(pieces=tuple(pieces), **values)
        _check(model)
        return model


class Normalizer:
    """Text to the form in which pieces are matched: mapped characters, single spaces, a space in front, space marks."""

    def __init__(self, model: SentencePieceModel) -> None:
        """Raises `TokenizerError` when the model's character map is damaged."""
        self._model = model
        self._charsmap = _Charsmap(model.charsmap) if model.charsmap else None
        self._user_defined = _any_of([p.text for p in model.pieces if p.type is PieceType.USER_DEFINED])

    def __call__(self, text: str, add_prefix: bool = True) -> str:
        """The normalized `text`; `add_prefix=False` suppresses the space in front."""
        model = self._model
        chunks = self._chunks(text)
        body = _single_spaces(chunks) if model.remove_extra_whitespaces else "".join(chunks)
        if not body:
            return ""
        body = body.replace(" ", SPACE_MARK)
        add_prefix = add_prefix and model.add_dummy_prefix
        if add_prefix and not model.whitespace_as_suffix:
            body = SPACE_MARK + body
        if model.remove_extra_whitespaces:
            body = body.rstrip(SPACE_MARK)
        if add_prefix and model.whitespace_as_suffix:
            body += SPACE_MARK
        return body

    def _chunks(self, text: str) -> Iterator[str]:
        """`text` in runs of unchanged characters, user-defined symbols (never changed) and replaced runs."""
        never = len(text)
        position, symbol = 0, self._next_symbol(text, 0)
        while position < len(text):
            if symbol is not None and symbol.start() < position:  # a replaced run reached into it
                symbol = self._next_symbol(text, position)
            symbol_at = never if symbol is None else symbol.start()
            mapped_at = never if self._charsmap is None else self._charsmap.next_candidate(text, position)
            start = min(symbol_at, mapped_at)
            if start > position:
                yield text[position:start]
            if start == never:
                return
            if symbol is not None and start == symbol_at:
                yield symbol.group()
                position = symbol.end()
            else:
                assert self._charsmap is not None
                replacement, length = self._charsmap.replace(text, start)
                yield replacement
                position = start + length

    def _next_symbol(self, text: str, position: int) -> re.Match[str] | None:
        return None if self._user_defined is None else self._user_defined.search(text, position)


class SentencePieceEncoder:
    """Text to ids, equal to the sentencepiece library's."""

    def __init__(self, model: SentencePieceModel) -> None:
        """Raises `TokenizerError` when the model cannot encode."""
        self.model = model
        self.normalizer = Normalizer(model)
        self._byte_ids = _byte_ids(model) if model.byte_fallback else None
        self._user_defined_ids: dict[str, int] = {}
        self._user_defined = None
        self._search: Callable[[str], Iterable[tuple[int, int, int]]]
        if model.model_type is ModelType.BPE:
            self._search = _BpeSearch(model)
            self._user_defined_ids = {
                p.text: index for index, p in enumerate(model.pieces) if p.type is PieceType.USER_DEFINED
            }
            self._user_defined = _any_of(list(self._user_defined_ids))
        else:
            self._search = _UnigramSearch(model)

    def encode(self, text: str, add_prefix: bool = True) -> list[int]:
        """Ids of `text`, which holds no special tokens; `add_prefix=False` suppresses the space in front."""
        normalized = self.normalizer(text, add_prefix)
        ids: list[int] = []
        position = 0
        if self._user_defined is not None:
            for match in self._user_defined.finditer(normalized):
                self._encode_plain(normalized[position : match.start()], ids)
                ids.append(self._user_defined_ids[match.group()])
                position = match.end()
        self._encode_plain(normalized[position:], ids)
        return ids

    def _encode_plain(self, normalized: str, ids: list[int]) -> None:
        if not normalized:
            return
        unk_id = self.model.unk_id
        after_unknown = False
        for token_id, start, end in self._search(normalized):
            if token_id != unk_id:
                ids.append(token_id)
            elif self._byte_ids is not None:
                ids.extend(self._byte_ids[byte] for byte in normalized[start:end].encode())
            elif not after_unknown:  # a run of unknown characters is one unknown token
                ids.append(unk_id)
            after_unknown = token_id == unk_id


# --- the two searches: normalized text -> (id, start, end) of each piece --------------------------------------------


class _UnigramSearch:
    """The segmentation with the highest sum of scores."""

    def __init__(self, model: SentencePieceModel) -> None:
        normal = [p.score for p in model.pieces if p.type is PieceType.NORMAL]
        if not normal:
            raise TokenizerError("the SentencePiece model has no normal pieces, so it cannot encode text")
        best = max(_SMALLEST_FLOAT32, *normal)
        self._unk_id = model.unk_id
        self._unknown_score = array("f", [min(normal) - _UNKNOWN_PENALTY])[0]
        self._root: _TrieNode = {}
        for index, piece in enumerate(model.pieces):
            if piece.type not in (PieceType.NORMAL, PieceType.USER_DEFINED):
                continue
            node = self._root
            for character in piece.text:
                node = node.setdefault(character, {})  # type: ignore[assignment]  # "" alone leads to no node
            preferred = len(piece.text.encode()) * best - 0.1
            node[""] = index, piece.score if piece.type is PieceType.NORMAL else preferred

    def __call__(self, text: str) -> list[tuple[int, int, int]]:
        size = len(text)
        # Best path to each character: sums are rounded to float32 before they are compared, as in the library.
        score_at = array("f", [-math.inf]) * (size + 1)
        score_at[0] = 0.0
        rounded = array("f", [0.0])
        start_of, id_of = [-1] * (size + 1), [self._unk_id] * (size + 1)
        for start in range(size):
            score_here = score_at[start]
            node: Any = self._root
            single = False
            end = start
            while end < size and (node := node.get(text[end])) is not None:
                end += 1
                found = node.get("")
                if found is not None:
                    single = single or end == start + 1
                    rounded[0] = score_here + found[1]
                    if start_of[end] < 0 or rounded[0] > score_at[end]:
                        score_at[end], start_of[end], id_of[end] = rounded[0], start, found[0]
            if not single:
                rounded[0], end = score_here + self._unknown_score, start + 1
                if start_of[end] < 0 or rounded[0] > score_at[end]:
                    score_at[end], start_of[end], id_of[end] = rounded[0], start, self._unk_id
        path: list[tuple[int, int, int]] = []
        end = size
        while end > 0:
            path.append((id_of[end], start_of[end], end))
            end = start_of[end]
        path.reverse()
        return path


_TrieNode: TypeAlias = "dict[str, _TrieNode | tuple[int, float]]"


class _BpeSearch:
    """Merges of neighbours, the best score first, of equal ones the leftmost."""

    def __init__(self, model: SentencePieceModel) -> None:
        from tokenizers import Tokenizer, models

        names = {_bpe_name(index, piece): index for index, piece in enumerate(model.pieces)}
        merges = _merges(model)
        for parts in merges:
            for part in parts:
                # Characters merge even where they are no pieces; alone they are unknown: ids past the vocabulary.
                names.setdefault(part, len(names))
        self._known, self._unk_id = len(model.pieces), model.unk_id
        unk = _bpe_name(model.unk_id, model.pieces[model.unk_id])
        self._library = Tokenizer(models.BPE(vocab=names, merges=merges, unk_token=unk, fuse_unk=True))

    def __call__(self, text: str) -> Iterator[tuple[int, int, int]]:
        encoding = self._library.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield (token_id if token_id < self._known else self._unk_id), start, end


def _bpe_name(index: int, piece: Piece) -> str:
    """The piece's text, or, where text must not match the piece, a name that no text contains."""
    if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED):
        return piece.text
    return f" {index}"  # normalized text holds no plain space


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All ways to make a piece of two, in the order in which the library tries them.

    The ways to make one piece share its score; the library takes the leftmost, and so does any order among them: random
    models against the library show no text in which two of them meet.
    """
    mergeable = {p.text for p in model.pieces if p.type in (PieceType.NORMAL, PieceType.UNUSED)}
    ranked = sorted(
        (index for index, p in enumerate(model.pieces) if p.text in mergeable and len(p.text) > 1),
        key=lambda index: -model.pieces[index].score,
    )
    merges: list[tuple[str, str]] = []
    scores: list[float] = []
    for index in ranked:
        piece = model.pieces[index]
        text = piece.text
        splits = [
            cut
            for cut in range(1, len(text))
            if (cut == 1 or text[:cut] in mergeable) and (cut == len(text) - 1 or text[cut:] in mergeable)
        ]
        if splits and piece.type is PieceType.UNUSED:
            raise TokenizerError(
                f"SentencePiece BPE piece {index} ({text!r}) is marked unused although merges lead to it; "
                "such models are not supported. Use the tokenizer.json of the same checkpoint."
            )
        if splits:
            scores.append(piece.score)
            merges.extend((text[:cut], text[cut:]) for cut in splits)
    if len(set(scores)) < len(scores):
        warnings.warn(
            "the SentencePiece model has pieces of equal score: where two of them overlap in a text the lower id is "
            "merged first, while the sentencepiece library takes the one further left",
            stacklevel=2,
        )
    return merges


def _byte_ids(model: SentencePieceModel) -> list[int]:
    found = {p.text: index for index, p in enumerate(model.pieces) if p.type is PieceType.BYTE}
    missing = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in found]
    if missing:
        raise TokenizerError(
            f"the SentencePiece model declares byte fallback but lacks {len(missing)} of 256 byte pieces, "
            f"the first being {missing[0]}"
        )
    return [found[f"<0x{byte:02X}>"] for byte in range(256)]


# --- normalization -------------------------------------------------------------------------------------------------


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of `texts` at each place, or None if there are none."""
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _single_spaces(chunks: Iterable[str]) -> str:
    """Join, dropping leading spaces and every space that follows a space."""
    parts: list[str] = []
    after_space = True
    for chunk in chunks:
        if after_space:
            chunk = chunk.lstrip(" ")
        if chunk:
            parts.append(_SPACES.sub(" ", chunk))
            after_space = chunk.endswith(" ")
    return "".join(parts)


_SPACES = re.compile(" {2,}")


class _Charsmap:
    """`precompiled_charsmap`: a double-array trie over UTF-8 bytes whose values are offsets of replacement texts.

    Layout: uint32 size of the trie in bytes, the trie as uint32 units, then NUL-terminated replacements.
    """

    _MAX_MATCHES = 32  # the library looks at no more prefixes than this

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 4:
            raise TokenizerError(f"the SentencePiece model's character map has {len(blob)} bytes, too few for a header")
        (size,) = struct.unpack_from("<I", blob)
        if size % 4 or size < 4 or size > len(blob) - 4:
            raise TokenizerError(
                f"the SentencePiece model's character map declares a trie of {size} bytes; "
                f"expected a multiple of 4 up to {len(blob) - 4}"
            )
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._replacements = blob[4 + size :]
        unmapped = "".join(chr(code) for code in range(128) if self._child(_offset(self._units[0]), code) is None)
        self._candidate = re.compile(f"[^{re.escape(unmapped)}]" if unmapped else ".", re.DOTALL)

    def next_candidate(self, text: str, position: int) -> int:
        """Where the next character that may begin a mapped run lies; the text's length if there is none."""
        match = self._candidate.search(text, position)
        return len(text) if match is None else match.start()

    def _child(self, node: int, byte: int) -> int | None:
        child = node ^ byte
        if child >= len(self._units) or self._units[child] & 0x800000FF != byte:
            return None
        return child

    def replace(self, text: str, start: int) -> tuple[str, int]:
        """The replacement of the longest mapped run at `start` and its length in characters; else the character."""
        node = _offset(self._units[0])
        best: tuple[int, int] | None = None
        matches = 0
        for index in range(start, len(text)):
            for byte in text[index].encode():
                child = self._child(node, byte)
                if child is None:
                    break
                unit = self._units[child]
                node = child ^ _offset(unit)
                if unit >> 8 & 1:
                    matches += 1
                    best = self._value(node), index + 1 - start
            else:
                if matches < self._MAX_MATCHES:
                    continue
            break
        if best is None:
            return text[start], 1
        return self._replacement(best[0]), best[1]

    def _value(self, node: int) -> int:
        if node >= len(self._units):
            raise TokenizerError("the SentencePiece model's character map points outside its trie: a damaged file")
        unit: int = self._units[node]
        return unit & 0x7FFFFFFF

    def _replacement(self, offset: int) -> str:
        end = self._replacements.find(b"\0", offset)
        if offset >= len(self._replacements) or end < 0:
            raise TokenizerError("the SentencePiece model's character map points outside its texts: a damaged file")
        return self._replacements[offset:end].decode("utf-8", "replace")


def _offset(unit: int) -> int:
    """Where the children of a double-array unit lie, relative to it."""
    return (unit >> 10) << ((unit & 0x200) >> 6)


# --- the file ------------------------------------------------------------------------------------------------------


class _MalformedError(Exception):
    """The bytes are no valid model."""


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a serialized message; 32- and 64-bit values as little-endian bytes."""
    position, size = 0, len(data)
    while position < size:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _MalformedError(f"field number 0 at byte {position}")
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _MalformedError(f"wire type {wire} at byte {position}, expected 0, 1, 2 or 5")
        if length > size - position:
            raise _MalformedError(f"field {number} wants {length} bytes at byte {position}, {size - position} are left")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _MalformedError(f"a number is cut off at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise _MalformedError(f"a number at byte {position} is longer than 10 bytes")


def _as_bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise _MalformedError(f"{name} is a number, expected bytes")
    return value


def _as_int(value: object, name: str) -> int:
    if not isinstance(value, int):
        raise _MalformedError(f"{name} is not an integer")
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _as_bool(value: object, name: str) -> bool:
    return bool(_as_int(value, name))


def _as_model_type(value: object, name: str) -> ModelType:
    try:
        return ModelType(_as_int(value, name))
    except ValueError as error:
        raise _MalformedError(f"{name} is {value!r}, expected 1 (unigram) or 2 (bpe)") from error


# ModelProto's field number -> (field number inside that message -> our name, converter)
_SPEC_FIELDS: dict[int, dict[int, tuple[str, Callable[[object, str], Any]]]] = {
    2: {  # TrainerSpec
        3: ("model_type", _as_model_type),
        24: ("whitespace_as_suffix", _as_bool),
        35: ("byte_fallback", _as_bool),
        40: ("unk_id", _as_int),
        41: ("bos_id", _as_int),
        42: ("eos_id", _as_int),
        43: ("pad_id", _as_int),
    },
    3: {  # NormalizerSpec
        2: ("charsmap", _as_bytes),
        3: ("add_dummy_prefix", _as_bool),
        4: ("remove_extra_whitespaces", _as_bool),
        5: ("escape_whitespaces", _as_bool),
    },
}


def _parse_piece(data: bytes, index: int) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == 1:
            try:
                text = _as_bytes(value, "piece text").decode("utf-8")
            except UnicodeDecodeError as error:
                raise _MalformedError(f"piece {index} is not UTF-8") from error
        elif number == 2:
            raw = _as_bytes(value, "piece score")
            if len(raw) != 4:
                raise _MalformedError(f"the score of piece {index} has {len(raw)} bytes, expected 4")
            (score,) = struct.unpack("<f", raw)
        elif number == 3:
            try:
                kind = PieceType(_as_int(value, "piece type"))
            except ValueError as error:
                raise _MalformedError(f"piece {index} has type {value!r}, expected 1 to 6") from error
    if not text:
        raise _MalformedError(f"piece {index} is empty")
    if len(text) > _MAX_PIECE_CHARS:
        raise _MalformedError(f"piece {index} has {len(text)} characters, at most {_MAX_PIECE_CHARS} are accepted")
    if not math.isfinite(score):
        raise _MalformedError(f"piece {index} has the score {score}")
    return Piece(text, score, kind)


def _check(model: SentencePieceModel) -> None:
    if not model.pieces:
        raise _MalformedError("it holds no pieces")
    seen: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if seen.setdefault(piece.text, index) != index:
            raise _MalformedError(f"pieces {seen[piece.text]} and {index} are both {piece.text!r}")
    unknown = [index for index, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN]
    if unknown != [model.unk_id]:
        raise _MalformedError(f"expected one unknown piece, at id {model.unk_id}; found {unknown[:5]}")
    if model.model_type not in (ModelType.UNIGRAM, ModelType.BPE):
        raise _MalformedError(f"model type {model.model_type.name.lower()} is not supported, only unigram and bpe")
    if not model.escape_whitespaces:
        raise _MalformedError("escape_whitespaces=false is not supported")
