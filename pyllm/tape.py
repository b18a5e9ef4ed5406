"""`Tape`: the methods that a model calls on `Ops`, remembered, so that the gradients can be computed in reverse.

The model does not know which of the two it was given. A tape lives for one recording of a step: made, run forward once,
run backward once; replaying the recorded graph repeats the step. Every value that backward needs stays where it is in
an arena that was laid out for the step; a value's gradient is an array of the same shape, and a view of a value (q in
q, k and v) has the same view of its gradient.

Gradients of parameters accumulate. The gradient of a value is written by the last call that used it and added to, in
the kernels, by those before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32, Arena, Array, AttentionRule
from pyllm.ops_training import TrainingOps
from pyllm.spec import Activation, NormKind, Pooling

if TYPE_CHECKING:
    from typing_extensions import Unpack

I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Dropout:
    """Rate, and the seed uint64 [1], which every step changes in place. Sites number themselves."""

    rate: float
    seed: NDArray[np.uint64]


@dataclass(frozen=True)
class TapeMemory:
    """Where a tape's arrays come from: what is kept until backward, the values of one part of a block where they are
    computed again in backward (None: kept like the others), and gradients."""

    kept: Arena
    part: Arena | None
    gradients: Arena


class Tape:
    """Runs the kernels of `ops` and remembers how to go back.

    Args:
        ops: its calls are run or recorded, as it stands.
        memory: for values and gradients.
        gradient_of: gradient of each parameter by its `id`; the caller keeps the parameters alive.
        dropout: of the embedding, the attention weights, and what is added to the residual stream.
    """

    def __init__(
        self, ops: TrainingOps, memory: TapeMemory, gradient_of: Mapping[int, Any], dropout: Dropout | None = None
    ) -> None:
        self.ops = ops
        self._memory = memory
        self._gradient_of = gradient_of
        self._dropout = dropout
        self._sites = 0
        self._embedding_sites: dict[int, tuple[float, NDArray[np.uint64], int] | None] = {}  # by width
        self._values = _Values()
        self._calls: list[_Call] = []
        self._parts: list[tuple[int, int]] = []  # first call and end of each part
        self._open: int | None = None
        self._written: dict[int, tuple[_View, _View, F32 | None, F32 | None]] = {}  # keys and values of each cache

    # Parts of a block

    def mark(self) -> int:
        """A part of a block begins: what is computed in it is used in it only, but for the residual stream."""
        self._open = len(self._calls)
        self._embedding_sites.clear()
        return self._open

    def release(self, mark: int) -> None:
        """The part that began at `mark` ends."""
        assert self._open == mark, "parts of a block do not nest"
        self._parts.append((mark, len(self._calls)))
        self._open = None
        if self._memory.part is not None:
            self._values.forget(self._memory.part.memory)
            self._memory.part.used = 0

    def shared(self, x: F32) -> F32:
        """x, which several blocks use: its gradient outlives the part of the block that writes it first."""
        self._view(x).value.gradient = self._memory.gradients.take(x.shape)
        return x

    # Kernels

    def embedding(
        self,
        tokens: I32,
        table: _cpu.PackedMatrix | F32,
        positions: I32 | None = None,
        position_table: F32 | None = None,
        types: I32 | None = None,
        type_table: F32 | None = None,
    ) -> F32:
        """See :meth:`pyllm.ops.Ops.embedding`. What is looked up before a block begins is added up, tokens and their
        positions, and dropped with one mask, as if the sum were.
        """
        out = self._new((tokens.shape[0], table.shape[1]), kept=True)
        ops, y = self.ops, self._view(out)
        gradient, position_gradient = self._gradient(table), self._gradient(position_table)
        type_gradient = self._gradient(type_table)
        width = table.shape[1]
        if width not in self._embedding_sites:
            self._embedding_sites[width] = self._site()
        dropped = self._embedding_sites[width]

        def forward() -> None:
            ops.embedding(tokens, table, positions, position_table, types, type_table, out=out)
            if dropped is not None:
                ops.dropout(out, *dropped, out=out)

        def backward() -> None:
            dy = self._incoming(y)
            if dropped is not None:
                ops.dropout(dy, *dropped, out=dy)
            if gradient is not None:
                ops.embedding_backward(gradient, position_gradient, dy, tokens, positions, type_gradient, types)

        self._run(forward, backward, again=False)
        return out

    def rope_angles(
        self, positions: I32, inv_freq: F32, table: I32 | None = None, scaling: float = 1.0
    ) -> tuple[F32, F32]:
        """See :meth:`pyllm.ops.Ops.rope_angles`. They depend on no parameter."""
        shape = (positions.shape[0], inv_freq.shape[1])
        cos, sin = self._new(shape, kept=True), self._new(shape, kept=True)
        self.ops.rope_angles(positions, inv_freq, table, scaling, out=(cos, sin))
        return cos, sin

    def gather_columns(self, x: F32, index: I32) -> F32:
        """See :meth:`pyllm.ops.Ops.gather_columns`; x is a parameter."""
        out = self._new((x.shape[0], index.shape[0]), kept=True)
        ops, y, gradient = self.ops, self._view(out), self._gradient(x)

        def backward() -> None:
            if gradient is not None:
                ops.gather_columns_backward(gradient, self._incoming(y), index)

        self._run(lambda: ops.gather_columns(x, index, out=out), backward, again=False)
        return out

    def norm(
        self, x: F32, weight: F32 | None, bias: F32 | None = None, *, kind: NormKind, eps: float, out: F32 | None = None
    ) -> F32:
        """See :meth:`pyllm.ops.Ops.norm`. Where `out` is x, the result is another array all the same."""
        out = self._new(x.shape)
        ops, source, y = self.ops, self._view(x), self._view(out)
        dweight, dbias = self._gradient(weight), self._gradient(bias)

        def forward() -> None:
            ops.norm(x, weight, bias, kind=kind, eps=eps, out=out)

        def backward() -> None:
            dy = self._incoming(y)
            if source.is_whole and source.value.gradient is None:  # in place: nothing else needs dy
                self._hand_on(y, source)
                dx, add = dy, False
            else:
                dx, add = self._target(source)
            ops.norm_backward(
                dy, x, weight, kind=kind, eps=eps, dweight=dweight, dbias=dbias, residual=dx if add else None, out=dx
            )

        self._run(forward, backward)
        return out

    def axpby(self, x: F32, a: float, y: F32 | None = None, b: float = 1.0, out: F32 | None = None) -> F32:
        """See :meth:`pyllm.ops.Ops.axpby`. Where `out` is x or y, the result is another array all the same."""
        out = self._new(x.shape)
        ops, first, result = self.ops, self._view(x), self._view(out)
        second = None if y is None else self._view(y)

        def forward() -> None:
            ops.axpby(x, a, y, b, out=out)

        def backward() -> None:
            dout = self._incoming(result)
            if second is not None:
                dy, add = self._target(second)
                ops.axpby(dout, b, dy if add else None, out=dy)
            if first.is_whole and first.value.gradient is None:  # in place: nothing else needs dout
                self._hand_on(result, first)
                dx, add = dout, False
            else:
                dx, add = self._target(first)
            ops.axpby(dout, a, dx if add else None, out=dx)

        self._run(forward, backward)
        return out

    def add(self, x: F32, branch: F32, scale: float = 1.0, out: F32 | None = None) -> F32:
        """See :meth:`pyllm.ops.Ops.add`. Where `out` is x, the result is another array all the same.

        As the residual stream it outlives the part of the block.
        """
        out = self._new(x.shape, kept=True)
        ops, stream, added, y = self.ops, self._view(x), self._view(branch), self._view(out)
        dropped = self._site()

        def forward() -> None:
            if dropped is not None:
                ops.dropout(branch, *dropped, out=branch)
            ops.axpby(x, scale, branch, out=out)

        def backward() -> None:
            dy = self._incoming(y)
            dbranch, again = self._target(added)
            assert not again, "a branch has one use"
            if dropped is not None:
                ops.dropout(dy, *dropped, out=dbranch)
            else:
                ops.axpby(dy, 1.0, out=dbranch)
            self._hand_on(y, stream)
            if scale != 1:
                ops.axpby(dy, scale, out=dy)

        self._run(forward, backward, again=False)
        return out

    def matmul(
        self,
        x: F32,
        w: _cpu.PackedMatrix,
        bias: F32 | None = None,
        bias_up: F32 | None = None,
        activation: Activation | None = None,
        residual: F32 | None = None,
        out: F32 | None = None,
    ) -> F32:
        """See :meth:`pyllm.ops.Ops.matmul`. Where `out` is the residual, the result is another array all the same.

        A sum with a residual is the residual stream: it outlives the part of the block.
        """
        rows, (n, _) = x.shape[0], w.shape
        out = self._new((rows, n), kept=residual is not None)
        ops, source, y = self.ops, self._view(x), self._view(out)
        stream = None if residual is None else self._view(residual)
        pre = self._new((rows, 2 * n if w.gated else n)) if activation is not None or w.gated else None
        dropped = self._site() if residual is not None else None
        branch = self._new((rows, n)) if dropped is not None else out
        dw, db, db_up = self._gradient(w), self._gradient(bias), self._gradient(bias_up)

        def forward() -> None:
            if dropped is None:
                ops.matmul(x, w, bias, bias_up, activation, residual, out=out, pre=pre)
            else:
                ops.matmul(x, w, bias, bias_up, activation, out=branch, pre=pre)
                ops.dropout(branch, *dropped, residual=residual, out=out)

        def backward() -> None:
            dy = self._incoming(y)
            if stream is not None:
                self._hand_on(y, stream)
            if dropped is not None:
                dy = ops.dropout(dy, *dropped, out=self._memory.gradients.take((rows, n)))
            if pre is not None:
                dy = ops.activation_backward(dy, pre, activation, gated=w.gated, out=pre)
            if db is not None:
                ops.column_sum(db, dy[:, :n])
            if db_up is not None:
                ops.column_sum(db_up, dy[:, n:])
            if dw is not None:
                ops.matmul_dw(dw, dy, x)
            dx, add = self._target(source)
            ops.matmul_dx(dy, w, out=dx, add=add)

        self._run(forward, backward, again=residual is None)
        return out

    def product_norm(self, x: F32, weight: F32, bias: F32 | None = None, *, kind: NormKind, eps: float) -> F32:
        """See :meth:`pyllm.ops.Ops.product_norm`."""
        return self.norm(x, weight, bias, kind=kind, eps=eps)

    def queries(self, *arguments: Any) -> None:
        """See :meth:`pyllm.ops.Ops.queries`: what each step makes is kept, so there are several."""

    def clamp(self, x: F32, limit: float) -> F32:
        """See :meth:`pyllm.ops.Ops.clamp`: in place."""
        ops, view = self.ops, self._view(x)
        self._run(lambda: ops.clamp(x, limit), lambda: ops.clamp_backward(self._incoming(view), x, limit))
        return x

    def rope(self, x: F32, cos: F32, sin: F32, head_size: int) -> F32:
        """See :meth:`pyllm.ops.Ops.rope`: in place."""
        ops, view = self.ops, self._view(x)

        def forward() -> None:
            ops.rope(x, cos, sin, head_size)

        def backward() -> None:
            ops.rope(self._incoming(view), cos, sin, head_size, inverse=True)

        self._run(forward, backward)
        return x

    def kv_write(
        self,
        cache: Array,
        k: F32,
        v: F32,
        slots: NDArray[np.int64],
        head_size: int,
        cos: F32 | None = None,
        sin: F32 | None = None,
    ) -> None:
        """See :meth:`pyllm.ops.Ops.kv_write`; the attention that reads the cache comes next."""
        self._written[id(cache)] = (self._view(k), self._view(v), cos, sin)
        self._run(lambda: self.ops.kv_write(cache, k, v, slots, head_size, cos, sin), lambda: None)

    def attention(
        self,
        q: F32,
        cache: Array,
        starts: I32,
        lengths: I32,
        tables: I32,
        *,
        head_size: int,
        scale: float,
        **rule: Unpack[AttentionRule],
    ) -> F32:
        """See :meth:`pyllm.ops.Ops.attention`; keys and values are what :meth:`kv_write` wrote last, in order."""
        out = self._new(q.shape)
        heads = q.shape[1] // head_size
        lse = self._new((q.shape[0], heads))
        ops, queries, y = self.ops, self._view(q), self._view(out)
        keys, values, cos, sin = self._written[id(cache)]
        bias = rule.get("bias")
        biases = None if bias is None else self._view(bias)
        dropped = self._site()

        def forward() -> None:
            ops.attention(
                q, cache, starts, lengths, tables, head_size=head_size, scale=scale, lse=lse, dropout=dropped, out=out,
                **rule,
            )  # fmt: skip

        def backward() -> None:
            targets = [self._target(view) for view in (queries, keys, values)]
            assert not any(add for _, add in targets), "q, k and v have one use"
            dq, dk, dv = (target for target, _ in targets)
            dbias, add_dbias = (None, False) if biases is None else self._target(biases)
            ops.attention_backward(
                self._incoming(y), out, q, cache, lse, starts, lengths, tables, head_size=head_size, scale=scale,
                dropout=dropped, gradients=(dq, dk, dv), dbias=dbias, add_dbias=add_dbias, **rule,
            )  # fmt: skip
            if cos is not None and sin is not None:
                ops.rope(dk, cos, sin, head_size, inverse=True)

        self._run(forward, backward)
        return out

    def pool(self, x: F32, starts: I32, pooling: Pooling) -> F32:
        """See :meth:`pyllm.ops.Ops.pool`."""
        out = self._new((starts.shape[0] - 1, x.shape[1]))
        ops, source, y = self.ops, self._view(x), self._view(out)

        def backward() -> None:
            dx, add = self._target(source)
            assert not add, "what is pooled has one use"
            ops.pool_backward(dx, self._incoming(y), starts, pooling, x if pooling is Pooling.MAX else None)

        self._run(lambda: ops.pool(x, starts, pooling, out=out), backward)
        return out

    # The loss, and back

    def head_losses(
        self,
        x: F32,
        w: _cpu.PackedMatrix,
        loss: Callable[[F32, slice], None],
        *,
        rows: int,
        bias: F32 | None = None,
        softcap: float | None = None,
    ) -> None:
        """Losses of what the head gives, ``x w^T + bias``, soft-capped or not, `rows` rows at a time, with their
        gradients.

        x [T, D]. `loss` gets logits [<= rows, N] and which rows of x they are of, and turns them into their gradient;
        logits never stand in memory beyond `rows` rows.
        """
        ops, total = self.ops, x.shape[0]
        dx, add = self._target(self._view(x))
        assert not add, "the head is the last to use its input"
        dw, db = self._gradient(w), self._gradient(bias)
        mark = self._memory.gradients.used
        memory = self._memory.gradients.take((1 if softcap is None else 2, min(rows, total), w.shape[0]))
        for first in range(0, total, rows):
            span = slice(first, min(first + rows, total))
            logits, pre = memory[0, : span.stop - first], memory[-1, : span.stop - first]
            ops.matmul(x[span], w, bias, out=logits)
            if softcap is not None:
                ops.softcap(logits, softcap, pre=pre, out=logits)
            loss(logits, span)
            if softcap is not None:
                ops.activation_backward(logits, pre, Activation.TANH, out=logits)
            if db is not None:
                ops.column_sum(db, logits)
            if dw is not None:
                ops.matmul_dw(dw, logits, x[span])
            ops.matmul_dx(logits, w, out=dx[span])
        self._memory.gradients.used = mark

    def backward(self) -> None:
        """All gradients, from what :meth:`head_losses` left."""
        part_ending = {end: first for first, end in self._parts}
        memory = self._memory.gradients
        mark, first = memory.used, -1
        for at in range(len(self._calls), 0, -1):
            if at in part_ending:
                first, mark = part_ending[at], memory.used
                if self._memory.part is not None:
                    for call in self._calls[first:at]:
                        if call.again:
                            call.forward()
            self._calls[at - 1].backward()
            if at - 1 == first:
                memory.used = mark
        self._calls.clear()

    # Inside

    def _run(self, forward: Callable[[], object], backward: Callable[[], object], *, again: bool = True) -> None:
        forward()
        self._calls.append(_Call(forward, backward, again))

    def _new(self, shape: tuple[int, ...], kept: bool = False) -> F32:
        part = self._memory.part
        arena = part if part is not None and not kept and self._open is not None else self._memory.kept
        array = arena.take(shape)
        self._values.add(array)
        return array

    def _site(self) -> tuple[float, NDArray[np.uint64], int] | None:
        """Rate, seed and number of the next place where values are dropped."""
        if self._dropout is None:
            return None
        self._sites += 1
        return self._dropout.rate, self._dropout.seed, self._sites - 1

    def _gradient(self, parameter: object) -> Any:
        """The parameter's gradient; None for one that is not trained."""
        return self._gradient_of.get(id(parameter))

    def _view(self, array: F32) -> _View:
        return self._values.view(array)

    def _incoming(self, view: _View) -> F32:
        """The gradient of what a call computed, which all later calls have written."""
        value = view.value
        assert value.gradient is not None, "a value that nothing used"
        assert value.is_written(view), "a value of which parts were not used"
        return view.of(value.gradient)

    def _target(self, view: _View) -> tuple[F32, bool]:
        """Where a call writes the gradient of what it read, and whether it must add to what is there."""
        value = view.value
        if value.gradient is None:
            value.gradient = self._memory.gradients.take(value.array.shape)
        add = value.is_written(view)
        if not add:
            value.written.append((view.offset, view.count))
        return view.of(value.gradient), add

    def _hand_on(self, y: _View, x: _View) -> None:
        """y was made of x: what arrives at y becomes what arrives at x, in the same memory."""
        assert x.value.gradient is None, "the residual is used by what follows it first"
        x.value.gradient, x.value.written = y.value.gradient, list(y.value.written)


