"""BERT's tokenizer made from a `vocab.txt`: text is cleaned and cut into words, words into the longest known pieces.

The family: BERT, ELECTRA and DistilBERT share the layout, the special tokens and the way pairs are put together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyllm.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def parse_vocab(text: str, where: str) -> dict[str, int]:
    """Tokens with their ids: one a line, the line's number from 0 on; raises `TokenizerError` naming `where`."""
    lines = text.removesuffix("\n").split("\n")
    vocab = {line.removesuffix("\r"): index for index, line in enumerate(lines)}
    if len(vocab) < len(lines):
        raise TokenizerError(f"{where}: several lines hold one token; the file is damaged")
    return vocab


def build(
    vocab: dict[str, int],
    special_tokens: dict[str, str],
    where: str,
    *,
    lower: bool = True,
    strip_accents: bool | None = None,
    split_chinese: bool = True,
) -> tokenizers.Tokenizer:
    """The library's tokenizer; `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`, whose B has type 1.

    `strip_accents` None: as `lower`. `split_chinese` makes a word of each Chinese character. Raises `TokenizerError`
    naming `where` if a token that these need is not in the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    unknown, begin, end = (special_tokens[name] for name in ("unk_token", "cls_token", "sep_token"))
    missing = [token for token in (unknown, begin, end) if token not in vocab]
    if missing:
        raise TokenizerError(f"{where}: expected {', '.join(missing)} among the tokens; it is of another tokenizer")
    library = Tokenizer(models.WordPiece(vocab=vocab, unk_token=unknown))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=split_chinese, strip_accents=strip_accents, lowercase=lower
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    library.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, vocab[begin]), (end, vocab[end])],
    )
    return library
