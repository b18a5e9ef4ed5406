"""Checkpoints of a run: ordinary model folders with the training state beside the weights.

A run's folder holds ``step-<n>`` folders and the links ``last`` and ``best``. A folder appears whole or not at all, and
a link goes over to it in one step afterwards, so a run that is killed at any moment leaves its last checkpoint intact.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.convert.new_folder import new_folder
from pyllm.errors import CheckpointError, shown
from pyllm.folder import read_json
from pyllm.models import family_of, open_checkpoint
from pyllm.safetensors_file import SafetensorsFile
from pyllm.safetensors_writer import SafetensorsWriter, Shape
from pyllm.train.parameters import Parameters, load_values
from pyllm.weights import SINGLE_FILE

LAST, BEST = "last", "best"
STATE_FILE, MOMENTS_FILE = "training_state.json", "training_state.safetensors"
MAX_STATE_BYTES = 100_000_000
FORMAT = 1
MOMENTS = ("first_moment", "second_moment")
STEP = re.compile(r"step-(\d{8,})")
PARTIAL = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.partial")
FROM_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
                  "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on, beside weights and moments."""

    step: int
    settings: dict[str, Any]  # `TrainConfig.fixed()`
    model: dict[str, Any]  # config.json as the run was given it
    data: dict[str, Any]
    best_loss: float | None
    last_loss: float | None


def save_model(
    folder: Path, parameters: Parameters, config: Mapping[str, Any], tokenizer: Path | None, dtype: Any = np.float32
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into an existing folder, weights as `dtype`."""
    kept = {name: value for name, value in config.items() if name not in ("torch_dtype", "quantization_config")}
    _write_json(folder / "config.json", {**kept, "dtype": str(np.dtype(dtype))})
    names, spec = family_of(config).names, parameters.spec
    rows = list(names.expand(spec))
    shapes = {row.name: Shape(np.dtype(dtype), row.stored_shape(spec)) for row in rows}
    with SafetensorsWriter(folder / SINGLE_FILE, shapes) as writer:
        for row in rows:
            values = row.join([parameters.get(slot) for slot in row.slots], spec)
            writer.write(row.name, row.written(values).astype(dtype))
    for path in sorted(tokenizer.iterdir()) if tokenizer is not None else []:
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in FROM_TOKENIZER):
            shutil.copyfile(path, folder / path.name)


class Checkpoints:
    """The checkpoints in the folder of a run. What else lies in that folder is left alone."""

    def __init__(self, out: Path, keep: int) -> None:
        self.out, self.keep = out, keep

    def save(self, parameters: Parameters, state: RunState, tokenizer: Path | None, best: bool = False) -> Path:
        """Write a checkpoint, make it the last one, and the best one if it is, and remove those beyond `keep`.

        Raises `OSError` for what the disk refuses, with the last checkpoint as it was.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for path in self.out.iterdir():
            if PARTIAL.fullmatch(path.name):  # of a run that was killed
                shutil.rmtree(path, ignore_errors=True)
        folder = self.out / f"step-{state.step:08}"
        if _step_of(folder) is not None:  # whole, but the run was killed before it became the last one
            _remove(folder)
        needed, free = parameters.weights.nbytes * 3, shutil.disk_usage(self.out).free
        if needed > free:
            raise OSError(28, f"no room for a checkpoint: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; the "
                          "last one is intact", str(self.out))  # fmt: skip
        with new_folder(folder) as partial:
            save_model(partial, parameters, state.model, tokenizer)
            values = {name: getattr(parameters, name) for name in MOMENTS}
            shapes = {name: Shape(array.dtype, array.shape) for name, array in values.items()}
            with SafetensorsWriter(partial / MOMENTS_FILE, shapes) as writer:
                for name, array in values.items():
                    writer.write(name, array)
            _write_json(partial / STATE_FILE, {"format": FORMAT, **vars(state)})
        if best:  # before `last`, whose state tells a resumed run of the best loss: `best` never lags behind it
            self._link(BEST, folder)
        self._link(LAST, folder)
        self._prune()
        return folder

    def mark_best(self, folder: Path) -> None:
        """Let `best` stand for this checkpoint."""
        self._link(BEST, folder)
        self._prune()

    def exist(self) -> bool:
        """Whether the run has a checkpoint."""
        return (self.out / LAST).exists()

    def read_state(self) -> RunState:
        """The state of the last checkpoint; raises `CheckpointError` where there is none."""
        if not self.exist():
            raise CheckpointError(f"{self.out}: no checkpoint to go on from: expected the link {LAST} in it")
        path = self.out / LAST / STATE_FILE
        values = read_json(path, MAX_STATE_BYTES, CheckpointError)
        found = values.pop("format", None)
        if found != FORMAT or set(values) != set(RunState.__dataclass_fields__):
            raise CheckpointError(f"{path}: expected a training state of format {FORMAT}, found {shown(found)}")
        return RunState(**values)

    def load(self, parameters: Parameters) -> None:
        """Weights and moments of the last checkpoint."""
        folder = self.out / LAST
        with open_checkpoint(folder) as checkpoint:
            if checkpoint.spec.slots() != parameters.spec.slots():
                raise CheckpointError(f"{folder}: the weights are those of another model")
            load_values(parameters, checkpoint.tensors)
        file = SafetensorsFile(folder / MOMENTS_FILE)
        try:
            for name in MOMENTS:
                target: NDArray[np.float32] = getattr(parameters, name)
                entry = file.entries.get(name)
                if entry is None or entry.dtype != "F32" or entry.shape != target.shape:
                    raise CheckpointError(f"{folder / MOMENTS_FILE}: {name}: expected float32 {list(target.shape)}")
                target[:] = file.view(name)
        finally:
            file.close()

    def _link(self, name: str, folder: Path) -> None:
        temporary = self.out / f".{name}.{secrets.token_hex(4)}"
        temporary.symlink_to(folder.name)
        os.replace(temporary, self.out / name)

    def _prune(self) -> None:
        linked = {(self.out / name).resolve() for name in (LAST, BEST)}
        steps = {path: step for path in self.out.iterdir() if (step := _step_of(path)) is not None}
        for path in sorted(steps, key=steps.__getitem__)[: -self.keep]:
            if path.resolve() not in linked:
                _remove(path)


def _step_of(folder: Path) -> int | None:
    """The step of a checkpoint, or None for what is none."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match and not folder.is_symlink() and (folder / STATE_FILE).is_file() else None


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill midway leaves a partial folder, which the next save removes, and never half of it."""
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    folder.rename(partial)
    shutil.rmtree(partial)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
