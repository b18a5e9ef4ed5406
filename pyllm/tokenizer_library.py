"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, `vocab.json` + `merges.txt`, `vocab.txt`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyllm.detokenizer import Stage, stages_of
from pyllm.errors import TokenizerError
from pyllm.tokenizer_backend import Backend, PairEncoding, Settings, Span, fitting, guarded, read_json_object, read_text

if TYPE_CHECKING:
    import tokenizers


T = TypeVar("T")


class _LibraryBackend:
    """Everything done by a `tokenizers.Tokenizer`, except decoding."""

    def __init__(self, library: tokenizers.Tokenizer, settings: Settings) -> None:
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
        special = self._library.num_special_tokens_to_add(is_pair=True)
        for encoding, length in zip((one, two), fitting(len(one), len(two), special, max_tokens), strict=True):
            encoding.truncate(length)
        encoding = self._library.post_process(one, two)
        return PairEncoding(encoding.ids, encoding.type_ids)

    def spans(self, text: str) -> list[Span | None]:
        encoding = self._library.encode(text)
        places = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [None if special else _without_spaces(text, *place) for place, special in places]

    def to_json(self) -> str:
        text: str = self._library.to_str()
        return text


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the spaces before a word, which byte-level tokens hold, unless it has nothing else."""
    spaces = end - start - len(text[start:end].lstrip())
    return (start, end) if start + spaces == end else (start + spaces, end)


def _decoder_of(library: tokenizers.Tokenizer) -> dict[str, Any] | None:
    if library.decoder is None:
        return None
    spec: dict[str, Any] = json.loads(library.decoder.__getstate__())
    return spec


def from_tokenizer_json(path: Path, settings: Settings) -> Backend:
    """The tokenizer in a `tokenizer.json`."""
    from tokenizers import Tokenizer as Library

    text = read_text(path)
    library = guarded(path, lambda: Library.from_str(text))
    return guarded(path, lambda: _LibraryBackend(library, settings))


def _mark_added(library: tokenizers.Tokenizer, settings: Settings) -> None:
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


def _apply_bos_eos_flags(library: tokenizers.Tokenizer, settings: Settings) -> None:
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


@dataclass(frozen=True)
class _Bpe:
    """What a class of tokenizers does beside its vocabulary and merges."""

    special_tokens: dict[str, str]  # where the vocabulary has them
    of_bytes: bool = True  # or else of the characters of words in lower case
    words: str | None = None  # the pattern of a word, in a text in NFC; None: GPT-2's
    encloses: bool = False  # a text in <s> and </s>


_END_OF_TEXT = "<|endoftext|>"
_GPT2 = _Bpe({"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT})
_GPT = _Bpe({}, of_bytes=False)
_QWEN2 = _Bpe({"eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}, words=_QWEN2_WORDS)
_ROBERTA = _Bpe(
    {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    encloses=True,
)
_BPE_CLASSES = {
    "GPT2Tokenizer": _GPT2,
    "OpenAIGPTTokenizer": _GPT,
    "Qwen2Tokenizer": _QWEN2,
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
}
_BPE_MODEL_TYPES = {
    "gpt2": _GPT2,
    "openai-gpt": _GPT,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2,
    "roberta": _ROBERTA,
    "bart": _ROBERTA,
}


def from_vocab_and_merges(vocab_path: Path, merges_path: Path, settings: Settings) -> Backend:
    """A BPE of its vocabulary and merges: of bytes, or GPT-1's of words."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    kind = _declared_kind(settings, _BPE_CLASSES, _BPE_MODEL_TYPES, "gpt2", "vocab.json + merges.txt")
    vocab = _read_vocab(vocab_path)
    merges = _read_merges(merges_path, vocab)
    if not kind.of_bytes:
        return guarded(vocab_path, lambda: _LibraryBackend(_bpe_of_words(vocab, merges, settings), settings))
    library = guarded(vocab_path, lambda: Library(models.BPE(vocab=vocab, merges=merges)))
    prefix = settings.flag("add_prefix_space") or False
    library.decoder = decoders.ByteLevel()
    if kind.words is not None:
        library.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(kind.words), behavior="isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        library.post_processor = processors.ByteLevel(trim_offsets=False)
    for name, text in kind.special_tokens.items():
        if text in vocab:
            settings.special_tokens.setdefault(name, text)
    if kind.encloses and "</s>" in vocab and "<s>" in vocab:
        library.post_processor = processors.RobertaProcessing(
            ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]), trim_offsets=False, add_prefix_space=prefix
        )
    return guarded(vocab_path, lambda: _LibraryBackend(library, settings))


def _bpe_of_words(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """BERT's words in lower case, the last piece of each ending in `</w>`."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    unknown = settings.special_tokens.setdefault("unk_token", "<unk>")
    library = Library(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix="</w>"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    return library


def _declared_kind(settings: Settings, classes: dict[str, T], model_types: dict[str, T], default: str, files: str) -> T:
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


def from_vocab_txt(path: Path, settings: Settings) -> Backend:
    """A WordPiece of its vocabulary."""
    from pyllm import wordpiece

    _declared_kind(settings, _WORDPIECE_CLASSES, _WORDPIECE_MODEL_TYPES, "bert", "vocab.txt")
    if settings.flag("do_basic_tokenize") is False:
        raise TokenizerError(
            f"{settings.folder / 'tokenizer_config.json'}: do_basic_tokenize: expected true, found false, which is not "
            "supported. Put the model's tokenizer.json into the folder."
        )
    vocab = wordpiece.parse_vocab(read_text(path), str(path))
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

    return guarded(path, build)


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json_object(path)
    wrong = [token for token, index in vocab.items() if type(index) is not int or not 0 <= index < 1 << 31]
    if not vocab or wrong:
        found = f"{wrong[0]!r}: {vocab[wrong[0]]!r}" if wrong else "an empty object"
        raise TokenizerError(f"{path}: expected tokens with their ids, found {found}")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{path}: several tokens share one id; the file is damaged")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    lines = read_text(path).split("\n")
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
