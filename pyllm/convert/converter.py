"""`convert`: plan the new folder, round one matrix after the other, write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.convert import layout
from pyllm.convert.calibration import mean_squares
from pyllm.convert.new_folder import new_folder, refuse_existing
from pyllm.errors import CheckpointError, ConfigError, RequestError, listed
from pyllm.folder import read_config
from pyllm.isa import default_threads
from pyllm.models import family_of, open_checkpoint
from pyllm.ops import F32
from pyllm.quantization import Layout, Scheme
from pyllm.quantization.rounding import RoundingError, quantize
from pyllm.safetensors_writer import SafetensorsWriter, Shape
from pyllm.spec import ENCODER, is_matrix
from pyllm.tokenizer import Tokenizer
from pyllm.weight_names import Row
from pyllm.weights import INDEX_FILE, SINGLE_FILE, Checkpoint, resolve

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = {"int8": (0, 32, 64, 128), "int4": (64, 32, 128)}  # the default first; 0: one scale for each output
MAX_SHARD_BYTES = 5_000_000_000
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.bpe", "LICENSE*", "NOTICE*", "USE_POLICY*")
NOT_COPIED = ("config.json", "*.index.json")


@dataclass(frozen=True)
class Converted:
    """What became of a model: bytes of weights before and after, and by module the error of rounding.

    With calibration text, errors are weighted by the mean squares of the activations they meet.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    errors: dict[str, RoundingError] = field(default_factory=dict)

    @property
    def error(self) -> RoundingError:
        """Of all modules together."""
        return sum(self.errors.values(), RoundingError())


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quantization: str,
    group_size: int | None = None,
    calibration: str | None = None,
    skip: Sequence[str] = (),
    threads: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Converted:
    """Write the model `model` (folder or hub name) to the new folder `out` with the matrices of its blocks quantized.

    quantization: "int4" or "int8", symmetric. group_size: inputs that share a scale, 32, 64 or 128, for int8 also 0,
    all of them; default 64 for int4 and 0 for int8. calibration: a text whose activations weigh the rounding errors.
    skip: shell patterns of modules, as the checkpoint names them, that stay as they are. Embedding, head, norms and
    biases always do.

    The folder has the layout of compressed-tensors ("pack-quantized"), with the tokenizer and all small files of the
    model. It appears when it is complete; nothing is overwritten. Without calibration a few tensors are in memory at a
    time, with it the whole model. Raises `PyllmError` for what cannot be done, `ValueError` for arguments that do not
    exist, `OSError` for what the disk refuses.
    """
    if quantization not in BITS:
        raise ValueError(f"quantization: expected {' or '.join(BITS)}, got {quantization!r}")
    sizes = GROUP_SIZES[quantization]
    size = sizes[0] if group_size is None else group_size
    if size not in sizes:
        expected = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"group_size: expected one of {expected} for {quantization}, got {group_size!r}")
    if calibration is not None and not calibration.strip():
        raise ValueError("calibration: the text is empty; give some pages of what the model will be used for")
    out = Path(out)
    refuse_existing(out)
    folder = resolve(os.fspath(model), revision=revision, offline=offline)
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{folder} is quantized already: convert the model that it was made of")
    threads = threads if threads is not None else default_threads()
    with open_checkpoint(folder) as checkpoint:
        rows = family_of(config).names.expand(checkpoint.spec)
        scheme = Scheme(Layout.PACK_QUANTIZED, BITS[quantization], size)
        plan = _with_schemes([_planned(row, checkpoint) for row in rows], scheme, skip)
        importance: dict[str, F32] = {}
        if calibration is not None:
            importance = _importance(folder, checkpoint, calibration, threads, _part(progress, 0, 0.5))
        _check_disk(out, plan)
        with new_folder(out) as partial:
            writing = _part(progress, 0.5 if calibration is not None else 0, 1)
            errors = _write_weights(partial, plan, checkpoint, importance, threads, writing)
            ignored = [item.module for item in plan if item.is_matrix and item.scheme is None]
            config["quantization_config"] = layout.quantization_config(scheme, ["lm_head", *ignored])
            _write_json(partial / "config.json", config)
            _copy_files(folder, partial)
    before, after = sum(item.stored.nbytes for item in plan), sum(item.nbytes for item in plan)
    return Converted(out, before, after, errors)


