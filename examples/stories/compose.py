"""Composes stories: the same seed gives the same story, on every machine."""

from __future__ import annotations

from random import Random

from .plots import PLOTS, Teller


def story(seed: int, plot: str | None = None) -> str:
    """The story of a seed, of any plot or of a given one."""
    rng = Random(seed)
    teller = Teller(rng)
    name = plot or rng.choice(list(PLOTS))
    PLOTS[name](teller)
    return teller.text()
