"""What a comparison found, and what is read off it: medians, ratios of the same round, fractions of measured limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from pyllm.compare.engine import OURS
from pyllm.limits import Limits

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """Something to measure: `load`, `prefill` or `decode` of `sequences` prompts of `prompt` tokens each."""

    name: str
    kind: str
    sequences: int = 1
    prompt: int = 16


@dataclass
class Turn:
    """One round: the limits as they were, and the seconds that each engine took."""

    limits: Limits
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class CellResult:
    """A cell's rounds, and what one round had to read and do."""

    cell: Cell
    tokens: int
    """That each engine ran in a round, all sequences together."""
    operations: float
    """Of a round: multiplications and additions."""
    bytes: dict[str, float] = field(default_factory=dict)
    """That each engine had to read in a round, in its own format: weights, and keys and values."""
    turns: list[Turn] = field(default_factory=list)
    peak_memory: dict[str, int] = field(default_factory=dict)
    """Most bytes that each engine's process has had resident so far, mapped file pages included."""
    greedy: dict[str, list[int]] = field(default_factory=dict)
    """The first tokens that each engine chose."""
    missing: dict[str, str] = field(default_factory=dict)
    """Engines without a figure, and why."""

    @property
    def engines(self) -> list[str]:
        """Those with figures."""
        return list(dict.fromkeys(name for turn in self.turns for name in turn.seconds))

    def seconds(self, engine: str) -> float:
        """Median over the rounds."""
        return median(turn.seconds[engine] for turn in self._with(engine))

    def rate(self, engine: str) -> float:
        """Median, in tokens per second."""
        return self.tokens / self.seconds(engine)

    def ratio(self, engine: str) -> float | None:
        """How many times as fast ours is: median over rounds that have both; None where none has."""
        pairs = [turn.seconds[engine] / turn.seconds[OURS] for turn in self._with(engine) if OURS in turn.seconds]
        return median(pairs) if pairs else None

    def fraction(self, engine: str, dtype: str) -> float:
        """The time that bytes or operations need at the limits of the same round, over the time taken: median."""
        return median(self.needed(turn.limits, engine, dtype) / turn.seconds[engine] for turn in self._with(engine))

    def needed(self, limits: Limits, engine: str, dtype: str) -> float:
        """Seconds that the round takes at the limits: the longer of reading and computing."""
        return max(self.bytes[engine] / limits.read_gbps, self.operations / peak(limits, dtype)) / 1e9

    def limited_by(self, engine: str, dtype: str) -> str:
        """`bytes` or `operations`, whichever needs longer at the median limits."""
        limits = middle([turn.limits for turn in self._with(engine)])
        reading, computing = self.bytes[engine] / limits.read_gbps, self.operations / peak(limits, dtype)
        return "bytes" if reading >= computing else "operations"

    def agreement(self, engine: str) -> tuple[int, int] | None:
        """How many of the first tokens are ours, of how many; None where either is missing."""
        if OURS not in self.greedy or engine not in self.greedy:
            return None
        pairs = list(zip(self.greedy[OURS], self.greedy[engine], strict=False))
        return sum(ours == theirs for ours, theirs in pairs), len(pairs)

    def _with(self, engine: str) -> list[Turn]:
        return [turn for turn in self.turns if engine in turn.seconds]


@dataclass
class ModelResult:
    """One model at one dtype: engines as "name version" by name, those that are missing and why, and the cells."""

    model: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)
    weight_bytes: dict[str, float] = field(default_factory=dict)
    """That each engine reads in a decode step."""
    missing: dict[str, str] = field(default_factory=dict)
    cells: list[CellResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Cells that the model cannot have, and why."""

    def cell(self, name: str) -> CellResult | None:
        """The cell of that name, if it was measured."""
        return next((result for result in self.cells if result.cell.name == name and result.turns), None)

    @property
    def limits(self) -> Limits | None:
        """Medians of the limits over all rounds."""
        found = [turn.limits for result in self.cells for turn in result.turns]
        return middle(found) if found else None


@dataclass
class Comparison:
    """All of it."""

    machine: str
    threads: int
    rounds: int
    began: str
    models: list[ModelResult] = field(default_factory=list)

    def figures(self) -> Iterator[dict[str, Any]]:
        """Every figure, with its unit in its name."""
        for model in self.models:
            for result in model.cells:
                for engine in result.engines:
                    yield {
                        "model": model.model,
                        "dtype": model.dtype,
                        "cell": result.cell.name,
                        "engine": engine,
                        "seconds": result.seconds(engine),
                        "tokens_per_second": result.rate(engine),
                        "times_as_fast_as_it": result.ratio(engine),
                        "fraction_of_limit": result.fraction(engine, model.dtype),
                        "limited_by": result.limited_by(engine, model.dtype),
                        "peak_memory_bytes": result.peak_memory.get(engine),
                    }


def combined(comparisons: Sequence[Comparison]) -> Comparison:
    """Several as one, the machine's and the rounds' description being those of the first.

    What they have of one model and dtype comes together; a cell that several measured is that of the last.
    """
    models: dict[tuple[str, str], ModelResult] = {}
    for new in (model for one in comparisons for model in one.models):
        into = models.setdefault((new.model, new.dtype), ModelResult(new.model, new.dtype))
        into.versions |= new.versions
        into.weight_bytes |= new.weight_bytes
        into.missing |= new.missing
        into.skipped |= new.skipped
        cells = {result.cell.name: result for result in into.cells}
        into.cells = list((cells | {result.cell.name: result for result in new.cells if result.turns}).values())
    return replace(comparisons[0], models=list(models.values()))


def peak(limits: Limits, dtype: str) -> float:
    """10^9 operations per second at which weights of `dtype` can be multiplied; 4-bit ones are multiplied as 8-bit."""
    return {"float32": limits.f32_gflops, "bfloat16": limits.bf16_gflops}.get(dtype, limits.int8_gops)


def middle(limits: list[Limits]) -> Limits:
    """Medians of several measurements."""
    names = ("read_gbps", "f32_gflops", "bf16_gflops", "int8_gops")
    return Limits(limits[0].threads, limits[0].isa, *(median(getattr(one, name) for one in limits) for name in names))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All rounds as they were, and the figures read off them."""
    return {"format": FORMAT, **asdict(comparison), "figures": list(comparison.figures())}


def from_json(value: dict[str, Any]) -> Comparison:
    """What `to_json` gave; `ValueError` where it is something else."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"expected a comparison saved by `pyllm bench --compare`, format {FORMAT}")
    fields = {name: value[name] for name in ("machine", "threads", "rounds", "began")}
    return Comparison(**fields, models=[_model(one) for one in value["models"]])


def _model(value: dict[str, Any]) -> ModelResult:
    return ModelResult(**{**value, "cells": [_cell(one) for one in value["cells"]]})


def _cell(value: dict[str, Any]) -> CellResult:
    turns = [Turn(Limits(**turn["limits"]), turn["seconds"]) for turn in value["turns"]]
    return CellResult(**{**value, "cell": Cell(**value["cell"]), "turns": turns})
