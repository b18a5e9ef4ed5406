"""A comparison as a picture: for every model, prefill, decode and batched decode of all engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # the backend comes first

from pyllm.compare.engine import ENGINES
from pyllm.compare.results import Comparison, ModelResult

COLORS = dict(zip(ENGINES, ("#c8442a", "#4c78a8", "#72a98f", "#b7a6cf"), strict=False))
BARS = (("prefill-512", "prefill of 512"), ("decode", "decode"), ("decode-2048", "decode at depth 2,048"))


def plot(comparison: Comparison, path: Path) -> None:
    """Write it to `path`, in the format that its ending names."""
    names = list(dict.fromkeys(model.model for model in comparison.models))
    figure, axes = pyplot.subplots(len(names), 4, figsize=(17, 3.6 * len(names)), squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        models = [model for model in comparison.models if model.model == name]
        for axis, (cell, title) in zip(row, BARS, strict=False):
            _bars(axis, models, cell)
            axis.set_title(f"{name}, {title}", fontsize=10)
        _batches(row[-1], models)
        row[0].set_ylabel("tokens per second")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [name for name in ENGINES if name in handles]
    figure.legend(
        [handles[name] for name in labels], labels, loc="outside upper center", ncols=len(labels), frameon=False
    )
    figure.supxlabel(
        f"{comparison.machine}, {comparison.threads} threads, {comparison.began}; medians of {comparison.rounds} "
        "rounds in turns; dashed: the limit measured in the same rounds, for what pyllm reads and computes",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, models: list[ModelResult], cell: str) -> None:
    """A group of bars for each dtype, and a line where the limit is for ours."""
    shown = [(model, result) for model in models if (result := model.cell(cell)) is not None]
    width = 0.8 / max(1, len(ENGINES))
    for at, (model, result) in enumerate(shown):
        for offset, engine in enumerate(ENGINES):
            if engine in result.engines:
                label = engine if engine not in axis.get_legend_handles_labels()[1] else None
                place = at + (offset - (len(ENGINES) - 1) / 2) * width
                bar = axis.bar(place, result.rate(engine), width, color=COLORS[engine], label=label)
                axis.bar_label(bar, fmt="%.3g", fontsize=7, padding=1)
        if "pyllm" in result.engines:
            limit = result.rate("pyllm") / result.fraction("pyllm", model.dtype)
            axis.hlines(limit, at - 0.45, at + 0.45, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xticks(range(len(shown)), [model.dtype for model, _ in shown])
    axis.set_ylim(0, 1.35 * max((r.rate(e) for _, r in shown for e in r.engines), default=1))
    _plain(axis)


def _batches(axis: Any, models: list[ModelResult]) -> None:
    """Decode over the number of sequences, for the smallest dtype that has it."""
    for model in reversed(models):
        results = [
            result
            for result in model.cells
            if result.cell.kind == "decode" and result.cell.prompt == 16 and result.turns
        ]
        if len(results) < 2:
            continue
        for engine in ENGINES:
            points = [(r.cell.sequences, r.rate(engine)) for r in results if engine in r.engines]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", color=COLORS[engine], label=engine)
        axis.set_xscale("log", base=2)
        ticks = sorted(result.cell.sequences for result in results)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{model.model}, {model.dtype}, decode of N sequences", fontsize=10)
        break
    else:
        axis.set_axis_off()
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
