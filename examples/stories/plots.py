"""The plots: which sentences follow each other, with branches at every step."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from . import words
from .events import FORMS
from .forms import Person
from .world import World, pronoun


class Teller:
    """Tells a story sentence by sentence and keeps the world that it makes true."""

    def __init__(self, rng: Random) -> None:
        """Begin a story; all its choices come from `rng`."""
        self.rng, self.world = rng, World()
        self.paragraphs: list[list[str]] = [[]]
        self._last: set[str] = set()  # whom the last sentence mentioned
        self._quoted = False  # whether somebody spoke in it

    def tell(self, name: str, **slots: str | Person) -> dict[str, str]:
        """A sentence of a form; lists that are not given are drawn from. Gives the words in its slots."""
        form = FORMS[name]
        wordings = form.wordings
        if self._quoted:  # not two speeches in a row, where there is another way
            wordings = tuple(one for one in wordings if '"' not in one.text) or wordings
        wording = self.rng.choice(wordings)
        given: dict[str, str | Person] = dict(slots)
        for slot in sorted(wording.slots() - given.keys()):
            given[slot] = self.rng.choice(words.LISTS[slot])
        keys = {slot: value.key if isinstance(value, Person) else value for slot, value in given.items()}
        for value in given.values():
            if isinstance(value, Person):
                self.world.introduce(value.key, value.kind)
        subject = keys.get(form.subject, "")
        others = {other for other in self._last - {subject} if pronoun(other) == pronoun(subject)}
        clear = bool(self.paragraphs[-1]) and subject == self.world.subject and not others
        text = wording.tell(
            given, self.world.looks, short=clear and self.rng.random() < 0.6, full=self.rng.random() < 0.5
        )
        form.happen(self.world, keys)
        self._quoted = '"' in text
        self._last = {keys[slot] for slot in "abc" if slot in keys}
        self.paragraphs[-1].append(text)
        return keys

    def maybe(self, chance: float, name: str, **slots: str | Person) -> None:
        """A sentence, or none."""
        if self.rng.random() < chance:
            self.tell(name, **slots)

    def paragraph(self) -> None:
        """Begin a new paragraph."""
        if self.paragraphs[-1]:
            self.paragraphs.append([])

    def text(self) -> str:
        """The story so far."""
        return "\n\n".join(" ".join(paragraph) for paragraph in self.paragraphs if paragraph)

    # Choices

    def pick(self, options: list[str], *but: str) -> str:
        """One of the options that is none of those."""
        return self.rng.choice([option for option in options if option not in but])

    def somebody(self, names: dict[str, str] = words.FRIENDS, human: float = 0.4) -> Person:
        """Somebody with one of these names."""
        girl = self.rng.random() < 0.5
        name = self.rng.choice([name for name, gender in names.items() if gender == ("she" if girl else "he")])
        child = "girl" if girl else "boy"
        kind = child if self.rng.random() < human else self.pick(words.ANIMALS, *self.world.people.values())
        return Person(name, kind, self.rng.choice(words.NATURES))

    def stranger(self, kinds: list[str] = words.HELPERS) -> Person:
        """Somebody without a name: "an old owl"."""
        kind = self.pick(kinds, *self.world.people.values())
        return Person(kind, kind, self.rng.choice(words.HELPER_NATURES))

    def thing(self, nouns: list[str]) -> str:
        """A thing with a colour or a look of its own."""
        noun = self.pick(nouns, *self.world.looks)
        self.world.looks[noun] = self.rng.choice(words.COLOURS + words.LOOKS)
        return noun

    # Parts that many plots share

    def hero(self) -> str:
        """The beginning: who it is about."""
        a = self.somebody(words.HEROES)
        self.tell("open", a=a)
        self.maybe(0.35, self.pick(["hobby", "virtue"]), a=a.key)
        return a.key

    def friend(self, a: str) -> str:
        """A friend of the hero."""
        b = self.somebody()
        self.tell("friend", a=a, b=b)
        return b.key

    def helped_by(self, a: str, b: str | None, kinds: list[str] = words.HELPERS) -> str:
        """Somebody comes, asks, hears and offers help: a friend, or a stranger where there is none."""
        if b is None:
            person = self.stranger(kinds)
            b = person.key
            self.tell("meet", a=a, b=person)
        elif not self.world.true(("with", a, b)):
            self.tell("comes", a=a, b=b)
        self.maybe(0.6, "why_sad", a=a, b=b)
        self.tell("tells", a=a, b=b)
        self.tell("offer", b=b)
        return b

    def end(self, a: str, b: str | None, theme: str) -> None:
        """An ending: friends, sleep, a lesson, or two of them."""
        self.maybe(0.5, "happy", a=a)
        ways = ["moral"]
        if b is not None and self.world.true(("bond", a, b)):
            ways.append("friends")
        ways.append("sleep")
        way = self.pick(ways)
        if way == "friends":
            assert b is not None
            self.tell("end_friends", a=a, b=b)
        elif way == "sleep":
            if self.world.place(a) != "home":
                self.tell("home", a=a)
            self.tell("end_sleep", a=a)
        else:
            self.tell(f"moral_{theme}", a=a)
        self.maybe(0.4, "the_end")


def mishap_to_a_thing(s: Teller, mishap: str) -> None:
    """A wish to show a thing or to play with it; it is lost, breaks, or is carried off by the wind."""
    rng, a = s.rng, s.hero()
    t = s.thing({"lost": words.SMALL, "broken": words.BREAKS, "stuck": words.FLIES}[mishap])
    show = rng.random() < 0.5
    b = s.friend(a) if show or rng.random() < 0.3 else None
    s.tell("have", a=a, t=t)
    s.maybe(0.5, "morning", a=a)
    p = s.pick(words.OPEN if mishap == "stuck" else words.OUTDOORS)
    if show:
        assert b is not None
        s.tell("wish_show", a=a, t=t, b=b)
    else:
        s.tell("wish_play", a=a, t=t, p=p)
    s.paragraph()
    s.tell("go", a=a, p=p)
    s.maybe(0.3, "scene")
    if mishap != "lost":
        s.maybe(0.4, "play", a=a, t=t)
    if mishap == "lost":
        helper = _lost(s, a, b, t)
    elif mishap == "broken":
        helper = _broken(s, a, b, t)
    else:
        helper = _stuck(s, a, b, t)
    s.paragraph()
    if show:
        assert b is not None
        if not s.world.true(("with", a, b)):
            s.tell("comes", a=a, b=b)
        s.tell("show_done", a=a, t=t, b=b)
    else:
        s.tell("play_done", a=a, t=t, p=p)
    s.end(a, helper, mishap)


def _lost(s: Teller, a: str, b: str | None, t: str) -> str:
    s.tell("lost", a=a, t=t)
    s.maybe(0.5, "sad", a=a)
    spots = s.rng.sample(words.SPOTS, 5)
    for _ in range(s.rng.choice([1, 1, 2])):
        s.tell("search", a=a, t=t, s=spots.pop())
    s.paragraph()
    helper = b
    if helper is None or s.rng.random() < 0.4:
        person = s.stranger()
        helper = person.key
        s.tell("meet", a=a, b=person)
    else:
        s.tell("comes", a=a, b=helper)
    s.tell("ask_seen", a=a, b=helper, t=t)
    if s.rng.random() < 0.5:
        spot = spots.pop()
        s.tell("hint", b=helper, s=spot)
        s.tell("found_told", a=a, t=t, s=spot)
    else:
        s.tell("not_seen", b=helper)
        s.tell("found_by", b=helper, t=t, s=spots.pop())
        s.tell("gives_back", a=a, b=helper, t=t)
    s.tell("thanks", a=a, b=helper)
    return helper


def _broken(s: Teller, a: str, b: str | None, t: str) -> str:
    s.tell("broke", a=a, t=t)
    s.maybe(0.6, "sad", a=a)
    pastes = s.rng.sample(words.LISTS["paste"], 2)
    if s.rng.random() < 0.5:
        s.tell("try_mend", a=a, t=t, paste=pastes.pop())
    s.paragraph()
    helper = s.helped_by(a, b if s.rng.random() < 0.6 else None, words.SMITHS)
    s.tell("mends", b=helper, t=t, paste=pastes.pop())
    s.tell("thanks", a=a, b=helper)
    return helper


def _stuck(s: Teller, a: str, b: str | None, t: str) -> str:
    s.tell("flew_off", a=a, t=t, r=s.pick(words.PERCHES))
    s.maybe(0.4, "sad", a=a)
    reaches = s.rng.sample(words.LISTS["reach"], 2)
    for _ in range(s.rng.choice([1, 1, 2])):
        s.tell("reach_fail", a=a, t=t, reach=reaches.pop())
    s.paragraph()
    helper = s.helped_by(a, b if s.rng.random() < 0.3 else None, words.TALL)
    s.tell("fetches", b=helper, t=t)
    s.tell("gives_back", a=a, b=helper, t=t)
    s.tell("thanks", a=a, b=helper)
    return helper


def earning(s: Teller) -> None:
    """Something in a shop costs more than the hero has: it must be worked for."""
    a = s.hero()
    s.maybe(0.5, "morning", a=a)
    s.tell("go", a=a, p=s.pick(["village", "market", "harbor"]))
    t = s.thing(list(words.THINGS))
    s.tell("shop", a=a, t=t)
    s.tell("wish_own", a=a, t=t)
    s.tell("no_coins", a=a, t=t)
    s.maybe(0.3, "sad", a=a)
    s.paragraph()
    chores = s.rng.sample(words.LISTS["chore"], 3)
    b = ""
    for _ in range(s.rng.choice([1, 2, 2])):
        person = s.stranger()
        b = person.key
        s.tell("meet", a=a, b=person)
        s.tell("ask_work", a=a, b=b)
        s.tell("works", a=a, b=b, chore=chores.pop())
    s.tell("enough", a=a)
    s.paragraph()
    s.tell("buys", a=a, t=t)
    s.maybe(0.6, "play", a=a, t=t)
    s.end(a, None, "earn")


def new_friend(s: Teller) -> None:
    """Somebody lonely meets somebody shy, or the rain brings two together."""
    a = s.hero()
    s.tell("wish_friend", a=a)
    s.paragraph()
    s.maybe(0.4, "morning", a=a)
    s.tell("go", a=a, p=s.pick(words.OUTDOORS))
    s.maybe(0.3, "scene")
    person = s.somebody()
    b = person.key
    s.tell("stranger", a=a, b=person)
    game = s.pick(words.LISTS["game"])
    s.tell("invites", a=a, b=b, game=game)
    if s.rng.random() < 0.6:
        theme = "friend"
        s.tell("shy", b=b)
        s.maybe(0.5, "waits", a=a)
        s.tell("offers", a=a, b=b)
        s.tell("trusts", b=b)
    else:
        theme = "rain"
        s.tell("rain", a=a, b=b)
        s.tell("shelter", a=a, b=b)
        s.tell("snack", a=a, b=b)
    s.paragraph()
    s.maybe(0.6, "first_friend", b=b)
    s.tell("game", a=a, b=b, game=game)
    s.end(a, b, theme)


def quarrel(s: Teller) -> None:
    """Two friends want the same thing."""
    a = s.hero()
    b = s.friend(a)
    s.maybe(0.4, "morning", a=a)
    s.paragraph()
    p = s.pick(words.OUTDOORS)
    s.tell("comes", a=a, b=b)
    s.maybe(0.4, "greet", a=a, b=b)
    s.tell("go_both", a=a, b=b, p=p)
    t = s.thing(words.SHARED)
    s.tell("find", a=a, b=b, t=t, s=s.pick(words.SPOTS))
    s.tell("wish_both", a=a, b=b, t=t)
    s.tell("quarrel", a=a, b=b)
    muddy = s.rng.random() < 0.6
    if muddy:
        s.tell("mud", a=a, b=b, t=t)
    s.paragraph()
    s.tell("sorry", a=a, b=b)
    if muddy:
        s.tell("wash", a=a, b=b, t=t)
    s.tell("turns", a=a, b=b, t=t)
    s.maybe(0.4, "snack", a=a, b=b)
    s.end(a, b, "quarrel")


def skill(s: Teller) -> None:
    """Something must be learned, and the first try goes wrong."""
    a = s.hero()
    b = s.friend(a) if s.rng.random() < 0.4 else None
    what = s.pick(words.LISTS["skill"])
    s.tell("wish_skill", a=a, skill=what)
    s.paragraph()
    s.maybe(0.4, "morning", a=a)
    s.tell("go", a=a, p=s.pick(words.OUTDOORS))
    s.tell("fails", a=a)
    s.maybe(0.6, "sad", a=a)
    s.paragraph()
    b = s.helped_by(a, b)
    tips = s.rng.sample(words.LISTS["tip"], 2)
    for _ in range(s.rng.choice([1, 1, 2])):
        s.tell("teach", b=b, tip=tips.pop())
        s.tell("again", a=a)
    s.tell("can", a=a, skill=what)
    s.maybe(0.5, "proud", b=b)
    s.tell("thanks", a=a, b=b)
    s.end(a, b, "skill")


def lost_child(s: Teller) -> None:
    """On the way to a picnic somebody small needs help."""
    a = s.hero()
    p = s.pick(words.OUTDOORS)
    s.maybe(0.4, "morning", a=a)
    s.tell("wish_picnic", a=a, p=p)
    s.paragraph()
    s.maybe(0.3, "scene")
    baby = s.pick(words.BABIES)
    s.tell("crying", a=a, b=Person(baby, baby, s.pick(["little", "small", "young", "shy"])))
    s.tell("lost_mother", b=baby)
    s.tell("promise", a=a, b=baby)
    spots = s.rng.sample(words.SPOTS, 2)
    for _ in range(s.rng.choice([1, 2])):
        s.tell("seek", a=a, b=baby, s=spots.pop())
    s.maybe(0.5, "calls", a=a)
    s.tell("mother", a=a, b=baby)
    s.paragraph()
    s.maybe(0.7, "mother_thanks", a=a)
    s.tell("go_both", a=a, b=baby, p=p)
    s.tell("picnic", a=a, b=baby, p=p)
    s.end(a, baby, "helping")


def birthday(s: Teller) -> None:
    """A cake is to be baked, and something is missing."""
    a = s.hero()
    b = s.pick(list(words.FAMILY))
    cake, part = s.pick(words.LISTS["cake"]), s.pick(words.LISTS["part"])
    s.tell("wish_cake", a=a, b=b, cake=cake)
    s.tell("missing", a=a, part=part, cake=cake)
    s.maybe(0.3, "sad", a=a)
    s.paragraph()
    s.tell("go", a=a, p=s.pick(words.OUTDOORS))
    none = s.rng.choice([0, 1, 1, 2])
    c = ""
    for index in range(none + 1):
        person = s.stranger()
        c = person.key
        s.tell("meet", a=a, b=person)
        s.tell("ask_part", a=a, b=b, c=c, part=part)
        if index < none:
            s.tell("has_none", c=c)
        else:
            s.tell("gives_part", a=a, c=c, part=part)
    s.maybe(0.6, "thanks", a=a, b=c)
    s.paragraph()
    s.tell("home", a=a)
    s.tell("bakes", a=a, b=b, cake=cake)
    s.maybe(0.4, "smell")
    s.tell("gives_cake", a=a, b=b, cake=cake)
    s.maybe(0.6, "tastes", b=b)
    s.end(a, b, "baking")


def lost_way(s: Teller) -> None:
    """Something pretty leads away from the path."""
    a = s.hero()
    s.maybe(0.4, "morning", a=a)
    lure = s.pick(words.LISTS["lure"])
    s.tell("go", a=a, p=s.pick(words.WILD))
    s.tell("wish_follow", a=a, lure=lure)
    s.tell("follows", a=a, lure=lure)
    s.tell("astray", a=a, lure=lure)
    s.maybe(0.7, "scared", a=a)
    s.paragraph()
    b = s.helped_by(a, None)
    s.tell("lure_again", a=a, lure=lure)
    s.tell("guide", a=a, b=b)
    s.paragraph()
    s.tell("hug", a=a, c=s.pick(list(words.FAMILY)))
    s.tell("thanks", a=a, b=b)
    s.end(a, b, "way")


def honesty(s: Teller) -> None:
    """Something of the family breaks, and is hidden first."""
    a = s.hero()
    t = s.thing(words.SHARED)
    b = s.pick(list(words.FAMILY))
    pot = s.pick(words.LISTS["crockery"])
    s.tell("have", a=a, t=t)
    s.tell("wish_inside", a=a, t=t)
    s.paragraph()
    s.tell("crash", a=a, b=b, crockery=pot)
    if s.rng.random() < 0.7:
        s.tell("hides", a=a, b=b)
        s.tell("ashamed", a=a, b=b)
    s.maybe(0.5, "where", a=a, b=b, crockery=pot)
    s.tell("confess", a=a, b=b, crockery=pot)
    s.tell("forgive", a=a, b=b)
    s.paragraph()
    s.tell("mend_pot", a=a, b=b, crockery=pot)
    s.tell("play_out", a=a, t=t, p=s.pick(words.OPEN))
    s.end(a, b, "honest")


def seed(s: Teller) -> None:
    """A plant needs patience, and then protection."""
    a = s.hero()
    b = s.friend(a)
    plant = s.pick(words.LISTS["plant"])
    s.tell("wish_plant", a=a, plant=plant)
    s.tell("go", a=a, p="garden")
    s.tell("plants", a=a, plant=plant)
    s.maybe(0.7, "bare", a=a, plant=plant)
    s.paragraph()
    s.tell("comes", a=a, b=b)
    s.maybe(0.7, "patience", a=a, b=b, plant=plant)
    s.tell("sprout", a=a, plant=plant)
    s.tell("pest", a=a, plant=plant)
    s.tell("tells", a=a, b=b)
    s.tell("offer", b=b)
    s.tell("guard", a=a, b=b)
    s.paragraph()
    s.tell("grows", a=a, plant=plant)
    s.tell(s.pick(["thanks", "snack"]), a=a, b=b)
    s.end(a, b, "seed")


def race(s: Teller) -> None:
    """To win, or to help."""
    a = s.hero()
    goal, prize = s.pick(words.LISTS["goal"]), s.pick(words.LISTS["prize"])
    s.maybe(0.4, "morning", a=a)
    s.tell("wish_win", a=a, goal=goal, prize=prize)
    s.tell("go", a=a, p=s.pick(words.OPEN))
    person = s.somebody()
    b = person.key
    s.tell("rival", a=a, b=person)
    s.paragraph()
    s.tell("start", a=a)
    s.tell("falls", b=b)
    s.maybe(0.7, "stops", a=a, goal=goal)
    s.tell("helps_up", a=a, b=b)
    s.tell("finish", a=a, b=b, goal=goal)
    s.paragraph()
    s.tell("both_win", a=a, b=b, prize=prize)
    s.maybe(0.4, "snack", a=a, b=b)
    s.end(a, b, "race")


def storm(s: Teller) -> None:
    """A friend loses a roof, and finds another."""
    a = s.hero()
    b = s.friend(a)
    warmth = s.pick(words.LISTS["warmth"])
    s.tell("wish_warm", a=a, warmth=warmth)
    s.paragraph()
    s.tell("storm", b=b)
    s.tell("knock", a=a, b=b)
    s.maybe(0.5, "tells", a=b, b=a)
    s.tell("invite_in", a=a, b=b, warmth=warmth)
    s.tell("drink", a=a, b=b, warmth=warmth)
    s.paragraph()
    s.tell("repair", a=a, b=b)
    s.maybe(0.5, "thanks", a=b, b=a)
    s.end(a, b, "storm")


def far_wish(s: Teller) -> None:
    """The moon cannot be had, but there is another way."""
    a = s.hero()
    heaven = s.pick(words.LISTS["heaven"])
    s.tell("wish_sky", a=a, heaven=heaven)
    s.paragraph()
    s.tell("go", a=a, p=s.pick(words.OPEN))
    climbs = s.rng.sample(words.LISTS["climb"], 2)
    for _ in range(s.rng.choice([1, 2])):
        s.tell("climbs", a=a, heaven=heaven, climb=climbs.pop())
    s.tell("slips", a=a, heaven=heaven)
    s.maybe(0.6, "sad", a=a)
    s.paragraph()
    b = s.helped_by(a, None)
    bowl = s.pick(words.LISTS["bowlful"])
    s.tell("shows", b=b, bowlful=bowl)
    s.tell("mirror", a=a, heaven=heaven, bowlful=bowl)
    s.paragraph()
    s.tell("thanks", a=a, b=b)
    s.end(a, b, "moon")


def treasure(s: Teller) -> None:
    """An old map, and something in the way."""
    a = s.hero()
    b = s.friend(a)
    s.maybe(0.4, "morning", a=a)
    p, q = s.rng.sample(words.OUTDOORS, 2)
    s.tell("go", a=a, p=q)
    s.tell("map", a=a, s=s.pick(words.SPOTS))
    s.tell("wish_treasure", a=a, p=p)
    s.paragraph()
    s.tell("gap", a=a)
    s.maybe(0.3, "sad", a=a)
    b = s.helped_by(a, b)
    s.tell("cross", a=a, b=b)
    s.paragraph()
    s.tell("go_both", a=a, b=b, p=p)
    t = s.thing(words.TREASURES)
    s.tell("chest", a=a, t=t, p=p)
    s.tell("shares", a=a, b=b, t=t)
    s.end(a, b, "treasure")


PLOTS: dict[str, Callable[[Teller], None]] = {
    "lost": lambda s: mishap_to_a_thing(s, "lost"),
    "broken": lambda s: mishap_to_a_thing(s, "broken"),
    "stuck": lambda s: mishap_to_a_thing(s, "stuck"),
    "earning": earning,
    "new_friend": new_friend,
    "quarrel": quarrel,
    "skill": skill,
    "lost_child": lost_child,
    "birthday": birthday,
    "lost_way": lost_way,
    "honesty": honesty,
    "seed": seed,
    "race": race,
    "storm": storm,
    "far_wish": far_wish,
    "treasure": treasure,
}
