"""Training data: files to tokens, tokens to micro-batches, and the way back to any position."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pyllm.errors import ConfigError, DataError
from pyllm.tokenizer import Tokenizer
from pyllm.train import documents
from pyllm.train.data import PackedData
from pyllm.train.head_loss import IGNORED
from pyllm.train.token_files import read_bin, write_bin
from pyllm.train.token_store import TokenStore, open_tokens

WORDS = ["once", "upon", "a", "time", "there", "was", "little", "girl", "Köln", "你好", "🙂", "fox."]
PATTERNS = (  # how GPT-2 and Llama 3 cut a text into words
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("model") / "m", chat=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def made(lengths: list[int], seed: int = 0, name: str = "made") -> TokenStore:
    """Documents of given lengths, no token of them twice."""
    ends = np.cumsum(lengths)
    return TokenStore(np.arange(ends[-1], dtype=np.uint32) + 1, ends, None, True, f"{name}{lengths}{seed}", name)


# --- files ---------------------------------------------------------------------------------------------------------


def test_documents_end_with_the_end_token(tmp_path: Path, model: Path, cache: Path) -> None:
    texts = ["Once upon a time", "there was", "a girl</s>"]
    store = open_tokens(lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), model, cache)
    tokenizer = Tokenizer.load(model)
    expected = [tokenizer.encode(text) for text in texts]
    expected = [ids if ids[-1] == 1 else [*ids, 1] for ids in expected]
    assert store.tokens.tolist() == [token for ids in expected for token in ids]
    assert store.ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert store.tokens.dtype == np.uint16
    assert store.answers is None


def test_a_long_text_has_the_ids_of_the_whole(
    tmp_path: Path, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 61)
    rng = np.random.default_rng(1)
    text = "".join(
        rng.choice(WORDS) + rng.choice([" ", "  ", "\n", "\n\n \n"], p=[0.7, 0.1, 0.1, 0.1]) for _ in range(500)
    )
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    shares: list[float] = []
    store = open_tokens(path, model, cache, shares.append)
    assert store.tokens.tolist() == [*Tokenizer.load(model).encode(text), 1]
    assert store.ends.tolist() == [len(store.tokens)]
    assert shares[-1] == 1.0


def test_pieces_of_a_text_keep_the_words_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 300)
    rng = np.random.default_rng(2)
    marks = [" ", "  ", "\n", "\n\n", "\n  ", "\r\n", "\n\n \n"]
    text = "".join(rng.choice(WORDS) + rng.choice(marks) for _ in range(2000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(documents.read_texts(path))
    assert "".join(pieces) == text and len(pieces) > 20
    for pattern in PATTERNS:
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
        cut = [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)]
        assert cut == [word for word, _ in words.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", ["你好" * 1000, "a" * 1000, "\n" * 1000, "a\n\n" * 300, "é", "  "])
def test_a_text_without_a_place_to_cut_comes_in_pieces(
    tmp_path: Path, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 61)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    made = list(documents.read_documents(path, Tokenizer.load(model)))
    pieces = [document.parts[0][0] for document in made]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * 61
    assert [document.open for document in made] == [True] * (len(made) - 1) + [False]
    assert made[-1].bytes_read == len(text.encode())


def test_an_end_token_in_a_text_separates_documents(tmp_path: Path, model: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon</s>a time</s>there")
    store = open_tokens(tmp_path / "a.txt", model, cache)
    assert [int(store.tokens[end - 1]) for end in store.ends] == [1, 1, 1]
    assert len(store.ends) == 3


def test_prompts_are_told_from_answers(tmp_path: Path, model: Path, cache: Path) -> None:
    tokenizer = Tokenizer.load(model)
    path = lines(tmp_path / "a.jsonl", [{"prompt": "Once upon", "completion": " a time"}, {"text": "a fox"}])
    store = open_tokens(path, model, cache)
    prompt, answer = tokenizer.encode("Once upon"), [*tokenizer.encode(" a time"), 1]
    assert store.answers is not None
    rest = len(store.tokens) - len(prompt) - len(answer)
    assert store.answers.tolist() == [0] * len(prompt) + [1] * len(answer) + [1] * rest
    data = PackedData([store], context=64, tokens=64, mask_prompt=True, shuffle=False)
    tokens, labels, starts = data.next_batch()
    size = int(starts[1])
    assert size == len(prompt) + len(answer) - 1
    counted = labels[:size] != IGNORED
    assert labels[:size][counted].tolist() == answer
    assert tokens[1:size][counted[:-1]].tolist() == answer[:-1]
    unmasked = PackedData([store], context=64, tokens=64, shuffle=False).next_batch()[1]
    assert (unmasked[:size] != IGNORED).all()


def test_conversations_go_through_the_template(tmp_path: Path, model: Path, cache: Path) -> None:
    messages = [
        {"role": "user", "content": "Once"},
        {"role": "assistant", "content": "upon"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "time"},
    ]
    store = open_tokens(lines(tmp_path / "a.jsonl", [{"messages": messages}]), model, cache)
    tokenizer = Tokenizer.load(model)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert tokenizer.decode(store.tokens.tolist(), skip_special_tokens=False) == whole
    assert store.answers is not None
    said = tokenizer.decode(store.tokens[store.answers == 1].tolist(), skip_special_tokens=False)
    assert said == "upon</s>time</s>"


def test_a_conversation_without_text_is_no_document(tmp_path: Path, model: Path, cache: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    silent, said = ({"messages": [{"role": role, "content": "Once"}]} for role in ("system", "user"))
    store = open_tokens(lines(tmp_path / "a.jsonl", [silent, said, silent, said]), folder, cache)
    size = len(Tokenizer.load(folder).encode("Once", add_special_tokens=False))
    assert store.ends.tolist() == [size, 2 * size] and len(store.tokens) == 2 * size
    with pytest.raises(DataError, match="holds 0 token"):
        open_tokens(lines(tmp_path / "b.jsonl", [silent]), folder, cache)


def test_token_files_are_known_by_where_their_documents_end(tmp_path: Path, model: Path) -> None:
    write_bin(tmp_path / "a.bin", np.array([5, 1, 6, 7], np.uint16))
    with_ends, without = open_tokens(tmp_path / "a.bin", model), open_tokens(tmp_path / "a.bin", None)
    assert with_ends.ends.tolist() == [2, 4] and without.ends.tolist() == [4]
    assert with_ends.key != without.key


def test_tokens_are_made_once_for_a_content(tmp_path: Path, model: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Once upon a time")
    first = open_tokens(path, model, cache)
    [folder] = cache.iterdir()
    made_at = (folder / "tokens").stat().st_mtime_ns
    (tmp_path / "b.txt").write_text("Once upon a time")
    assert open_tokens(tmp_path / "b.txt", model, cache).key == first.key
    assert (folder / "tokens").stat().st_mtime_ns == made_at
    path.write_text("Once upon a dime")
    assert open_tokens(path, model, cache).key != first.key
    assert len(list(cache.iterdir())) == 2, "and no partial folder stays"
    with (folder / "tokens").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="damaged"):
        open_tokens(tmp_path / "b.txt", model, cache)


@pytest.mark.parametrize("layout", ["nanogpt", "llm.c"])
def test_token_files_both_ways(tmp_path: Path, layout: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    path = tmp_path / "a.bin"
    write_bin(path, tokens, layout)
    assert path.stat().st_size == 2000 + (1024 if layout == "llm.c" else 0)
    assert read_bin(path).tolist() == tokens.tolist()
    with pytest.raises(DataError, match="vocabulary"):
        read_bin(path, 100)
    wide = tokens.astype(np.uint32) + 70000
    if layout == "nanogpt":
        with pytest.raises(DataError, match="two bytes"):
            write_bin(path, wide, layout)
    else:
        write_bin(path, wide, layout)
        assert read_bin(path).tolist() == wide.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_header_as_llm_c_writes_it(tmp_path: Path) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 5
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.arange(5, dtype=np.uint16).tobytes())
    assert read_bin(tmp_path / "a.bin").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.bin", b"", "empty"),
        ("a.txt", b"abc\0def", "zero byte at byte 3"),
        ("a.txt", b"abc\xff", "not UTF-8 text.*at byte 3"),
        ("a.txt", "abcü".encode()[:-1], "not UTF-8 text.*at byte 3 \\(0xc3"),
        ("a.txt", os.urandom(3000) + b"\0", "not UTF-8 text"),
        ("a.bin", b"abc", "found 3 bytes"),
        ("a.bin", b"\5\0", "holds 1 token"),
        ("a.jsonl", b"\n\n", "holds 0 token"),
        ("a.jsonl", b'{"text": "a"}\nno\n', "line 2: not a JSON object"),
        ("a.jsonl", b'["a"]\n', "expected a JSON object with `text`"),
        ("a.jsonl", b'{"txt": "a"}\n', "expected `text`.*found txt"),
        ("a.jsonl", b'{"text": 3}\n', "text: expected a string, found 3"),
        ("a.jsonl", b'{"text": "a", "prompt": "b", "completion": "c"}\n', "found completion, prompt, text"),
        ("a.jsonl", b'{"text": "a \\ud83d\\ude42"}\n{"text": "a \\ud83d"}\n', r"line 2: .ud83d is half of a surrogate"),
        ("a.jsonl", b'{"messages": []}\n', "expected a list of objects with role"),
        ("a.csv", b"a,b", "expected a file named .txt, .jsonl or .bin"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, model: Path, cache: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_tokens(path, model, cache)
    assert not cache.exists() or not any(cache.glob(".*")), "nothing half is left"


def test_files_that_are_none(tmp_path: Path, model: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_tokens(tmp_path / "a.txt", model, cache)
    with pytest.raises(DataError, match="expected a file, found something else"):
        open_tokens(tmp_path, model, cache)
    (tmp_path / "a.txt").write_text("Once upon")
    with pytest.raises(DataError, match="needs a tokenizer"):
        open_tokens(tmp_path / "a.txt", None, cache)


def test_a_file_is_split_between_documents() -> None:
    store = made([10] * 30)
    train, held = store.split(0.08)
    assert (len(train.tokens), len(held.tokens)) == (270, 30)
    assert train.ends.tolist() == list(range(10, 271, 10))
    assert held.ends.tolist() == [10, 20, 30]
    assert held.key != train.key
    one = made([100])
    assert [len(part.tokens) for part in one.split(0.25)] == [75, 25]
    with pytest.raises(DataError, match="cannot be split"):
        made([3]).split(0.1)


# --- micro-batches -------------------------------------------------------------------------------------------------


def sequences(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the sequences of a micro-batch that are no padding."""
    tokens, labels, starts = batch
    assert starts[0] == 0 and starts[-1] == len(tokens) and (np.diff(starts) >= 0).all()
    assert tokens.dtype == labels.dtype == starts.dtype == np.int32
    parts = [(tokens[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts.tolist()) if a < b]
    return [part for part in parts if any(label != IGNORED for label in part[1])]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40).filter(lambda n: max(n) > 1),
    context=st.integers(1, 33),
    batch=st.integers(0, 100),
    seed=st.integers(0, 3),
)
def test_documents_are_whole_and_come_once_an_epoch(lengths: list[int], context: int, batch: int, seed: int) -> None:
    data = PackedData([made(lengths)], context=context, tokens=context + batch, seed=seed)
    seen: Counter[int] = Counter()
    predicting = {t + 1 for t in range(sum(lengths)) if t + 1 not in set(np.cumsum(lengths))}
    while data.sources()[0].epochs < 3:
        made_batch = data.next_batch()
        assert (np.diff(made_batch[2]) <= context).all()
        assert len(made_batch[2]) == data.sequences + 1
        for tokens, labels in sequences(made_batch):
            assert labels == [token + 1 for token in tokens], "the next token of the same document"
            ends = np.cumsum(lengths)
            assert np.searchsorted(ends, tokens[0] - 1, "right") == np.searchsorted(ends, labels[-1] - 1, "right")
            seen.update(tokens)
    assert set(seen) == predicting
    per_batch = (context + batch) * len(lengths) // data.tokens_per_epoch
    assert max(seen.values()) - min(seen.values()) <= 3 + per_batch, "what waits does not wait for long"