@dataclass(frozen=True)
class _Item:
    """One weight of the new folder. With a scheme it becomes integers, else it stays as it is `stored`."""

    row: Row
    stored: Shape
    shape: tuple[int, ...]  # [out, in] of a matrix
    scheme: Scheme | None = None

    @property
    def module(self) -> str:
        return self.row.name.rpartition(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a block: those are what is quantized."""
        slot = self.row.slots[0]
        return slot.removeprefix(ENCODER).startswith("blocks.") and is_matrix(slot, self.shape)

    @property
    def tensors(self) -> dict[str, Shape]:
        if self.scheme is None:
            return {self.row.name: self.stored}
        parts = layout.part_shapes(self.scheme, self.shape[0], self.shape[1], self.stored.dtype)
        return {f"{self.module}.{part}": shape for part, shape in parts.items()}

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self.tensors.values())


def _planned(row: Row, checkpoint: Checkpoint) -> _Item:
    array = checkpoint.stored(row.slots[0])
    return _Item(row, Shape(array.dtype, array.shape), row.shape(checkpoint.spec))


def _with_schemes(plan: list[_Item], scheme: Scheme, skip: Sequence[str]) -> list[_Item]:
    """Every matrix of a block quantized, but for skipped modules; each must have inputs that groups divide."""
    modules = [item.module for item in plan if item.is_matrix]
    for pattern in skip:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise ValueError(f"skip: expected shell patterns of modules such as {modules[0]}, got {pattern!r}, which "
                             "matches none")  # fmt: skip
    chosen = [
        replace(item, scheme=scheme)
        if item.is_matrix and not any(fnmatchcase(item.module, pattern) for pattern in skip)
        else item
        for item in plan
    ]
    if all(item.scheme is None for item in chosen):
        raise ValueError(f"skip: {', '.join(skip)} leaves nothing to quantize")
    granularity = scheme.group_size or scheme.per_word
    problems = [
        f"{item.module} has {item.shape[1]} inputs"
        for item in chosen
        if item.scheme is not None and item.shape[1] % granularity
    ]
    if problems:
        what = f"groups of {granularity}" if scheme.group_size else f"words of {granularity} values"
        raise ConfigError(
            listed(f"{what} do not divide every matrix (choose another --group-size, or --skip these)", problems, 8)
        )
    return chosen


def _importance(
    folder: Path, checkpoint: Checkpoint, text: str, threads: int, progress: Callable[[float], None] | None
) -> dict[str, F32]:
    tokens = Tokenizer.load(folder).encode(text)
    if not tokens:
        raise RequestError("the calibration text has no tokens")
    return mean_squares(checkpoint, tokens, threads, progress)


def _write_weights(
    folder: Path,
    plan: list[_Item],
    checkpoint: Checkpoint,
    importance: dict[str, F32],
    threads: int,
    progress: Callable[[float], None] | None,
) -> dict[str, RoundingError]:
    shards = _shards(plan)
    width = len(shards)
    files = [f"model-{i + 1:05}-of-{width:05}.safetensors" for i in range(width)] if width > 1 else [SINGLE_FILE]
    errors: dict[str, RoundingError] = {}
    done, total = 0, sum(item.stored.nbytes for item in plan)
    for name, items in zip(files, shards, strict=True):
        shapes = {tensor: shape for item in items for tensor, shape in item.tensors.items()}
        with SafetensorsWriter(folder / name, shapes) as writer:
            for item in items:
                if item.scheme is None:
                    writer.write(item.row.name, checkpoint.stored(item.row.slots[0]))
                else:
                    errors[item.module] = _write_quantized(writer, item, item.scheme, checkpoint, importance, threads)
                for slot in item.row.slots:
                    checkpoint.release(slot)
                done += item.stored.nbytes
                if progress:
                    progress(done / total)
    if width > 1:
        weight_map = {tensor: file for file, items in zip(files, shards, strict=True)
                      for item in items for tensor in item.tensors}  # fmt: skip
        total = sum(item.nbytes for item in plan)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return errors


def _write_quantized(
    writer: SafetensorsWriter,
    item: _Item,
    scheme: Scheme,
    checkpoint: Checkpoint,
    importance: dict[str, F32],
    threads: int,
) -> RoundingError:
    slots = item.row.slots
    weight = item.row.join([checkpoint.tensors[slot] for slot in slots], checkpoint.spec)
    if not np.all(np.isfinite(weight)):
        raise CheckpointError(f"{item.row.name}: expected finite numbers, found NaN or infinity")
    tensor, error = quantize(
        weight, scheme.bits, scheme.group_size, item.stored.dtype, importance.get(slots[0]), threads
    )
    for part, values in layout.parts(tensor).items():
        writer.write(f"{item.module}.{part}", values)
    return error


def _shards(plan: list[_Item]) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in plan:
        if shards[-1] and size + item.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _check_disk(out: Path, plan: list[_Item]) -> None:
    needed, free = sum(item.nbytes for item in plan), shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(28, f"no room: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(out.parent))


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation defaults, licence: every small file that the weights come with."""
    for path in sorted(source.iterdir()):
        wanted = any(fnmatchcase(path.name, pattern) for pattern in COPIED)
        if wanted and path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _part(progress: Callable[[float], None] | None, start: float, stop: float) -> Callable[[float], None] | None:
    """Progress of a step that goes from share `start` to share `stop` of all."""
    return None if progress is None else lambda share: progress(start + share * (stop - start))
