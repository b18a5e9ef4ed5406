"""Text to ids and back, for every tokenizer layout of a Hugging Face folder.

`Tokenizer.load` takes, in this order, `tokenizer.json`, `tokenizer.model` or `spiece.model` (SentencePiece, BPE or
Unigram), `vocab.json` + `merges.txt` (byte-level BPE; also under the names `encoder.json` + `vocab.bpe`), or
`vocab.txt` (WordPiece).

Special tokens in plain text: a string such as `<|endoftext|>` or `</s>` inside a text becomes that token's id, as
transformers does and as chat templates need it. Text of strangers that must not hold them is the caller's to clean.
Decoding never cleans up spaces (`clean_up_tokenization_spaces` is ignored): it would change the text.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pyllm.detokenizer import Detokenizer, Stage, sentencepiece_stages, stages_of
from pyllm.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from pyllm.sentencepiece import SentencePieceEncoder, SentencePieceModel

_MAX_FILE_BYTES = 512 << 20
_PROMPT_TAIL = 64  # ids of a prompt that can still matter to the text after it: an unfinished character is 4 bytes

_Built = TypeVar("_Built")

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class PairEncoding:
    """Two texts as one input: `ids`, and `type_ids` with 0 or 1 for each as the model tells the texts apart."""

    ids: list[int]
    type_ids: list[int]


class Tokenizer:
    """Encodes, decodes, streams, and renders chats. Make one with `load`."""

    vocab_size: int
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __init__(self, backend: _Backend, settings: _Settings) -> None:
        """Use `load`."""
        self._backend = backend
        self._settings = settings
        self._special_ids = backend.special_ids
        self.vocab_size = backend.vocab_size
        self.bos_token_id = self._id_of("bos_token")
        self.pad_token_id = self._id_of("pad_token")
        self.unk_token_id = self._id_of("unk_token")
        if self.bos_token_id is None:
            self.bos_token_id = settings.first_valid_id("bos_token_id", self.vocab_size)
        self.eos_token_ids = settings.eos_ids(self._id_of("eos_token"), self.vocab_size)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of the model in `folder`; `TokenizerError` when there is none or it is malformed."""
        folder = Path(folder)
        settings = _Settings.load(folder)
        if (folder / "tokenizer.json").is_file():
            return cls(_from_tokenizer_json(folder / "tokenizer.json", settings), settings)
        for name in ("tokenizer.model", "spiece.model"):
            if (folder / name).is_file():
                return cls(_from_sentencepiece(folder / name, settings), settings)
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file() and (folder / merges).is_file():
                return cls(_from_vocab_and_merges(folder / vocab, folder / merges, settings), settings)
        if (folder / "vocab.txt").is_file():
            return cls(_from_vocab_txt(folder / "vocab.txt", settings), settings)
        raise TokenizerError(
            f"{folder}: no tokenizer found; expected tokenizer.json, tokenizer.model, spiece.model, vocab.json with "
            "merges.txt, encoder.json with vocab.bpe, or vocab.txt. Copy the tokenizer's files into the folder, or "
            "pass token ids."
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens` also those the model expects around it."""
        _check_text(text)
        return self._backend.encode(text, add_special_tokens)

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


class _Backend(Protocol):
    """What the layouts have in common."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...
    def encode_pair(self, first: str, second: str, max_tokens: int | None) -> PairEncoding: ...
    def token_of(self, token_id: int) -> str | None: ...
    def id_of(self, token: str) -> int | None: ...
    def to_json(self) -> str: ...
    def stages(self) -> list[Stage]: ...


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


# --- the folder's settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AddedToken:
    """A token that is found in text before anything else."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class _Settings:
    """What the JSON files beside the vocabulary say."""

    folder: Path
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    tokenizer: dict[str, Any]  # tokenizer_config.json
    special_tokens: dict[str, str]  # bos_token -> "<s>", ...
    added: dict[int, _AddedToken]  # ids that the settings fix
    extra_special: tuple[str, ...]
    chat_template: str | None

    @classmethod
    def load(cls, folder: Path) -> _Settings:
        tokenizer = _read_json_object(folder / "tokenizer_config.json")
        special_map = _read_json_object(folder / "special_tokens_map.json")
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
            config=_read_json_object(folder / "config.json"),
            generation=_read_json_object(folder / "generation_config.json"),
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


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if the file is missing."""
    if not path.is_file():
        return {}
    value = _read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error or 'nested too deeply'}); fetch it again") from error


def _read_text(path: Path) -> str:
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


def _added_tokens(folder: Path, tokenizer: dict[str, Any]) -> dict[int, _AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json and `added_tokens.json`, by id."""
    added: dict[int, _AddedToken] = {}
    for content, token_id in _read_json_object(folder / "added_tokens.json").items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise TokenizerError(f"{folder / 'added_tokens.json'}: entry {content!r}: {token_id!r}, expected an id")
        added[token_id] = _AddedToken(content)
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
        added[int(key)] = _AddedToken(
            text,
            *(bool(flags.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")),
        )
    return dict(sorted(added.items()))


def _chat_template(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        named = {
            entry["name"]: entry["template"]
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


# --- tokenizer.json, vocab.json + merges.txt -----------------------------------------------------------------------


class _LibraryBackend:
    """Everything done by a `tokenizers.Tokenizer`, except decoding."""

    def __init__(self, library: tokenizers.Tokenizer, settings: _Settings) -> None:
        library.no_truncation()
        library.no_padding()
        _mark_added(library, settings)
        _apply_bos_eos_flags(library, settings)
        self._library = library
        self.vocab_size = library.get_vocab_size(with_added_tokens=True)
        self.token_of = library.id_to_token
        self.id_of = library.token_to_id
        named = {library.token_to_id(text) for text in settings.all_special()}
        marked = {index for index, token in library.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(marked | {index for index in named if index is not None})
        self.stages: Callable[[], list[Stage]] = stages_of(_decoder_of(library))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_pair(self, first: str, second: str, max_tokens: int | None) -> PairEncoding:
        one, two = (self._library.encode(text, add_special_tokens=False) for text in (first, second))
        if max_tokens is not None:
            room = max_tokens - self._library.num_special_tokens_to_add(is_pair=True)
            if room < 0:
                raise TokenizerError(
                    f"max_tokens: expected at least the {max_tokens - room} special tokens of a pair, got {max_tokens}"
                )
            shorter, longer = sorted((one, two), key=len)
            shorter.truncate(min(len(shorter), room // 2))
            longer.truncate(min(len(longer), room - len(shorter)))
        encoding = self._library.post_process(one, two)
        return PairEncoding(encoding.ids, encoding.type_ids)

    def to_json(self) -> str:
        text: str = self._library.to_str()
        return text


def _decoder_of(library: tokenizers.Tokenizer) -> dict[str, Any] | None:
    if library.decoder is None:
        return None
    spec: dict[str, Any] = json.loads(library.decoder.__getstate__())
    return spec


def _from_tokenizer_json(path: Path, settings: _Settings) -> _LibraryBackend:
    from tokenizers import Tokenizer as Library

    text = _read_text(path)
    library = _guarded(path, lambda: Library.from_str(text))
    return _guarded(path, lambda: _LibraryBackend(library, settings))


def _guarded(path: Path, build: Callable[[], _Built]) -> _Built:
    """`build()`, with whatever the library raises as a `TokenizerError`."""
    try:
        return build()
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise TokenizerError(f"{path}: not a tokenizer that can be used ({error}); fetch it again") from error


def _mark_added(library: tokenizers.Tokenizer, settings: _Settings) -> None:
    """Add the tokens that the settings name, at the ids they give; those without an id must be in the vocabulary."""
    from tokenizers import AddedToken

    known = {token.content for token in library.get_added_tokens_decoder().values()}
    for token_id, token in settings.added.items():
        if token.content in known:
            continue
        expected = library.token_to_id(token.content)
        if expected is None:
            expected = library.get_vocab_size(with_added_tokens=True)
        if expected != token_id:
            raise TokenizerError(
                f"{settings.folder}: added token {token.content!r} is declared with id {token_id}, but the vocabulary "
                f"gives it {expected}; the tokenizer's files do not belong together"
            )
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        library.add_tokens([AddedToken(token.content, **flags)])
        known.add(token.content)
    named = [text for text in settings.all_special() if text not in known and library.token_to_id(text) is not None]
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in named])


def _apply_bos_eos_flags(library: tokenizers.Tokenizer, settings: _Settings) -> None:
    """`add_bos_token` / `add_eos_token`, where tokenizer_config.json has them, replace the file's own rule."""
    from tokenizers import processors

    flags = {name: settings.flag(f"add_{name}") for name in ("bos_token", "eos_token")}
    if all(flag is None for flag in flags.values()):
        return
    wanted: dict[str, tuple[str, int]] = {}
    for name, flag in flags.items():
        text = settings.special_tokens.get(name)
        if flag and text is not None and (token_id := library.token_to_id(text)) is not None:
            wanted[name] = text, token_id
    before, after = (f"{wanted[name][0]}:{{0}} " if name in wanted else "" for name in ("bos_token", "eos_token"))
    template = f"{before}${{1}}:{{0}} {after}"
    library.post_processor = processors.TemplateProcessing(
        single=template.format(0, "A").split(),
        pair=(template.format(0, "A") + template.format(1, "B")).split(),
        special_tokens=list(wanted.values()),
    )


# Words of the GPT-2 tokenizer come from ByteLevel itself; these tokenizers split differently.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL_CLASSES = {
    "GPT2Tokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2",
    "RobertaTokenizer": "roberta",
    "BartTokenizer": "roberta",
}
_BYTE_LEVEL_MODEL_TYPES = {"gpt2": "gpt2", "qwen2": "qwen2", "qwen3": "qwen2", "roberta": "roberta", "bart": "roberta"}


def _from_vocab_and_merges(vocab_path: Path, merges_path: Path, settings: _Settings) -> _LibraryBackend:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    kind = _byte_level_kind(settings)
    vocab = _read_vocab(vocab_path)
    merges = _read_merges(merges_path, vocab)
    library = _guarded(vocab_path, lambda: Library(models.BPE(vocab=vocab, merges=merges)))
    prefix = settings.flag("add_prefix_space") or False
    library.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        library.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        library.post_processor = processors.ByteLevel(trim_offsets=False)
    defaults = {
        "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "roberta": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "sep_token": "</s>",
            "cls_token": "<s>",
            "mask_token": "<mask>",
        },
    }[kind]
    for name, text in defaults.items():
        if text in vocab:
            settings.special_tokens.setdefault(name, text)
    if kind == "roberta" and "</s>" in vocab and "<s>" in vocab:
        library.post_processor = processors.RobertaProcessing(
            ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]), trim_offsets=False, add_prefix_space=prefix
        )
    return _guarded(vocab_path, lambda: _LibraryBackend(library, settings))


def _byte_level_kind(settings: _Settings) -> str:
    """Which words a byte-level BPE of vocab.json + merges.txt splits text into."""
    return _declared_kind(settings, _BYTE_LEVEL_CLASSES, _BYTE_LEVEL_MODEL_TYPES, "gpt2", "vocab.json + merges.txt")


def _declared_kind(
    settings: _Settings, classes: dict[str, str], model_types: dict[str, str], default: str, files: str
) -> str:
    """What the tokenizer's class stands for, or else the model's type, which defaults to `default`."""
    name = settings.tokenizer.get("tokenizer_class")
    if isinstance(name, str):
        kind = classes.get(name.removesuffix("Fast"))
    else:
        name = settings.config.get("model_type", default)
        kind = model_types.get(name) if isinstance(name, str) else None
    if kind is None:
        raise TokenizerError(
            f"{settings.folder}: {files} of a {name!r} tokenizer are not supported, only those of "
            f"{', '.join(classes)}. Put the model's tokenizer.json beside them."
        )
    return kind


_WORDPIECE_CLASSES = dict.fromkeys(("BertTokenizer", "ElectraTokenizer", "DistilBertTokenizer"), "wordpiece")
_WORDPIECE_MODEL_TYPES = dict.fromkeys(("bert", "electra", "distilbert"), "wordpiece")


def _from_vocab_txt(path: Path, settings: _Settings) -> _LibraryBackend:
    from pyllm import wordpiece

    _declared_kind(settings, _WORDPIECE_CLASSES, _WORDPIECE_MODEL_TYPES, "bert", "vocab.txt")
    if settings.flag("do_basic_tokenize") is False:
        raise TokenizerError(
            f"{settings.folder / 'tokenizer_config.json'}: do_basic_tokenize: expected true, found false, which is not "
            "supported. Put the model's tokenizer.json into the folder."
        )
    vocab = wordpiece.parse_vocab(_read_text(path), str(path))
    for name, text in wordpiece.SPECIAL_TOKENS.items():
        settings.special_tokens.setdefault(name, text)
    lower, split_chinese = settings.flag("do_lower_case"), settings.flag("tokenize_chinese_chars")

    def build() -> _LibraryBackend:
        library = wordpiece.build(
            vocab,
            settings.special_tokens,
            str(path),
            lower=lower is not False,
            strip_accents=settings.flag("strip_accents"),
            split_chinese=split_chinese is not False,
        )
        return _LibraryBackend(library, settings)

    return _guarded(path, build)


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json_object(path)
    wrong = [token for token, index in vocab.items() if type(index) is not int or not 0 <= index < 1 << 31]
    if not vocab or wrong:
        found = f"{wrong[0]!r}: {vocab[wrong[0]]!r}" if wrong else "an empty object"
        raise TokenizerError(f"{path}: expected tokens with their ids, found {found}")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{path}: several tokens share one id; the file is damaged")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    lines = _read_text(path).split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or not left or not right or " " in right:
            raise TokenizerError(f"{path}: line {number} is {line[:80]!r}, expected two tokens")
        missing = [token for token in (left, right, left + right) if token not in vocab]
        if missing:
            raise TokenizerError(
                f"{path}: line {number} needs {missing[0][:80]!r}, which the vocabulary lacks; "
                "the two files do not belong together"
            )
        merges.append((left, right))
    return merges


# --- tokenizer.model -----------------------------------------------------------------------------------------------


def _from_sentencepiece(path: Path, settings: _Settings) -> _SentencePieceBackend:
    from pyllm.sentencepiece import SentencePieceEncoder, SentencePieceModel

    model = SentencePieceModel.load(path)
    encoder = _guarded(path, lambda: SentencePieceEncoder(model))
    return _SentencePieceBackend(model, encoder, settings)


class _SentencePieceBackend:
    """A SentencePiece model and the special tokens around it."""

    def __init__(self, model: SentencePieceModel, encoder: SentencePieceEncoder, settings: _Settings) -> None:
        from pyllm.sentencepiece import PieceType

        self._encoder = encoder
        is_t5 = settings.tokenizer.get("tokenizer_class") in ("T5Tokenizer", "T5TokenizerFast") or (
            "tokenizer_class" not in settings.tokenizer and settings.config.get("model_type") in ("t5", "mt5", "umt5")
        )
        if is_t5:
            _add_sentinels(settings, len(model.pieces))
        tokens: list[str | None] = [piece.text for piece in model.pieces]
        added: dict[str, tuple[int, _AddedToken]] = {}
        for index, piece in enumerate(model.pieces):
            if piece.type is PieceType.CONTROL:
                added[piece.text] = index, _AddedToken(piece.text)
        highest = len(tokens) + len(settings.added)
        for index, token in settings.added.items():
            if index >= highest:
                raise TokenizerError(
                    f"{settings.folder}: added token {token.content!r} has id {index}, but only {highest - 1} can be "
                    "reached by the pieces and added tokens; the tokenizer's files do not belong together"
                )
            tokens.extend([None] * (index + 1 - len(tokens)))
            tokens[index] = token.content
            added[token.content] = index, token
        ids = {text: index for index, text in reversed(list(enumerate(tokens))) if text is not None}
        for name, index in (("bos_token", model.bos_id), ("eos_token", model.eos_id), ("unk_token", model.unk_id)):
            if 0 <= index < len(model.pieces):
                settings.special_tokens.setdefault(name, model.pieces[index].text)
        for text in settings.all_special():
            if text in ids:
                added.setdefault(text, (ids[text], _AddedToken(text)))
        self._tokens, self._ids, self._added = tokens, ids, added
        self._split = _split_pattern([token for _, token in added.values()])
        self.vocab_size = len(tokens)
        self.special_ids = frozenset(index for index, token in added.values() if token.special) | {model.unk_id}
        self._prefix = self._named(settings, "bos_token", not is_t5)
        self._suffix = self._named(settings, "eos_token", is_t5)
        self._space_everywhere = is_t5 or settings.flag("legacy") is True
        self._space_in_front = settings.flag("add_prefix_space") is not False
        self._strips = (
            model.add_dummy_prefix or model.remove_extra_whitespaces,
            model.remove_extra_whitespaces,
        )

    def _named(self, settings: _Settings, name: str, default: bool) -> list[int]:
        """The id of a named token as a list, empty when `add_<name>` (or its default) says not to add it."""
        flag = settings.flag(f"add_{name}")
        index = self._ids.get(settings.special_tokens.get(name, ""))
        return [index] if index is not None and (default if flag is None else flag) else []

    def to_json(self) -> str:
        raise TokenizerError("it is a SentencePiece model without a tokenizer.json: put that of the model beside it")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._prefix) if add_special_tokens else []
        position = 0
        for match in self._split.finditer(text) if self._split else ():
            self._encode_plain(text, position, match.start(), ids)
            found = match.group()
            ids.append(self._added[found if found in self._added else found.strip()][0])
            position = match.end()
        self._encode_plain(text, position, len(text), ids)
        if add_special_tokens:
            ids.extend(self._suffix)
        return ids

    def _encode_plain(self, text: str, start: int, end: int, ids: list[int]) -> None:
        if start < end:
            front = self._space_in_front and (start == 0 or self._space_everywhere)
            ids.extend(self._encoder.encode(text[start:end], add_prefix=front))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def encode_pair(self, first: str, second: str, max_tokens: int | None) -> PairEncoding:
        raise TokenizerError(
            "pairs of texts: a SentencePiece model does not say how they are put together. Put the model's "
            "tokenizer.json into the folder, which does."
        )

    def token_of(self, token_id: int) -> str | None:
        return self._tokens[token_id] if token_id < len(self._tokens) else None

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def stages(self) -> list[Stage]:
        return sentencepiece_stages(*self._strips)


def _add_sentinels(settings: _Settings, pieces: int) -> None:
    """T5's tokens for masked spans, unless they are written down: behind the pieces, <extra_id_0> last."""
    if any(token.content.startswith("<extra_id_") for token in settings.added.values()):
        return
    count = settings.tokenizer.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 10_000:
        raise TokenizerError(
            f"{settings.folder / 'tokenizer_config.json'}: extra_ids: expected an integer from 0 to 10000, found "
            f"{count!r}"
        )
    for index in range(count):
        settings.added.setdefault(pieces + index, _AddedToken(f"<extra_id_{count - 1 - index}>"))


def _split_pattern(added: list[_AddedToken]) -> re.Pattern[str] | None:
    """Finds the longest added token at each place, with the spaces that it swallows."""
    if not added:
        return None
    alternatives: list[str] = []
    for token in sorted(added, key=lambda token: len(token.content), reverse=True):
        pattern = re.escape(token.content)
        if token.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        alternatives.append((r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(alternatives))
