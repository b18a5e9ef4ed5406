"""The transformer: embeddings, blocks, head. The only model code there is; families are data in a `ModelSpec`.

Shapes: T tokens, D hidden, H query heads, G key/value heads, E head size, F feed-forward, V vocabulary, R rows, W width
of the embedding table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyllm.batch import I32, I64, Batch
from pyllm.cache import KVCache
from pyllm.ops import F32, HeadNorms, Ops
from pyllm.packed import BlockWeights, ModelWeights, NormWeights
from pyllm.position_bias import Alibi, Buckets
from pyllm.spec import AttentionSpec, ModelSpec, NormSpec, Placement
from pyllm.tape import Tape

T = TypeVar("T", bound=np.generic)
Angles: TypeAlias = tuple[F32, F32] | tuple[None, None]  # cosines and sines [T, R / 2]


@dataclass(frozen=True)
class EncodedSource:
    """What an encoder gave for S tokens of sources, and where cross keys and values made of it belong."""

    states: F32  # [S, D]
    slots: I64  # [S] of the cross cache


@dataclass(frozen=True)
class AttentionTrace:
    """Collects the attention weights of each block: [H, T, T], and of its cross attention [H, T, S]."""

    own: list[F32] = field(default_factory=list)
    cross: list[F32] = field(default_factory=list)


@dataclass(frozen=True)
class _Pass:
    """What the blocks of one forward pass share; `local_angles` are those of layers with a window, `bias` [H, 2n + 1]
    is that of distances from -n to n, where it is learned; `attentions` collects weights, where they are wanted.

    `cross` has keys and values of the sources; `source` where they are to be written first.
    """

    ops: Ops | Tape
    batch: Batch
    cache: KVCache
    cross: KVCache | None
    source: EncodedSource | None
    angles: Angles
    local_angles: Angles
    bias: F32 | None
    attentions: AttentionTrace | None


class Model:
    """A model of `spec` with packed weights; holds no state between calls. `encoder` is a model by itself.

    `ops` is an `Ops`, or a `Tape` where gradients are wanted: it has the same methods, but keeps what `Ops` overwrites,
    so results are taken as they are returned, whatever `out` was.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.encoder: Model | None = None
        if spec.encoder is not None and weights.encoder is not None:
            self.encoder = Model(spec.encoder, weights.encoder)
        shared = spec.relative_bias
        self._local_inv_freq = None if spec.local_rope is None else _constant(spec.local_rope.inv_freq(1)[None])
        self._buckets = None if shared is None else _constant(shared[1].of_distances(two_sided=spec.is_encoder))
        self._slopes = [
            _constant(a.bias.slopes(a.heads)) if isinstance(a.bias, Alibi) else None
            for a in (b.attention for b in spec.blocks)
        ]

    def forward(
        self,
        ops: Ops | Tape,
        batch: Batch,
        cache: KVCache,
        trace: list[F32] | None = None,
        attentions: AttentionTrace | None = None,
        *,
        cross: KVCache | None = None,
        source: EncodedSource | None = None,
    ) -> F32:
        """Residual stream [T, D] after the last block; writes this step's keys and values into `cache`.

        `trace` collects a copy of the residual stream before the first block and after each one, `attentions` the
        attention weights of each block, where the step is all of one sequence. A decoder with an encoder
        reads `cross`, which :meth:`write_cross` has filled; with a `source` each block fills its layer first, which the
        weights of cross attention need.
        """
        x = self._embed(ops, batch)
        angles = self._angles(ops, batch)
        local_angles, bias = self._local_angles(ops, batch) or angles, self._relative_bias(ops)
        this = _Pass(ops, batch, cache, cross, source, angles, local_angles, bias, attentions)
        for layer in range(len(self.spec.blocks)):
            if trace is not None:
                trace.append(x.copy())
            x = self._block(this, layer, x)
        return x

    def encode(
        self,
        ops: Ops | Tape,
        batch: Batch,
        scratch: KVCache,
        trace: list[F32] | None = None,
        attentions: AttentionTrace | None = None,
    ) -> F32:
        """The encoder's states [S, D] of whole sources, after its final norm; `scratch` is its cache for this call."""
        assert self.encoder is not None
        return ops.shared(self.encoder.final_norm(ops, self.encoder.forward(ops, batch, scratch, trace, attentions)))

    def write_cross(self, ops: Ops, source: EncodedSource, cross: KVCache) -> None:
        """Write the keys and values that every layer's cross attention makes of a source."""
        for layer in range(len(self.spec.blocks)):
            mark = ops.mark()
            self._write_cross(ops, layer, source, cross)
            ops.release(mark)

    def final_norm(self, ops: Ops | Tape, x: F32, out: F32 | None = None) -> F32:
        """Norm before the head: x [R, D] -> [R, D]; x itself where the model has none."""
        return _norm(ops, x, self.spec.final_norm, self.weights.final_norm, out)

    def head_input(self, ops: Ops | Tape, x: F32) -> F32:
        """What the head's matrix is multiplied with, from the residual stream x [R, D], before that is changed."""
        return self.before_head(ops, _product_norm(ops, x, self.spec.final_norm, self.weights.final_norm))

    def before_head(self, ops: Ops | Tape, x: F32) -> F32:
        """The same from states x [R, D] that have been normed: they are transformed or projected, and scaled."""
        weights, head = self.weights, self.spec.head
        if head.transform is not None and weights.head_transform is not None:
            x = ops.matmul(x, weights.head_transform, weights.head_transform_bias, activation=head.transform.activation)
            x = _norm(ops, x, head.transform.norm, weights.head_norm, out=x)
        elif weights.head_project is not None:
            x = ops.matmul(x, weights.head_project)
        return x if head.scale == 1 else ops.axpby(x, head.scale)

    def head(self, ops: Ops, x: F32, out: F32 | None = None) -> F32:
        """Logits [R, V], or scores of labels, of what :meth:`head_input` gives."""
        head, softcap = self.weights.head, self.spec.head.softcap
        assert head is not None
        logits = ops.matmul(x, head, self.weights.head_bias, out=out)
        return logits if softcap is None else ops.softcap(logits, softcap, out=logits)

    def logits(self, ops: Ops, x: F32, rows: I32, out: F32 | None = None) -> F32:
        """What the head gives, logits [R, V] or scores of labels, for these rows of the residual stream x [T, D]."""
        return self.head(ops, self.head_input(ops, ops.gather(x, rows)), out)

    def joins_choice(self, ops: Ops, rows: int) -> bool:
        """Whether :meth:`best_tokens` is to be had for so many rows: no logits are made then."""
        head, loop = self.weights.head, ops.loop
        if head is None or loop is None or self.spec.head.softcap is not None:
            return False
        return loop.joins_argmax(head, rows)

    def best_tokens(self, ops: Ops, x: F32) -> I32:
        """The token of the largest logit for each row of the residual stream x [R, D], by :meth:`DeviceLoop.argmax`."""
        head, loop = self.weights.head, ops.loop
        assert head is not None and loop is not None
        return loop.argmax(self.head_input(ops, x), head, self.weights.head_bias)  # type: ignore[no-any-return]

    def _embed(self, ops: Ops | Tape, batch: Batch) -> F32:
        """The residual stream before the first block."""
        spec, weights = self.spec.embedding, self.weights
        embed, table = weights.embed, weights.positions
        project, bias = weights.embed_project, weights.embed_project_bias
        positions = None if table is None else batch.positions
        if spec.scale == 1 and (project is None or spec.projects_sum):
            if batch.types is None:
                x = ops.embedding(batch.tokens, embed, positions, table)
            else:
                x = ops.embedding(batch.tokens, embed, positions, table, batch.types, weights.types)
        else:
            places = None if table is None else ops.embedding(batch.positions, table)
            x = ops.embedding(batch.tokens, embed)
            if spec.scale != 1:
                x = ops.axpby(x, spec.scale, places if project is None else None, out=x)
            if project is not None:
                x = ops.matmul(x, project, bias, residual=places, out=places)
        if weights.second_positions is not None and batch.second_positions is not None:
            x = ops.axpby(x, 1.0, ops.embedding(batch.second_positions, weights.second_positions), out=x)
        x = _norm(ops, x, spec.norm, weights.embed_norm, out=x)
        return ops.matmul(x, project, bias) if project is not None and spec.projects_sum else x

    def _angles(self, ops: Ops | Tape, batch: Batch) -> Angles:
        rope = self.spec.rope
        if rope is None or batch.inv_freq is None:
            return None, None
        positions = batch.positions if batch.pairs is None else batch.pairs.reshape(-1)
        cos, sin = ops.rope_angles(positions, batch.inv_freq, batch.rope_rows, rope.attention_scaling)
        return cos.reshape(len(batch.tokens), -1), sin.reshape(len(batch.tokens), -1)

    def _local_angles(self, ops: Ops | Tape, batch: Batch) -> Angles | None:
        rope = self.spec.local_rope
        if rope is None or self._local_inv_freq is None:
            return None
        return ops.rope_angles(batch.positions, self._local_inv_freq, None, rope.attention_scaling)

    def _relative_bias(self, ops: Ops | Tape) -> F32 | None:
        table = self.weights.relative_bias
        return None if table is None or self._buckets is None else ops.shared(ops.gather_columns(table, self._buckets))

    def _block(self, this: _Pass, layer: int, x: F32) -> F32:
        """The residual stream after a block, from that before it."""
        ops, spec, weights = this.ops, self.spec.blocks[layer], self.weights.blocks[layer]
        if spec.placement.is_parallel:
            mark = ops.mark()
            if weights.mlp_norm is None:
                first = second = _norm(ops, x, spec.norm, weights.attn_norm)
            else:  # the second is read after attention has changed x
                first = _product_norm(ops, x, spec.norm, weights.attn_norm)
                second = _norm(ops, x, spec.norm, weights.mlp_norm)
            x = self._attention(this, layer, first, x)
            x = self._mlp(this, layer, second, x)
            ops.release(mark)
            return x
        parts: list[tuple[Callable[..., F32], NormWeights | None, NormWeights | None]] = [
            (self._attention, weights.attn_norm, weights.attn_post_norm),
            (self._mlp, weights.mlp_norm, weights.mlp_post_norm),
        ]
        if weights.cross is not None:
            parts.insert(1, (self._cross, weights.cross.norm, None))
        for part, norm, post_norm in parts:
            if spec.placement is Placement.NORMED:
                x = _norm(ops, x, spec.norm, norm, out=x)
            mark = ops.mark()
            if spec.placement is Placement.POST:
                x = part(this, layer, x, x)
            elif spec.placement is Placement.NORMED:
                x = ops.add(x, part(this, layer, x), spec.residual_scale, out=x)
            elif spec.placement is Placement.SANDWICH:
                branch = part(this, layer, _product_norm(ops, x, spec.norm, norm))
                x = ops.add(x, _norm(ops, branch, spec.norm, post_norm, out=branch), out=x)
            else:
                x = part(this, layer, _product_norm(ops, x, spec.norm, norm), x)
            ops.release(mark)
            if spec.placement is Placement.POST:
                x = _norm(ops, x, spec.norm, norm, out=x)
        return x

    def _attention(self, this: _Pass, layer: int, x: F32, residual: F32 | None = None) -> F32:
        """out(attention(x)), plus the residual in its place where it is given and may be overwritten."""
        a, weights = self.spec.blocks[layer].attention, self.weights.blocks[layer]
        ops, batch, cache, size = this.ops, this.batch, this.cache.layers[layer], a.head_dim
        cos, sin = this.angles if a.window is None else this.local_angles
        norms = _head_norms(a, weights)
        q = ops.queries(x, weights.qkv, weights.qkv_bias, cache, batch.slots, size, cos, sin, norms)
        if q is None:
            qkv = ops.matmul(x, weights.qkv, weights.qkv_bias)
            qkv = qkv if a.clip is None else ops.clamp(qkv, a.clip)
            ends = a.heads * size, (a.heads + a.kv_heads) * size
            q, k, v = qkv[:, : ends[0]], qkv[:, ends[0] : ends[1]], qkv[:, ends[1] :]
            if norms is not None:
                q, k = _head_norm(ops, q, norms.q, norms), _head_norm(ops, k, norms.k, norms)
            if cos is not None and sin is not None:
                ops.rope(q, cos, sin, size)
            ops.kv_write(cache, k, v, batch.slots, size, cos, sin)
        attend = partial(
            ops.attention,
            q,
            cache,
            batch.starts,
            batch.lengths,
            batch.tables,
            head_size=size,
            scale=a.scale,
            window=a.window,
            causal=a.causal,
            prefix=batch.prefix,
            bias=this.bias if isinstance(a.bias, Buckets) else None,
            slopes=self._slopes[layer],
            softcap=a.softcap,
        )
        mixed = attend()
        if this.attentions is not None:

            def attend_to(values: F32) -> F32:
                ops.kv_write(cache, k, values, batch.slots, size, cos, sin)
                return attend()

            this.attentions.own.append(_attention_weights(ops, attend_to, a, len(q), len(q)))
            ops.kv_write(cache, k, v, batch.slots, size, cos, sin)
        return ops.matmul(mixed, weights.out, weights.out_bias, residual=residual, out=residual)

    def _cross(self, this: _Pass, layer: int, x: F32, residual: F32 | None = None) -> F32:
        """out(attention of x to its sources), plus the residual as in attention."""
        a, weights = self.spec.blocks[layer].cross, self.weights.blocks[layer].cross
        cross, lengths, tables = this.cross, this.batch.source_lengths, this.batch.source_tables
        assert a is not None and weights is not None
        assert cross is not None and lengths is not None and tables is not None
        ops = this.ops
        if this.source is not None:
            self._write_cross(ops, layer, this.source, cross)
        q = ops.matmul(x, weights.q, weights.q_bias)
        attend = partial(
            ops.attention, q, cross.layers[layer], this.batch.starts, lengths, tables, head_size=a.head_dim,
            scale=a.scale, causal=False,
        )  # fmt: skip
        mixed = attend()
        if this.attentions is not None:
            source = this.source
            assert source is not None

            def attend_to(values: F32) -> F32:
                self._write_cross(ops, layer, source, cross, values)
                return attend()

            this.attentions.cross.append(_attention_weights(ops, attend_to, a, len(q), len(source.states)))
            self._write_cross(ops, layer, source, cross)
        return ops.matmul(mixed, weights.out, weights.out_bias, residual=residual, out=residual)

    def _write_cross(
        self, ops: Ops | Tape, layer: int, source: EncodedSource, cross: KVCache, values: F32 | None = None
    ) -> None:
        """Write one layer's keys of a source, and its values or those that are given."""
        a, weights = self.spec.blocks[layer].cross, self.weights.blocks[layer].cross
        assert a is not None and weights is not None
        kv, width = ops.matmul(source.states, weights.kv, weights.kv_bias), a.kv_heads * a.head_dim
        values = kv[:, width:] if values is None else values
        ops.kv_write(cross.layers[layer], kv[:, :width], values, source.slots, a.head_dim)

    def _mlp(self, this: _Pass, layer: int, x: F32, residual: F32 | None = None) -> F32:
        """down(act(gate(x)) * up(x)), without a gate down(act(up(x))), plus the residual as in attention."""
        spec, weights = self.spec.blocks[layer].mlp, self.weights.blocks[layer]
        bias, bias_up = (weights.gate_bias, weights.up_bias) if spec.gated else (weights.up_bias, None)
        inner = this.ops.matmul(x, weights.up, bias, bias_up, spec.activation)
        return this.ops.matmul(inner, weights.down, weights.down_bias, residual=residual, out=residual)


