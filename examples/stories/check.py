"""Reads a story and says whether it makes sense."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .events import FORMS
from .forms import mention, read
from .world import InconsistentError, World

SENTENCE = re.compile(r'[^.!?]*(?:[.!?]+"?\s*|$)')


@dataclass(frozen=True)
class Verdict:
    """What a reader finds: what was understood, and what is wrong, in order."""

    steps: tuple[str, ...]  # names of the sentence forms
    problems: tuple[str, ...]

    @property
    def consistent(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(text: str) -> Verdict:
    """Read a story and keep the world that it describes: who is where and holds what, what is wished and goes wrong.

    Problems are: words that the grammar does not know, somebody who acts before being introduced or is introduced
    twice, a pronoun that does not fit, a thing that comes from nowhere or changes its looks, an act that the facts do
    not allow, and a wish or a mishap that is missing or still open at the end.
    """
    world, problems, position = World(), [], 0
    text = text.strip()
    while position < len(text):
        reading = read(list(FORMS.values()), text, position, world)
        if reading is None:
            match = SENTENCE.match(text, position)
            end = match.end() if match and match.end() > position else len(text)
            problems.append(f"not understood: {text[position:end].strip()}")
            position = end
            continue
        said = text[position : reading.end]
        problems += [f"{problem}: {said}" for problem in mention(reading, world)]
        try:
            reading.form.happen(world, reading.slots)
        except InconsistentError as error:
            problems.append(f"{error}: {said}")
        position = reading.end
        while position < len(text) and text[position].isspace():
            position += 1
    if not world.steps or world.steps[0] != "open":
        problems.append("it does not begin by saying whom it is about")
    if ("over",) not in world.facts:
        problems.append("it has no ending")
    problems += world.unfinished()
    return Verdict(tuple(world.steps), tuple(problems))
