"""Reads training text: `.txt`, one document a file, and `.jsonl`, one document a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm.errors import DataError, TokenizerError, shown
from pyllm.folder import unique_names
from pyllm.tokenizer import Tokenizer

PIECE_CHARACTERS = 1 << 20  # of a text file that are tokenised together: as many, up to twice as many
MAX_LINE_BYTES = 64 << 20
KEYS = "`text`, `prompt` and `completion`, `source` and `target`, or `messages`"
PAIRS = (("prompt", "completion"), ("source", "target"))  # what is given, and what is to be written


@dataclass(frozen=True)
class Document:
    """Texts in order, each with whether its tokens are an answer, that is, no prompt.

    `open` says that more of the same document follows, so that no end token is due; `chat` that a template made the
    text, which brings its own special tokens. `maskable` is False where a template does not let prompt and answer be
    told apart.
    """

    parts: tuple[tuple[str, bool], ...]
    open: bool = False
    chat: bool = False
    maskable: bool = True
    bytes_read: int = 0  # of the file, so far


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of a file; raises `DataError` for what is empty, binary or malformed."""
    if path.suffix == ".txt":
        return _read_text(path)
    if path.suffix == ".jsonl":
        return _read_lines(path, tokenizer)
    raise DataError(f"{path}: expected a file named .txt, .jsonl or .bin")


def read_texts(path: Path) -> Iterator[str]:
    """The plain texts of a file, without any template; raises `DataError`."""
    if path.suffix == ".jsonl":
        for record, at, _ in read_records(path):
            names = ("text", *(name for pair in PAIRS for name in pair))
            keys = [key for key in names if isinstance(record.get(key), str)]
            yield from (record[key] for key in keys)
            messages = record.get("messages")
            said = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
            yield from (text for text in said if isinstance(text, str))
            if not keys and not said:
                raise DataError(f"{at}: expected {KEYS}, found {', '.join(sorted(record)) or 'no keys'}")
    elif path.suffix == ".txt":
        for document in _read_text(path):
            yield from (text for text, _ in document.parts)
    else:
        raise DataError(f"{path}: expected a file named .txt or .jsonl")


def _read_text(path: Path) -> Iterator[Document]:
    """A text in pieces, so that its length costs no memory.

    Byte-level tokenizers with the patterns of GPT-2 or Llama 3 give the ids of the whole text, as long as it can be cut
    beside a line end or space with no other white space at its side.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()

    def decode(data: bytes) -> str:
        return decoder.decode(data, final=not data)  # the beginning of a character waits for its end

    read, rest = 0, ""
    with path.open("rb") as file:
        for data in iter(lambda: file.read(PIECE_CHARACTERS), b""):
            rest += _decoded(data, path, read, decode)
            read += len(data)
            if len(rest) >= PIECE_CHARACTERS:
                cut = _cut(rest)
                yield Document(((rest[:cut], True),), open=True, bytes_read=read)
                rest = rest[cut:]
    rest += _decoded(b"", path, read, decode)
    if rest:
        yield Document(((rest, True),), bytes_read=read)


def _cut(text: str) -> int:
    """Where to cut: after the last line, else before the last space, that stands alone; else before the last character.

    White space in a row stays in one piece, as patterns tell its end from what follows.
    """
    for mark, after in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, -1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
            at = text.rfind(mark, 1, at)
    return len(text) - 1


def _read_lines(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    for record, at, read in read_records(path):
        yield _document(record, at, tokenizer, read)


def read_records(path: Path, keys: str = KEYS) -> Iterator[tuple[dict[str, Any], str, int]]:
    """The objects of a `.jsonl` file, each with where it stands and the bytes read so far; raises `DataError`, which
    names the `keys` that are expected."""
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            at = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{at}: longer than {MAX_LINE_BYTES} bytes; is this one JSON object a line?")
            text = _decoded(line, path, read).strip()
            read += len(line)
            if not text:
                continue
            try:
                record = json.loads(text, object_pairs_hook=unique_names)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{at}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{at}: expected a JSON object with {keys}, found {shown(record)}")
            if "\\u" in text:  # only an escape can stand for half of a surrogate pair
                try:
                    json.dumps(record, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    half = ord(error.object[error.start])
                    raise DataError(
                        f"{at}: \\u{half:04x} is half of a surrogate pair, which stands for no character by itself"
                    ) from error
            yield record, at, read


def _document(record: Mapping[str, Any], at: str, tokenizer: Tokenizer, read: int) -> Document:
    keys = {"text", "messages", *(name for pair in PAIRS for name in pair)} & record.keys()
    if keys == {"messages"}:
        return _conversation(record["messages"], at, tokenizer, read)
    if keys != {"text"} and not any(keys == set(pair) for pair in PAIRS):
        raise DataError(f"{at}: expected {KEYS}, found {', '.join(sorted(record)) or 'no keys'}")
    for key in keys:
        if not isinstance(record[key], str):
            raise DataError(f"{at}: {key}: expected a string, found {shown(record[key])}")
    if keys == {"text"}:
        return Document(((record["text"], True),), bytes_read=read)
    [(given, written)] = [pair for pair in PAIRS if keys == set(pair)]
    return Document(((record[given], False), (record[written], True)), bytes_read=read)


def _conversation(messages: object, at: str, tokenizer: Tokenizer, read: int) -> Document:
    """A conversation through the chat template; what the assistant says is the answer."""
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        raise DataError(f"{at}: messages: expected a list of objects with role and content, found {shown(messages)}")
    try:
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        parts, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
            answer = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
            if not (whole.startswith(answer) and answer.startswith(prompt) and len(prompt) >= done):
                return Document(((whole, True),), chat=True, maskable=False, bytes_read=read)
            parts += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answer)], True)]
            done = len(answer)
    except TokenizerError as error:
        raise DataError(f"{at}: {error}") from error
    parts.append((whole[done:], False))
    return Document(tuple(part for part in parts if part[0]), chat=True, bytes_read=read)


def _decoded(data: bytes, path: Path, before: int, decode: Callable[[bytes], str] = bytes.decode) -> str:
    """Text; refuses what is not UTF-8 and what holds NUL bytes, which no text does.

    `before` counts the bytes of the file before `data`; `decode` may hold back some of them.
    """
    zero = data.find(b"\0")
    try:
        if zero < 0:
            return decode(data)
        what, where, byte = "a zero byte", zero, 0
    except UnicodeDecodeError as error:
        what, where = error.reason, error.start + len(data) - len(error.object)
        byte = error.object[error.start]
    raise DataError(
        f"{path}: not UTF-8 text: {what} at byte {before + where} (0x{byte:02x}). Convert it, for example with "
        "iconv -t UTF-8; token files are named .bin."
    )
