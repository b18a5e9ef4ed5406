"""The transformer: embeddings, blocks, head. The only model code there is; families are data in a `ModelSpec`.

Shapes: T tokens, D hidden, H query heads, G key/value heads, E head size, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

import numpy as np

from pyllm.batch import I32, Batch
from pyllm.cache import KVCache
from pyllm.ops import F32, Ops
from pyllm.packed import BlockWeights, ModelWeights, NormWeights
from pyllm.spec import AttentionSpec, BlockSpec, ModelSpec, NormSpec
from pyllm.tape import Tape


class Model:
    """A decoder of `spec` with packed weights; holds no state between calls.

    `ops` is an `Ops`, or a `Tape` where gradients are wanted: it has the same methods, but keeps what `Ops` overwrites,
    so results are taken as they are returned, whatever `out` was.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights) -> None:
        self.spec = spec
        self.weights = weights

    def forward(self, ops: Ops | Tape, batch: Batch, cache: KVCache, trace: list[F32] | None = None) -> F32:
        """Residual stream [T, D] after the last block; writes this step's keys and values into `cache`.

        `trace` collects a copy of the residual stream before the first block and after each one.
        """
        spec, weights = self.spec, self.weights
        positions = batch.positions if weights.positions is not None else None
        x = ops.embedding(batch.tokens, weights.embed, positions, weights.positions)
        angles = None
        if spec.rope is not None and batch.inv_freq is not None:
            scaling = spec.rope.attention_scaling
            angles = ops.rope_angles(batch.positions, batch.inv_freq, batch.rope_rows, scaling)
        for i, (block, block_weights) in enumerate(zip(spec.blocks, weights.blocks, strict=True)):
            if trace is not None:
                trace.append(x.copy())
            mark = ops.mark()
            x = self._attention(ops, block, block_weights, x, angles, batch, cache, i)
            ops.release(mark)
            mark = ops.mark()
            x = self._mlp(ops, block, block_weights, x)
            ops.release(mark)
        return x

    def final_norm(self, ops: Ops | Tape, x: F32) -> F32:
        """Norm before the head: x [R, D] -> [R, D]."""
        return _norm(ops, x, self.spec.final_norm, self.weights.final_norm)

    def logits(self, ops: Ops, x: F32, rows: I32, out: F32 | None = None) -> F32:
        """Logits [R, V] of these rows of the residual stream x [T, D]."""
        return ops.matmul(self.final_norm(ops, ops.gather(x, rows)), self.weights.head, out=out)

    def _attention(
        self,
        ops: Ops | Tape,
        spec: BlockSpec,
        weights: BlockWeights,
        x: F32,
        angles: tuple[F32, F32] | None,
        batch: Batch,
        cache: KVCache,
        layer: int,
    ) -> F32:
        """x + out(attention(norm(x)))."""
        a: AttentionSpec = spec.attention
        size = a.head_dim
        qkv = ops.matmul(_norm(ops, x, spec.norm, weights.attn_norm), weights.qkv, weights.qkv_bias)
        q, k, v = np.split(qkv, [a.heads * size, (a.heads + a.kv_heads) * size], axis=1)
        if a.qk_norm is not None:
            q = _head_norm(ops, q, a.heads, a.qk_norm, weights.q_norm)
            k = _head_norm(ops, k, a.kv_heads, a.qk_norm, weights.k_norm)
        cos, sin = angles if angles is not None else (None, None)
        if cos is not None and sin is not None:
            ops.rope(q, cos, sin, size)
        ops.kv_write(cache.layers[layer], k, v, batch.slots, size, cos, sin)
        mixed = ops.attention(
            q,
            cache.layers[layer],
            batch.starts,
            batch.lengths,
            batch.tables,
            head_size=size,
            scale=a.scale,
            window=a.window,
        )
        return ops.matmul(mixed, weights.out, weights.out_bias, residual=x, out=x)

    def _mlp(self, ops: Ops | Tape, spec: BlockSpec, weights: BlockWeights, x: F32) -> F32:
        """x + down(act(gate(norm(x))) * up(norm(x))), or without the gate act(up(norm(x)))."""
        normed = _norm(ops, x, spec.norm, weights.mlp_norm)
        bias, bias_up = (weights.gate_bias, weights.up_bias) if spec.mlp.gated else (weights.up_bias, None)
        inner = ops.matmul(normed, weights.up, bias, bias_up, spec.mlp.activation)
        return ops.matmul(inner, weights.down, weights.down_bias, residual=x, out=x)


def _norm(ops: Ops | Tape, x: F32, spec: NormSpec, weights: NormWeights) -> F32:
    return ops.norm(x, weights.weight, weights.bias, kind=spec.kind, eps=spec.eps)


def _head_norm(ops: Ops | Tape, x: F32, heads: int, spec: NormSpec, weight: F32 | None) -> F32:
    """Normalise each head of x [T, heads * E], in place where it may be."""
    view = x.reshape(x.shape[0], heads, -1)  # splits the last dimension: always a view
    return ops.norm(view, weight, kind=spec.kind, eps=spec.eps, out=view).reshape(x.shape)
