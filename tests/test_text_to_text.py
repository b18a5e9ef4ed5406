"""What encoder-decoders are trained on: files of pairs, and texts that are damaged to be restored."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from test_cli import pyllm
from tokenizers import Tokenizer as TokenizersLibrary
from tokenizers.processors import TemplateProcessing
from training import GOLDEN

from pyllm import LLM
from pyllm.cli.live import operations_per_token
from pyllm.errors import ConfigError, DataError
from pyllm.models import read_spec
from pyllm.tokenizer import Tokenizer
from pyllm.train import RepeatedData, TrainConfig, Trainer
from pyllm.train.evaluation import evaluate
from pyllm.train.head_loss import IGNORED
from pyllm.train.objectives.denoising import CorruptedSpans, Denoising, InfilledText
from pyllm.train.objectives.spans import partition, spread
from pyllm.train.objectives.ul2 import MixedDenoisers
from pyllm.train.pairs import PairedData, PairForm, Pairs
from pyllm.train.run_config import settings
from pyllm.train.setup import plan_of_run, prepare
from pyllm.train.token_store import TokenStore, end_tokens, open_tokens
from pyllm.train.tokenizer_training import train_tokenizer

FORM = PairForm(start=9, end=2, before=(1,), behind=(2,))
SENTINELS = tuple(range(99, 79, -1))
MASK, STOP = 70, 60  # and every token from 50 on begins a word


def store_of(pairs: list[tuple[list[int], list[int]]]) -> TokenStore:
    """As they are written: a start token, the source, the target, an end token."""
    tokens, answers, ends = [], [], []
    for source, target in pairs:
        tokens += [1, *source, *target, 2]
        answers += [0] * (1 + len(source)) + [1] * (len(target) + 1)
        ends.append(len(tokens))
    return TokenStore(np.array(tokens, np.uint16), np.array(ends), np.array(answers, np.uint8), True, "key", "pairs")


def some_pairs(count: int = 40) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(10, 50, rng.integers(1, 19)).tolist(), rng.integers(10, 50, rng.integers(0, 7)).tolist())
            for _ in range(count)]  # fmt: skip


def taken_apart(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Texts of source and target of each pair that counts, after a look at what the decoder is given."""
    tokens, labels, starts, source, bounds = (array.tolist() for array in batch)
    found = []
    for (first, end), (begin, stop) in zip(pairwise(starts), pairwise(bounds), strict=True):
        if end == first or labels[first] == IGNORED:
            assert set(labels[first:end]) <= {IGNORED}
            continue
        assert tokens[first:end] == [9, *labels[first : end - 1]]
        assert labels[first] == 1 and labels[end - 1] == 2 and source[begin] == 1 and source[stop - 1] == 2
        found.append((source[begin + 1 : stop - 1], labels[first + 1 : end - 1]))
    return found


def test_pairs_are_sources_and_targets() -> None:
    pairs = some_pairs()
    data = PairedData([store_of(pairs)], FORM, context=24, tokens=160)
    shapes, found = set(), []
    while len(found) < 6 * len(pairs):
        batch = data.next_batch()
        shapes.add(tuple(len(array) for array in batch))
        found += taken_apart(batch)
        assert max(np.diff(batch[2]).max(), np.diff(batch[4]).max()) <= 24
    assert all(found.count(pair) >= 4 * pairs.count(pair) for pair in pairs), "each once in an epoch, about"
    assert all(pair in pairs for pair in found)
    [(target, labels, starts, source, bounds)] = shapes
    assert target + source == 160 == labels + data.source_tokens and starts == bounds == data.sequences + 1
    ordered = PairedData([store_of(pairs)], FORM, context=24, tokens=160, shuffle=False)
    assert taken_apart(ordered.next_batch())[0] == pairs[0]


def test_room_is_shared_as_the_weights_say() -> None:
    """Of files with long sources and with long targets."""
    stores = [store_of([([10] * 30, [11] * 2)] * 20), store_of([([10] * 2, [11] * 30)] * 20)]
    for weights, share in (([0.9, 0.1], 0.83), ([0.1, 0.9], 0.17), (None, 0.5)):
        data = PairedData(stores, FORM, context=40, tokens=800, weights=weights)
        assert data.source_tokens == pytest.approx(800 * share, abs=30)


def test_a_start_token_does_not_stand_twice() -> None:
    form = PairForm(start=1, end=2, before=(1,), behind=(2,))
    data = PairedData([store_of([([10, 11], [12, 13])])], form, context=8, tokens=16)
    tokens, labels, _, source, bounds = data.next_batch()
    assert tokens[:3].tolist() == [1, 12, 13] and labels[:3].tolist() == [12, 13, 2]
    assert source[: bounds[1]].tolist() == [1, 10, 11, 2]


