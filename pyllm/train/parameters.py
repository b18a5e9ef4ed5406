"""The weights of a model as they are trained: flat buffers of weights, gradients and moments.

Matrices stand in the layout of the matmul kernel from the start, so that nothing is repacked between steps; an
optimizer step is one loop over each buffer. Matrices come first, which weight decay shrinks, then vectors (norms,
biases, positions), which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32, F64
from pyllm.ops_training import TrainingOps
from pyllm.packed import MatrixParts, assemble, matrices_of
from pyllm.spec import ENCODER, ModelSpec

ALIGN = 16  # floats between the beginnings of vectors: 64 bytes


@dataclass(frozen=True)
class MatrixPlace:
    """A matrix of the model, [n, k] in each part, and where it stands in the buffers."""

    parts: MatrixParts
    n: int
    k: int
    start: int
    stop: int

    @property
    def gated(self) -> bool:
        """Whether it is a matrix of two parts, the gate and the rest."""
        return self.parts.gate is not None

    @property
    def slots(self) -> tuple[str, ...]:
        """All slots in it, that of the gate first."""
        return self.parts.all_slots


@dataclass(frozen=True)
class VectorPlace:
    """A vector of the model, or its position table, and the slots that are joined in it."""

    slots: tuple[str, ...]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in floats; `matrices_end` is where vectors begin."""

    matrices: tuple[MatrixPlace, ...]
    vectors: tuple[VectorPlace, ...]
    matrices_end: int
    size: int

    @property
    def places(self) -> list[MatrixPlace | VectorPlace]:
        """All of them, in order."""
        return [*self.matrices, *self.vectors]


_JOINED = {".attn": "qkv", ".cross": "kv"}  # projections whose biases stand in one vector, by the end of their name


