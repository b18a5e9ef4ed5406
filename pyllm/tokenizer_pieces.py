"""SentencePiece models as tokenizers: `tokenizer.model`, `spiece.model`, `sentencepiece.bpe.model`, and the special
tokens around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyllm.detokenizer import Stage, sentencepiece_stages
from pyllm.errors import TokenizerError
from pyllm.tokenizer_backend import AddedToken, Backend, PairEncoding, Settings, Span, fitting, guarded

if TYPE_CHECKING:
    from pyllm.sentencepiece import SentencePieceEncoder, SentencePieceModel


FAIRSEQ_FILE = "sentencepiece.bpe.model"  # whose models have other ids than the pieces: those of fairseq
_LANGUAGES = """
ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO
ru_RU si_LK tr_TR vi_VN zh_CN
""".split()  # noqa: SIM905
_MORE_LANGUAGES = """
af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN
th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class _Kind:
    """What a class of tokenizers adds before a text, between the texts of a pair and at the end.

    These are special tokens by name, of which "language" is what `src_lang` says, or as they stand in the vocabulary.
    """

    before: tuple[str, ...]
    between: tuple[str, ...] | None  # None: texts of a pair are not put together
    after: tuple[str, ...]
    adds: str = "eos_token"  # the named one that is added unless the settings say otherwise; others if they say so
    has_sentinels: bool = False  # tokens for masked spans, behind the pieces
    languages: tuple[str, ...] | None = None  # marks, in the order of their ids in fairseq; None: no such ids


_OF_DECODERS = _Kind(("bos_token",), None, ("eos_token",), adds="bos_token")
_T5 = _Kind(("bos_token",), ("eos_token",), ("eos_token",), has_sentinels=True)
_XLM_ROBERTA = _Kind(("<s>",), ("eos_token", "eos_token"), ("eos_token",), languages=())
_MBART = _Kind((), (), ("eos_token", "language"), languages=tuple(_LANGUAGES))
_MBART_50 = _Kind(("language",), (), ("eos_token",), languages=(*_LANGUAGES, *_MORE_LANGUAGES))
_CLASSES = {
    "T5Tokenizer": _T5,
    "XLMRobertaTokenizer": _XLM_ROBERTA,
    "MBartTokenizer": _MBART,
    "MBart50Tokenizer": _MBART_50,
}
_MODEL_TYPES = {"t5": _T5, "mt5": _T5, "umt5": _T5, "xlm-roberta": _XLM_ROBERTA, "mbart": _MBART}


def from_sentencepiece(path: Path, settings: Settings) -> Backend:
    """The tokenizer of a SentencePiece model, BPE or Unigram."""
    from pyllm.sentencepiece import SentencePieceEncoder, SentencePieceModel

    kind, model = _kind_of(settings), SentencePieceModel.load(path)
    if path.name == FAIRSEQ_FILE:
        if kind.languages is None:
            name = settings.tokenizer.get("tokenizer_class", settings.config.get("model_type"))
            raise TokenizerError(
                f"{path}: expected the tokenizer of XLM-RoBERTa, mBART or mBART-50, found that of {name!r}, which is "
                "not supported. Put the model's tokenizer.json into the folder."
            )
        model = _as_in_fairseq(model, kind.languages)
        for name in ("pad", "mask"):
            settings.special_tokens.setdefault(f"{name}_token", f"<{name}>")
    encoder = guarded(path, lambda: SentencePieceEncoder(model))
    return _SentencePieceBackend(model, encoder, settings, kind)


def _kind_of(settings: Settings) -> _Kind:
    """What the tokenizer's class stands for, or else the model's type."""
    name = settings.tokenizer.get("tokenizer_class")
    if isinstance(name, str):
        return _CLASSES.get(name.removesuffix("Fast"), _OF_DECODERS)
    name = settings.config.get("model_type")
    return _MODEL_TYPES.get(name, _OF_DECODERS) if isinstance(name, str) else _OF_DECODERS


