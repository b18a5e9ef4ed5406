"""Texts that are damaged to be restored: spans, infilled texts, UL2's mixture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from text_to_text import FORM, taken_apart

from pyllm.errors import ConfigError, DataError
from pyllm.train.head_loss import IGNORED
from pyllm.train.objectives.denoising import CorruptedSpans, Denoising, InfilledText
from pyllm.train.objectives.spans import partition, spread
from pyllm.train.objectives.ul2 import MixedDenoisers
from pyllm.train.pairs import PairForm

SENTINELS = tuple(range(99, 79, -1))
MASK, STOP = 70, 60  # and every token from 50 on begins a word


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


def corrupted(data: Any = None, form: PairForm = FORM, **options: Any) -> CorruptedSpans:
    given = {"context": 60, "share": 0.15, "mean_span": 3.0, "seed": 0, **options}
    return CorruptedSpans(data or Texts(), form, SENTINELS, **given)


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
    other = make(Texts((3, 58, 2, 50)), like=data)
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


def mixed(data: Any = None, form: PairForm = FORM, **options: Any) -> MixedDenoisers:
    return MixedDenoisers(data or Texts(), form, SENTINELS[8:], MODES, **{"context": 62, "seed": 0, **options})


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


@pytest.mark.parametrize("make", [corrupted, mixed])
def test_a_decoder_reads_both(make: Callable[..., Denoising]) -> None:
    """Sources stand before their targets in one sequence, and only these count; the pairs are those of others."""
    form = replace(FORM, start=None, behind=())
    data, shapes = make(form=form, context=90), set()
    pairs = pairs_of_texts(make(), Texts(), 20)
    expected = [([1, *source], [*target, 2]) for _, found in pairs for source, target in found]
    seen, used = [], 0
    for _ in range(15):
        tokens, labels, starts = batch = data.next_batch()
        shapes.add(tuple(map(len, batch)))
        for first, end in pairwise(starts.tolist()):
            if (labels[first:end] == IGNORED).all():
                continue
            used += end - first
            cut = first + int(np.flatnonzero(labels[first:end] != IGNORED)[0]) + 1
            assert (labels[cut - 1 : end] != IGNORED).all()
            assert tokens[cut:end].tolist() == labels[cut - 1 : end - 1].tolist()
            seen.append((tokens[first:cut].tolist(), labels[cut - 1 : end].tolist()))
    assert len(shapes) == 1 and used > 0.8 * 15 * len(tokens)
    assert len(seen) > 35 and all(pair in expected for pair in seen)
    with pytest.raises(DataError, match="expected texts that become no longer than the context of 40"):
        make(form=form, context=40)


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
