"""Checkpoint folders in the Hugging Face layout: finding them, their config, and their weights under canonical names.

Loading is strict both ways: every weight that the model's spec needs must be there with its shape and a known dtype,
every tensor in the files must be known, and everything wrong is reported at once. Weights are views of memory-mapped
files: nothing is converted here, and nothing copied but rows that stand in another order. Quantized weights stand
beside them, to be read one at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from pyllm.errors import CheckpointError, listed, shown
from pyllm.folder import read_config, read_json, resolve
from pyllm.quantization import MARKS, KernelForm, Quantization, QuantizedTensor, Scheme, StoredWeight, collect
from pyllm.safetensors_file import DTYPES, Array, SafetensorsFile, StoredTensor
from pyllm.spec import HeadKind, ModelSpec
from pyllm.weight_names import NameTable, Place, Row

__all__ = ["Checkpoint", "load", "read_config", "resolve"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
EMBED, HEAD = "embed.weight", "head.weight"


class Checkpoint:
    """Weights of one model: every slot of `spec` is either in `tensors`, as a read-only view of a mapped file, or in
    `quantized`, as integers and scales.

    Views are float32, float16 or ml_dtypes.bfloat16, may be strided or transposed, and their base may be unaligned;
    what is stored in another form (`Transform.LESS_ONE`) is converted at each access.
    Quantized weights are unpacked anew at each access, parts of them still views.
    `spec` is the one given to `load`, except that it is untied when the file holds a head of its own. Use it as a
    context manager, or `close` it, when the weights have been packed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plain: Mapping[str, _Source],
        quantized: Mapping[str, _QuantizedSource],
        files: list[SafetensorsFile],
    ) -> None:
        """Take over `files`, which the sources refer to."""
        self.spec = spec
        self.tensors: Mapping[str, Array] = _Reading(plain)
        self.quantized: Mapping[str, QuantizedTensor] = _Reading(quantized)
        self._sources: dict[str, _Source | _QuantizedSource] = {**plain, **quantized}
        self._files = files

    def kernel_form(self, slot: str) -> KernelForm | None:
        """What a weight in `quantized` will be packed as, told without reading it; None if not as integers."""
        source = self._sources[slot]
        return source.weight.form(source.scheme, source.shape[1]) if isinstance(source, _QuantizedSource) else None

    def stored_bits(self) -> set[int]:
        """Bits of the weights in `quantized`."""
        return {source.scheme.bits for source in self._sources.values() if isinstance(source, _QuantizedSource)}

    def stored(self, slot: str) -> Array:
        """The whole tensor that the slot in `tensors` is part of, as the file has it."""
        source = self._sources[slot]
        assert isinstance(source, _Source)
        return source.tensor.view()

    def release(self, slot: str) -> None:
        """Give back the memory of pages that the slot's tensor was read from; call it when the slot is packed."""
        self._sources[slot].release()

    def close(self) -> None:
        """Unmap the files; views that are still held keep their file alive."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        self.close()


def load(
    folder: Path,
    spec: ModelSpec,
    names: NameTable,
    quantization: Quantization | None = None,
    new_head: bool = False,
) -> Checkpoint:
    """Open the weights in `folder` for a model of this spec; raises one `CheckpointError` for everything wrong.

    With `quantization`, weights that are stored as its layouts say are taken as such. With `new_head` the files are
    those of a model with another head or none: `tensors` lacks the head's matrix and bias, and its other weights where
    the files do.
    """
    files: list[SafetensorsFile] = []
    try:
        stored = _open_files(folder, files)
        return _match(folder, spec, names, quantization, stored, files, new_head)
    except BaseException:
        for file in files:
            file.close()
        raise


@dataclass(frozen=True)
class _Source:
    """A slot's place: these rows of a stored tensor, seen as [out, in]."""

    tensor: StoredTensor
    row: Row
    place: Place

    def read(self) -> Array:
        return self.row.read(self.tensor.view())[self.place]

    def release(self) -> None:
        self.tensor.file.release(self.tensor.name)


@dataclass(frozen=True)
class _QuantizedSource:
    """A slot's place: these rows of a quantized weight [out, in] of this shape."""

    weight: StoredWeight
    scheme: Scheme
    shape: tuple[int, int]
    place: Place

    def read(self) -> QuantizedTensor:
        return self.weight.read(self.scheme, *self.shape).rows(self.place)

    def release(self) -> None:
        self.weight.release()


Read = TypeVar("Read", covariant=True)


class _Readable(Protocol[Read]):
    def read(self) -> Read: ...