def layout_of(spec: ModelSpec) -> Layout:
    """The layout of a model's weights."""
    slots = spec.slots()
    matrices: list[MatrixPlace] = []
    at = 0

    for parts in matrices_of(spec):
        n, k = parts.shape(spec)
        size = _cpu.packed_bytes(n, k, "float32", parts.gate is not None) // 4
        matrices.append(MatrixPlace(parts, n, k, at, at + size))
        at += size
    end = at
    vectors: list[VectorPlace] = []
    placed = {slot for m in matrices for slot in m.slots}
    for slot in slots:
        if slot in placed:
            continue
        stem, _, part = slot.removesuffix(".bias").rpartition(".")
        together = next((parts for end, parts in _JOINED.items() if stem.endswith(end) and part in parts), "")
        names = tuple(f"{stem}.{p}.bias" for p in together) if together and slot.endswith(".bias") else (slot,)
        shape = slots[slot] if len(names) == 1 else (sum(slots[name][0] for name in names),)
        placed.update(names)
        vectors.append(VectorPlace(names, shape, at, at + prod(shape)))
        at += -(-prod(shape) // ALIGN) * ALIGN
    return Layout(tuple(matrices), tuple(vectors), end, at)


class Parameters:
    """Weights, gradients and moments of a model, and `model_weights` to run it with.

    `compute` is the dtype of the matrices that products read: "float32", the weights themselves, or "bfloat16", a
    rounded copy that each update writes anew. Everything begins as zero.
    """

    def __init__(self, spec: ModelSpec, ops: TrainingOps, compute: str = "float32") -> None:
        self.spec, self.ops, self.compute = spec, ops, compute
        self.layout = layout_of(spec)
        size = self.layout.size
        self.weights, self.gradients, self.first_moment, self.second_moment = (
            _cpu.allocate(4 * size).view(np.float32) for _ in range(4)
        )
        self._packed: dict[str, _Matrix] = {m.parts.name: self._matrix(m) for m in self.layout.matrices}
        self._vectors = {v.slots[0]: self._vector(v) for v in self.layout.vectors}
        self.model_weights = assemble(
            spec, compute, lambda parts: self._packed[parts.name].weight, lambda *slots: self._vector_of(slots[0])
        )
        # By identity, as the tape meets them in the model; their gradients.
        self.gradient_of: dict[int, Any] = {id(m.weight): m.gradient for m in self._packed.values()}
        self.gradient_of |= {id(weight): gradient for weight, gradient in self._vectors.values()}
        for part, weights, at in ((spec, self.model_weights, ""), (spec.encoder, self.model_weights.encoder, ENCODER)):
            if part is not None and weights is not None and weights.positions is not None:
                gradient = self._vectors[f"{at}positions.weight"][1]
                self.gradient_of[id(weights.positions)] = gradient[part.embedding.position_offset :]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        rounded = sum(m.weight.nbytes for m in self._packed.values()) if self.compute != "float32" else 0
        return 4 * self.weights.nbytes + rounded

    def set(self, slot: str, values: NDArray[Any]) -> None:
        """Give the slot these values, of any float dtype, as [out, in]."""
        place = self._place(slot)
        if isinstance(place, VectorPlace):
            start = sum(self._rows(name) for name in place.slots[: place.slots.index(slot)])
            flat = self._vectors[place.slots[0]][0]
            flat[start : start + len(values)] = values
            return
        matrix = self._packed[place.parts.name]
        part = int(place.gated and slot != place.parts.gate)
        for packed in (matrix.master, matrix.weight):
            self.ops.context.pack(packed, values, self._first_row(place, slot), part)
            if self.compute == "float32":
                break

    def get(self, slot: str) -> F32:
        """A copy of the slot's values, float32 [out, in]."""
        return self._read(slot, self._packed_weight, 0)

    def gradient(self, slot: str) -> F32:
        """A copy of the slot's gradient."""
        return self._read(slot, self._packed_gradient, 1)

    def fill(self, values: Callable[[str, tuple[int, ...]], NDArray[Any]]) -> None:
        """Set every slot to `values(slot, shape)`."""
        for slot, shape in self.spec.slots().items():
            self.set(slot, values(slot, shape))

    def zero_gradients(self) -> None:
        """Gradients accumulate: begin again."""
        self.gradients.fill(0)

    def update(self, hyper: F64, weight_decay: float) -> None:
        """One AdamW step of all weights, which leaves gradients at 0; see :meth:`TrainingOps.adamw` for `hyper`."""

        def step(span: slice, decay: float, narrow: _cpu.PackedMatrix | None = None) -> None:
            params, grads, m, v = (
                flat[span] for flat in (self.weights, self.gradients, self.first_moment, self.second_moment)
            )
            self.ops.adamw(params, grads, m, v, hyper, decay, narrow, clear=True)

        end = self.layout.matrices_end
        if self.compute == "float32":
            step(slice(0, end), weight_decay)
        else:
            for place in self.layout.matrices:
                step(slice(place.start, place.stop), weight_decay, self._packed[place.parts.name].weight)
        if end < self.layout.size:
            step(slice(end, self.layout.size), 0.0)

    def first_bad(self, flat: F32) -> str | None:
        """The first tensor with a value that is not finite, in `weights` or `gradients`."""
        for place in self.layout.places:
            if not np.isfinite(flat[place.start : place.stop]).all():
                return ", ".join(place.slots)
        return None

    def _matrix(self, place: MatrixPlace) -> _Matrix:
        def over(flat: F32) -> _cpu.PackedMatrix:
            return _cpu.PackedMatrix(place.n, place.k, "float32", place.gated, memory=flat[place.start : place.stop])

        master = over(self.weights)
        weight = master
        if self.compute != "float32":
            weight = _cpu.PackedMatrix(place.n, place.k, self.compute, place.gated)
        return _Matrix(master, weight, over(self.gradients))

    def _vector(self, place: VectorPlace) -> tuple[F32, F32]:
        weight, gradient = (flat[place.start : place.stop] for flat in (self.weights, self.gradients))
        return weight.reshape(place.shape), gradient.reshape(place.shape)

    def _vector_of(self, slot: str) -> F32 | None:
        return self._vectors[slot][0] if slot in self._vectors else None

    def _place(self, slot: str) -> MatrixPlace | VectorPlace:
        for place in self.layout.places:
            if slot in place.slots:
                return place
        raise KeyError(slot)

    def _rows(self, slot: str) -> int:
        return self.spec.slots()[slot][0]

    def _first_row(self, place: MatrixPlace, slot: str) -> int:
        stacked = place.parts.slots
        return 0 if slot == place.parts.gate else sum(self._rows(s) for s in stacked[: stacked.index(slot)])

    def _packed_weight(self, name: str) -> _cpu.PackedMatrix:
        return self._packed[name].master

    def _packed_gradient(self, name: str) -> _cpu.PackedMatrix:
        return self._packed[name].gradient

    def _read(self, slot: str, packed: Callable[[str], _cpu.PackedMatrix], which: int) -> F32:
        place = self._place(slot)
        rows = self._rows(slot)
        if isinstance(place, VectorPlace):
            start = sum(self._rows(name) for name in place.slots[: place.slots.index(slot)])
            vector: F32 = self._vectors[place.slots[0]][which][start : start + rows].copy()
            return vector
        start = self._first_row(place, slot) + (place.n if place.gated and slot != place.parts.gate else 0)
        unpacked: F32 = self.ops.unpack(packed(place.parts.name))
        return unpacked[start : start + rows]


@dataclass(frozen=True)
class _Matrix:
    master: _cpu.PackedMatrix
    weight: _cpu.PackedMatrix  # what products read: the master itself, or a rounded copy
    gradient: _cpu.PackedMatrix


def load_values(parameters: Parameters, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Set every slot from the mapping."""
    parameters.fill(lambda slot, shape: tensors[slot])
