"""How families name and lay out their weights: tables from tensor names to canonical slots.

A slot's name is what the model calls a weight ("blocks.3.attn.q.weight"), its shape that of `ModelSpec.slots`, with
matrices as [out, in]. A stored tensor holds one slot or several, in an order of rows that a `Row` describes both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.spec import ENCODER, ModelSpec

Place = slice | NDArray[np.intp]  # rows of a stored tensor


class Transform(Flag):
    """How a stored tensor differs from its slots one above the other; several may hold at once."""

    AS_STORED = 0
    TRANSPOSED = auto()  # stored [in, out], as GPT-2's Conv1D does
    PER_HEAD = auto()  # q, k and v of the first head, then those of the second: [heads, 3, head size, in]
    ONE_ROW = auto()  # a vector stored as [1, N]
    INTERLEAVED = auto()  # in q and k, channels (2k, 2k + 1) of a head are rotated together; ours are (k, k + R/2)
    SECTIONED = auto()  # in q and k, rotated pairs (k, k + R/4) of the first section stand before those of the second
    INTERLEAVED_NORMS = auto()  # so are the weights of norms on heads of q and k: [heads, head size], all rotated
    LESS_ONE = auto()  # the weights of a norm are stored less 1, as Gemma has them


@dataclass(frozen=True)
class Row:
    """One line of a family's name table; `{i}` in the names stands for the layer.

    `name` is as `save_pretrained` writes it. Several slots mean that the checkpoint holds them in one tensor, one after
    the other along the out dimension. A row with `without` is of models that lack that slot. Of rows of the same slots
    the first that a model has counts.
    """

    name: str
    slots: tuple[str, ...]
    transform: Transform = Transform.AS_STORED
    without: str | None = None

    def stored_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        shape = self.shape(spec)
        if Transform.ONE_ROW in self.transform:
            return (1, *shape)
        return shape[::-1] if Transform.TRANSPOSED in self.transform else shape

    def oriented(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """A view of the stored tensor as [out, in], or the other way around."""
        if Transform.ONE_ROW in self.transform:
            return tensor[0] if tensor.ndim == 2 else tensor[None]
        return tensor.T if Transform.TRANSPOSED in self.transform else tensor

    def read(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """The values of the stored tensor as [out, in]: a view, or float32 where they are stored in another form."""
        if Transform.INTERLEAVED_NORMS in self.transform:
            return np.concatenate([tensor[:, 0::2], tensor[:, 1::2]], axis=1)
        if Transform.LESS_ONE in self.transform:
            return np.asarray(tensor.astype(np.float32) + np.float32(1))
        return self.oriented(tensor)

    def written(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is stored for these values [out, in]: the inverse of `read`."""
        if Transform.INTERLEAVED_NORMS in self.transform:
            halves = np.split(values, 2, axis=1)
            return np.stack(halves, axis=2).reshape(values.shape)
        return values - np.float32(1) if Transform.LESS_ONE in self.transform else self.oriented(values)

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """The shape of all slots together, as [out, in]."""
        shapes = [spec.slots()[slot] for slot in self.slots]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def places(self, spec: ModelSpec) -> dict[str, Place]:
        """Which rows of the stored tensor, as [out, in], each slot has, in the slot's order."""
        shapes = spec.slots()
        places: dict[str, Place] = {}
        start = 0
        for at, slot in enumerate(self.slots):
            rows = shapes[slot][0]
            if Transform.PER_HEAD in self.transform:
                size = rows // _attention_heads(spec, slot)
                blocks = np.arange(rows // size) * len(self.slots) + at
                places[slot] = (blocks[:, None] * size + np.arange(size)).reshape(-1)
            else:
                places[slot] = slice(start, start + rows)
            if self.transform & (Transform.INTERLEAVED | Transform.SECTIONED) and _is_rotated(slot):
                groups = None if Transform.INTERLEAVED in self.transform else 2
                places[slot] = _indices(places[slot])[_halves_first(spec, slot, rows, groups)]
            start += rows
        return places

    def join(self, parts: Sequence[NDArray[Any]], spec: ModelSpec) -> NDArray[Any]:
        """The stored tensor, as [out, in], that holds these values of the slots."""
        places = self.places(spec).values()
        if len(parts) == 1 and all(isinstance(place, slice) for place in places):
            return parts[0]
        joined = np.empty(self.shape(spec), parts[0].dtype)
        for place, part in zip(places, parts, strict=True):
            joined[place] = part
        return joined


@dataclass(frozen=True)
class NameTable:
    """How a family names its weights.

    `prefix` is that of the base model, which files may hold or not. `ignored` are shell-style patterns, without the
    prefix, of tensors that carry no weights, such as saved causal masks, or those of heads that the model was not asked
    for; what a row of this model names is never ignored. `renamed` are older names of tensors. The keys of `aliases`
    are names, without the prefix, under which files hold a weight once more, and its name here.
    """

    prefix: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def base_name(self, name: str) -> str:
        """The name without base prefix and legacy endings: by it, names of one weight are found equal."""
        name = self.renamed.get(name, name).removeprefix(self.prefix)
        for legacy, current in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(legacy):
                return name.removesuffix(legacy) + current
        return name

    def is_ignored(self, base_name: str) -> bool:
        """Whether a tensor that no row names may be there."""
        return any(fnmatchcase(base_name, pattern) for pattern in self.ignored)

    def expand(self, spec: ModelSpec) -> Iterator[Row]:
        """The rows of this model: one per layer where `{i}` stands, and only those whose slots the spec has."""
        slots, given = spec.slots(), set[tuple[str, ...]]()
        for row in self.rows:
            part = spec.encoder if row.slots[0].startswith(ENCODER) and spec.encoder is not None else spec
            layers = range(len(part.blocks)) if "{i}" in row.name else range(1)
            for layer in layers:
                named = tuple(slot.format(i=layer) for slot in row.slots)
                lacks = row.without is None or row.without.format(i=layer) not in slots
                if lacks and named not in given and all(slot in slots for slot in named):
                    given.add(named)
                    yield replace(row, name=row.name.format(i=layer), slots=named)


def linear(name: str, *slots: str, transform: Transform = Transform.AS_STORED) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias."""
    return (
        Row(f"{name}.weight", tuple(f"{slot}.weight" for slot in slots), transform),
        Row(f"{name}.bias", tuple(f"{slot}.bias" for slot in slots), transform & ~Transform.TRANSPOSED),
    )


def _attention_heads(spec: ModelSpec, slot: str) -> int:
    """Heads of the q, k or v projection that a slot belongs to."""
    attention = spec.blocks[int(slot.split(".")[1])].attention
    return attention.heads if ".q." in slot else attention.kv_heads


def _is_rotated(slot: str) -> bool:
    return ".attn.q." in slot or ".attn.k." in slot


def _halves_first(spec: ModelSpec, slot: str, rows: int, groups: int | None) -> NDArray[np.intp]:
    """Rows of rotated pairs in the order that has the first of all pairs before the second; stored pairs stand so in
    each of `groups`, or are neighbours where that is None."""
    heads = _attention_heads(spec, slot)
    order = np.arange(rows // heads)
    if spec.rope is not None:
        rotated = spec.rope.dim
        order[:rotated] = order[:rotated].reshape(groups or rotated // 2, 2, -1).swapaxes(0, 1).reshape(-1)
    return (np.arange(heads)[:, None] * len(order) + order).reshape(-1)


def _indices(place: Place) -> NDArray[np.intp]:
    return np.arange(place.start, place.stop) if isinstance(place, slice) else place