class _Reading(Mapping[str, Read]):
    """Slot -> what its source reads, made anew at each access so that the file is checked each time."""

    def __init__(self, sources: Mapping[str, _Readable[Read]]) -> None:
        self._sources = sources

    def __getitem__(self, slot: str) -> Read:
        return self._sources[slot].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _open_files(folder: Path, files: list[SafetensorsFile]) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its stored name; opened files are added to `files`."""
    if (folder / SINGLE_FILE).exists():
        file = SafetensorsFile(folder / SINGLE_FILE)
        files.append(file)
        return {name: StoredTensor(file, name) for name in file.entries}
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder, files)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected one with config.json and the weights")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    raise CheckpointError(
        f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found "
        + (f"only {', '.join(others[:8])}; export the model as safetensors" if others else "neither")
    )


def _open_shards(folder: Path, files: list[SafetensorsFile]) -> dict[str, StoredTensor]:
    weight_map = _read_weight_map(folder / INDEX_FILE)
    problems: list[str] = []
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        problem = _unsafe_shard(folder, shard)
        try:
            if problem is None:
                shards[shard] = SafetensorsFile(folder / shard)
                files.append(shards[shard])
        except CheckpointError as error:
            problem = str(error)
        if problem is not None:
            problems.append(problem)
    held = Counter(name for file in shards.values() for name in file.entries)
    for shard, file in shards.items():
        for name in file.entries:
            if held[name] > 1 and weight_map.get(name) != shard:
                problems.append(f"{shard}: {shown(name)} is also in another shard")
            elif weight_map.get(name) != shard:
                problems.append(f"{shard}: {shown(name)} is not listed in {INDEX_FILE} for this file")
    for name, shard in weight_map.items():
        if shard in shards and name not in shards[shard].entries:
            problems.append(f"{shard}: {shown(name)} is listed in {INDEX_FILE} but not in the file")
    if problems:
        raise CheckpointError(listed(f"{folder}: the shards do not fit {INDEX_FILE}", problems))
    return {name: StoredTensor(shards[shard], name) for name, shard in weight_map.items()}


def _read_weight_map(path: Path) -> dict[str, str]:
    index = read_json(path, MAX_INDEX_BYTES, CheckpointError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: expected an object of tensor and file names, found "
                              f"{shown(weight_map)}")  # fmt: skip
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: {shown(name)}: expected a file name, found {shown(shard)}")
    return weight_map


def _unsafe_shard(folder: Path, shard: str) -> str | None:
    """Why a shard's name must not be opened, or None."""
    if not re.fullmatch(r"[^/\\:\0]+\.safetensors", shard) or not shard.isprintable():
        return f"{INDEX_FILE} names {shown(shard)}: expected a plain name ending in .safetensors, in the same folder"
    try:
        home, target = folder.resolve(), (folder / shard).resolve()
    except (OSError, RuntimeError) as error:
        return f"{INDEX_FILE} names {shown(shard)}, which cannot be followed: {error}"
    if target.parent != home and not any(target.is_relative_to(store) for store in _blob_stores(home)):
        return f"{INDEX_FILE} names {shown(shard)}, a link that leads out of the folder"
    return None


def _blob_stores(home: Path) -> list[Path]:
    """Where the links of a download cache lead: CACHE/REPOSITORY/snapshots/COMMIT holds links to the blobs of the
    repository, and those may be links to blobs that the whole cache shares."""
    if home.parent.name != "snapshots":
        return []
    repository = home.parent.parent
    return [repository / "blobs", repository.parent / "blobs"]


