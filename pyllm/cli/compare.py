"""`pyllm bench --compare`: pyllm and other engines in turns, on random weights of real shapes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pyllm.cli.output import note, write, write_json

if TYPE_CHECKING:
    from pyllm.compare.measure import Plan
    from pyllm.compare.results import Comparison


def compare(
    *,
    models: str | None,
    dtypes: str | None,
    cells: str | None,
    peers: str | None,
    threads: int | None,
    rounds: int | None,
    quick: bool,
    folder: Path | None,
    save: Path | None,
    load: list[Path] | None,
    plot: Path | None,
    json: bool,
) -> int:
    """Measure, or load what was measured; print tables, or JSON; save and plot where asked."""
    if plot is not None:
        _need_matplotlib()
    if load:
        comparison = _loaded(load)
    else:
        from pyllm.compare.measure import compare as run

        plan = _plan(models, dtypes, cells, peers, threads, rounds, quick, folder)
        for comparison in run(plan, note):  # the last one counts
            if save is not None:
                _save(comparison, save)
    if json:
        from pyllm.compare.results import to_json

        write_json(to_json(comparison))
    else:
        from pyllm.compare.report import report

        write(report(comparison), end="\n")
    if plot is not None:
        from pyllm.compare.plot import plot as draw

        draw(comparison, plot)
    return 0


def _plan(
    models: str | None,
    dtypes: str | None,
    cells: str | None,
    peers: str | None,
    threads: int | None,
    rounds: int | None,
    quick: bool,
    folder: Path | None,
) -> Plan:
    from pyllm.compare.engine import DTYPES, PEERS
    from pyllm.compare.measure import CELLS, QUICK_CELLS, Plan
    from pyllm.isa import default_threads

    plan = Plan(
        models=_names(models, ("gpt2",) if quick else ("llama-1b", "gpt2")),
        dtypes=_names(dtypes, DTYPES),
        cells=_names(cells, QUICK_CELLS if quick else tuple(CELLS)),
        peers=_names(peers, PEERS),
        threads=threads if threads is not None else default_threads(),
        rounds=rounds if rounds is not None else 2 if quick else 5,
        folder=(folder.expanduser() if folder is not None else models_folder()).resolve(),
    )
    try:
        plan.check()
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    return plan


def _names(given: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return default
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def models_folder() -> Path:
    """Where made models are kept: tens of gigabytes for all of them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyllm" / "compare"


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'pyllm[compare]'")


def _save(comparison: Comparison, path: Path) -> None:
    from pyllm.compare.results import to_json

    partial = path.with_name(path.name + ".partial")  # who is interrupted here keeps what was saved before
    partial.write_text(json.dumps(to_json(comparison)))
    partial.replace(path)


def _loaded(paths: list[Path]) -> Comparison:
    """Saved comparisons as one."""
    from pyllm.compare.results import combined, from_json

    found = []
    for path in paths:
        try:
            found.append(from_json(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"--load {path}: {error}") from None
    return combined(found)
