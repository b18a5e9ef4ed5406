"""What the layouts of tokenizers have in common: the settings beside a vocabulary, and how each layout is used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyllm.detokenizer import Stage
from pyllm.errors import TokenizerError

_MAX_FILE_BYTES = 512 << 20
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_Built = TypeVar("_Built")
Span = tuple[int, int] | tuple[None, None]  # a token's first character in a text, and the one behind it, where known


@dataclass(frozen=True)
class PairEncoding:
    """Two texts as one input: `ids`, and `type_ids` with 0 or 1 for each as the model tells the texts apart."""

    ids: list[int]
    type_ids: list[int]


class Backend(Protocol):
    """What the layouts have in common: `Tokenizer` says what its methods do."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Ids of each text."""

    def encode_pair(self, first: str, second: str, max_tokens: int | None) -> PairEncoding:
        """Two texts as one input."""

    def spans(self, text: str) -> list[Span | None]:
        """Which characters each token of a text stands for."""

    def token_of(self, token_id: int) -> str | None:
        """The token with this id."""

    def id_of(self, token: str) -> int | None:
        """The id of a token."""

    def to_json(self) -> str:
        """As a tokenizer.json; `TokenizerError` where there is none of it."""

    def stages(self) -> list[Stage]:
        """How tokens become text, for one stream."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before anything else."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Settings:
    """What the JSON files beside the vocabulary say."""

    folder: Path
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    tokenizer: dict[str, Any]  # tokenizer_config.json
    special_tokens: dict[str, str]  # bos_token -> "<s>", ...
    added: dict[int, AddedToken]  # ids that the settings fix
    extra_special: tuple[str, ...]
    chat_template: str | None

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """What the files in `folder` say; those that are missing say nothing."""
        tokenizer = read_json_object(folder / "tokenizer_config.json")
        special_map = read_json_object(folder / "special_tokens_map.json")
        special_tokens: dict[str, str] = {}
        extra: list[str] = []
        for source in (special_map, tokenizer):
            special_tokens |= {name: text for name in _NAMED if (text := _token_text(source.get(name))) is not None}
            for key in ("additional_special_tokens", "extra_special_tokens"):
                listed = source.get(key)
                for entry in listed.values() if isinstance(listed, dict) else listed or ():
                    if (text := _token_text(entry)) is not None:
                        extra.append(text)
        return cls(
            folder=folder,
            config=read_json_object(folder / "config.json"),
            generation=read_json_object(folder / "generation_config.json"),
            tokenizer=tokenizer,
            special_tokens=special_tokens,
            added=_added_tokens(folder, tokenizer),
            extra_special=tuple(extra),
            chat_template=_chat_template(folder, tokenizer),
        )

    def all_special(self) -> list[str]:
        """Contents of all tokens that the settings call special."""
        return list(dict.fromkeys([*self.special_tokens.values(), *self.extra_special]))

    def flag(self, name: str) -> bool | None:
        """A yes or no of tokenizer_config.json; None when it says nothing."""
        value = self.tokenizer.get(name)
        return value if isinstance(value, bool) else None

    def first_valid_id(self, key: str, vocab_size: int) -> int | None:
        """The id that generation_config.json or config.json gives for `key`."""
        for source in (self.generation, self.config):
            for value in self._ids(source, key, vocab_size):
                return value
        return None

    def eos_ids(self, of_tokenizer: int | None, vocab_size: int) -> tuple[int, ...]:
        """All ids that end a text: the tokenizer's, then generation_config.json's, then config.json's."""
        found = [] if of_tokenizer is None else [of_tokenizer]
        for source in (self.generation, self.config):
            found.extend(self._ids(source, "eos_token_id", vocab_size))
        return tuple(dict.fromkeys(found))

    def _ids(self, source: dict[str, Any], key: str, vocab_size: int) -> list[int]:
        values = source.get(key)
        model_vocab = self.config.get("vocab_size")
        limit = max(vocab_size, model_vocab) if type(model_vocab) is int else vocab_size
        name = "config.json" if source is self.config else "generation_config.json"
        valid: list[int] = []
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if type(value) is not int:
                raise TokenizerError(f"{self.folder / name}: {key} holds {value!r}, expected integers")
            if 0 <= value < limit:
                valid.append(value)
            else:
                warnings.warn(
                    f"{self.folder / name}: {key} {value} is ignored, the vocabulary has {limit} entries", stacklevel=2
                )
        return valid


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if the file is missing."""
    if not path.is_file():
        return {}
    value = _read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error or 'nested too deeply'}); fetch it again") from error


def read_text(path: Path) -> str:
    """A UTF-8 file; `TokenizerError` where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: {size} bytes; at most {_MAX_FILE_BYTES} are accepted")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from error


def _token_text(value: Any) -> str | None:
    """A special token's text, given as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_tokens(folder: Path, tokenizer: dict[str, Any]) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json and `added_tokens.json`, by id."""
    added: dict[int, AddedToken] = {}
    for content, token_id in read_json_object(folder / "added_tokens.json").items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise TokenizerError(f"{folder / 'added_tokens.json'}: entry {content!r}: {token_id!r}, expected an id")
        added[token_id] = AddedToken(content)
    decoder = tokenizer.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no JSON object")
    for key, entry in decoder.items():
        text = _token_text(entry)
        if not (key.isascii() and key.isdigit() and len(key) < 10) or text is None:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{key!r}] is {entry!r}, "
                "expected an id and a token"
            )
        flags = entry if isinstance(entry, dict) else {}
        added[int(key)] = AddedToken(
            text,
            *(bool(flags.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")),
        )
    return dict(sorted(added.items()))


def _chat_template(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        named = {
            entry["name"]: entry["template"]
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def fitting(first: int, second: int, special: int, most: int | None) -> tuple[int, int]:
    """How many tokens of two texts fit beside the special ones: the longer is cut, once they are equally long both."""
    if most is None:
        return first, second
    room = most - special
    if room < 0:
        raise TokenizerError(f"max_tokens: expected at least the {special} special tokens of a pair, got {most}")
    shorter = min(first, second, room // 2)
    longer = min(max(first, second), room - shorter)
    return (shorter, longer) if first <= second else (longer, shorter)


def guarded(path: Path, build: Callable[[], _Built]) -> _Built:
    """`build()`, with whatever the library raises as a `TokenizerError`."""
    try:
        return build()
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise TokenizerError(f"{path}: not a tokenizer that can be used ({error}); fetch it again") from error
