"""Sentence forms: texts with slots that can be told and read, and what they need and change in the world.

A slot is a letter: a, b, c are somebody, t, u a thing, p, q a place, s, r a spot where a thing may lie; or the name of
a list of words. `{a}` is the plain mention, `{A}` the same at the beginning of a sentence, and what follows a dot
another form of it: `{a.his}`, `{a.new}` (an introduction), `{t.new}` ("a red kite"), `{t.noun}` ("red kite"), `{t.did}`
("flew the red kite"), `{p.at}`, `{p.to}`, `{cake.the}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from .words import (
    ANIMALS,
    BABIES,
    CHILDREN,
    COLOURS,
    GENDER,
    HELPER_NATURES,
    HELPERS,
    LISTS,
    LOOKS,
    NATURES,
    PERCHES,
    PLACES,
    SMITHS,
    SPOTS,
    TALL,
    THINGS,
)
from .world import Fact, InconsistentError, World, pronoun

SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
# Before these a name stays a name: "from Mia", "said Mia".
OBJECT = re.compile(r"\b(from|of|to|at|for|on|over|with|by|before|showed|gave|said|asked|cried|called|shouted) $")
CASES = {"he": ("he", "she"), "him": ("him", "her"), "his": ("his", "her"), "himself": ("himself", "herself")}
KINDS = {*CHILDREN, *ANIMALS, *HELPERS, *TALL, *SMITHS, *BABIES}


@dataclass(frozen=True)
class Person:
    """Somebody to be introduced: `key` is the name, or the kind of whoever has none."""

    key: str
    kind: str
    nature: str

    @property
    def new(self) -> str:
        """ "a little fox named Pip", or "an old owl"."""
        named = f" named {self.key}" if self.key != self.kind else ""
        return f"{article(self.nature)} {self.nature} {self.kind}{named}"


@dataclass(frozen=True)
class Reading:
    """What a text says: the sentence form, and the words in its slots."""

    form: Form
    slots: Mapping[str, str]
    mentions: tuple[tuple[str, str, str], ...]  # slot, modifier, text
    end: int


@dataclass(frozen=True)
class Form:
    """One thing that can be told, in several wordings."""

    name: str
    subject: str  # slot of the somebody whom "he" means afterwards
    needs: tuple[str, ...]
    drops: tuple[str, ...]
    adds: tuple[str, ...]
    texts: tuple[str, ...]

    @cached_property
    def wordings(self) -> tuple[Wording, ...]:
        """The texts, taken apart."""
        return tuple(Wording(text, self.subject) for text in self.texts)

    def happen(self, world: World, slots: Mapping[str, str]) -> None:
        """Check that the world allows this, and change it; raises `InconsistentError`."""
        problems = []
        for need in self.needs:
            try:
                world.require(bind(need, slots, world))
            except InconsistentError as error:
                problems.append(str(error))
        for drop in self.drops:
            world.drop(bind(drop, slots, world))
        for add in self.adds:
            try:
                world.add(bind(add, slots, world))
            except InconsistentError as error:
                problems.append(str(error))
        world.steps.append(self.name)
        if self.subject in slots:
            world.subject = slots[self.subject]
        if problems:
            raise InconsistentError("; ".join(problems))


class Wording:
    """One text of a form."""

    def __init__(self, text: str, subject: str) -> None:
        """Take the text apart at its slots; the subject's first plain mention may be a pronoun."""
        self.text = text
        self.parts: list[tuple[str, str, str, bool]] = []  # literal before, slot, modifier, capital
        position, self.tail = 0, ""
        self.pronoun_at, mentioned = -1, False
        for match in SLOT.finditer(text):
            name, modifier = match[1], match[2] or ""
            slot = name.lower()
            if slot == subject and not modifier and not mentioned:
                mentioned = True
                if not OBJECT.search(text[: match.start()]) and not text.startswith("'", match.end()):
                    self.pronoun_at = len(self.parts)
            self.parts.append((text[position : match.start()], slot, modifier, name[0].isupper()))
            position = match.end()
        self.tail = text[position:]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What reads this wording."""
        out = []
        for index, (literal, slot, modifier, capital) in enumerate(self.parts):
            body = _pattern(slot, modifier, index == self.pronoun_at)
            if capital and (not _is_person(slot) or modifier in CASES):
                body = _capital(body, slot)
            out.append(re.escape(literal) + f"({body})")
        return re.compile("".join(out) + re.escape(self.tail) + r"(?=\s|$)")

    def slots(self) -> set[str]:
        """Names of the slots."""
        return {slot for _, slot, _, _ in self.parts}

    def tell(self, slots: Mapping[str, str | Person], looks: Mapping[str, str | None], short: bool, full: bool) -> str:
        """The text with its slots filled; `short` says he or she for the subject, `full` how things look, each time."""
        out = []
        for index, (literal, slot, modifier, capital) in enumerate(self.parts):
            word = _say(slot, modifier, slots[slot], looks, short and index == self.pronoun_at, full)
            out.append(literal + (word[0].upper() + word[1:] if capital else word))
        return "".join(out) + self.tail


def form(name: str, *texts: str, subject: str = "a", needs: str = "", drops: str = "", adds: str = "") -> Form:
    """A form from facts written with semicolons between them."""

    def split(facts: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in facts.split(";") if part.strip())

    return Form(name, subject, split(needs), split(drops), split(adds), texts)


def bind(pattern: str, slots: Mapping[str, str], world: World) -> Fact:
    """A fact from its pattern: slots become what fills them, @a the place of a."""
    out = []
    for word in pattern.split(" "):
        out.append(world.place(slots[word[1:]]) if word.startswith("@") else slots.get(word, word))
    return tuple(out)


def read(forms: list[Form], text: str, position: int, world: World) -> Reading | None:
    """What the text says from `position` on, in the longest way that can be understood."""
    best: Reading | None = None
    for one in forms:
        for wording in one.wordings:
            match = wording.pattern.match(text, position)
            if match is None or (best is not None and match.end() <= best.end):
                continue
            reading = _interpret(one, wording, match, world)
            if reading is not None:
                best = reading
    return best


def mention(reading: Reading, world: World) -> Iterator[str]:
    """Introduce and look up what a reading mentions; gives what is wrong with it."""
    for slot, modifier, text in reading.mentions:
        key = reading.slots[slot]
        try:
            if slot in "abc" and modifier == "new":
                _meet(key, text, world)
            elif slot in "abc":
                _check_person(key, slot, modifier, text, world)
            elif slot in "tu":
                noun = re.search(rf"(?:\b({'|'.join(COLOURS + LOOKS)}) )?\b{key}\b", text)
                assert noun is not None
                world.look(key, noun[1], modifier == "new")
        except InconsistentError as error:
            yield str(error)


def article(word: str) -> str:
    """A or an."""
    return "an" if word[0] in "aeiou" else "a"


def _say(
    slot: str, modifier: str, value: str | Person, looks: Mapping[str, str | None], short: bool, full: bool
) -> str:
    if isinstance(value, Person):
        return value.new if modifier == "new" else _say(slot, modifier, value.key, looks, short, full)
    if slot in "abc":
        gender = pronoun(value)
        if modifier == "call":
            return value if gender else f"dear {value}"
        if modifier:
            return CASES[modifier][gender == "she"]
        return gender if short and gender else (value if gender else f"the {value}")
    if slot in "tu":
        adjective = looks.get(value)
        noun = f"{adjective} {value}" if adjective and (full or modifier in ("new", "long")) else value
        if modifier == "new":
            return f"{article(noun)} {noun}"
        if modifier == "noun":
            return noun
        if modifier in ("did", "do"):
            return THINGS[value][modifier == "do"].format(f"the {noun}")
        return f"the {noun}"
    if slot in "pq":
        return PLACES[value][modifier == "to"] if modifier else f"the {value}"
    return _the(value) if modifier else value


def _pattern(slot: str, modifier: str, short: bool) -> str:
    def any_of(words: list[str]) -> str:
        return "|".join(sorted(map(re.escape, words), key=len, reverse=True))

    if slot in "abc":
        if modifier == "new":
            return r"an? [a-z]+ [a-z]+(?: named [A-Z][a-z]+)?"
        if modifier == "call":
            return r"[A-Z][a-z]+|dear [a-z]+"
        if modifier:
            return "|".join(CASES[modifier])
        return r"[A-Z][a-z]+|[Tt]he [a-z]+" + (r"|[Hh]e|[Ss]he" if short else "")
    if slot in "tu":
        noun = f"(?:(?:{any_of(COLOURS + LOOKS)}) )?(?:{any_of(list(THINGS))})"
        if modifier == "new":
            return rf"an? {noun}"
        if modifier == "noun":
            return noun
        if modifier in ("did", "do"):
            verbs = {ways[modifier == "do"].format("") for ways in THINGS.values()}
            return rf"(?:{any_of(sorted(verbs))})the {noun}"
        return rf"the {noun}"
    if slot in "pq":
        return any_of([ways[modifier == "to"] if modifier else f"the {p}" for p, ways in PLACES.items()])
    if slot in "sr":
        return any_of(SPOTS + PERCHES)
    return any_of([_the(value) if modifier else value for value in LISTS[slot]])


def _capital(body: str, slot: str) -> str:
    """The pattern with a capital at the beginning of each alternative; that of a thing begins with an article."""
    if slot in "tu":
        return body[0].upper() + body[1:]
    return "|".join(part[0].upper() + part[1:] for part in body.split("|"))


def _is_person(slot: str) -> bool:
    return slot in ("a", "b", "c")


def _interpret(one: Form, wording: Wording, match: re.Match[str], world: World) -> Reading | None:
    """What a match says, or None where its words make no sense in their slots."""
    slots: dict[str, str] = {}
    mentions = []
    for index, (_, slot, modifier, capital) in enumerate(wording.parts):
        text = match[index + 1]
        mentions.append((slot, modifier, text))
        if _is_person(slot) and modifier in CASES:
            continue
        key = _key(slot, modifier, text[0].lower() + text[1:] if capital else text, world)
        if key is None or (capital and not text[0].isupper()):
            return None
        if slots.setdefault(slot, key) != key:
            return None
    return Reading(one, slots, tuple(mentions), match.end())


def _key(slot: str, modifier: str, text: str, world: World) -> str | None:
    if _is_person(slot):
        if modifier == "new":
            _, nature, kind, *named = text.split(" ")
            if nature not in NATURES + HELPER_NATURES or kind not in KINDS or (named and named[1] not in GENDER):
                return None
            return named[1] if named else kind
        if text in ("he", "she", "He", "She"):
            return world.subject or None
        if text.lower().startswith(("the ", "dear ")):
            kind = text.split(" ")[1]
            return kind if kind in KINDS else None
        name = text[0].upper() + text[1:]
        return name if name in GENDER else None
    if slot in ("t", "u"):
        noun = text.rsplit(" ", 1)[-1]
        if modifier in ("did", "do") and not text.startswith(THINGS[noun][modifier == "do"].format("")):
            return None
        return noun
    if slot in ("p", "q"):
        way = modifier == "to"
        return next((p for p, ways in PLACES.items() if text == (ways[way] if modifier else f"the {p}")), None)
    if modifier == "the":
        return next(value for value in LISTS[slot] if _the(value) == text)
    return text


def _the(value: str) -> str:
    """ "the blue kite" of "a blue kite"."""
    return "the " + value.split(" ", 1)[1]


def _meet(key: str, text: str, world: World) -> None:
    """An introduction."""
    words = text.split(" ")
    if words[0] != article(words[1]):
        raise InconsistentError(f"{words[0]} {words[1]}")
    kind = words[2]
    world.introduce(key, kind)
    if kind in CHILDREN and pronoun(key) != CHILDREN[kind]:
        raise InconsistentError(f"a {kind} named {key}")


def _check_person(key: str, slot: str, modifier: str, text: str, world: World) -> None:
    gender = pronoun(key)
    if modifier in CASES or text.lower() in ("he", "she"):
        expected = CASES[modifier or "he"][gender == "she"] if gender else "no pronoun"
        if text.lower() != expected:
            raise InconsistentError(f"{key} is called {text.lower()}")
    if key not in world.people:
        world.people[key] = "?"
        raise InconsistentError(f"{key} acts before being introduced")
