"""WordPiece folders, and pairs of texts in every layout, against transformers."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import T5_TEXTS, copy_into, hard_texts
from tokenizer_fixtures import CORPUS, byte_level_bpe, small_bpe, write_byte_level, write_json
from tokenizers import trainers

from pyllm.errors import TokenizerError
from pyllm.tokenizer import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = "the he ##llo wor ##ld ##l h w a ##a u un ##aff ##able a b ##b ! , . ' 日 本 é e E H".split()  # noqa: SIM905
VOCAB = list(dict.fromkeys(SPECIAL + PIECES))
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln, naïve café: São Paulo, Łódź",
    "Привет, как дела? Καλημέρα κόσμε",
    "日本語のテキスト、中文字符 한국어 텍스트",
    "مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "e\u0301 \u00e9 \ufb01ancé \u0130stanbul ẞ ß",
    "tabs\tand\nlines\r\n\u00a0\u2003spaces \u200bzero\ufeff width\u00ad",
    "[CLS] a [MASK] b [SEP]",
    "emoji 👩‍👩‍👧 🦙 $1,000.50 it's don't x_y-z @#%^&*~`",
    "x" * 101 + " " + "unaffable" * 12,
    "\x00\ufffdcontrol\x07",
    "",
    "   ",
]
PAIRS = [*zip(TEXTS[:11], TEXTS[10::-1], strict=True), ("", "a"), ("a", "the " * 40), ("the " * 40, "a")]


def write_vocab(folder: Path, tokens: list[str] = VOCAB, **config: Any) -> Path:
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    return folder


def written_out(text: str, vocab: dict[str, int]) -> list[int]:
    """BERT's uncased tokenizer from its description, without special tokens in the text."""
    cleaned = ""
    for character in text:
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            cleaned += " "
        elif character not in "\x00\ufffd" and category[0] != "C":
            cleaned += f" {character} " if 0x4E00 <= ord(character) <= 0x9FFF else character
    decomposed = unicodedata.normalize("NFD", cleaned)
    folded = "".join(c for c in decomposed if unicodedata.category(c) != "Mn").lower()
    marks = {c for c in folded if (c.isascii() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"}
    spaced = "".join(f" {c} " if c in marks else c for c in folded)
    ids = []
    for word in spaced.split():
        pieces, start = [], 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab)
            end = next(ends, None)
            if end is None:
                break
            pieces.append(vocab[prefix + word[start:end]])
            start = end
        ids += pieces if start == len(word) else [vocab["[UNK]"]]
    return ids


def test_bert_equals_its_description(shared_data: Path) -> None:
    source = shared_data / "tokenizers/bert-base-uncased"
    tokenizer = Tokenizer.load(source)
    vocab = {token: i for i, token in enumerate((source / "vocab.txt").read_text().split("\n")[:-1])}
    for text in TEXTS:
        if "[CLS]" not in text:
            assert tokenizer.encode(text) == [101, *written_out(text, vocab), 102], text
    hello = [101, 7592, 1010, 1061, 1005, 2035, 999, 2129, 2024, 2017, 100, 1029, 102]
    assert tokenizer.encode("Hello, y'all! How are you 😁 ?") == hello  # published


@pytest.mark.oracle
def test_bert_of_vocab_txt_equals_tokenizer_json_and_transformers(shared_data: Path, tmp_path: Path) -> None:
    import transformers

    source = shared_data / "tokenizers/bert-base-uncased"
    folder = copy_into(tmp_path, source / "vocab.txt")
    write_json(folder / "config.json", {"model_type": "bert"})
    ours, whole = Tokenizer.load(folder), Tokenizer.load(source)
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    for text in TEXTS + hard_texts(shared_data):
        assert ours.encode(text) == whole.encode(text) == theirs(text)["input_ids"], text[:200]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
        {"tokenizer_class": "ElectraTokenizerFast"},
        {"tokenizer_class": "DistilBertTokenizer"},
    ],
)
def test_settings_of_vocab_txt(config: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    ours = Tokenizer.load(write_vocab(tmp_path, **config))
    theirs = transformers.BertTokenizer(
        {token: i for i, token in enumerate(VOCAB)}, **{k: v for k, v in config.items() if k != "tokenizer_class"}
    )
    for text in [*TEXTS, "Hello World, unaffable [MASK] ÉéEe 日本", "hello!", "E É e\u0301"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    for first, second in PAIRS:
        expected = theirs(first, second)
        found = ours.encode_pair(first, second)
        assert (found.ids, found.type_ids) == (expected["input_ids"], expected["token_type_ids"])


def test_wordpiece_text_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_vocab(tmp_path))
    ids = tokenizer.encode("Hello, [MASK] world!")
    assert [tokenizer.token_of(i) for i in ids] == ["[CLS]", "he", "##llo", ",", "[MASK]", "wor", "##ld", "!", "[SEP]"]
    assert tokenizer.decode(ids) == "hello , world !"
    assert tokenizer.special_ids == frozenset(range(5)) and tokenizer.pad_token_id == 0
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(VOCAB).encode())
    assert Tokenizer.load(tmp_path).encode("Hello, [MASK] world!") == ids


