"""What is true in a story: a set of facts that sentences need and change."""

from __future__ import annotations

from dataclasses import dataclass, field

from .words import FAMILY, GENDER

Fact = tuple[str, ...]
SORROWS = {"sad", "scared", "worried", "cross", "lonely", "ashamed"}


class InconsistentError(Exception):
    """A sentence that contradicts what the story has said so far."""


@dataclass
class World:
    """Who and what a story has introduced, and what is true of them.

    A fact is a tuple of words, such as ("holds", "Mia", "kite"), ("at", "Mia", "park") or ("trouble", "kite").
    """

    facts: set[Fact] = field(default_factory=lambda: {("at", name, "home") for name in FAMILY})
    people: dict[str, str] = field(default_factory=lambda: dict.fromkeys(FAMILY, "family"))  # name or kind -> kind
    looks: dict[str, str | None] = field(default_factory=dict)  # thing -> its adjective, once one was given
    subject: str = ""  # of the last sentence: whom "he" and "she" mean
    steps: list[str] = field(default_factory=list)  # names of the sentences so far
    wished: int = 0
    troubled: int = 0

    def place(self, who: str) -> str:
        """Where somebody is."""
        return next((fact[2] for fact in self.facts if fact[:2] == ("at", who)), "")

    def true(self, fact: Fact) -> bool:
        """Whether a fact holds; `*` stands for any word, and ("with", a, b) means that both are at one place."""
        if fact[0] == "with":
            return self.place(fact[1]) == self.place(fact[2]) != ""
        return bool(self._matching(fact))

    def require(self, fact: Fact) -> None:
        """Raise `InconsistentError` unless a fact holds, or does not where it begins with an exclamation mark."""
        wanted = not fact[0].startswith("!")
        plain = (fact[0].removeprefix("!"), *fact[1:])
        if self.true(plain) != wanted:
            raise InconsistentError(f"{'it is not so' if wanted else 'it is so'} that {' '.join(plain)}")

    def add(self, fact: Fact) -> None:
        """Make a fact true; what it replaces (somebody's place, feeling, the holder of a thing) ends."""
        if fact[0] in ("at", "feels"):
            self.drop((fact[0], fact[1], "*"))
        if fact[0] == "holds":
            self.drop(("holds", "*", fact[2]))
        if fact[0] == "wish":
            self.wished += 1
        if fact[0] == "trouble":
            self.troubled += 1
            if not self.wished:
                raise InconsistentError("the mishap comes before any wish")
        self.facts.add(fact)

    def drop(self, fact: Fact) -> None:
        """Make facts false that match; `*` stands for any word."""
        self.facts -= self._matching(fact)

    def introduce(self, key: str, kind: str) -> None:
        """Somebody new."""
        if key in self.people:
            raise InconsistentError(f"{key} is introduced twice")
        self.people[key] = kind

    def look(self, thing: str, adjective: str | None, new: bool) -> None:
        """A thing is mentioned, with an adjective or without."""
        if thing not in self.looks and not new:
            self.looks[thing] = adjective
            raise InconsistentError(f"the {thing} comes from nowhere")
        known = self.looks.setdefault(thing, adjective)
        if adjective is not None and known != adjective:
            raise InconsistentError(f"the {known or 'plain'} {thing} became {adjective}")

    def unfinished(self) -> list[str]:
        """What is still open, now that the story is over."""
        problems = []
        if not self.wished:
            problems.append("nobody wished for anything")
        if not self.troubled:
            problems.append("nothing went wrong")
        for fact in sorted(self.facts):
            if fact[0] in ("wish", "trouble"):
                problems.append(f"it ends with an open {fact[0]}: {' '.join(fact[1:])}")
            if fact[0] == "feels" and fact[2] in SORROWS:
                problems.append(f"it ends while {fact[1]} is still {fact[2]}")
        return problems

    def _matching(self, fact: Fact) -> set[Fact]:
        if "*" not in fact:
            return {fact} & self.facts
        return {
            other
            for other in self.facts
            if len(other) == len(fact) and all(w in ("*", o) for w, o in zip(fact, other, strict=True))
        }


def pronoun(key: str) -> str | None:
    """ "he" or "she" for somebody with a name, None for "the owl"."""
    return GENDER.get(key)
