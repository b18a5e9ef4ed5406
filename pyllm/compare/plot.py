"""A comparison as a picture: for every model, prefill, decode and batched decode of all engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import Patch

from pyllm.compare.engine import ENGINES, OURS
from pyllm.compare.report import significant
from pyllm.compare.results import CellResult, Comparison, ModelResult

COLORS = dict(zip(ENGINES, ("#c8442a", "#4c78a8", "#72a98f", "#b7a6cf"), strict=True))
BARS = {"prefill-512": "prefill of 512", "decode": "decode", "decode-2048": "decode at depth 2,048"}


def plot(comparison: Comparison, path: Path) -> None:
    """Write it to `path`, in the format that its ending names."""
    names = list(dict.fromkeys(model.model for model in comparison.models))
    figure, axes = pyplot.subplots(
        len(names), len(BARS) + 1, figsize=(17, 3.6 * len(names)), squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, names, strict=True):
        models = [model for model in comparison.models if model.model == name]
        for axis, (cell, title) in zip(row, BARS.items(), strict=False):
            _bars(axis, models, cell, f"{name}, {title}")
        _batches(row[-1], models)
        row[0].set_ylabel("tokens per second")
    shown = [name for name in ENGINES if any(name in r.engines for m in comparison.models for r in m.cells)]
    patches = [Patch(color=COLORS[name], label=name) for name in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches) or 1, frameon=False)
    figure.supxlabel(
        f"{comparison.machine}, {comparison.threads} threads, {comparison.began}; medians of {comparison.rounds} "
        "rounds in turns; dashed: the limit measured in the same rounds, for what pyllm reads and computes",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, models: list[ModelResult], cell: str, title: str) -> None:
    """A group of bars for each dtype, and a line where the limit is for ours."""
    shown = [(model, result) for model in models if (result := model.cell(cell)) is not None]
    if not shown:
        axis.set_axis_off()
        return
    width, highest = 0.2, 0.0
    for at, (model, result) in enumerate(shown):
        engines = [name for name in ENGINES if name in result.engines]
        rates = [result.rate(name) for name in engines]
        places = [at + (i - (len(engines) - 1) / 2) * width for i in range(len(engines))]
        bars = axis.bar(places, rates, width, color=[COLORS[name] for name in engines])
        axis.bar_label(bars, [significant(rate) for rate in rates], fontsize=7, padding=1)
        highest = max(highest, *rates)
        if OURS in engines:
            limit = result.rate(OURS) / result.fraction(OURS, model.dtype)
            axis.hlines(limit, at - 0.45, at + 0.45, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xticks(range(len(shown)), [model.dtype for model, _ in shown])
    axis.set_ylim(0, 1.35 * highest)
    _finish(axis, title)


def _batches(axis: Any, models: list[ModelResult]) -> None:
    """Decode over the number of sequences, of the smallest dtype that ours has it for."""
    for model in reversed(models):
        results = sorted((r for r in model.cells if _is_batch(r)), key=lambda r: r.cell.sequences)
        if len(results) < 2 or not any(OURS in result.engines for result in results):
            continue
        for engine in ENGINES:
            points = [(r.cell.sequences, r.rate(engine)) for r in results if engine in r.engines]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=COLORS[engine])
        ticks = [result.cell.sequences for result in results]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        _finish(axis, f"{model.model}, {model.dtype}, decode of N sequences together")
        return
    axis.set_axis_off()


def _is_batch(result: CellResult) -> bool:
    """Whether it is decode from a short prompt, of however many sequences."""
    return result.cell.kind == "decode" and result.cell.prompt == 16 and bool(result.turns)


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
