"""Tokenised text: made once, kept in a cache folder under a name that depends on the content, mapped from then on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pyllm.convert.new_folder import new_folder
from pyllm.errors import DataError
from pyllm.tokenizer import Tokenizer
from pyllm.train.documents import Document, read_documents
from pyllm.train.token_files import Tokens, read_bin

FORMAT = 2
STEP = 1 << 18  # tokens that are looked at together
BATCH_CHARACTERS = 1 << 22  # that are tokenised together
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)

Progress = Callable[[float], None]


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a file, mapped into memory.

    `ends` int64 [documents]: where each document ends; `answers` uint8 [tokens]: 1 where a token is no part of a
    prompt, or None where none is. `key` identifies content and tokenizer. A part of a file has documents of the file
    `before` its own, of `of` in all.
    """

    tokens: Tokens
    ends: NDArray[np.int64]
    answers: NDArray[np.uint8] | None
    maskable: bool
    key: str
    name: str
    before: int = 0
    of: int | None = None

    def document(self, index: int) -> str:
        """In words, which document of the file this one is."""
        return f"document {self.before + index + 1} of {len(self.ends) if self.of is None else self.of}"

    def answers_between(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens of answers are in each of these parts, which rise, do not overlap and are not empty."""
        assert self.answers is not None
        counts, at = np.empty(len(firsts), np.int64), 0
        while at < len(firsts):  # few tokens at a time, of which numpy makes a wider copy
            begin = firsts[at]
            end = max(at + 1, int(np.searchsorted(lasts, begin + STEP)))
            edges = np.stack([firsts[at:end], lasts[at:end]], 1).ravel()[:-1] - begin
            counts[at:end] = np.add.reduceat(self.answers[begin : lasts[end - 1]], edges, dtype=np.int64)[::2]
            at = end
        return counts

    def split(self, share: float, whole: bool = False) -> tuple[TokenStore, TokenStore]:
        """All but the last `share` of the tokens, or a little more, and that; between documents where there are 20, or
        where they must stay `whole`."""
        cut = int(len(self.tokens) * (1 - share))
        if whole or len(self.ends) >= 20:
            cut = int(self.ends[max(int(np.searchsorted(self.ends, cut, "right")) - 1, 0)])
        if not 2 <= cut <= len(self.tokens) - 2:
            raise DataError(
                f"{self.name}: {len(self.tokens)} tokens cannot be split so that {share:.3g} of them are held out: "
                "give more text, or held-out data of its own"
            )
        return self._slice(0, cut), self._slice(cut, len(self.tokens))

    def _slice(self, start: int, stop: int) -> TokenStore:
        inside = self.ends[(self.ends > start) & (self.ends < stop)] - start
        before = int(np.searchsorted(self.ends, start, "right"))
        return TokenStore(
            self.tokens[start:stop],
            np.append(inside, stop - start),
            None if self.answers is None else self.answers[start:stop],
            self.maskable,
            f"{self.key}[{start}:{stop}]",
            self.name,
            self.before + before,
            len(self.ends) if self.of is None else self.of,
        )


def open_tokens(
    path: Path, tokenizer_folder: Path | None, cache: Path | None = None, progress: Progress | None = None
) -> TokenStore:
    """The tokens of a `.txt`, `.jsonl` or `.bin` file.

    Text is tokenised by the tokenizer in `tokenizer_folder`, once for its content, into `cache` (default: the user's).
    An end token follows each document that has none, and what the tokenizer puts before texts comes first. Raises
    `DataError`.
    """
    try:
        regular, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not regular:
        raise DataError(f"{path}: {'expected a file, found something else' if exists else 'no such file'}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    tokenizer = Tokenizer.load(tokenizer_folder) if tokenizer_folder is not None else None
    if path.suffix == ".bin":
        store = _of_bin(path, tokenizer)
    else:
        if tokenizer_folder is None or tokenizer is None:
            raise DataError(f"{path}: text needs a tokenizer: give its folder")
        key = content_key(path, tokenizer_folder)
        folder = (cache or default_cache()) / key
        if not (folder / "meta.json").is_file():
            _tokenise(path, tokenizer, folder, progress)
        store = _opened(folder, key, str(path))
    if len(store.tokens) < 2:
        raise DataError(f"{path}: holds {len(store.tokens)} token; at least two are needed, as each predicts the next")
    return store


def default_cache() -> Path:
    """PYLLM_CACHE, else ~/.cache/pyllm (or under XDG_CACHE_HOME); tokens lie in `tokens` in it."""
    given = os.environ.get("PYLLM_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyllm"
    return (Path(given) if given else home) / "tokens"


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What may end a document, the first of which is added to one that has none: the tokenizer's end tokens, or what
    it puts behind a text where it has none or that is one of them, as encoders' [SEP]."""
    behind, ends = tokenizer.around()[1], tokenizer.eos_token_ids
    return tuple(behind[:1]) if behind and (not ends or behind[0] in ends) else ends


def _of_bin(path: Path, tokenizer: Tokenizer | None) -> TokenStore:
    """A token file; its documents end where the tokenizer's end token stands."""
    tokens = read_bin(path, tokenizer.vocab_size if tokenizer else None)
    final = tokenizer.eos_token_ids if tokenizer is not None else ()
    ends = np.append(np.flatnonzero(np.isin(tokens, final)) + 1 if final else [], len(tokens)).astype(np.int64)
    key = digest(path) + "".join(f"-{token}" for token in final)
    return TokenStore(tokens, np.unique(ends), None, True, key, str(path))


def _tokenise(path: Path, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    try:
        with new_folder(folder) as partial:
            with (partial / "tokens").open("xb") as tokens, (partial / "answers").open("xb") as answers:
                writer = _Writer(tokens, answers, tokenizer)
                batch: list[Document] = []
                waiting = 0
                for document in read_documents(path, tokenizer):
                    batch.append(document)
                    waiting += sum(len(text) for text, _ in document.parts)
                    if waiting >= BATCH_CHARACTERS:
                        writer.add(batch)
                        batch, waiting = [], 0
                        if progress is not None:
                            progress(min(document.bytes_read / size, 1.0))
                writer.add(batch)
            if not writer.masked:
                (partial / "answers").unlink()
            writer.finish(partial)
    except FileExistsError:  # another process made the same meanwhile
        if not (folder / "meta.json").is_file():
            raise
    if progress is not None:
        progress(1.0)


class _Writer:
    """Appends documents' tokens, and which of them are answers, to two files."""

    def __init__(self, tokens: BinaryIO, answers: BinaryIO, tokenizer: Tokenizer) -> None:
        self.tokens, self.answers, self.tokenizer = tokens, answers, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.ends: list[int] = []
        self.masked, self.maskable, self.count = False, True, 0
        self._start, self._final = tokenizer.around()[0], end_tokens(tokenizer)
        self._open = False  # whether the last document goes on

    def add(self, documents: Sequence[Document]) -> None:
        """Tokenise documents together, in parallel, and write them."""
        texts = [text for document in documents for text, _ in document.parts]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        final = self._final
        for document in documents:
            begins = not self._open and not document.chat
            ids = list(self._start) if begins else []
            answers = [document.parts[0][1]] * len(ids) if ids else []
            for _, answer in document.parts:
                more = next(encoded)
                ids += more
                answers += [answer] * len(more)
            self._open = document.open
            if not document.open and not document.chat and final and (not ids or ids[-1] not in final):
                ids.append(final[0])
                answers.append(True)
            self._write(np.array(ids, self.dtype), np.array(answers, np.uint8), document)

    def _write(self, ids: Tokens, answers: NDArray[np.uint8], document: Document) -> None:
        self.tokens.write(ids.tobytes())
        self.answers.write(answers.tobytes())
        self.masked |= not answers.all()
        self.maskable &= document.maskable
        if not document.chat:  # end tokens within a text separate documents
            inner = np.flatnonzero(np.isin(ids, self._final))
            self.ends += (self.count + inner + 1).tolist()
        self.count += len(ids)
        if not document.open and self.count > (self.ends[-1] if self.ends else 0):  # a template may give no text
            self.ends.append(self.count)

    def finish(self, folder: Path) -> None:
        """Write what lies beside the two files."""
        np.array(self.ends, "<i8").tofile(folder / "ends")
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "tokens": self.count,
            "documents": len(self.ends),
            "masked": self.masked,
            "maskable": self.maskable,
        }
        (folder / "meta.json").write_text(json.dumps(meta))


def _opened(folder: Path, key: str, name: str) -> TokenStore:
    def mapped(file: str, dtype: str, count: int) -> NDArray[Any]:
        path = folder / file
        expected = count * np.dtype(dtype).itemsize
        if path.stat().st_size != expected:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {expected}")
        return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)

    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT or meta["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"unknown format {meta['format']!r}")
        tokens = mapped("tokens", meta["dtype"], meta["tokens"])
        ends = mapped("ends", "<i8", meta["documents"])
        answers = mapped("answers", "|u1", meta["tokens"]) if meta["masked"] else None
        return TokenStore(tokens, ends, answers, bool(meta["maskable"]), key, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the cached tokens of {name} are damaged ({error}): remove this folder") from error


def content_key(path: Path, tokenizer_folder: Path) -> str:
    """Identifies the content of a file and of the tokenizer that its text is read by."""
    parts = [str(FORMAT), path.suffix, digest(path)]
    for name in TOKENIZER_FILES:
        file = tokenizer_folder / name
        if file.is_file():
            parts += [name, digest(file)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def digest(path: Path) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        state = hashlib.blake2b(digest_size=16)
        while data := file.read(1 << 20):
            state.update(data)
        return state.hexdigest()