@pytest.mark.parametrize(
    ("tokens", "config", "message"),
    [
        ([*VOCAB, "the"], {}, "vocab.txt: several lines hold one token"),
        (VOCAB[2:], {}, r"expected \[UNK\] among the tokens"),
        (["a", "b"], {}, r"expected \[UNK\], \[CLS\], \[SEP\]"),
        (VOCAB, {"tokenizer_class": "MPNetTokenizer"}, "'MPNetTokenizer' tokenizer are not supported"),
        (VOCAB, {"do_basic_tokenize": False}, "do_basic_tokenize: expected true"),
    ],
)
def test_refused_vocab_txt(tokens: list[str], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(write_vocab(tmp_path, tokens, **config))


def roberta(folder: Path) -> tuple[Tokenizer, Any]:
    """Ours and transformers', of one vocab.json + merges.txt."""
    import transformers

    byte_level_bpe().model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {token: len(vocab) + i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    write_json(folder / "vocab.json", vocab)
    write_json(folder / "config.json", {"model_type": "roberta"})
    return Tokenizer.load(folder), transformers.RobertaTokenizer.from_pretrained(folder)


@pytest.mark.oracle
def test_bpe_of_words_equals_transformers(tmp_path: Path) -> None:
    """GPT-1's: `vocab.json` + `merges.txt` give what the library makes of them, and its tokenizer.json the same."""
    import transformers

    theirs = transformers.OpenAIGPTTokenizer()._tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    theirs.train_from_iterator([*TEXTS, *CORPUS], trainer)
    theirs.model.save(str(tmp_path))
    write_json(tmp_path / "config.json", {"model_type": "openai-gpt"})
    folder = tmp_path / "whole"
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    for ours in (Tokenizer.load(tmp_path), Tokenizer.load(folder)):
        assert ours.id_of("the</w>") is not None
        for text in (*TEXTS, *T5_TEXTS, "The LLAMA, the\tend. \U0010ffff"):
            ids = theirs.encode(text).ids
            assert ours.encode(text) == ids, text
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.oracle
def test_roberta_equals_transformers(tmp_path: Path) -> None:
    ours, theirs = roberta(tmp_path)
    for text in [*TEXTS, *T5_TEXTS, "Hello <mask>, there<mask> x", "<s>x</s></s>y"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    for first, second in PAIRS:
        found = ours.encode_pair(first, second)
        assert found.ids == theirs(first, second)["input_ids"]
        assert set(found.type_ids) == {0}  # RoBERTa has one type


@pytest.mark.oracle
def test_spans_of_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Characters, not bytes, and without the space before a word."""
    import transformers

    bert, bytes_ = tmp_path / "bert", tmp_path / "roberta"
    bert.mkdir()
    bytes_.mkdir()
    vocab = {token: i for i, token in enumerate(VOCAB)}
    bert_pair = Tokenizer.load(write_vocab(bert)), transformers.BertTokenizer(vocab)
    for ours, theirs in (bert_pair, roberta(bytes_)):
        for text in (*TEXTS, " the  hat"):
            expected = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
            for found, place, special in zip(
                ours.spans(text), expected["offset_mapping"], expected["special_tokens_mask"], strict=True
            ):
                assert (found is None) == bool(special)
                assert found is None or found == place or not text[slice(*found)].strip()


@pytest.mark.oracle
def test_longest_first_truncation_equals_transformers(tmp_path: Path) -> None:
    import transformers

    bert, bytes_ = tmp_path / "bert", tmp_path / "roberta"
    bert.mkdir()
    bytes_.mkdir()
    vocab = {token: i for i, token in enumerate(VOCAB)}
    bert_pair = Tokenizer.load(write_vocab(bert)), transformers.BertTokenizer(vocab)
    rng = random.Random(3)
    for ours, theirs in (bert_pair, roberta(bytes_)):
        for _ in range(150):
            first, second = ("the " * rng.randrange(9), "a " * rng.randrange(1, 9))  # an empty one is none to them
            limit = rng.randrange(4, 24)
            expected = theirs(first, second, truncation=True, max_length=limit)["input_ids"]
            assert ours.encode_pair(first, second, max_tokens=limit).ids == expected, (first, second, limit)
    ours = bert_pair[0]
    assert ours.encode_pair("the", "a", max_tokens=3).ids == ours.encode_pair("", "").ids
    with pytest.raises(TokenizerError, match="expected at least the 3 special tokens of a pair, got 2"):
        ours.encode_pair("the", "a", max_tokens=2)


def test_pairs_of_other_layouts(tmp_path: Path) -> None:
    plain = Tokenizer.load(write_byte_level(tmp_path))
    assert plain.encode_pair("Hello", "world").ids == plain.encode("Hello") + plain.encode("world")
    write_byte_level(tmp_path, bos_token="<|im_start|>", add_bos_token=True, add_eos_token=True)
    flagged = Tokenizer.load(tmp_path)
    pair = flagged.encode_pair("Hello", "world")
    assert pair.ids == flagged.encode("Hello") + flagged.encode("world")
    assert pair.type_ids == [0] * len(flagged.encode("Hello")) + [1] * len(flagged.encode("world"))
    with pytest.raises(TokenizerError, match="surrogate"):
        plain.encode_pair("Hello", "a\ud800")
    sentencepiece = tmp_path / "sentencepiece"
    sentencepiece.mkdir()
    (sentencepiece / "tokenizer.model").write_bytes(small_bpe())
    with pytest.raises(TokenizerError, match=r"pairs of texts: .* tokenizer\.json"):
        Tokenizer.load(sentencepiece).encode_pair("a", "b")
