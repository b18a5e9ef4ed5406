"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from pyllm.errors import ConfigError, DataError
from pyllm.train.logs import read_log


def plot_run(folder: Path, out: Path) -> None:
    """Draw loss and learning rate of the run in `folder` into `out`, whose name says as what (.png, .svg, .pdf).

    Raises `DataError` where there is no run or no step, `ConfigError` where matplotlib is missing or `out` has a name
    it does not know.
    """
    records = read_log(folder)
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not steps:
        raise DataError(f"{folder}: the run has made no step yet")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed: pip install 'pyllm[train]'") from error
    figure = Figure(figsize=(8, 6), layout="constrained")  # by itself: pyplot would know of it, and have a backend
    losses, rates = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    at = [r["step"] for r in steps]
    loss = [r["loss"] for r in steps]
    losses.plot(at, loss, color="0.75", linewidth=0.8)
    losses.plot(at, _smoothed(loss), color="tab:blue", label="training")
    if evals:
        losses.plot(
            [r["step"] for r in evals], [r["eval_loss"] for r in evals], "o-", color="tab:red", label="held out"
        )
    shown = sorted(filter(isfinite, _smoothed(loss) + [r["eval_loss"] for r in evals]))
    if shown:
        losses.set_ylim(shown[0] * 0.95, shown[int(0.99 * (len(shown) - 1))] * 1.05)
    losses.set_ylabel("loss, nats per token")
    losses.legend()
    losses.grid(alpha=0.3)
    rates.plot(at, [r["learning_rate"] for r in steps], color="tab:green")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise ConfigError(f"{out}: {error}") from error


def _smoothed(values: Sequence[float]) -> list[float]:
    """Moving averages over a fiftieth of the run."""
    width = max(len(values) // 50, 1)
    sums, out = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - width] if i >= width else 0.0)
        out.append(sums / min(i + 1, width))
    return out
