"""A comparison as text: a Markdown table for each model and dtype, cells down, engines across."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.compare.engine import OURS
from pyllm.compare.measure import CELLS
from pyllm.compare.results import CellResult, Comparison, ModelResult, peak

LEGEND = (
    "Medians. In brackets: share of the limit measured in the same rounds, the longer of the times that reading "
    "(weights in the engine's own format, keys and values) and computing take. Behind it: how many times as fast pyllm "
    "is. Load: from opening the model to its first token, files in the page cache, libraries imported. Memory: most "
    "that was resident of the engine's own process, mapped file pages included. Equal tokens: first greedy choices "
    "that are pyllm's."
)


def report(comparison: Comparison) -> str:
    """Everything, as Markdown."""
    lines = [
        f"{comparison.machine}; {comparison.threads} threads, {comparison.rounds} rounds in turns, {comparison.began}.",
        "",
        LEGEND,
    ]
    for model in comparison.models:
        lines += ["", *_model(model)]
    return "\n".join(lines)


def _model(model: ModelResult) -> Iterator[str]:
    yield f"### {model.model}, {model.dtype}"
    yield ""
    limits = model.limits
    if limits is None:
        yield "Nothing was measured."
    else:
        unit = "GFLOP/s" if model.dtype in ("float32", "bfloat16") else "GOP/s"
        yield (
            f"Limits ({limits.isa}): reads {limits.read_gbps:.1f} GB/s, computes "
            f"{peak(limits, model.dtype):.0f} {unit}."
        )
        yield ""
        yield from _table(model, [name for name in model.versions if any(name in c.engines for c in model.cells)])
    notes = [f"- {name}: {reason}" for name, reason in model.missing.items()]
    notes += [f"- {cell}: {reason}" for cell, reason in model.skipped.items()]
    notes += [
        f"- {result.cell.name}, {name}: {reason}" for result in model.cells for name, reason in result.missing.items()
    ]
    if notes:
        yield ""
        yield "Missing:"
        yield from notes


def _table(model: ModelResult, engines: list[str]) -> Iterator[str]:
    rows = [["", *(model.versions[name] for name in engines)]]
    for name in CELLS:
        if (result := model.cell(name)) is not None:
            rows.append([_title(result), *(_figure(model, result, engine) for engine in engines)])
    alone = [result for result in model.cells if result.cell.name == "decode"]
    for title, results in (("peak memory, one sequence, GB", alone), ("peak memory, all of these, GB", model.cells)):
        if any(result.peak_memory for result in results):
            rows.append([title, *(_memory(model, results, engine) for engine in engines)])
    if (result := model.cell("decode")) is not None:
        rows.append(["equal tokens", *(_agreement(result, engine) for engine in engines)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for index, row in enumerate(rows):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _title(result: CellResult) -> str:
    cell = result.cell
    if cell.kind == "load":
        return "load to first token, s"
    if cell.kind == "prefill":
        return f"prefill of {cell.prompt}, tok/s"
    if cell.sequences > 1:
        return f"decode, {cell.sequences} sequences together, tok/s"
    return "decode, tok/s" if cell.name == "decode" else f"decode at depth {cell.prompt:,}, tok/s"


def _figure(model: ModelResult, result: CellResult, engine: str) -> str:
    if engine not in result.engines:
        return "-"
    value = result.seconds(engine) if result.cell.kind == "load" else result.rate(engine)
    text = f"{significant(value)} ({result.fraction(engine, model.dtype):.0%})"
    ratio = result.ratio(engine) if engine != OURS else None
    return text if ratio is None else f"{text} {ratio:.2f}x"


def _memory(model: ModelResult, results: list[CellResult], engine: str) -> str:
    sizes = [result.peak_memory[engine] for result in results if engine in result.peak_memory]
    if not sizes:
        return "-"
    size = max(sizes)
    return f"{size / 1e9:.2f} ({size / model.weight_bytes[engine]:.2f} x weights)"


def _agreement(result: CellResult, engine: str) -> str:
    found = result.agreement(engine)
    return "-" if found is None else f"{found[0]} of {found[1]}"


def significant(value: float) -> str:
    """With three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