def test_pairs_go_on_where_a_run_stopped() -> None:
    def make(seed: int = 3) -> PairedData:
        return PairedData([store_of(some_pairs()), store_of(some_pairs(9))], FORM, context=24, tokens=96, seed=seed)

    data = make()
    for _ in range(5):
        data.next_batch()
    state = json.loads(json.dumps(data.state()))
    expected = [data.next_batch() for _ in range(9)]
    again = make()
    again.load_state(state)
    for batch in expected:
        for found, array in zip(again.next_batch(), batch, strict=True):
            np.testing.assert_array_equal(found, array)
    with pytest.raises(DataError, match="cannot go on with other data"):
        make(4).load_state(state)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([10], [11]), ([], [12])], "document 2 of 2 has an empty source"),
        ([([10] * 7, [11])], "document 1 of 1 has a source of more than the 8 tokens that there is room for, .* has 9"),
        ([([10], [11] * 7)], "document 1 of 1 has a target of more than the 8 tokens that there is room for, .* has 9"),
    ],
)
def test_pairs_that_do_not_fit(pairs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairedData([store_of(pairs)], FORM, context=8, tokens=16)


def test_a_part_of_a_file_names_documents_as_the_file_has_them() -> None:
    pairs = [([10], [11])] * 30 + [([10] * 9, [11])] + [([10], [11])] * 2
    store = store_of(pairs)
    first, rest = store.split(0.5)
    second, last = rest.split(0.3, whole=True)
    assert len(first.ends) + len(second.ends) + len(last.ends) == 33
    with pytest.raises(DataError, match="document 31 of 33 has a source of more than the 8 tokens"):
        Pairs(rest, FORM, context=8)
    assert (second.document(0), last.document(len(last.ends) - 1)) == (
        f"document {len(first.ends) + 1} of 33",
        "document 33 of 33",
    )


def test_pairs_take_little_memory_beside_their_tokens() -> None:
    store = store_of([([10] * 60, [11] * 40)] * 10000)
    tracemalloc.start()
    pairs = Pairs(store, FORM, context=64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(store.tokens)
    assert (pairs.count(), pairs.source_total, pairs.total) == (10000, 620000, 620000 + 420000)


def test_files_that_hold_no_pairs() -> None:
    store = store_of([([10], [11])])
    plain = TokenStore(store.tokens, store.ends, None, True, "key", "texts")
    with pytest.raises(DataError, match="texts: expected pairs for seq2seq"):
        PairedData([plain], FORM, context=8, tokens=16)
    for answers in ([0, 0, 0, 0], [0, 1, 0, 1]):
        mixed = TokenStore(store.tokens, store.ends, np.array(answers, np.uint8), True, "key", "mixed")
        with pytest.raises(DataError, match="document 1 of 1 is no source with one target behind it"):
            PairedData([mixed], FORM, context=8, tokens=16)
    with pytest.raises(ConfigError, match="batch_tokens: expected at least 16, a source and a target"):
        PairedData([store], FORM, context=8, tokens=15)


class Texts:
    """Texts between 1 and 2 of different tokens from 10 to 69, and padding at the end; a function of their number."""

    def __init__(self, lengths: tuple[int, ...] = (2, 3, 25, 1, 58)) -> None:
        self.lengths, self.position = lengths, 0

    def texts(self, position: int) -> list[list[int]]:
        rng = np.random.default_rng([7, position])
        return [rng.permutation(np.arange(10, 70))[:length].tolist() for length in self.lengths]

    def next_batch(self) -> Any:
        texts = [[1, *text, 2] for text in self.texts(self.position)]
        self.position += 1
        tokens = np.array([*(token for text in texts for token in text), *[0] * 5], np.int32)
        labels = np.where(tokens == 0, IGNORED, tokens).astype(np.int32)
        return tokens, labels, np.cumsum([0, *map(len, texts), 5]).astype(np.int32)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def corrupted(data: Any = None, **options: Any) -> CorruptedSpans:
    given = {"context": 60, "share": 0.15, "mean_span": 3.0, "seed": 0, **options}
    return CorruptedSpans(data or Texts(), FORM, SENTINELS, **given)


def infilled(data: Any = None, **options: Any) -> InfilledText:
    given = {"context": 60, "share": 0.3, "mean_span": 3.0, "seed": 0, **options}
    return InfilledText(data or Texts(), FORM, MASK, [STOP, 61], range(30, 70), **given)


def pairs_of_texts(data: Denoising, texts: Texts, count: int) -> list[tuple[list[Any], list[Any]]]:
    """Texts of `count` micro-batches of texts, but for those too short to be damaged, and their pairs, matched by their
    tokens: pairs come in another order, those of a micro-batch of texts before all of the next."""
    found: list[Any] = []
    groups = []
    for position in range(count):
        usable = [text for text in texts.texts(position) if len(text) > 1]
        while len(found) < len(usable):
            found += taken_apart(data.next_batch())
        chosen, found = found[: len(usable)], found[len(usable) :]
        held = [{*source, *target} - {*SENTINELS, MASK} for source, target in chosen]
        groups.append((usable, [chosen[held.index(set(text))] for text in usable]))
    return groups


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text, from its two halves."""
    marks = [i for i, token in enumerate(target) if token in SENTINELS]
    spans = {target[a]: target[a + 1 : b] for a, b in pairwise([*marks, len(target)])}
    assert list(spans) == list(SENTINELS[: len(spans)]) == [token for token in source if token in SENTINELS]
    assert all(spans.values())
    return [token for at in source for token in (spans[at] if at in SENTINELS else [at])]


@pytest.mark.parametrize(("share", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.5, 8.0), (0.9, 3.0)])
def test_spans_and_what_is_left_are_the_text(share: float, mean_span: float) -> None:
    data, plain = corrupted(share=share, mean_span=mean_span), Texts()
    starts_with_text = ends_with_sentinel = True
    for texts, found in pairs_of_texts(data, plain, 60):
        assert [restored(*pair) for pair in found] == texts
        for text, (source, target) in zip(texts, found, strict=True):
            taken = min(max(round(share * len(text)), 1), len(text) - 1)
            spans = len([token for token in target if token in SENTINELS])
            assert len(target) - spans == taken
            assert spans == min(max(1, round(taken / mean_span)), len(text) - taken, len(SENTINELS))
            starts_with_text &= source[0] not in SENTINELS
            ends_with_sentinel &= source[-1] in SENTINELS
    assert starts_with_text and ends_with_sentinel


def test_568_tokens_become_512_and_114() -> None:
    """The published sizes: 28 sentinels for 85 tokens, and an end token behind both."""
    form = PairForm(start=0, end=1, behind=(1,))
    tokens = np.arange(200, 768, dtype=np.int32)
    data = Texts(())
    data.next_batch = lambda: (tokens, tokens, np.array([0, 568], np.int32))  # type: ignore[method-assign]
    spans = CorruptedSpans(data, form, range(100, 200), context=568, share=0.15, mean_span=3.0, seed=0)
    _, labels, starts, _, bounds = spans.next_batch()
    assert (bounds[1], starts[1]) == (512, 114) and (labels[:114] != IGNORED).all() and (labels[114:] == IGNORED).all()


@pytest.mark.parametrize("make", [corrupted, infilled, lambda data, **options: mixed(data, **options)])
def test_little_is_padding(make: Callable[..., Denoising]) -> None:
    """Whatever the texts' lengths, and none is lost."""
    lengths = (5, 30, 12, 4, 7, 50, 3, 9) * 12
    texts = Texts(lengths)
    data = make(texts)
    shapes, used, total, count = set(), 0, 0, 0
    for _ in range(30):
        _, labels, starts, source, bounds = batch = data.next_batch()
        shapes.add(tuple(map(len, batch)))
        counted = [i for i in range(len(starts) - 1) if starts[i] < starts[i + 1] and labels[starts[i]] != IGNORED]
        used += sum(int(bounds[i + 1] - bounds[i] + starts[i + 1] - starts[i]) for i in counted)
        total += len(labels) + len(source)
        count += len(counted)
    assert len(shapes) == 1 and used > 0.95 * total
    other = make(Texts((3, 60, 2, 58)), like=data)
    assert {tuple(map(len, other.next_batch())) for _ in range(5)} == shapes
    assert abs(count - 30 * len(lengths)) < len(lengths)


def test_spans_are_as_likely_everywhere() -> None:
    rng = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        sizes = tuple(partition(5, 3, rng))
        counts[sizes] = counts.get(sizes, 0) + 1
    assert all(sum(sizes) == 5 and min(sizes) > 0 for sizes in counts)
    assert len(counts) == 6 and max(counts.values()) < 1.3 * min(counts.values())
    for _ in range(200):
        spans = spread([2, 0, 3], 9, rng)
        assert [b - a for a, b in spans] == [2, 0, 3]
        assert all(stop < begin for (_, stop), (begin, _) in pairwise(spans)), "no two touch"


@pytest.mark.parametrize(("share", "mean_span"), [(0.3, 3.0), (0.7, 1.0)])
def test_infilled_texts(share: float, mean_span: float) -> None:
    data, plain = infilled(share=share, mean_span=mean_span), Texts()
    inserted, moved = 0, 0
    for texts, found in pairs_of_texts(data, plain, 60):
        assert [target for _, target in found] == [[*text] for text in texts], "the target is the text"
        for text, (source, _) in zip(texts, found, strict=True):
            assert len(source) <= len(text) and MASK in source
            sentence = np.cumsum([0, *(token in (STOP, 61) for token in text)])[: len(text)].tolist()
            place = {token: (sentence[i], i) for i, token in enumerate(text)}
            kept = [token for token in source if token != MASK]
            order = list(dict.fromkeys(place[token][0] for token in kept))
            assert [place[token][0] for token in kept] == sorted((place[t][0] for t in kept), key=order.index)
            for a, b in pairwise(kept):  # within a sentence nothing moves
                assert place[a][0] != place[b][0] or place[a][1] < place[b][1]
            moved += order != sorted(order)
            for i, (a, b, c) in enumerate(zip(source, source[1:], source[2:], strict=False)):
                assert [a, b] != [MASK, MASK] and [b, c] != [MASK, MASK], i
                inserted += b == MASK and place.get(a, (0, 0))[1] + 1 == place.get(c, (0, -1))[1]
    assert inserted > 0 and moved > 0


def test_words_are_masked_as_a_whole() -> None:
    """Tokens below 30 go on with a word; a share of all words is gone, whatever their lengths."""
    data, plain = infilled(Texts((58,))), Texts((58,))
    for [text], [(source, _)] in pairs_of_texts(data, plain, 30):
        words = np.split(np.array(text), [i for i in range(1, 58) if text[i] >= 30 or text[i - 1] in (STOP, 61)])
        gone = [word for word in words if not set(word.tolist()) & set(source)]
        assert all(set(word.tolist()) <= set(source) or not set(word.tolist()) & set(source) for word in words)
        assert abs(len(gone) - 0.3 * len(words)) <= 3


@pytest.mark.parametrize("begins", [(), (100,), (10,), range(10, 70)])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_something_of_every_text_is_kept(begins: Any, share: float) -> None:
    lengths = (2, 2, 3, 4, 40)
    data = InfilledText(Texts(lengths), FORM, MASK, (), begins, context=60, share=share, mean_span=3.0, seed=0)
    for texts, found in pairs_of_texts(data, Texts(lengths), 30):
        for (source, target), length in zip(found, map(len, texts), strict=True):
            kept = [token for token in source if token != MASK]
            assert len(target) == length and 0 < len(kept) < length and set(kept) <= set(target)
            if begins == (100,) and share == 0.3:  # of one word: as if each token were one
                assert len(kept) == length - max(1, round(0.3 * length))


def test_some_masks_are_random_tokens() -> None:
    ordinary, masks, random = list(range(71, 79)), 0, 0
    data = infilled(random_share=0.25, ordinary=ordinary)
    for _ in range(60):
        for source, _ in taken_apart(data.next_batch()):
            masks += source.count(MASK)
            random += sum(token in ordinary for token in source)
    assert random / (masks + random) == pytest.approx(0.25, abs=0.03)
    assert data.state()["kind"][-2] == 0.25
    with pytest.raises(ConfigError, match="random_share: expected 0 <= value < 1, got 1"):
        infilled(random_share=1)


MODES = {"[NLU]": [91, 92], "[S2S]": [93], "[NLG]": [94]}  # as many tokens as the tokenizer makes of them


def mixed(data: Any = None, **options: Any) -> MixedDenoisers:
    return MixedDenoisers(data or Texts(), FORM, SENTINELS[8:], MODES, **{"context": 60, "seed": 0, **options})


def test_each_of_ul2s_denoisers_is_as_likely() -> None:
    """Sources begin with their mode, which tells how the text is damaged."""
    data, plain = mixed(), Texts()
    found: dict[tuple[str, int, int], int] = {}  # mode, tokens that were taken out, spans
    pairs: list[Any] = []
    for position in range(150):
        [text] = [text for text in plain.texts(position) if len(text) == 58]
        while not (chosen := [pair for pair in pairs if {*text} <= {*pair[0], *pair[1]}]):
            pairs = taken_apart(data.next_batch())
        source, target = chosen[0]
        mode = next(name for name, ids in MODES.items() if source[: len(ids)] == ids)
        source = source[len(MODES[mode]) :]
        spans = sum(token in SENTINELS for token in target)
        if mode == "[S2S]":
            assert source == [*text[:44], SENTINELS[8]] and target == text[44:], "a quarter of 58, rounded to even"
        assert [token for token in source if token not in SENTINELS] == [token for token in text if token in source]
        key = mode, len(target) - spans, spans
        found[key] = found.get(key, 0) + 1
    regular = [("[NLU]", 9, 3), ("[NLU]", 9, 1)]
    extreme = [("[NLG]", 29, 10), ("[NLG]", 29, 4), ("[NLG]", 9, 1), ("[NLG]", 29, 1)]
    assert set(found) == {*regular, ("[S2S]", 14, 0), *extreme}
    assert min(found.values()) >= 8 and max(found.values()) <= 36, found


@pytest.mark.parametrize("make", [corrupted, infilled, mixed])
def test_damage_is_decided_by_the_seed(make: Callable[..., Denoising]) -> None:
    data, other = make(), make(seed=1)
    differ = False
    for _ in range(8):
        state = json.loads(json.dumps(data.state()))
        expected = data.next_batch()
        again = make()
        again.load_state(state)
        assert again.state() == state
        for found, array in zip(again.next_batch(), expected, strict=True):
            np.testing.assert_array_equal(found, array)
        differ |= taken_apart(other.next_batch()) != taken_apart(expected)
    assert differ
    with pytest.raises(DataError, match="damaged its texts by"):
        other.load_state(state)


def test_what_cannot_be_damaged() -> None:
    with pytest.raises(ConfigError, match="sentinels, <extra_id_0> and so on, found none"):
        CorruptedSpans(Texts(), FORM, (), context=60, share=0.15, mean_span=3, seed=0)
    with pytest.raises(ConfigError, match="mask_share: expected 0 < value < 1, got 1"):
        corrupted(share=1)
    with pytest.raises(ConfigError, match="mean_span: expected 1 <= value"):
        infilled(mean_span=0.5)
    with pytest.raises(DataError, match="a text holds a sentinel"):
        CorruptedSpans(Texts(), FORM, range(10, 70), context=60, share=0.15, mean_span=3, seed=0)
    with pytest.raises(DataError, match=r"a text holds a mask \(id 30\)"):
        InfilledText(Texts((60,)), FORM, 30, (), (), context=62, share=0.3, mean_span=3, seed=0)
    with pytest.raises(DataError, match="expected texts of at least two tokens, as one is hidden"):
        corrupted(Texts((1, 1)))


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a mask, padding and sentinels; pairs in both spellings; texts."""
    folder = tmp_path_factory.mktemp("pairs")
    names = [chr(ord("A") + i) for i in range(15)]
    lines = [{"source": f"fox {name} runs.", "target": name} for name in names]
    lines += [{"prompt": f"fox {name} sleeps.", "completion": name} for name in names]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = ["A fox runs. It sleeps! " * 3] * 30
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(
        [folder / "texts.jsonl"], folder / "tokenizer", vocab_size=300, special=("<pad>", "<mask>"), sentinels=8
    )
    return folder


def run(home: Path, objective: str, **values: Any) -> Any:
    given = {"out": str(home / "run"), "steps": 1, "arch": "t5", "layers": 1, "hidden": 16, "heads": 2, "context": 32,
             "data": [str(home / "texts.jsonl")], "tokenizer": str(home / "tokenizer"), "batch_tokens": 128,
             "data_cache": str(home / "cache"), "objective": objective, **values}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    config, theirs = settings(given)
    return prepare(config, theirs.seed, None, theirs.objective), given


def test_the_tokenizer_of_a_new_model(home: Path) -> None:
    tokenizer = Tokenizer.load(home / "tokenizer")
    assert tokenizer.pad_token_id == tokenizer.id_of("<pad>") and tokenizer.mask_token_id == tokenizer.id_of("<mask>")
    assert tokenizer.around() == ([0], []) and end_tokens(tokenizer) == (1,)
    assert None not in [tokenizer.id_of(f"<extra_id_{i}>") for i in range(8)]
    with pytest.raises(ConfigError, match="sentinels: expected 0 to 1000, got 1001"):
        train_tokenizer([home / "texts.jsonl"], home / "other", vocab_size=3000, sentinels=1001)


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        ("$A", [], []),
        ("<s> $A", [0], []),
        ("$A </s>", [], [1]),
        ("<s> $A </s>", [0], [1]),
        ("$A </s> <mask>", [], [1, 3]),
        ("<mask> <s> $A", [3, 0], []),
        ("$A <mask> <s>", [], [3, 0]),
    ],
)
def test_special_tokens_around_a_text(home: Path, tmp_path: Path, template: str, before: Any, behind: Any) -> None:
    """As decoders, T5, BART, mBART, and ChatGLM in its two forms have them."""
    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    library = TokenizersLibrary.from_file(str(path))
    special = [(name, index) for index, name in enumerate(["<s>", "</s>", "<pad>", "<mask>"]) if name in template]
    library.post_processor = TemplateProcessing(single=template, special_tokens=special)
    library.save(str(path))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert tokenizer.around() == (before, behind) and end_tokens(tokenizer) == (1,)


def test_pairs_of_a_file(home: Path) -> None:
    setup, given = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], valid_share=0.2)
    tokenizer = Tokenizer.load(home / "tokenizer")
    tokens, labels, starts, source, bounds = batch = setup.train.next_batch()
    pad = tokenizer.pad_token_id
    for (first, end), (begin, stop) in list(zip(pairwise(starts), pairwise(bounds), strict=True))[:4]:
        assert tokens[first] == pad and labels[first] == 0 and labels[end - 1] == 1
        text = tokenizer.decode(source[begin:stop])
        assert text.split()[1] == tokenizer.decode(labels[first:end]) and source[begin] == 0
    assert setup.valid is not None
    assert list(map(len, setup.valid.next_batch())) == list(map(len, batch))
    plan = plan_of_run(given)
    assert (plan.shape.tokens, plan.shape.source) == (len(tokens), len(source))
    del given["data"]
    assert plan_of_run(given).shape.source == 64


def test_a_plan_knows_a_head_of_its_own_that_config_does_not_name(home: Path, tmp_path: Path) -> None:
    """T5 v1.1 as older versions wrote it: the file holds a head, config.json says nothing of one."""
    setup, given = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], tie=False, valid_share=0)
    model = Trainer(
        setup.model, setup.train, TrainConfig(tmp_path / "new", steps=1, threads=1), tokenizer=setup.tokenizer
    )
    folder = model.run().folder
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    for data in ({}, {"data": [str(home / "pairs.jsonl")]}):
        values = {name: given[name] for name in ("context", "batch_tokens", "data_cache", "objective")}
        planned = plan_of_run({**values, **data, "model": str(folder)})
        assert planned.weights == model.plan.weights and not planned.spec.head.tied


@pytest.mark.parametrize("objective", ["spans", "denoise", "ul2"])
def test_texts_of_a_file_become_no_longer_than_the_context(home: Path, objective: str) -> None:
    for packing in ("documents", "plain"):
        setup, given = run(home, objective, arch="bart", packing=packing, valid_share=0)
        batch = setup.train.next_batch()
        assert max(np.diff(batch[2]).max(), np.diff(batch[4]).max()) <= 32
        assert 0.2 < (batch[1] != IGNORED).mean() <= 1
        assert plan_of_run(given).shape.all_tokens == len(batch[0]) + len(batch[3])
        if packing == "plain":
            del given["data"]
            assert plan_of_run(given).shape.all_tokens == pytest.approx(len(batch[0]) + len(batch[3]), rel=0.1)


def test_sentences_of_scripts_without_spaces(tmp_path: Path) -> None:
    """A byte-level vocabulary has their ends, with or without what closes a quotation, under names of bytes."""
    texts = ["狐狸跑。猫睡觉。", "狗叫。」鸟飞。", 'A fox runs."It sleeps'] * 20
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([path], tmp_path / "tokenizer", vocab_size=320, special=("<pad>", "<mask>"))
    values = {"arch": "bart", "data": [str(path)], "data_cache": str(tmp_path / "cache"), "mask_share": 0.1}
    setup, _ = run(tmp_path, "denoise", valid_share=0, **values)
    tokenizer, swapped = Tokenizer.load(tmp_path / "tokenizer"), set()
    for end in ("。", "。」", '."'):
        assert len(tokenizer.encode(end, add_special_tokens=False)) == 1
    for _ in range(20):
        _, _, _, source, bounds = setup.train.next_batch()
        for begin, stop in pairwise(bounds.tolist()):
            text = tokenizer.decode(source[begin:stop])
            for first, second in ("狐猫", "狗鸟", ("fox", "It")):
                if -1 < text.find(second) < text.find(first):
                    swapped.add(first)
    assert swapped == {"狐", "狗", "fox"}


def test_settings_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    pairs = [str(home / "pairs.jsonl")]
    for objective, values, message in [
        ("causal", {}, "objective: expected seq2seq, spans, denoise or ul2 for this t5 model, got 'causal'"),
        ("spans", {"arch": "gpt2"}, "objective: expected causal, prefix or blanks for this gpt2 model, got 'spans'"),
        ("seq2seq", {"data": pairs, "packing": "plain"}, "packing: expected documents for seq2seq"),
        ("seq2seq", {"data": pairs, "mask_prompt": True}, "mask_prompt: expected no for a model with an encoder"),
        ("seq2seq", {"data": pairs, "batch_tokens": 63}, "batch_tokens: expected at least 64"),
        ("seq2seq", {}, "expected pairs for seq2seq"),
        ("spans", {"context": 3}, "context: expected at least 4 tokens for spans, got 3"),
        ("seq2seq", {"init_std": 0.1}, "init_std: expected none, as the first weights of T5 follow from its sizes"),
        ("seq2seq", {"data": pairs, "mask_share": 0.2}, "mask_share: expected none for seq2seq"),
        ("causal", {"arch": "gpt2", "mean_span": 4.0}, "mean_span: expected none for causal"),
        ("denoise", {"mask_rule": "bernoulli"}, "mask_rule: expected none for denoise"),
        ("seq2seq", {"arch": "bart", "tie": False}, "tie: BART has one matrix"),
        ("seq2seq", {"tokenizer": None, "vocab_size": 300}, "tokenizer: expected one with an end token for t5"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            run(home, objective, valid_share=0, **values)
    train_tokenizer([home / "texts.jsonl"], tmp_path / "bare", vocab_size=270)
    bare = {"tokenizer": str(tmp_path / "bare"), "data": ["missing.jsonl"]}  # refused before any text is read
    with pytest.raises(ConfigError, match="denoise needs a tokenizer with a mask token"):
        run(home, "denoise", **bare)
    with pytest.raises(ConfigError, match="expected a tokenizer with sentinels"):
        run(home, "spans", **bare)
    mbart = {**json.loads((GOLDEN / "mbart" / "config.json").read_text()), "decoder_start_token_id": None}
    shutil.copyfile(GOLDEN / "mbart" / "model.safetensors", tmp_path / "model.safetensors")
    tiny_model.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(mbart))
    assert read_spec(tmp_path).decoder_start_token_id is None
    with pytest.raises(ConfigError, match="expected decoder_start_token_id in config"):
        run(home, "seq2seq", data=pairs, arch=None, tokenizer=None, model=str(tmp_path))


def test_sources_and_targets_may_have_different_room() -> None:
    longest = store_of([([10] * 6, [11] * 5)])  # 8 tokens with what is around them, and 7
    assert Pairs(longest, FORM, 8, longest_target=7).count() == 1
    with pytest.raises(DataError, match="a target of more than the 6 tokens that there is room for"):
        Pairs(longest, FORM, 8, longest_target=6)


@pytest.mark.parametrize(("objective", "token"), [("spans", "<extra_id_3>"), ("denoise", "<mask>")])
def test_texts_that_hold_what_stands_for_a_span(home: Path, tmp_path: Path, objective: str, token: str) -> None:
    """They are found before the first step, wherever they are."""
    texts = ["A fox runs."] * 30 + [f"A fox {token} runs."] + ["It sleeps!"] * 3
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    index = Tokenizer.load(home / "tokenizer").id_of(token)
    expected = f"{path}: document 31 of 34 holds {token} \\(id {index}\\), which objective {objective} puts"
    with pytest.raises(DataError, match=expected):
        run(home, objective, data=[str(home / "texts.jsonl"), str(path)])
    other = "denoise" if objective == "spans" else "spans"
    run(home, other, data=[str(path)])


def test_few_pairs_are_held_out_whole(home: Path, tmp_path: Path) -> None:
    lines = [{"source": "a fox", "target": "runs"}, {"source": "a fox", "target": "sleeps"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = open_tokens(tmp_path / "two.jsonl", home / "tokenizer", home / "cache").split(0.3, whole=True)
    assert len(first.ends) == len(second.ends) == 1


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "tie", "rate"), [("t5", True, 1e-2), ("t5", False, 1e-2), ("bart", True, 1e-2)])
def test_a_new_model_fits_a_batch_and_writes_its_targets(
    home: Path, tmp_path: Path, arch: str, tie: bool, rate: float
) -> None:
    pairs = [str(home / "pairs.jsonl")]
    sizes = {"hidden": 32, "batch_tokens": 256, "init_std": 0.1 if arch == "bart" else None}
    setup, _ = run(home, "seq2seq", data=pairs, arch=arch, tie=tie, valid_share=0, **sizes)
    config = TrainConfig(
        tmp_path / "run", steps=100, learning_rate=rate, warmup_steps=5, threads=2, objective="seq2seq",
        sample_prompts=("fox C runs.",), sample_tokens=8, sample_temperature=0.0,
    )  # fmt: skip
    trainer = Trainer(setup.model, RepeatedData(setup.train, 1), config, tokenizer=setup.tokenizer)
    assert trainer.spec.head.scale == (32**-0.5 if arch == "t5" and tie else 1)
    first = trainer.step().loss
    assert first == pytest.approx(np.log(trainer.spec.vocab_size), rel=0.2)
    result = trainer.run()
    assert result.last_loss is not None and result.last_loss < 0.1
    llm = LLM(result.folder, threads=2, dtype="float32")
    _, labels, starts, source, bounds = trainer.data.next_batch()
    counted = [i for i in range(len(starts) - 1) if starts[i] < starts[i + 1] and labels[starts[i]] != IGNORED]
    sources = [source[bounds[i] : bounds[i + 1]].tolist() for i in counted]
    written = llm.generate([{"prompt_token_ids": ids} for ids in sources], temperature=0, max_tokens=12)
    assert len(counted) > 4
    for i, output in zip(counted, written, strict=True):
        assert list(output.outputs[0].token_ids) == labels[starts[i] : starts[i + 1]].tolist()
    evaluated = evaluate(llm, open_tokens(home / "pairs.jsonl", home / "tokenizer", home / "cache"))
    assert evaluated.documents == 30 and evaluated.loss < 3, "half of the pairs were in the batch"
    [sample] = trainer.sample()
    assert sample.text == llm.generate("fox C runs.", temperature=0, max_tokens=8)[0].outputs[0].text
    assert_transformers_reads(result.folder, llm, sources, [o.outputs[0].token_ids for o in written])


def test_samples_begin_as_the_folder_says(home: Path, tmp_path: Path) -> None:
    sizes = {"hidden": 32, "batch_tokens": 256, "init_std": 0.1}
    setup, _ = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], arch="bart", valid_share=0, **sizes)
    config = TrainConfig(
        tmp_path / "new", steps=1, threads=1, objective="seq2seq", sample_prompts=("fox C runs.",), sample_tokens=8,
        sample_temperature=0.0,
    )  # fmt: skip
    folder = Trainer(setup.model, RepeatedData(setup.train, 1), config, tokenizer=setup.tokenizer).run().folder
    begun = {"decoder_start_token_id": 5, "forced_bos_token_id": 70}
    (folder / "generation_config.json").write_text(json.dumps(begun))
    trainer = Trainer(str(folder), RepeatedData(setup.train, 1), replace(config, out=tmp_path / "on"))
    [sample] = trainer.sample()
    [output] = LLM(folder, threads=1, dtype="float32").generate("fox C runs.", temperature=0, max_tokens=8)
    assert sample.text == output.outputs[0].text and output.outputs[0].token_ids[0] == 70


def assert_transformers_reads(folder: Path, llm: LLM, sources: list[list[int]], written: list[Any]) -> None:
    """The same logits and texts, where transformers is at hand or must be."""
    at_hand = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not at_hand and not os.environ.get("PYLLM_REQUIRE_ORACLE"):
        return
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    start = llm.spec.decoder_start_token_id
    for ids, expected in zip(sources[:3], written[:3], strict=True):
        target = [start, *expected[:-1]]
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), decoder_input_ids=torch.tensor([target])).logits[0].numpy()
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0].tolist()
        ours = llm.forward(target, source_token_ids=ids).logits
        assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())
        assert made == [start, *expected]


@pytest.mark.parametrize(
    ("objective", "arch"), [("seq2seq", "bart"), ("spans", "t5"), ("denoise", "bart"), ("ul2", "t5")]
)
def test_a_resumed_run_is_as_one_that_was_not_stopped(home: Path, tmp_path: Path, objective: str, arch: str) -> None:
    data = {"data": [str(home / "pairs.jsonl")]} if objective == "seq2seq" else {}

    def trainer(out: str, resume: bool = False) -> Trainer:
        setup, _ = run(home, objective, arch=arch, **data)
        config = TrainConfig(tmp_path / out, steps=6, learning_rate=1e-2, dropout=0.1, accumulation=2, threads=2,
                             objective=objective, eval_batches=2)  # fmt: skip
        return Trainer(
            setup.model, setup.train, config, eval_data=setup.valid, tokenizer=setup.tokenizer, resume=resume
        )

    whole = trainer("whole")
    whole.run()
    stopped = trainer("stopped")
    for _ in range(3):
        stopped.step()
    stopped.save()
    resumed = trainer("stopped", resume=True)
    resumed.run()
    np.testing.assert_array_equal(resumed.parameters.weights, whole.parameters.weights)
    np.testing.assert_array_equal(resumed.parameters.second_moment, whole.parameters.second_moment)
    assert resumed.evaluate().loss == whole.evaluate().loss


def test_command_line(home: Path, tmp_path: Path) -> None:
    """A run, what its live line counts, its evaluation, and how it goes on where it was ended."""
    sizes = ["--arch", "t5", "--layers", 1, "--hidden", 16, "--heads", 2, "-c", 32, "--batch-tokens", 128]
    command = [
        *sizes,
        "--tokenizer",
        home / "tokenizer",
        "--objective",
        "seq2seq",
        "-o",
        tmp_path / "run",
        "--steps",
        4,
        "--keep",
        4,
    ]
    environment = {"PYLLM_CACHE": str(home / "cache")}
    made = pyllm("train", home / "pairs.jsonl", *command, "--save-every", 1, "--dropout", 0.1, env=environment)
    assert made.returncode == 0, made.stderr
    assert b"held-out loss" in made.stderr and b"% of peak" in made.stderr
    scored = pyllm("eval", home / "pairs.jsonl", "-m", tmp_path / "run" / "last", "--json", env=environment)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)[0]["documents"] == 30
    wrong = pyllm("eval", home / "texts.jsonl", "-m", tmp_path / "run" / "last", env=environment)
    assert wrong.returncode == 1 and b"expected pairs" in wrong.stderr
    cut = shutil.copytree(tmp_path / "run", tmp_path / "cut", symlinks=True)  # as a kill behind step 2 leaves it
    for step in (3, 4):
        shutil.rmtree(cut / f"step-0000000{step}")
    for name in ("last", "best"):
        (cut / name).unlink()
        (cut / name).symlink_to("step-00000002")
    on = pyllm("train", "--resume", "-o", cut, env=environment)
    assert on.returncode == 0, on.stderr
    for file in ("model.safetensors", "training_state.safetensors"):
        assert (cut / "last" / file).read_bytes() == (tmp_path / "run" / "last" / file).read_bytes()
    assert (cut / "last").resolve().name == "step-00000004"


def test_the_pairs_of_the_example(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "examples" / "number_names.py"
    files = [tmp_path / "numbers.jsonl", tmp_path / "unseen.jsonl"]
    subprocess.run([sys.executable, script, *files], check=True)
    trained, unseen = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(trained) == 9500
    pairs = trained + unseen
    names = {pair["source"]: pair["target"] for pair in pairs}
    assert len(names) == len(set(names.values())) == 10000
    assert names["2 0 2 6"] == "two thousand twenty-six" and names["0"] == "zero" and names["1 1"] == "eleven"


def test_operations_of_both_parts() -> None:
    """Of a model whose matrices are all there is to count, by hand."""
    spec = read_spec(GOLDEN / "t5")
    hidden, inner, heads, size, vocabulary = 20, 28, 4, 6, 67
    own = 2 * (6 * heads * size * hidden + 2 * hidden * inner + vocabulary * hidden)  # self attention, q and o of cross
    own += 4 * heads * size * 1 + 4 * heads * size  # one key each, and one of the source
    read = 2 * (2 * (4 * heads * size * hidden + 2 * hidden * inner) + 2 * heads * size * hidden) + 2 * 4 * heads * size
    assert operations_per_token(spec, 1, 0.0) == 3 * own
    assert operations_per_token(spec, 1, 1.0) == 3 * read