def _as_in_fairseq(model: SentencePieceModel, languages: tuple[str, ...]) -> SentencePieceModel:
    """The model with pieces in the order of fairseq's ids: its special tokens, the others, and marks behind them."""
    from pyllm.sentencepiece import Piece, PieceType

    begin, unknown = (
        tuple(Piece(text, 0.0, kind) for text in texts.split())
        for texts, kind in (("<s> <pad> </s>", PieceType.CONTROL), ("<unk>", PieceType.UNKNOWN))
    )
    marks = tuple(Piece(text, 0.0, PieceType.CONTROL) for text in (*languages, "<mask>"))
    pieces = (*begin, *unknown, *model.pieces[3:], *marks)
    return replace(model, pieces=pieces, bos_id=0, pad_id=1, eos_id=2, unk_id=3)


class _SentencePieceBackend:
    """A SentencePiece model and the special tokens around it."""

    def __init__(
        self, model: SentencePieceModel, encoder: SentencePieceEncoder, settings: Settings, kind: _Kind
    ) -> None:
        from pyllm.sentencepiece import PieceType

        self._encoder = encoder
        if kind.has_sentinels:
            _add_sentinels(settings, len(model.pieces))
        tokens: list[str | None] = [piece.text for piece in model.pieces]
        added: dict[str, tuple[int, AddedToken]] = {}
        for index, piece in enumerate(model.pieces):
            if piece.type is PieceType.CONTROL:
                added[piece.text] = index, AddedToken(piece.text, lstrip=piece.text == "<mask>")
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
                added.setdefault(text, (ids[text], AddedToken(text)))
        self._tokens, self._ids, self._added = tokens, ids, added
        self._split = _split_pattern([token for _, token in added.values()])
        self.vocab_size = len(tokens)
        self.special_ids = frozenset(index for index, token in added.values() if token.special) | {model.unk_id}
        self._prefix = self._added_by(kind, kind.before, settings)
        self._between = None if kind.between is None else self._added_by(kind, kind.between, settings)
        self._suffix = self._added_by(kind, kind.after, settings)
        self._space_everywhere = kind is not _OF_DECODERS or settings.flag("legacy") is True
        self._space_in_front = settings.flag("add_prefix_space") is not False
        self._strips = (
            model.add_dummy_prefix or model.remove_extra_whitespaces,
            model.remove_extra_whitespaces,
        )

    def _added_by(self, kind: _Kind, names: tuple[str, ...], settings: Settings) -> list[int]:
        """Ids of the special tokens with these names, without those that `add_<name>` says not to add."""
        found: list[int] = []
        for name in names:
            text: str | None = name
            if name == "language":
                text = settings.tokenizer.get("src_lang") or "en_XX"
                if text not in self._ids:
                    raise TokenizerError(
                        f"{settings.folder / 'tokenizer_config.json'}: src_lang: expected a mark such as en_XX, found "
                        f"{text!r}"
                    )
            elif name.endswith("_token"):
                flag = settings.flag(f"add_{name}")
                wanted = name == kind.adds if flag is None else flag
                text = settings.special_tokens.get(name) if wanted else None
            if text in self._ids:
                found.append(self._ids[text])
        return found

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
        if self._between is None:
            raise TokenizerError(
                "pairs of texts: a SentencePiece model does not say how they are put together. Put the model's "
                "tokenizer.json into the folder, which does."
            )
        one, two = self.encode(first, False), self.encode(second, False)
        special = len(self._prefix) + len(self._between) + len(self._suffix)
        lengths = fitting(len(one), len(two), special, max_tokens)
        ids = [*self._prefix, *one[: lengths[0]], *self._between, *two[: lengths[1]], *self._suffix]
        return PairEncoding(ids, [0] * len(ids))

    def spans(self, text: str) -> list[Span | None]:
        nowhere: Span = (None, None)
        own = len(self.encode(text, False))
        return [*[None] * len(self._prefix), *[nowhere] * own, *[None] * len(self._suffix)]

    def token_of(self, token_id: int) -> str | None:
        return self._tokens[token_id] if token_id < len(self._tokens) else None

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def stages(self) -> list[Stage]:
        return sentencepiece_stages(*self._strips)


def _add_sentinels(settings: Settings, pieces: int) -> None:
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
        settings.added.setdefault(pieces + index, AddedToken(f"<extra_id_{count - 1 - index}>"))


def _split_pattern(added: list[AddedToken]) -> re.Pattern[str] | None:
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