def _match(
    folder: Path,
    spec: ModelSpec,
    names: NameTable,
    quantization: Quantization | None,
    stored: Mapping[str, StoredTensor],
    files: list[SafetensorsFile],
    new_head: bool,
) -> Checkpoint:
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        base = names.base_name(name)
        if base in tensors:
            problems.append(f"{tensor.place} and {tensors[base].place} are two names of one weight")
        tensors[base] = tensor
    _merge_aliases(names, tensors, problems)
    weights, found = collect(tensors) if quantization is not None else ({}, tensors)
    problems += [f"{found[name].place} stands beside its quantized form" for name in weights if name in found]
    spec = _resolve_tie(spec, names, found, weights, problems)
    shapes = spec.slots()
    plain: dict[str, _Source] = {}
    quantized: dict[str, _QuantizedSource] = {}
    own = f"{spec.head.at}."
    for row in names.expand(spec):
        name, places = names.base_name(row.name), row.places(spec)
        if new_head and (row.slots[0] in (f"{own}weight", f"{own}bias")):
            continue
        if name in weights and quantization is not None:
            weight, shape = weights.pop(name), row.shape(spec)
            if len(shape) != 2:
                problems.append(f"{weight.place}: expected an unquantized tensor of shape {list(shape)}")
                continue
            scheme, wrong = weight.match(quantization, *shape)
            problems += wrong
            if scheme is not None:
                _drop_zero_bias(name, found, shapes, row.slots)
                quantized |= {slot: _QuantizedSource(weight, scheme, shape, place) for slot, place in places.items()}
        elif name not in found and new_head and row.slots[0].startswith(own):
            continue
        elif name not in found:
            problems.append(f"missing {row.name}, expected shape {list(row.stored_shape(spec))}")
        else:
            tensor = found.pop(name)
            problem = _misfit(tensor, row.stored_shape(spec))
            if problem is not None:
                problems.append(f"{tensor.place}: {problem}")
                continue
            plain |= {slot: _Source(tensor, row, place) for slot, place in places.items()}
    of_heads = {names.base_name(row.name) for row in names.rows} if new_head else set()
    found = {name: tensor for name, tensor in found.items() if not names.is_ignored(name) and name not in of_heads}
    for place in [tensor.place for tensor in found.values()] + [weight.place for weight in weights.values()]:
        problems.append(f"{place} is not a weight of a {spec.family} model with this config"
                        + _quantized_hint(place, quantization))  # fmt: skip
    if problems:
        raise CheckpointError(listed(f"{folder}: the weights do not fit the config", problems))
    return Checkpoint(spec, plain, quantized, files)


def _merge_aliases(names: NameTable, tensors: dict[str, StoredTensor], problems: list[str]) -> None:
    """One tensor for each weight that files may hold under several names."""
    for alias, name in names.aliases.items():
        if alias not in tensors:
            continue
        tensor = tensors.pop(alias)
        main = tensors.setdefault(name, tensor)
        alike = main.entry.shape == tensor.entry.shape and main.entry.dtype in DTYPES and tensor.entry.dtype in DTYPES
        if not alike or not _same_values(main.view(), tensor.view()):
            problems.append(f"{tensor.place}: expected the values of {main.place}, of which it is another name")


def _drop_zero_bias(
    name: str, found: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], slots: tuple[str, ...]
) -> None:
    """Quantizers write a bias of zeros beside every layer, also where the model has none: it changes nothing."""
    bias = found.get(name.removesuffix("weight") + "bias")
    if bias is None or slots[0].removesuffix("weight") + "bias" in shapes or bias.entry.dtype not in DTYPES:
        return
    if not np.any(bias.view()):
        del found[name.removesuffix("weight") + "bias"]


def _quantized_hint(place: str, quantization: Quantization | None) -> str:
    if quantization is None and place.rstrip("'").endswith(tuple(f".{mark}" for mark in MARKS)):
        return "; it is quantized, but config.json has no quantization_config"
    return ""


def _resolve_tie(
    spec: ModelSpec,
    names: NameTable,
    found: dict[str, StoredTensor],
    weights: dict[str, StoredWeight],
    problems: list[str],
) -> ModelSpec:
    """Settle where a tied pair lies: under either name; under both it is one weight only if the values agree."""
    if not spec.head.tied or spec.head.kind is HeadKind.NONE:
        return spec
    rows = {row.slots: names.base_name(row.name) for row in names.rows}
    embed, head = rows[EMBED,], rows[HEAD,]
    if head in weights and embed not in found and embed not in weights:
        weights[embed] = weights.pop(head)
        return spec
    if head in weights or (head in found and embed in weights):
        return spec.untied()
    if head not in found:
        return spec
    if embed not in found:
        found[embed] = found.pop(head)
        return spec
    shape = spec.slots()[EMBED]
    if any(_misfit(found[name], shape) is not None for name in (embed, head)):
        problem = _misfit(found[head], shape)
        if problem is not None:
            problems.append(f"{found[head].place}: {problem}")
        del found[head]
        return spec
    if _same_values(found[embed].view(), found[head].view()):
        del found[head]
        return spec
    return spec.untied()


def _same_values(left: Array, right: Array, rows: int = 1024) -> bool:
    """Equality by value, NaN equal to NaN, a few rows at a time."""
    return all(
        np.array_equal(left[at : at + rows].astype(np.float32), right[at : at + rows].astype(np.float32), True)
        for at in range(0, len(left), rows)
    )


def _misfit(tensor: StoredTensor, shape: tuple[int, ...]) -> str | None:
    entry = tensor.entry
    problems = []
    if entry.shape != shape:
        problems.append(f"expected shape {list(shape)}, found {shown(list(entry.shape))}")
    if entry.dtype not in DTYPES:
        problems.append(f"expected dtype {', '.join(DTYPES)}, found {entry.dtype}")
    return "; ".join(problems) or None
