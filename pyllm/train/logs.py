"""The log of a run: every report as a line of JSON, and the curves as CSV."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyllm.errors import DataError, shown
from pyllm.train.report import Callbacks, EvalReport, Sample, StepReport

JSONL, CSV = "log.jsonl", "log.csv"
COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "eval_loss")
MAX_LOG_BYTES = 1 << 30


class RunLog(Callbacks):
    """Writes both files in the run's folder; a resumed run cuts off what came after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def started(self, step: int, steps: int, parameters: int) -> None:
        """Begin the files, or go on with them after `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_log(self.folder) if r["step"] <= step] if step else []
        replace_text(self.folder / JSONL, (json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        replace_text(self.folder / CSV, [",".join(COLUMNS) + "\n", *map(_row, kept)])

    def stepped(self, report: StepReport) -> None:
        """A step."""
        self._add({"kind": "step", **asdict(report), "tokens_per_second": report.tokens_per_second})

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation."""
        values = asdict(report)
        self._add({"kind": "eval", "step": report.step, "eval_loss": report.loss, **values})

    def sampled(self, sample: Sample) -> None:
        """A sample."""
        self._add({"kind": "sample", **asdict(sample)})

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint."""
        self._add({"kind": "checkpoint", "step": step, "folder": folder.name})

    def _add(self, record: dict[str, Any]) -> None:
        with (self.folder / JSONL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if row := _row(record):
            with (self.folder / CSV).open("a", encoding="utf-8") as file:
                file.write(row)


def replace_text(path: Path, lines: Iterable[str]) -> None:
    """Write a file, or another one in its place; a kill or a full disk leaves the old one as it was."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log, in order; a last line that was cut off is left out. Raises `DataError`."""
    path = folder / JSONL
    if not path.is_file():
        raise DataError(f"{folder}: expected the folder of a training run, with {JSONL} in it")
    with path.open("rb") as file:
        lines = file.read(MAX_LOG_BYTES).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a JSON object: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise DataError(f"{path}, line {number}: expected a record of a run, found {shown(record)}")
        records.append(record)
    return records


def _row(record: dict[str, Any]) -> str:
    """A record as a line of the CSV file; nothing for what has no numbers."""
    if record["kind"] == "step":
        return ",".join("" if record.get(c) is None else f"{record[c]:.8g}" for c in COLUMNS) + "\n"
    if record["kind"] == "eval":
        return f"{record['step']}" + "," * (len(COLUMNS) - 1) + f"{record['eval_loss']:.8g}\n"
    return ""
