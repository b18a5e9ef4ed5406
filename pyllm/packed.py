"""Weights as the kernels want them: matrices packed into panels, vectors in float32.

What is multiplied together is packed together (q, k and v; gate and up), so that a layer is four matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32, GROUP_SIZES, Array, Ops, host_memory
from pyllm.quantization import in_one_form
from pyllm.spec import ENCODER, HeadKind, ModelSpec
from pyllm.weights import Checkpoint

DTYPES = ("float32", "float16", "bfloat16")
_EMBED = "embed.weight"
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class Precision:
    """What the matrices of a model are packed as.

    `dtype` is float32, float16 or bfloat16. With `quantization` "int8" or "int4" matrices are rounded to integers,
    but for those of slots that match one of the shell patterns `skip`. The embedding and the head, with what projects
    from and to them, take int8 at most: they cost little there, and int4 would hurt them most.

    `stored` is what the checkpoint's matrices are quantized to already; those stay what they are. Where it is "int4",
    an embedding and a head that were left out become int8.
    """

    dtype: str
    quantization: str | None = None
    skip: tuple[str, ...] = ()
    stored: str | None = None

    @property
    def integers(self) -> str | None:
        """What the matrices of blocks are, for the most part, if they are integers."""
        return self.stored or self.quantization

    def of(self, *slots: str) -> str:
        """The dtype of the matrix that these slots, plain in the checkpoint, are packed into together."""
        if any(fnmatchcase(slot, pattern) for slot in slots for pattern in self.skip):
            return self.dtype
        if not slots[0].removeprefix(ENCODER).startswith("blocks."):
            return "int8" if self.quantization is not None or self.stored == "int4" else self.dtype
        return self.quantization or self.dtype

    def __str__(self) -> str:
        """In words, for people."""
        if self.integers is None:
            return self.dtype
        parts = ["as stored"] if self.stored else []
        parts += ["embedding and head int8"] if self.integers == "int4" else []
        parts += [f"{', '.join(self.skip)} {self.dtype}"] if self.skip else []
        return self.integers + (f" ({'; '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class NormWeights:
    """weight and bias, float32 [D]."""

    weight: F32
    bias: F32 | None


@dataclass(frozen=True)
class CrossWeights:
    """Cross attention: `q` [H E, D] of the decoder's tokens, `kv` [2G E, D] of the source's, `out` [D, H E]."""

    norm: NormWeights
    q: _cpu.PackedMatrix
    q_bias: F32 | None
    kv: _cpu.PackedMatrix
    kv_bias: F32 | None
    out: _cpu.PackedMatrix
    out_bias: F32 | None


@dataclass(frozen=True)
class BlockWeights:
    """One block: `qkv` [(H + 2G) E, D], `out` [D, H E], `up` [F, D] (gated: with its gate), `down` [D, F]; `cross` is
    that of a decoder with an encoder."""

    attn_norm: NormWeights
    attn_post_norm: NormWeights | None
    qkv: _cpu.PackedMatrix
    qkv_bias: F32 | None
    q_norm: F32 | None
    k_norm: F32 | None
    out: _cpu.PackedMatrix
    out_bias: F32 | None
    cross: CrossWeights | None
    mlp_norm: NormWeights | None
    mlp_post_norm: NormWeights | None
    up: _cpu.PackedMatrix
    gate_bias: F32 | None
    up_bias: F32 | None
    down: _cpu.PackedMatrix
    down_bias: F32 | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model; a tied model's `head` is its `embed`. `dtype` says in words what they are packed as.

    `positions` [P, D] begins at the row of position 0; `types` [S, D] are those of token types, `relative_bias` [H,
    buckets] belongs to attention scores. `matrices` are all of them, by the names of :func:`matrices_of`, but for an
    `embed` that is a plain table [V, D]: a row of one is read faster than out of a packed matrix.
    """

    dtype: str
    matrices: Mapping[str, _cpu.PackedMatrix]
    embed: _cpu.PackedMatrix | Array
    embed_project: _cpu.PackedMatrix | None
    embed_project_bias: F32 | None
    positions: F32 | None
    types: F32 | None
    second_positions: F32 | None
    embed_norm: NormWeights | None
    relative_bias: F32 | None
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeights | None
    head_project: _cpu.PackedMatrix | None
    head_transform: _cpu.PackedMatrix | None
    head_transform_bias: F32 | None
    head_norm: NormWeights | None
    head: _cpu.PackedMatrix | None  # None where the model has no head
    head_bias: F32 | None
    encoder: ModelWeights | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        table = 0 if "embed" in self.matrices else int(self.embed.nbytes)
        return table + sum(matrix.nbytes for matrix in self.matrices.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: every matrix but a separate embedding table, and those that
        only a source passes through."""
        of_source = sum(m.nbytes for name, m in self.matrices.items() if name.startswith(ENCODER))
        of_source += sum(block.cross.kv.nbytes for block in self.blocks if block.cross is not None)
        return self.nbytes - of_source - (0 if self.head is self.embed else int(self.embed.nbytes))


@dataclass(frozen=True)
class MatrixParts:
    """A packed matrix: the slots that are stacked in it, and that of its gate, if it has one.

    `heads`, where it gives queries, keys and values that nothing but a rotation changes, has the channels of a head and
    how many pairs of them are rotated.
    """

    name: str
    slots: tuple[str, ...]
    gate: str | None = None
    heads: tuple[int, int] | None = None

    def under(self, prefix: str) -> MatrixParts:
        """The same matrix of a part of the model whose names begin so."""
        gate = None if self.gate is None else prefix + self.gate
        return replace(self, name=prefix + self.name, slots=tuple(prefix + slot for slot in self.slots), gate=gate)

    @property
    def all_slots(self) -> tuple[str, ...]:
        """Those and the gate."""
        return self.slots if self.gate is None else (self.gate, *self.slots)

    def shape(self, spec: ModelSpec) -> tuple[int, int]:
        """[out, in], of one of the two parts where it is gated."""
        shapes = [spec.slots()[slot] for slot in self.slots]
        return sum(shape[0] for shape in shapes), shapes[0][1]


def _plain(name: str, *slots: str) -> MatrixParts:
    return MatrixParts(name, tuple(f"{slot}.weight" for slot in slots))


def _cross_matrices(at: str) -> list[MatrixParts]:
    return [
        _plain(f"{at}.cross.q", f"{at}.cross.q"),
        _plain(f"{at}.cross.kv", f"{at}.cross.k", f"{at}.cross.v"),
        _plain(f"{at}.cross.out", f"{at}.cross.o"),
    ]


def matrices_of(spec: ModelSpec) -> list[MatrixParts]:
    """Every packed matrix of a model: embedding, blocks, head, and then those of its encoder."""
    found = [_plain("embed", "embed")]
    if spec.embedding.width is not None:
        found.append(_plain("embed.project", "embed.project"))
    for i, block in enumerate(spec.blocks):
        at = f"blocks.{i}"
        up = _plain(f"{at}.up", f"{at}.mlp.up")
        qkv = _plain(f"{at}.qkv", *(f"{at}.attn.{part}" for part in "qkv"))
        if block.attention.qk_norm is None:
            rope = spec.rope_of(block)
            qkv = replace(qkv, heads=(block.attention.head_dim, 0 if rope is None else rope.dim // 2))
        found += [
            qkv,
            _plain(f"{at}.out", f"{at}.attn.o"),
            *(_cross_matrices(at) if block.cross is not None else ()),
            replace(up, gate=f"{at}.mlp.gate.weight") if block.mlp.gated else up,
            _plain(f"{at}.down", f"{at}.mlp.down"),
        ]
    if spec.projects_to_head:
        found.append(_plain("head.project", "head.project"))
    if spec.head.transform is not None:
        found.append(_plain("head.transform", f"{spec.head.at}.transform"))
    if not spec.head.tied:
        found.append(_plain("head", spec.head.at))
    if spec.encoder is not None:
        found += [parts.under(ENCODER) for parts in matrices_of(spec.encoder) if parts.name != "embed"]
    return found


def assemble(
    spec: ModelSpec,
    dtype: str,
    matrix: Callable[[MatrixParts], _cpu.PackedMatrix],
    vector: Callable[..., F32 | None],
    table: Array | None = None,
) -> ModelWeights:
    """The weights of a model from where they stand: `vector` gives slots joined, None for those that it has not. The
    embedding is `table`, where that is given, else a matrix."""
    found = {parts.name: matrix(parts) for parts in matrices_of(spec) if table is None or parts.name != "embed"}
    return _assemble(spec, dtype, found, found["embed"] if table is None else table, vector)


def _assemble(
    spec: ModelSpec,
    dtype: str,
    found: Mapping[str, _cpu.PackedMatrix],
    embed: _cpu.PackedMatrix | Array,
    vector: Callable[..., F32 | None],
) -> ModelWeights:
    def norm(name: str) -> NormWeights | None:
        weight = vector(f"{name}.weight")
        return None if weight is None else NormWeights(weight, vector(f"{name}.bias"))

    def cross(at: str) -> CrossWeights | None:
        before = norm(f"{at}_norm")
        if before is None:
            return None
        return CrossWeights(
            norm=before,
            q=found[f"{at}.q"],
            q_bias=vector(f"{at}.q.bias"),
            kv=found[f"{at}.kv"],
            kv_bias=vector(*(f"{at}.{name}.bias" for name in "kv")),
            out=found[f"{at}.out"],
            out_bias=vector(f"{at}.o.bias"),
        )

    def block(at: str) -> BlockWeights:
        first = norm(f"{at}.attn_norm")
        assert first is not None
        return BlockWeights(
            attn_norm=first,
            attn_post_norm=norm(f"{at}.attn_post_norm"),
            qkv=found[f"{at}.qkv"],
            qkv_bias=vector(*(f"{at}.attn.{name}.bias" for name in "qkv")),
            q_norm=vector(f"{at}.attn.q_norm.weight"),
            k_norm=vector(f"{at}.attn.k_norm.weight"),
            out=found[f"{at}.out"],
            out_bias=vector(f"{at}.attn.o.bias"),
            cross=cross(f"{at}.cross"),
            mlp_norm=norm(f"{at}.mlp_norm"),
            mlp_post_norm=norm(f"{at}.mlp_post_norm"),
            up=found[f"{at}.up"],
            gate_bias=vector(f"{at}.mlp.gate.bias"),
            up_bias=vector(f"{at}.mlp.up.bias"),
            down=found[f"{at}.down"],
            down_bias=vector(f"{at}.mlp.down.bias"),
        )

    positions, encoder, at = vector("positions.weight"), None, spec.head.at
    if spec.encoder is not None:
        own = {name.removeprefix(ENCODER): m for name, m in found.items() if name.startswith(ENCODER)}
        encoder = _assemble(spec.encoder, dtype, own, embed, lambda *slots: vector(*(ENCODER + slot for slot in slots)))
    return ModelWeights(
        dtype=dtype,
        matrices=found,
        embed=embed,
        embed_project=found.get("embed.project"),
        embed_project_bias=vector("embed.project.bias"),
        positions=None if positions is None else positions[spec.embedding.position_offset :],
        types=vector("types.weight"),
        embed_norm=norm("embed.norm"),
        relative_bias=vector("relative_bias.weight"),
        second_positions=vector("second_positions.weight"),
        blocks=tuple(block(f"blocks.{i}") for i in range(len(spec.blocks))),
        final_norm=norm("final_norm"),
        head_project=found.get("head.project"),
        head_transform=found.get("head.transform"),
        head_transform_bias=vector(f"{at}.transform.bias"),
        head_norm=norm(f"{at}.norm"),
        head=found.get("embed" if spec.head.tied else "head"),
        head_bias=vector(f"{at}.bias"),
        encoder=encoder,
    )


def weight_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """The dtype to pack to: `dtype` itself, or for "auto" that of the checkpoint's matrices; of its embedding or its
    norms where matrices are quantized."""
    if dtype == "auto":
        slots = ("blocks.0.mlp.up.weight", "embed.weight", "final_norm.weight")
        return str(next(checkpoint.tensors[slot].dtype for slot in slots if slot in checkpoint.tensors))
    if dtype not in DTYPES:
        hint = f"; for integers give quantization={dtype!r}" if dtype in QUANTIZATIONS else ""
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}{hint}")
    return dtype


def precision_of(
    checkpoint: Checkpoint, dtype: str = "auto", quantization: str | None = None, skip: Sequence[str] = ()
) -> Precision:
    """The precision that these options ask for; `ValueError` for what does not exist."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected None, {' or '.join(QUANTIZATIONS)}, got {quantization!r}")
    if isinstance(skip, str):
        raise ValueError(f"quantization_skip: expected a sequence of patterns, got the text {skip!r}")
    slots = checkpoint.spec.slots()
    for pattern in skip:
        if not any(fnmatchcase(slot, pattern) for slot in slots):
            raise ValueError(
                f"quantization_skip: expected shell patterns over weights such as {next(iter(slots))}, got "
                f"{pattern!r}, which matches none"
            )
    bits = checkpoint.stored_bits()
    stored = f"int{min(bits)}" if bits else None
    return Precision(weight_dtype(checkpoint, dtype), quantization, tuple(skip), stored)