@dataclass(frozen=True)
class _Call:
    forward: Callable[[], object]
    backward: Callable[[], object]
    again: bool  # whether it must be run again where values were not kept


@dataclass(eq=False)
class _Value:
    """An array that a kernel wrote, and its gradient once something was written to it."""

    array: F32
    gradient: F32 | None = None
    written: list[tuple[int, int]] = field(default_factory=list)  # offset and number of elements of each view

    def is_written(self, view: _View) -> bool:
        """Whether all of the view has been written, itself or as parts of it."""
        if (view.offset, view.count) in self.written:
            return True
        return view.count == self.array.size and sum(count for _, count in self.written) == view.count


@dataclass(frozen=True)
class _View:
    """Some columns of a value, or all of it."""

    value: _Value
    offset: int  # in floats
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_whole(self) -> bool:
        return self.shape == self.value.array.shape

    def of(self, array: F32) -> F32:
        """The same view of an array that is laid out alike."""
        if self.shape == array.shape:
            return array
        flat = array.reshape(-1)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)


class _Values:
    """The values that are alive, by address."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._values: list[_Value] = []

    def add(self, array: F32) -> None:
        address = array.ctypes.data
        at = bisect_right(self._addresses, address)
        self._addresses.insert(at, address)
        self._values.insert(at, _Value(array))

    def view(self, array: F32) -> _View:
        address = array.ctypes.data
        at = bisect_right(self._addresses, address) - 1
        assert at >= 0, "not a value of this tape"
        value = self._values[at]
        offset = (address - self._addresses[at]) // 4
        assert offset < max(value.array.size, 1), "not a value of this tape"
        return _View(value, offset, array.shape, array.strides)

    def forget(self, memory: F32) -> None:
        """Forget the values in this memory, which others will take."""
        first, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        alive = [i for i, address in enumerate(self._addresses) if not first <= address < end]
        self._addresses = [self._addresses[i] for i in alive]
        self._values = [self._values[i] for i in alive]
