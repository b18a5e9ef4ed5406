"""Weights as the kernels want them: matrices packed into panels, vectors in float32.

What is multiplied together is packed together (q, k and v; gate and up), so that a layer is four matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32, GROUP_SIZES, Ops
from pyllm.quantization import in_one_form
from pyllm.spec import AttentionSpec, BlockSpec, MlpSpec
from pyllm.weights import Checkpoint

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class Precision:
    """What the matrices of a model are packed as.

    `dtype` is float32, float16 or bfloat16. With `quantization` "int8" or "int4" matrices are rounded to integers,
    but for those of slots that match one of the shell patterns `skip`. The embedding and the head take int8 at most:
    they cost little there, and int4 would hurt them most.

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
        if slots[0] in ("embed.weight", "head.weight"):
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
class BlockWeights:
    """One block: `qkv` [(H + 2G) E, D], `out` [D, H E], `up` [F, D] (gated: with its gate), `down` [D, F]."""

    attn_norm: NormWeights
    qkv: _cpu.PackedMatrix
    qkv_bias: F32 | None
    q_norm: F32 | None
    k_norm: F32 | None
    out: _cpu.PackedMatrix
    out_bias: F32 | None
    mlp_norm: NormWeights
    up: _cpu.PackedMatrix
    gate_bias: F32 | None
    up_bias: F32 | None
    down: _cpu.PackedMatrix
    down_bias: F32 | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model; a tied model's `head` is its `embed`. `dtype` says in words what they are packed as."""

    dtype: str
    embed: _cpu.PackedMatrix
    positions: F32 | None
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeights
    head: _cpu.PackedMatrix

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(matrix.nbytes for matrix in self._matrices())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: every matrix but a separate embedding table."""
        return self.nbytes - (0 if self.head is self.embed else self.embed.nbytes)

    def _matrices(self) -> list[_cpu.PackedMatrix]:
        matrices = [self.embed] + ([] if self.head is self.embed else [self.head])
        return matrices + [m for b in self.blocks for m in (b.qkv, b.out, b.up, b.down)]


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

    def matrix(n: int, k: int, *names: str, gated: bool = False) -> int:
        slots = [f"{name}.weight" for name in names]
        forms = [checkpoint.kernel_form(slot) for slot in slots]
        kinds = {replace(form, zeros=False) for form in forms if form is not None}
        if None in forms or len(kinds) > 1:
            dtype = precision.of(*slots)
            return _cpu.packed_bytes(n, k, dtype, gated, GROUP_SIZES.get(dtype, 0))
        form = kinds.pop()
        zeros = any(form is not None and form.zeros for form in forms)
        return _cpu.packed_bytes(n, k, form.dtype, gated, form.group_size, form.scale_dtype, zeros)

    total = matrix(spec.vocab_size, spec.hidden, "embed")
    if not spec.tied:
        total += matrix(spec.vocab_size, spec.hidden, "head")
    for i, block in enumerate(spec.blocks):
        at, a, m = f"blocks.{i}", block.attention, block.mlp
        total += matrix((a.heads + 2 * a.kv_heads) * a.head_dim, spec.hidden, *(f"{at}.attn.{name}" for name in "qkv"))
        total += matrix(spec.hidden, a.heads * a.head_dim, f"{at}.attn.o")
        total += matrix(m.hidden, spec.hidden, f"{at}.mlp.up", *_gate(at, m), gated=m.gated)
        total += matrix(spec.hidden, m.hidden, f"{at}.mlp.down")
    return total


def _gate(at: str, mlp: MlpSpec) -> list[str]:
    return [f"{at}.mlp.gate"] if mlp.gated else []


def pack_weights(
    checkpoint: Checkpoint, ops: Ops, precision: Precision, progress: Callable[[float], None] | None = None
) -> ModelWeights:
    """Pack every weight of `checkpoint`, giving back its file pages on the way; `progress` gets the share done."""
    packer = _Packer(checkpoint, ops, precision, progress)
    spec = checkpoint.spec
    embed = packer.matrix("embed")
    return ModelWeights(
        dtype=str(precision),
        embed=embed,
        positions=packer.vector("positions.weight"),
        blocks=tuple(packer.block(f"blocks.{i}", block) for i, block in enumerate(spec.blocks)),
        final_norm=packer.norm("final_norm"),
        head=embed if spec.tied else packer.matrix("head"),
    )


class _Packer:
    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, precision: Precision, progress: Callable[[float], None] | None
    ) -> None:
        self.checkpoint, self.ops, self.precision, self.progress = checkpoint, ops, precision, progress
        self.slots = checkpoint.spec.slots()
        self.done, self.total = 0, checkpoint.spec.num_parameters()

    def block(self, at: str, spec: BlockSpec) -> BlockWeights:
        attention: AttentionSpec = spec.attention
        mlp: MlpSpec = spec.mlp
        return BlockWeights(
            attn_norm=self.norm(f"{at}.attn_norm"),
            qkv=self.matrix(f"{at}.attn.q", f"{at}.attn.k", f"{at}.attn.v"),
            qkv_bias=self.vector(*(f"{at}.attn.{name}.bias" for name in "qkv")),
            q_norm=self.vector(f"{at}.attn.q_norm.weight") if attention.qk_norm else None,
            k_norm=self.vector(f"{at}.attn.k_norm.weight") if attention.qk_norm else None,
            out=self.matrix(f"{at}.attn.o"),
            out_bias=self.vector(f"{at}.attn.o.bias"),
            mlp_norm=self.norm(f"{at}.mlp_norm"),
            up=self.matrix(f"{at}.mlp.up", gate=f"{at}.mlp.gate" if mlp.gated else None),
            gate_bias=self.vector(f"{at}.mlp.gate.bias"),
            up_bias=self.vector(f"{at}.mlp.up.bias"),
            down=self.matrix(f"{at}.mlp.down"),
            down_bias=self.vector(f"{at}.mlp.down.bias"),
        )

    def norm(self, name: str) -> NormWeights:
        weight = self.vector(f"{name}.weight")
        assert weight is not None
        return NormWeights(weight, self.vector(f"{name}.bias"))

    def matrix(self, *names: str, gate: str | None = None) -> _cpu.PackedMatrix:
        slots, gates = [f"{name}.weight" for name in names], [f"{gate}.weight"] if gate else []
        packed = self._integers(gates, slots) or self.ops.pack(
            *(self._plain(slot) for slot in slots),
            dtype=self.precision.of(*slots, *gates),
            gate=self._plain(gates[0]) if gates else None,
        )
        self._release(*slots, *gates)
        return packed

    def _integers(self, gates: list[str], slots: list[str]) -> _cpu.PackedMatrix | None:
        """The matrix of weights that are integers in the checkpoint; None if no one matrix can hold them."""
        quantized = self.checkpoint.quantized
        if not all(slot in quantized for slot in (*gates, *slots)):
            return None
        joined = in_one_form([quantized[slot] for slot in (*gates, *slots)])
        if joined is None:
            return None
        form, tensors = joined
        rows = sum(tensor.shape[0] for tensor in tensors[len(gates) :])
        packed = _cpu.PackedMatrix(
            rows, tensors[0].inputs, form.dtype, bool(gates), form.group_size, form.scale_dtype, form.zeros
        )
        row = 0
        for i, tensor in enumerate(tensors):
            part = int(bool(gates) and i > 0)
            self.ops.context.pack_quantized(packed, tensor.values, tensor.scales, tensor.zeros, row, part)
            row += tensor.shape[0] if i >= len(gates) else 0
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
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

    def _release(self, *slots: str) -> None:
        for slot in slots:
            self.checkpoint.release(slot)
            self.done += int(np.prod(self.slots[slot]))
        if self.progress:
            self.progress(self.done / self.total)
