"""The joined stream equals the decode of all ids, whatever the ids; and decode equals the tokenizers library's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import byte_level_bpe, small_bpe, small_unigram
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from pyllm.errors import TokenizerError
from pyllm.tokenizer import Tokenizer
from pyllm.tokenizer_backend import Settings
from pyllm.tokenizer_library import from_tokenizer_json
from pyllm.tokenizer_pieces import from_sentencepiece

WORDS = [
    "\u2581Hello",
    "\u2581",
    "\u2581\u2581",
    "wor",
    "##ld",
    "l</w>",
    "</w>",
    ".",
    ",",
    "n't",
    "'s",
    "</w>o",
    "##",
    "do",
    " x",
    "é",
]
BYTES = [
    f"<0x{byte:02X}>" for byte in (0x41, 0x20, 0xF0, 0x9F, 0xA6, 0x99, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0x80, 0xFF, 0xED)
]

LLAMA = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
DECODERS: dict[str, Any] = {
    "none": None,
    "word piece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "metaspace": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "metaspace, no prefix": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True},
    "word ends": {"type": "BPEDecoder", "suffix": "</w>"},
    "llama": {"type": "Sequence", "decoders": LLAMA},
    "strip both": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "l", "start": 2, "stop": 2}],
    },
    "strip tokens": {"type": "Strip", "content": "l", "start": 1, "stop": 1},
    "regex": {"type": "Replace", "pattern": {"Regex": "[lo]+"}, "content": "0"},
    "fuse": {"type": "Fuse"},
    "empty sequence": {"type": "Sequence", "decoders": []},
}


def folder_of(path: Path, **config: Any) -> Settings:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Settings.load(path)


@pytest.fixture(scope="module")
def with_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Library]]:
    made: dict[str, tuple[Tokenizer, Library]] = {}

    def make(name: str) -> tuple[Tokenizer, Library]:
        if name not in made:
            folder = tmp_path_factory.mktemp("decoder")
            vocab = {text: index for index, text in enumerate(WORDS + BYTES)}
            spec = json.loads(Library(models.WordLevel(vocab, unk_token="é")).to_str())
            spec["decoder"] = DECODERS[name]
            spec["added_tokens"] = [
                {"id": len(vocab), "content": "<|s|>", "special": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            ]
            (folder / "tokenizer.json").write_text(json.dumps(spec))
            made[name] = Tokenizer.load(folder), Library.from_str(json.dumps(spec))
        return made[name]

    return make


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip)
    parts = [stream.push([token]) for token in ids]
    return "".join(parts) + stream.finish()


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(WORDS)), max_size=12), skip=st.booleans())
def test_decoders_equal_the_library(
    with_decoder: Callable[[str], tuple[Tokenizer, Library]], name: str, ids: list[int], skip: bool
) -> None:
    tokenizer, library = with_decoder(name)
    if name == "strip both":
        ids = [0, *ids, 0]  # the library panics on texts shorter than what it strips
    last = len(WORDS + BYTES)
    ids = [last if token == len(WORDS) else token for token in ids]
    assert tokenizer.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, len(WORDS + BYTES)), max_size=16))
def test_byte_fallback(with_decoder: Callable[[str], tuple[Tokenizer, Library]], ids: list[int]) -> None:
    tokenizer, library = with_decoder("llama")
    text, reference = tokenizer.decode(ids), library.decode(ids)
    assert streamed(tokenizer, ids) == text
    if "\ufffd" not in reference:  # the library gives up valid characters beside invalid bytes; we keep them
        assert text == reference
    assert ("\ufffd" in text) == ("\ufffd" in reference)


def real_tokenizers(shared_data: Path, tmp: Path) -> dict[str, Tokenizer]:
    none = folder_of(tmp)
    found = {
        name: Tokenizer(from_tokenizer_json(shared_data / path / "tokenizer.json", none), none)
        for name, path in (
            ("gpt2", "gpt2-tokenizer"),
            ("bert", "tokenizers/bert-base-uncased"),
            ("t5", "tokenizers/t5-small"),
        )
    }
    found["llama"] = Tokenizer.load(shared_data / "stories260K")
    found["unigram"] = Tokenizer(from_sentencepiece(shared_data / "tokenizers/unigram-test.model", none), none)
    return found


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return real_tokenizers(shared_data, tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "unigram"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans(), head=st.integers(0, 8))
def test_real_tokenizers(real: dict[str, Tokenizer], name: str, data: st.DataObject, skip: bool, head: int) -> None:
    tokenizer = real[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 260), max_size=20))
    text = tokenizer.decode(ids, skip)
    assert streamed(tokenizer, ids, skip) == text
    if name in ("gpt2", "bert", "t5"):
        assert text == tokenizer._backend._library.decode(ids, skip_special_tokens=skip)
    # After a prompt, the stream continues the prompt's text.
    before = tokenizer.stream(skip)
    prompt = before.push(ids[:head])
    after = tokenizer.stream(skip, prompt_ids=ids[:head])
    assert prompt + after.push(ids[head:]) + after.finish() == text


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "unigram"])
def test_hostile_strings_stream(real: dict[str, Tokenizer], name: str, shared_data: Path) -> None:
    tokenizer = real[name]
    for text in json.loads((shared_data / "text/blns.json").read_text()):
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("model", [small_bpe(), small_unigram(True)])
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 275), max_size=30))
def test_small_sentencepiece(model: bytes, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.load(folder)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_half_characters_are_held_back(tmp_path: Path) -> None:
    byte_level_bpe(259).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("é🦙x")
    assert len(ids) == 7  # one token for each byte
    stream = tokenizer.stream()
    assert [stream.push([token]) for token in ids] == ["", "é", "", "", "", "🦙", "x"]
    stream = tokenizer.stream()
    assert stream.push(ids[:1]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="finish"):
        stream.push(ids)


def test_unsupported_decoders(tmp_path: Path) -> None:
    for decoder in (
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ):
        library = Library(models.WordLevel({"a": 0}, unk_token="a"))
        library.decoder = decoder
        library.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="not supported"):
            Tokenizer.load(tmp_path)


def test_strip_takes_from_both_ends_and_no_more(with_decoder: Callable[[str], tuple[Tokenizer, Library]]) -> None:
    tokenizer, _ = with_decoder("strip both")
    word = tokenizer.id_of("l</w>")
    assert word is not None
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([word]) == "</w>"
    assert tokenizer.decode([word, word]) == "</w>l</w>"
