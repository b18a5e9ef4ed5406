"""The grammar of stories and its checker: what is composed makes sense, and what does not is found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from stories import make_model, words
from stories.check import check
from stories.compose import story
from stories.events import FORMS
from stories.plots import PLOTS
from stories.write import write

BROOK = """Once upon a time, there was a little fox named Pip. Pip had a friend, a kind girl named Mia. He had a red \
kite. Today, Pip wanted to show the kite to Mia.

Pip went to the park. But when he looked for the kite, it was gone. Pip was very sad. He looked under a bush, but the \
kite was not there.

Just then, Pip met an old owl. "Have you seen my kite?" he asked the owl. "I saw it in the tall grass," said the owl. \
Pip looked in the tall grass, and there was the kite! "Thank you so much!" said Pip, and hugged the owl.

Soon Mia came along and found Pip. At last, Pip could show the red kite to Mia. From that day on, Pip and the owl \
were the best of friends. The end."""


@pytest.mark.parametrize("plot", PLOTS)
def test_what_is_composed_is_consistent(plot: str) -> None:
    for seed in range(40):
        text = story(seed, plot)
        verdict = check(text)
        assert verdict.consistent, (seed, text, verdict.problems)


def test_a_story_of_ones_own_is_understood() -> None:
    assert check(BROOK).problems == ()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("He had a red", "She had a red", "Pip is called she"),
        ("Pip and the owl were", "Pip and the crow were", "crow acts before being introduced"),
        ("there was a little fox named Pip", "there was a little girl named Pip", "a girl named Pip"),
        ("an old owl", "a old owl", "a old"),
        ("Soon Mia came along and found Pip. ", "", "it is not so that with Pip Mia"),
        ("said the owl. Pip looked in the tall grass", "said the owl. Pip looked under a bench", "told under a bench"),
        ("I saw it in the tall grass", "I saw it under a bush", "it is so that searched under a bush"),
        ("the red kite to Mia", "the blue kite to Mia", "the red kite became blue"),
        ("At last, Pip could show the red kite to Mia. ", "", "ends with an open wish"),
        ("Today, Pip wanted to show the kite to Mia.", "", "the mishap comes before any wish"),
        ("when he looked for the kite", "when he looked for the drum", "the drum comes from nowhere"),
        ("Mia came along", "Mia flew along", "not understood: Soon Mia flew along"),
        ("From that day on, Pip and the owl were the best of friends. The end.", "", "it has no ending"),
        ("and there was the kite!", "and there was the kite! Pip was very sad.", "it is not so that trouble *"),
        ("Once upon a time, there was a little fox named Pip. ", "", "does not begin"),
        ("Pip went to the park.", "Pip went home.", "it is so that at Pip home"),
        ("an old owl", "an old owl. Just then, Pip met an old owl", "owl is introduced twice"),
    ],
)
def test_what_does_not_fit_is_found(old: str, new: str, problem: str) -> None:
    assert old in BROOK
    problems = check(BROOK.replace(old, new, 1)).problems
    assert any(problem in one for one in problems), problems


def test_a_name_that_is_another_is_found() -> None:
    found, planted = 0, 0
    for seed in range(150):
        text = story(seed)
        names = sorted(set(re.findall(r"named (\w+)", text)))
        for name in names:  # the last mention of somebody becomes somebody else
            head, _, tail = text.rpartition(name)
            if f"named {name}" not in head:
                continue
            planted += 1
            other = next(name for name in words.FRIENDS if name not in text)
            found += not check(head + other + tail).consistent
    assert planted > 150
    assert found == planted


def test_no_story_repeats() -> None:
    texts = [story(seed) for seed in range(4000)]
    assert len(set(texts)) == len(texts)
    assert story(7) == texts[7], "a seed always gives the same story"


def test_many_sentences_and_words() -> None:
    assert len(PLOTS) >= 10
    assert sum(len(one.texts) for one in FORMS.values()) > 350
    assert not set(words.HEROES) & set(words.FRIENDS)
    used: set[str] = set()
    for seed in range(1500):
        text = story(seed)
        used |= {*check(text).steps, *re.findall(r"[A-Za-z]+", text)}
    assert len(used) > 900
    assert set(FORMS) - used == set(), "forms that no story uses"


def test_every_mention_of_a_slot_is_known() -> None:
    for one in FORMS.values():
        for wording in one.wordings:
            assert all(len(slot) == 1 or slot in words.LISTS for slot in wording.slots()), (one.name, wording.text)
            for fact in one.needs + one.adds + one.drops:
                for word in fact.split(" "):
                    if len(word) == 1 and word.isalpha():
                        assert word in wording.slots(), (one.name, wording.text, fact)


def test_the_corpus_is_split_by_seed_and_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    assert write(tmp_path / "one", 2500, processes=1) == (2475, 25)
    write(tmp_path / "two", 2500, processes=2)
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    held = {json.loads(line)["text"] for line in (tmp_path / "one" / "valid.jsonl").read_text().splitlines()}
    train = {json.loads(line)["text"] for line in (tmp_path / "one" / "train.jsonl").read_text().splitlines()}
    assert story(99) in held and story(0) in train
    assert not held & train


def test_a_corpus_that_is_broken_off_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(folder: Path, count: int) -> None:
        (folder / "train.jsonl").write_text("{}\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_model, "write", broken_off)
    with pytest.raises(KeyboardInterrupt):
        make_model.make(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []
