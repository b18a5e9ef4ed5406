"""The table that comes last."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from gpu.process import Row
from gpu.roofs import PRODUCT, READ

MOST_LINES, WIDTH = 40, 160
NOT_TOLD = ("rows", "state", "seconds", "error")


def table(results: dict[str, Row], notes: Sequence[str] = ()) -> list[str]:
    """The results in words, and notes behind them, at most `MOST_LINES` lines."""
    roofs = {row["name"]: row["value"] for row in results.get("roofs", {}).get("rows", []) if "value" in row}
    lines = []
    for name, found in results.items():
        told = ", ".join(f"{key} {shown(value)}" for key, value in found.items() if key not in NOT_TOLD and value)
        errors = found.get("error", "").strip().splitlines()
        if errors and not any("error" in row for row in found.get("rows", [])):
            told = errors[-1]
        lines.append(f"{name:12} {found['state']:8} {found['seconds']:5.1f} s  {told}"[:WIDTH])
        lines += row_lines(found.get("rows", []), roofs)
    room = MOST_LINES - len(notes)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} lines more, in the JSON files"]
    return [*lines, *notes]


def row_lines(rows: list[Row], roofs: dict[str, float]) -> list[str]:
    """A line for each name, with all its figures; errors in one of their own; tests that passed together."""
    together: dict[str, list[str]] = {}
    passed, lines = [], []
    for row in rows:
        if "error" in row:
            lines.append(f"  {row['name']:34} {row['error'].strip().splitlines()[-1]}"[: 2 * WIDTH])
        elif "passed" in row:
            passed.append(f"{row['name']} {row['passed'] or 'skipped'}")
        else:
            batch = f"x{row['batch']} " if "batch" in row else ""
            figure = f"{batch}{row['value']:.4g} {row['unit']}{share(row, roofs)}"
            together.setdefault(row["name"], []).append(figure)
    lines = [*(f"  {label:34} {', '.join(figures)}"[:WIDTH] for label, figures in together.items()), *lines]
    if passed:
        lines += textwrap.wrap(
            f"tests that passed: {', '.join(passed)}", WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def shown(value: Any) -> str:
    """A value of a step in words."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share(row: Row, roofs: dict[str, float]) -> str:
    """How much of the machine's limit a figure is, where that was measured."""
    if row["unit"] == "TFLOP/s":
        limit, value = row.get("torch") or roofs.get(PRODUCT), row["value"]
    elif row["name"] in roofs:  # which is one itself
        return ""
    else:
        limit, value = roofs.get(READ), row["value"] if row["unit"] == "GB/s" else row.get("GB/s")
    return f" ({value / limit:.0%})" if limit and value else ""