def packed_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """Bytes that the packed matrices of a model take, without loading it."""
    spec = checkpoint.spec

    def size(parts: MatrixParts) -> int:
        n, k = parts.shape(spec)
        if parts.name == "embed" and keeps_table(checkpoint, precision):
            return n * k * np.dtype(precision.of(_EMBED)).itemsize
        gated = parts.gate is not None
        forms = [checkpoint.kernel_form(slot) for slot in parts.all_slots]
        kinds = {replace(form, zeros=False) for form in forms if form is not None}
        if None in forms or len(kinds) > 1:
            dtype = precision.of(*parts.all_slots)
            return _cpu.packed_bytes(n, k, dtype, gated, GROUP_SIZES.get(dtype, 0))
        form = kinds.pop()
        zeros = any(form is not None and form.zeros for form in forms)
        return _cpu.packed_bytes(n, k, form.dtype, gated, form.group_size, form.scale_dtype, zeros)

    return sum(size(parts) for parts in matrices_of(spec))


def keeps_table(checkpoint: Checkpoint, precision: Precision) -> bool:
    """Whether the embedding stays a plain table on the CPU: nothing is multiplied by it, and it holds floats."""
    head = checkpoint.spec.head
    only_read = not head.tied or head.kind is HeadKind.NONE
    return only_read and checkpoint.kernel_form(_EMBED) is None and precision.of(_EMBED) in DTYPES