def test_little_is_padding() -> None:
    rng = np.random.default_rng(0)
    data = PackedData([made(rng.integers(100, 300, 2000).tolist())], context=512, tokens=4096)
    share = np.mean([(data.next_batch()[1] == IGNORED).mean() for _ in range(50)])
    assert share < 0.01


@settings(max_examples=40, deadline=None)
@given(size=st.integers(34, 400), context=st.integers(1, 33), rows=st.integers(1, 4), seed=st.integers(0, 3))
def test_plain_windows(size: int, context: int, rows: int, seed: int) -> None:
    data = PackedData(
        [made([size // 2, size - size // 2])], context=context, tokens=rows * context, packing="plain", seed=seed
    )
    first: Counter[int] = Counter()
    for _ in range(-(-data.tokens_per_epoch // data.tokens)):
        tokens, labels, starts = data.next_batch()
        assert (labels == tokens + 1).all()
        assert np.diff(starts).tolist() == [context] * rows
        first.update(tokens.tolist())
    epochs = data.sources()[0].tokens * 2 // (((size - 1) // context - 1 or 1) * context) + rows
    assert max(first.values()) <= 1 + epochs


def test_each_epoch_has_an_order_of_its_own() -> None:
    data = PackedData([made([5] * 200)], context=4, tokens=400)
    batches = [sequences(data.next_batch()) for _ in range(8)]
    again = PackedData([made([5] * 200)], context=4, tokens=400)
    assert [sequences(again.next_batch()) for _ in range(8)] == batches
    assert batches[0] != batches[2] and batches[0] != batches[4]
    other = PackedData([made([5] * 200)], context=4, tokens=400, seed=1)
    assert sequences(other.next_batch()) != batches[0]
    kept = PackedData([made([5] * 200)], context=4, tokens=400, shuffle=False)
    assert [tokens[0] for tokens, _ in sequences(kept.next_batch())][:4] == [1, 6, 11, 16]


@pytest.mark.parametrize("packing", ["documents", "plain"])
def test_a_position_is_resumed_exactly(packing: str) -> None:
    def fresh() -> PackedData:
        rng = np.random.default_rng(3)
        stores = [made(rng.integers(2, 60, n).tolist(), name=str(n)) for n in (300, 50)]
        return PackedData(stores, context=32, tokens=256, packing=packing, weights=[1, 1])

    straight = fresh()
    states, batches = [], []
    for _ in range(120):
        states.append(json.loads(json.dumps(straight.state())))
        batches.append(straight.next_batch())
    assert straight.sources()[1].epochs > 3
    for at in (0, 1, 37, 90):
        resumed = fresh()
        resumed.load_state(states[at])
        for batch in batches[at : at + 25]:
            for left, right in zip(resumed.next_batch(), batch, strict=True):
                assert np.array_equal(left, right)
    other = PackedData([made([5] * 20)], context=4, tokens=40)
    with pytest.raises(DataError, match="other data"):
        other.load_state(states[0])


def test_mixtures_follow_their_weights() -> None:
    """The table of https://arxiv.org/abs/2005.14165, section 2.2: tokens in billions, weight in the mix, epochs in 300
    billion tokens; here a millionth of it."""
    table = [(410, 0.60, 0.44), (19, 0.22, 2.9), (12, 0.08, 1.9), (55, 0.08, 0.43), (3, 0.03, 3.4)]
    stores = [made([101] * (size * 10), name=str(size)) for size, _, _ in table]
    data = PackedData(stores, context=100, tokens=1000, weights=[weight for _, weight, _ in table])
    assert "sum to 1.01 and were normalised" in data.notes[0]
    for _ in range(300):
        data.next_batch()
    for report, (size, weight, epochs) in zip(data.sources(), table, strict=True):
        assert report.weight == pytest.approx(weight / 1.01)
        assert report.tokens == size * 1000
        assert report.epochs * size / 300 == pytest.approx(weight / 1.01, rel=0.03)
        assert report.epochs == pytest.approx(epochs, rel=0.25)  # the paper's figures are rounded, and one is off
    assert PackedData(stores, context=100, tokens=1000, weights=[0.5, 0.2, 0.1, 0.1, 0.1]).notes == []


def test_long_documents_are_cut_and_that_is_said() -> None:
    data = PackedData([made([10, 100])], context=32, tokens=128)
    assert "1 of 2 documents are longer than the context of 32 tokens" in data.notes[0]


def test_sequences_without_an_answer_are_left_out() -> None:
    answers = np.zeros(20, np.uint8)
    answers[8:10] = 1
    store = TokenStore(np.arange(20, dtype=np.uint16), np.array([10, 20]), answers, True, "k", "n")
    data = PackedData([store], context=10, tokens=20, mask_prompt=True)
    assert "1 sequences hold no answer" in data.notes[0]
    _, labels, _ = data.next_batch()
    assert set(labels.tolist()) == {8, 9, IGNORED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context: expected at least 1"),
        ({"tokens": 5}, "shorter than the context"),
        ({"packing": "loose"}, "packing: expected documents or plain, got 'loose'"),
        ({"packing": "plain", "tokens": 17}, "whole contexts"),
        ({"weights": [1, 2]}, "expected one for each of 1 files"),
        ({"weights": [-1]}, "positive numbers"),
        ({"weights": [float("nan")]}, "positive numbers"),
        ({"mask_prompt": True}, "no file holds prompts"),
    ],
)
def test_impossible_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"context": 8, "tokens": 16, **changes}
    with pytest.raises(ConfigError, match=message):
        PackedData([made([20])], **arguments)


def test_too_short() -> None:
    with pytest.raises(DataError, match="no document has a token to predict"):
        PackedData([made([1, 1])], context=8, tokens=16)
    with pytest.raises(DataError, match=r"fewer than the context.*\(--valid-share 0\)"):
        PackedData([made([8])], context=8, tokens=16, packing="plain")