def _constant(array: NDArray[T]) -> NDArray[T]:
    """The array, read-only: a GPU copies it once."""
    array.flags.writeable = False
    return array


def _attention_weights(
    ops: Ops | Tape, attend_to: Callable[[F32], F32], spec: AttentionSpec, tokens: int, keys: int
) -> F32:
    """Weights [H, T, S] of all keys for each query: what attention gives where keys have unit vectors for values, as
    many of them at a time as a head has channels."""
    weights: F32 = np.empty((spec.heads, tokens, keys), np.float32)
    for first in range(0, keys, spec.head_dim):
        count = min(spec.head_dim, keys - first)
        values = np.zeros((keys, spec.kv_heads, spec.head_dim), np.float32)
        values[first : first + count, :, :count] = np.eye(count)[:, None]
        mark = ops.mark()
        mixed = attend_to(values.reshape(keys, -1)).reshape(tokens, spec.heads, spec.head_dim)
        weights[:, :, first : first + count] = mixed[:, :, :count].swapaxes(0, 1)
        ops.release(mark)
    return weights


def _norm(ops: Ops | Tape, x: F32, spec: NormSpec | None, weights: NormWeights | None, out: F32 | None = None) -> F32:
    """x normalised; x itself where there is no norm."""
    if spec is None or weights is None:
        return x
    return ops.norm(x, weights.weight, weights.bias, kind=spec.kind, eps=spec.eps, out=out)


def _product_norm(ops: Ops | Tape, x: F32, spec: NormSpec | None, weights: NormWeights | None) -> F32:
    """The same for products alone, which come before x is changed."""
    if spec is None or weights is None:
        return x
    return ops.product_norm(x, weights.weight, weights.bias, kind=spec.kind, eps=spec.eps)


def _head_norms(spec: AttentionSpec, weights: BlockWeights) -> HeadNorms | None:
    """Those of queries and keys, where there are any."""
    if spec.qk_norm is None or weights.q_norm is None or weights.k_norm is None:
        return None
    return HeadNorms(weights.q_norm, weights.k_norm, spec.qk_norm.kind, spec.qk_norm.eps)


def _head_norm(ops: Ops | Tape, x: F32, weight: F32, norms: HeadNorms) -> F32:
    """Normalise each head of x [T, heads * E], in place where it may be."""
    view = x.reshape(x.shape[0], -1, weight.shape[-1])  # splits the last dimension: always a view
    return ops.norm(view, weight, kind=norms.kind, eps=norms.eps, out=view).reshape(x.shape)