def plain_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """The same of matrices on a GPU, which are float32 or bfloat16 and row-major."""
    total = 0
    for parts in matrices_of(checkpoint.spec):
        rows, columns = parts.shape(checkpoint.spec)
        total += rows * columns * (1 if parts.gate is None else 2)
    return total * (4 if precision.dtype == "float32" else 2)


def pack_weights(
    checkpoint: Checkpoint, ops: Ops, precision: Precision, progress: Callable[[float], None] | None = None
) -> ModelWeights:
    """Pack every weight of `checkpoint`, giving back its file pages on the way; `progress` gets the share done."""
    packer = _Packer(checkpoint, ops, precision, progress)
    table = packer.table() if keeps_table(checkpoint, precision) and not ops.on_gpu else None
    return assemble(checkpoint.spec, str(precision), packer.matrix, packer.vector, table)


class _Packer:
    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, precision: Precision, progress: Callable[[float], None] | None
    ) -> None:
        self.checkpoint, self.ops, self.precision, self.progress = checkpoint, ops, precision, progress
        self.slots = checkpoint.spec.slots()
        self.done, self.total = 0, checkpoint.spec.num_parameters()

    def table(self) -> Array:
        """The embedding as a table [V, D]."""
        weight = self._plain(_EMBED)
        table = host_memory(weight.shape, np.dtype(self.precision.of(_EMBED)))
        table[:] = weight
        self._release(_EMBED)
        return table

    def matrix(self, parts: MatrixParts) -> _cpu.PackedMatrix:
        packed = (self._integers(parts) if self.ops.packs_integers else None) or self._floats(parts)
        self._release(*parts.all_slots)
        return packed

    def _floats(self, parts: MatrixParts) -> _cpu.PackedMatrix:
        weights, dtype = [self._plain(slot) for slot in parts.slots], self.precision.of(*parts.all_slots)
        if parts.heads is not None:
            return self.ops.pack_qkv(*weights, head_size=parts.heads[0], half=parts.heads[1], dtype=dtype)
        return self.ops.pack(*weights, dtype=dtype, gate=None if parts.gate is None else self._plain(parts.gate))

    def _integers(self, parts: MatrixParts) -> _cpu.PackedMatrix | None:
        """The matrix of weights that are integers in the checkpoint; None if no one matrix can hold them."""
        quantized, gated = self.checkpoint.quantized, parts.gate is not None
        if not all(slot in quantized for slot in parts.all_slots):
            return None
        joined = in_one_form([quantized[slot] for slot in parts.all_slots])
        if joined is None:
            return None
        form, tensors = joined
        rows, inputs = parts.shape(self.checkpoint.spec)
        packed = _cpu.PackedMatrix(rows, inputs, form.dtype, gated, form.group_size, form.scale_dtype, form.zeros)
        row = 0
        for i, tensor in enumerate(tensors):
            is_gate = gated and i == 0
            self.ops.context.pack_quantized(
                packed, tensor.values, tensor.scales, tensor.zeros, row, int(gated and not is_gate)
            )
            row += 0 if is_gate else tensor.shape[0]
        return packed

    def _plain(self, slot: str) -> NDArray[Any]:
        """The weight as numbers, also if it is quantized."""
        tensors, quantized = self.checkpoint.tensors, self.checkpoint.quantized
        return tensors[slot] if slot in tensors else quantized[slot].dequantize()

    def vector(self, *slots: str) -> F32 | None:
        """The slots joined, float32; None where the model has no such weights."""
        if slots[0] not in self.slots:
            return None
        parts: list[NDArray[np.float32]] = [self.checkpoint.tensors[s].astype(np.float32) for s in slots]
        self._release(*slots)
        return self.ops.place(np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0]))

    def _release(self, *slots: str) -> None:
        for slot in slots:
            self.checkpoint.release(slot)
            self.done += int(np.prod(self.slots[slot]))
        if self.progress:
            self.progress(self.done / self.total)
