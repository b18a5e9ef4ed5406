"""Weights as the kernels want them: matrices packed into panels, vectors in float32.

What is multiplied together is packed together (q, k and v; gate and up), so that a layer is four matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32, Ops
from pyllm.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec
from pyllm.weights import Checkpoint

DTYPES = ("float32", "float16", "bfloat16")


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
    """All weights of a model; a tied model's `head` is its `embed`."""

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
    """The dtype to pack to: `dtype` itself, or for "auto" that of the checkpoint's matrices."""
    if dtype == "auto":
        return str(checkpoint.tensors["blocks.0.mlp.up.weight"].dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def packed_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes that the packed matrices of a model take, without loading it."""
    size = 4 if dtype == "float32" else 2

    def matrix(n: int, k: int) -> int:
        return -(-n // _cpu.PANEL) * _cpu.PANEL * (k + (k % 2 if dtype == "bfloat16" else 0)) * size

    total = matrix(spec.vocab_size, spec.hidden) * (1 if spec.tied else 2)
    for block in spec.blocks:
        a, m = block.attention, block.mlp
        total += matrix((a.heads + 2 * a.kv_heads) * a.head_dim, spec.hidden) + matrix(
            spec.hidden, a.heads * a.head_dim
        )
        total += matrix(m.hidden, spec.hidden) * (2 if m.gated else 1) + matrix(spec.hidden, m.hidden)
    return total


def pack_weights(
    checkpoint: Checkpoint, ops: Ops, dtype: str, progress: Callable[[float], None] | None = None
) -> ModelWeights:
    """Pack every weight of `checkpoint`, giving back its file pages on the way; `progress` gets the share done."""
    packer = _Packer(checkpoint, ops, weight_dtype(checkpoint, dtype), progress)
    spec = checkpoint.spec
    embed = packer.matrix("embed")
    return ModelWeights(
        dtype=packer.dtype,
        embed=embed,
        positions=packer.vector("positions.weight"),
        blocks=tuple(packer.block(f"blocks.{i}", block) for i, block in enumerate(spec.blocks)),
        final_norm=packer.norm("final_norm"),
        head=embed if spec.tied else packer.matrix("head"),
    )


class _Packer:
    def __init__(self, checkpoint: Checkpoint, ops: Ops, dtype: str, progress: Callable[[float], None] | None) -> None:
        self.checkpoint, self.ops, self.dtype, self.progress = checkpoint, ops, dtype, progress
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
        slots = [f"{name}.weight" for name in names]
        tensors = self.checkpoint.tensors
        gate_slot = f"{gate}.weight" if gate else None
        packed = self.ops.pack(
            *(tensors[s] for s in slots), dtype=self.dtype, gate=tensors[gate_slot] if gate_slot else None
        )
        self._release(*slots, *([gate_slot] if gate_slot else []))
        return packed

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
