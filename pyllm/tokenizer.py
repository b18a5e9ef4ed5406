"""Text to ids and back, for every tokenizer layout of a Hugging Face folder.

`Tokenizer.load` takes, in this order, `tokenizer.json`, `tokenizer.model`, `spiece.model` or `sentencepiece.bpe.model`
(SentencePiece, BPE or Unigram), `vocab.json` + `merges.txt` (BPE of bytes, or GPT-1's of words; also under the names
`encoder.json` + `vocab.bpe`), or `vocab.txt` (WordPiece).

Special tokens in plain text: a string such as `<|endoftext|>` or `</s>` inside a text becomes that token's id, as
transformers does and as chat templates need it. Text of strangers that must not hold them is the caller's to clean.
Decoding never cleans up spaces (`clean_up_tokenization_spaces` is ignored): it would change the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyllm.detokenizer import Detokenizer
from pyllm.errors import TokenizerError
from pyllm.tokenizer_backend import Backend, PairEncoding, Settings, Span
from pyllm.tokenizer_library import from_tokenizer_json, from_vocab_and_merges, from_vocab_txt
from pyllm.tokenizer_pieces import FAIRSEQ_FILE, from_sentencepiece

_LANGUAGE = re.compile(r"[a-z]{2}_[A-Z]{2}")  # marks such as en_XX
_PROMPT_TAIL = 64  # ids of a prompt that can still matter to the text after it: an unfinished character is 4 bytes


class Tokenizer:
    """Encodes, decodes, streams, and renders chats. Make one with `load`."""

    vocab_size: int
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __init__(self, backend: Backend, settings: Settings) -> None:
        """Use `load`."""
        self._backend = backend
        self._settings = settings
        self._special_ids = backend.special_ids
        self.vocab_size = backend.vocab_size
        self.bos_token_id = self._id_of("bos_token")
        self.pad_token_id = self._id_of("pad_token")
        self.unk_token_id = self._id_of("unk_token")
        self.mask_token_id = self._id_of("mask_token")
        if self.bos_token_id is None:
            self.bos_token_id = settings.first_valid_id("bos_token_id", self.vocab_size)
        self.eos_token_ids = settings.eos_ids(self._id_of("eos_token"), self.vocab_size)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of the model in `folder`; `TokenizerError` when there is none or it is malformed."""
        folder = Path(folder)
        settings = Settings.load(folder)
        if (folder / "tokenizer.json").is_file():
            return cls(from_tokenizer_json(folder / "tokenizer.json", settings), settings)
        for name in ("tokenizer.model", "spiece.model", FAIRSEQ_FILE):
            if (folder / name).is_file():
                return cls(from_sentencepiece(folder / name, settings), settings)
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file() and (folder / merges).is_file():
                return cls(from_vocab_and_merges(folder / vocab, folder / merges, settings), settings)
        if (folder / "vocab.txt").is_file():
            return cls(from_vocab_txt(folder / "vocab.txt", settings), settings)
        raise TokenizerError(
            f"{folder}: no tokenizer found; expected tokenizer.json, tokenizer.model, spiece.model, {FAIRSEQ_FILE}, "
            "vocab.json with merges.txt, encoder.json with vocab.bpe, or vocab.txt. Copy the tokenizer's files into "
            "the folder, or pass token ids."
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens` also those the model expects around it."""
        _check_text(text)
        return self._backend.encode(text, add_special_tokens)

    def encode_in(self, text: str, language: str) -> list[int]:
        """`encode`, marked with another language than the one that the tokenizer is set to, as mBART's texts are.

        Raises `TokenizerError` where there is no such language, or texts are not marked.
        """
        mark, ids, (before, behind) = self.language_id(language), self.encode(text), self.around()
        places = [*range(len(before)), *range(len(ids) - len(behind), len(ids))]
        marked = [at for at in places if _LANGUAGE.fullmatch(self.token_of(ids[at]) or "")]
        if not marked:
            raise TokenizerError(
                f"language: expected none, got {language!r}: this tokenizer marks no text with its own"
            )
        for at in marked:
            ids[at] = mark
        return ids

    @property
    def marks_behind(self) -> bool:
        """Whether the mark of a text's language stands behind it, as mBART has it, or before it, as mBART-50 has."""
        return any(_LANGUAGE.fullmatch(self.token_of(i) or "") for i in self.around()[1])

    def language_id(self, language: str) -> int:
        """The id of a language's mark, such as "en_XX"; `TokenizerError` where there is none."""
        token_id = self.id_of(language)
        if token_id is None or token_id not in self._special_ids or not _LANGUAGE.fullmatch(language):
            known = sorted(filter(_LANGUAGE.fullmatch, (self.token_of(i) or "" for i in self._special_ids)))
            expected = f"one of {', '.join(known)}" if known else "none, for this tokenizer has no marks of languages"
            raise TokenizerError(f"language: expected {expected}, got {language!r}")
        return token_id

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel where the backend can."""
        for text in texts:
            _check_text(text)
        return self._backend.encode_batch(texts, add_special_tokens)

    def encode_pair(self, first: str, second: str, max_tokens: int | None = None) -> PairEncoding:
        """Two texts as one input, with the special tokens that the model expects around and between them.

        With `max_tokens` the longer text is cut at its end until both fit, special tokens included; once they are
        equally long, both. Raises `TokenizerError` where not even the special tokens fit, and for a SentencePiece
        `tokenizer.model`, which does not say how pairs are put together.
        """
        _check_text(first)
        _check_text(second)
        return self._backend.encode_pair(first, second, max_tokens)

    def spans(self, text: str) -> list[Span | None]:
        """First character and end of what each token of `encode` stands for in the text; None for special tokens, and
        (None, None) for the others of a SentencePiece model, which does not say it.
        """
        _check_text(text)
        return self._backend.spans(text)

    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that `encode` puts before a text, and those behind it."""
        text = self.encode("a", add_special_tokens=False)
        whole, count = self.encode("a"), len(text)
        at = next((i for i in range(len(whole) - count + 1) if whole[i : i + count] == text), len(whole))
        return whole[:at], whole[at + count :]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids beyond the vocabulary (padding rows of an embedding) have no text."""
        stream = self.stream(skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A `Detokenizer` for ids as they come, after `prompt_ids`, whose own text it does not give.

        Without a prompt the joined pieces equal `decode` of all ids; with one they continue the prompt's text, leading
        space included.
        """
        special = self._special_ids if skip_special_tokens else frozenset()
        token_of = self._backend.token_of

        def shown(token_id: int) -> str | None:
            if token_id < 0:
                raise TokenizerError(f"cannot decode token id {token_id}: ids are 0 to {self.vocab_size - 1}")
            return None if token_id in special else token_of(token_id)

        stream = Detokenizer(shown, self._backend.stages())
        stream.push(prompt_ids[-_PROMPT_TAIL:])
        return stream

    def to_json(self) -> str:
        """The tokenizer as text of a tokenizer.json; `TokenizerError` for a SentencePiece model, which has none."""
        return self._backend.to_json()

    def token_of(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, as the tokenizer's file spells it; None beyond the vocabulary."""
        return None if token_id < 0 else self._backend.token_of(token_id)

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry, as the tokenizer's file spells it; None if there is none."""
        return self._backend.id_of(token)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` skips."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder came with a chat template."""
        return self._settings.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The folder's own, None where it has none."""
        return self._settings.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        `messages` are dicts with `role` and `content`; `extra` is handed to the template. Raises `TokenizerError` when
        there is no template, or when it fails or exceeds its caps.
        """
        template = self._settings.chat_template if chat_template is None else chat_template
        if template is None:
            raise TokenizerError(
                "this model has no chat template (no chat_template.jinja, and none in tokenizer_config.json): it was "
                "probably not trained on conversations. Give one with chat_template=, or use plain prompts."
            )
        from pyllm.chat_template import render_chat

        variables = {**self._settings.special_tokens, "documents": None, **extra}
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return render_chat(template, variables)

    def _id_of(self, name: str) -> int | None:
        token = self._settings.special_tokens.get(name)
        return None if token is None else self._backend.id_of(token)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text to encode is of type {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text to encode holds a lone surrogate ({text[error.start]!r} at character {error.start}), which no UTF-8 "
            "text can; decode the input with errors='replace'"
        ) from error
