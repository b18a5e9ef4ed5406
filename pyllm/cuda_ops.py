"""The kernels of :mod:`pyllm.ops` on a GPU: the methods that inference calls, with the same signatures.

Products take bfloat16 and add in float32; the residual stream, queries before they are rotated and logits are float32.
Which kernel runs depends on sizes alone: up to 16 rows go to the kernels of decoding, products of up to 64 to one
between, more to those of prompts (on Hopper by wgmma). A row's bits do not depend on the rows around it as long as the
kernel stays the same, and by wgmma the parts that it cuts K into. An object that is `invariant` takes for all rows the
kernels that do with any number.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.cuda_limits import (
    MATMUL_BLOCKS,
    MATMUL_FLOATS,
    MATMUL_ROWS,
    SPLIT_BLOCKS,
    SPLIT_ROWS,
    attention_workspace,
    recorded_memory,
)
from pyllm.cuda_memory import PIECE, DeviceArena, DeviceStage, Mailbox, Pending
from pyllm.cuda_weights import BFLOAT16, FLOAT32, DeviceMatrix, load_matrix, load_qkv
from pyllm.device import Device
from pyllm.ops import ACTIVATIONS, NORMS, HeadNorms, Ops, Stage, check_weights_of_heads
from pyllm.sampling import SAMPLE_ROW, SampleInputs
from pyllm.spec import Activation, ModelSpec, NormKind
from pyllm.tensor import DeviceArray

SKINNY_ROWS = 16  # of the products of decoding, at most
WGMMA_HEADS = 64, 128  # head sizes of attention by wgmma
TOP_TOKENS = 256  # that its log-probabilities list at most


@dataclass(frozen=True)
class Normed:
    """The norm of x [R, D] as the products of decoding form it themselves, from x as it is when they run."""

    x: DeviceArray
    weight: DeviceArray
    bias: DeviceArray | None
    kind: NormKind
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        """That of x."""
        return self.x.shape


class CudaOps(Ops):
    """Kernel calls on a GPU.

    `dtype` is what products take: bfloat16, or float32 for tests. Arrays of numpy where a device array is expected are
    copied to the GPU; logits of numpy are worked on by the CPU's kernels, on `threads` threads. With `invariant` a
    sequence's bits do not depend on the batch around it.
    """

    on_gpu = True
    packs_integers = False

    def __init__(
        self, device: Device, dtype: Any = BFLOAT16, *, threads: int | None = None, invariant: bool = False
    ) -> None:
        super().__init__(threads)
        self.device, self.dtype, self.invariant = device, np.dtype(dtype), invariant
        self.kernels = device.kernels
        self._outgrown: list[DeviceArray] = []  # workspaces that recorded graphs may use yet
        self._mailbox = Mailbox(device)
        self._constants: dict[int, tuple[weakref.ref[Any], DeviceArray]] = {}  # by the identity of what they copy
        self._partial = device.empty([0], np.float32)  # workspace of decode attention
        self._tickets = device.zeros([0], np.uint32)
        self._has_wgmma = device.has_wgmma
        self._matmul_partial = device.empty([MATMUL_FLOATS], np.float32)
        self._matmul_tickets = device.zeros([MATMUL_BLOCKS], np.uint32)
        self._largest = device.empty([device.multiprocessors * SKINNY_ROWS], np.int64)  # workspace of `argmax`
        self._ticket = device.zeros([1], np.uint32)

    @property
    def loop(self) -> CudaOps:
        """Itself, which has what decoding takes besides."""
        return self

    @property
    def recorded_memory(self) -> int:
        """As :attr:`DeviceLoop.recorded_memory`."""
        return recorded_memory(self.device)

    # Memory

    def empty(self, *shape: int, dtype: np.dtype[Any] = FLOAT32) -> Any:
        """An array for an output: memory of its own, or a piece of the arena inside :meth:`use_arena`."""
        return self.device.empty(shape, dtype) if self._arena is None else self._arena.take(shape, dtype)

    def place(self, array: NDArray[Any]) -> Any:
        """An array of the host, on the GPU."""
        return self.device.upload(array)

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """Memory that is kept, outside of any arena."""
        return self.device.empty(shape, dtype)

    def arena(self, floats: int) -> Any:
        """An arena with room for so many float32."""
        return DeviceArena(self.device.empty([floats * 4 + 64 * PIECE], np.uint8))

    def reserve(self, spec: ModelSpec, sequences: int, width: int) -> None:
        """Have the workspace of decode attention for so many sequences of `width` cache blocks, before a recording."""
        self._workspace(*attention_workspace(spec, sequences, width))

    def stage(self, arrays: Sequence[Any], lasting: bool = True) -> Stage:
        """Arrays that the host writes and kernels read; what is no array is passed on."""
        return DeviceStage(self.device, arrays, lasting)

    def tokens(self, chosen: Any) -> list[int]:
        """Tokens that a replayed step chose."""
        return self.fetch(chosen).wait().tolist()  # type: ignore[no-any-return]

    def fetch(self, array: DeviceArray) -> Pending:
        """As :meth:`DeviceLoop.fetch`."""
        return self._mailbox.fetch(array)

    # Recording

    def begin_recording(self) -> None:
        """From here kernel calls are recorded, not run."""
        self.device.begin_graph()

    def end_recording(self) -> Any:
        """The CUDA graph of the calls since :meth:`begin_recording`; their arrays must be kept as long as it."""
        return self.device.end_graph()

    def replay(self, graph: Any) -> None:
        """Run a recorded graph; it has not ended when this returns."""
        self.device.replay(graph)

    def stop(self) -> None:
        """End what a failure interrupted: a recording is dropped, outputs are memory of their own again."""
        self.device.drop_graph()
        self.use_arena(None)

    # Weights

    def pack(self, *weights: Any, dtype: str | None = None, gate: Any = None, group_size: int | None = None) -> Any:
        """Copy weights[i] [Ni, K] to the GPU, stacked along N, as "bfloat16" or "float32".

        With `gate` [N, K] the result is gated, see :class:`DeviceMatrix`.
        """
        return load_matrix(self.device, weights, dtype, gate)

    def pack_qkv(self, *weights: Any, head_size: int, half: int, dtype: str | None = None) -> Any:
        """As :meth:`Ops.pack_qkv`; where the kernels take them so, rows that are rotated together are neighbours."""
        return load_qkv(self.device, weights, dtype, head_size, half)

    # Kernels

    def matmul(
        self,
        x: Any,
        w: Any,
        bias: Any = None,
        bias_up: Any = None,
        activation: Activation | None = None,
        residual: Any = None,
        out: Any = None,
        pre: Any = None,
    ) -> Any:
        """As :meth:`Ops.matmul`; x is float32 or bfloat16, and so is the result: `dtype` behind an activation."""
        if pre is not None:
            raise TypeError("pre: expected None on a GPU: there is no training on it")
        if w.order is not None:
            raise ValueError("w: expected a matrix of pack, got one of pack_qkv, whose rows queries() alone takes")
        x = self._on_gpu(x)
        if out is None:
            out = self.empty(x.shape[0], w.shape[0], dtype=self.dtype if w.gated or activation is not None else FLOAT32)
        self._product(out, x, w, bias, bias_up, activation, residual)
        return out

    def _product(
        self, out: DeviceArray, x: Any, w: DeviceMatrix, bias: Any, bias_up: Any, activation: Any, residual: Any
    ) -> None:
        rows, columns = x.shape
        mark = self.mark()
        tail = (_raw(w.bias(bias, bias_up)), _raw(residual), ACTIVATIONS[activation], w.gated)
        y, values = out.raw, w.values.raw
        if w.dtype == FLOAT32 or columns % 8:
            self.kernels.plain_matmul(y, self._as(x, w.dtype).raw, values, *tail, self.device.stream)
        elif self._is_skinny(rows, columns):
            source, norm = self._prologue(x)
            self.kernels.skinny_matmul(
                y, source.raw, values, *tail, *norm, self.device.multiprocessors, self.device.stream
            )
        elif not self.invariant and rows <= MATMUL_ROWS:
            self.kernels.split_matmul(
                y, self._as(x, BFLOAT16).raw, values, *tail, self._matmul_partial.raw, self._matmul_tickets.raw,
                self.device.stream,
            )  # fmt: skip
        elif not self.invariant and self._has_wgmma:
            self.kernels.wgmma_matmul(
                y, self._as(x, BFLOAT16).raw, values, *tail, self.device.multiprocessors, self.device.stream
            )
        else:
            self.kernels.mma_matmul(y, self._as(x, BFLOAT16).raw, values, *tail, self.device.stream)
        self.release(mark)

    def _is_skinny(self, rows: int, columns: int, whole: bool = False) -> bool:
        """Whether the kernels of decoding take so many rows of x [R, K], float32 or to be normed where `whole`."""
        return not self.invariant and bool(self.kernels.skinny_fits(rows, columns, whole))

    def _prologue(self, x: DeviceArray | Normed) -> tuple[DeviceArray, tuple[Any, Any, int, float]]:
        """What a product of decoding reads, and the norm that it takes of it, as its launcher's arguments."""
        if not self._is_skinny(x.shape[0], x.shape[1], whole=True):
            x = self._as(x, BFLOAT16)
        if isinstance(x, Normed):
            return x.x, (x.weight.raw, _raw(x.bias), NORMS[x.kind], x.eps)
        return x, (None, None, 0, 0.0)

    def queries(
        self,
        x: Any,
        w: Any,
        bias: Any,
        cache: Any,
        slots: Any,
        head_size: int,
        cos: Any = None,
        sin: Any = None,
        norms: HeadNorms | None = None,
    ) -> Any:
        """As :meth:`Ops.queries`, of the cache's dtype; one kernel where a step has few rows and no norms, else two."""
        paged, slots = _paged(cache, head_size), self._on_gpu(slots)
        rows, columns = x.shape
        q = self.empty(rows, w.shape[0] - 2 * paged.shape[1] * head_size, dtype=cache.dtype)
        paired, mark = w.order is not None, self.mark()
        if paired and norms is None and self._is_skinny(rows, columns):
            source, norm = self._prologue(x)
            self.kernels.skinny_qkv(
                q.raw, paged.raw, source.raw, w.values.raw, _raw(w.bias(bias)), _raw(cos), _raw(sin), slots.raw,
                head_size, *norm, self.device.multiprocessors, self.device.stream,
            )  # fmt: skip
            self.release(mark)
            return q
        qkv = self.empty(rows, w.shape[0])
        self._product(qkv, x, w, bias, None, None, None)
        of_heads: tuple[Any, ...] = None, None, 0, 0.0
        if norms is not None:
            of_heads = self._on_gpu(norms.q).raw, self._on_gpu(norms.k).raw, NORMS[norms.kind], norms.eps
        self.kernels.qkv_write(
            q.raw, paged.raw, qkv.raw, slots.raw, head_size, paired, _raw(cos), _raw(sin), *of_heads, self.device.stream
        )
        self.release(mark)
        return q

    def joins_argmax(self, w: Any, rows: int) -> bool:
        """As :meth:`DeviceLoop.joins_argmax`: for the rows that the kernels of decoding take."""
        return w.dtype == BFLOAT16 and self._is_skinny(rows, w.shape[1])

    def argmax(self, x: Any, w: Any, bias: Any = None) -> Any:
        """As :meth:`DeviceLoop.argmax`."""
        rows, multiprocessors = x.shape[0], self.device.multiprocessors
        tokens, mark = self.empty(rows, dtype=np.dtype(np.int32)), self.mark()
        source, norm = self._prologue(x)
        self.kernels.skinny_argmax(
            tokens.raw, source.raw, w.values.raw, _raw(bias), *norm,
            self._largest.view(0, (multiprocessors, rows)).raw, self._ticket.raw, multiprocessors, self.device.stream,
        )  # fmt: skip
        self.release(mark)
        return tokens

    def product_norm(self, x: Any, weight: Any, bias: Any = None, *, kind: NormKind, eps: float) -> Any:
        """As :meth:`Ops.product_norm`: the products of decoding form it themselves."""
        if self.dtype == BFLOAT16 and self._is_skinny(x.shape[0], x.shape[1], whole=True):
            return Normed(x, weight, bias, kind, eps)
        return self.norm(x, weight, bias, kind=kind, eps=eps)

    def norm(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        *,
        kind: NormKind,
        eps: float,
        residual: Any = None,
        sum_out: Any = None,
        out: Any = None,
    ) -> Any:
        """As :meth:`Ops.norm`; the result is of `dtype`, as products take it, unless `out` is given."""
        out = self.empty(*x.shape, dtype=self.dtype) if out is None else out
        if weight is not None and len(weight.shape) == 2:
            check_weights_of_heads(x, weight)
            for head in range(x.shape[1]):
                self.norm(x[:, head], weight[head], kind=kind, eps=eps, out=out[:, head])
            return out
        self.kernels.norm(
            out.raw, self._as(x, FLOAT32).raw, _raw(weight), _raw(bias), _raw(residual), _raw(sum_out), eps,
            NORMS[kind], self.device.stream,
        )  # fmt: skip
        return out

    def activation(self, x: Any, activation: Activation, up: Any = None, out: Any = None) -> Any:
        """As :meth:`Ops.activation`."""
        out = self.empty(*x.shape) if out is None else out
        self.kernels.activation(out.raw, x.raw, _raw(up), ACTIVATIONS[activation], self.device.stream)
        return out

    def axpby(self, x: Any, a: float, y: Any = None, b: float = 1.0, out: Any = None) -> Any:
        """As :meth:`Ops.axpby`."""
        out = self.empty(*x.shape) if out is None else out
        x, y = self._as(x, FLOAT32), None if y is None else self._as(y, FLOAT32)
        self.kernels.axpby(out.raw, x.raw, a, _raw(y), b, self.device.stream)
        return out

    def embedding(
        self,
        tokens: Any,
        table: Any,
        positions: Any = None,
        position_table: Any = None,
        types: Any = None,
        type_table: Any = None,
        out: Any = None,
    ) -> Any:
        """As :meth:`Ops.embedding`; a row whose id is outside its table is NaN."""
        rows = table.values if isinstance(table, DeviceMatrix) else table
        tokens = self._on_gpu(tokens)
        out = self.empty(tokens.shape[0], rows.shape[1]) if out is None else out
        places = None if positions is None else self._on_gpu(positions)
        self.kernels.embedding(out.raw, tokens.raw, rows.raw, _raw(places), _raw(position_table), self.device.stream)
        if type_table is not None:
            mark = self.mark()
            self.axpby(out, 1.0, self.embedding(types, type_table), out=out)
            self.release(mark)
        return out

    def gather(self, x: Any, index: Any) -> Any:
        """As :meth:`Ops.gather`."""
        return self.embedding(index, x)

    def gather_columns(self, x: Any, index: Any, out: Any = None) -> Any:
        """As :meth:`Ops.gather_columns`; a read-only index of numpy is copied to the GPU once."""
        out = self.empty(x.shape[0], index.shape[0]) if out is None else out
        self.kernels.gather_columns(out.raw, x.raw, self._constant(index), self.device.stream)
        return out

    def rope_angles(
        self, positions: Any, inv_freq: Any, table: Any = None, scaling: float = 1.0, out: Any = None
    ) -> tuple[Any, Any]:
        """As :meth:`Ops.rope_angles`."""
        positions = self._on_gpu(positions)
        shape = positions.shape[0], inv_freq.shape[1]
        cos, sin = (self.empty(*shape), self.empty(*shape)) if out is None else out
        places = None if table is None else self._on_gpu(table)
        self.kernels.rope_angles(
            cos.raw, sin.raw, positions.raw, self._constant(inv_freq), _raw(places), scaling, self.device.stream
        )
        return cos, sin

    def rope(self, x: Any, cos: Any, sin: Any, head_size: int, inverse: bool = False) -> Any:
        """As :meth:`Ops.rope`."""
        self.kernels.rope(x.raw, cos.raw, sin.raw, head_size, inverse, self.device.stream)
        return x

    def kv_write(
        self, cache: Any, k: Any, v: Any, slots: Any, head_size: int, cos: Any = None, sin: Any = None
    ) -> None:
        """As :meth:`Ops.kv_write`; the cache is [blocks, G, 2, 64, Ep], float32 or bfloat16."""
        self.kernels.kv_write(
            _paged(cache, head_size).raw, k.raw, v.raw, self._on_gpu(slots).raw, head_size, _raw(cos), _raw(sin),
            self.device.stream,
        )  # fmt: skip

    def attention(
        self,
        q: Any,
        cache: Any,
        starts: Any,
        lengths: Any,
        tables: Any,
        *,
        head_size: int,
        scale: float,
        lse: Any = None,
        dropout: Any = None,
        out: Any = None,
        **rule: Any,
    ) -> Any:
        """As :meth:`Ops.attention`, without dropout; q may be bfloat16 where the cache is, the result is as the cache.

        How many rows a sequence has at most is read from where `starts` comes from on the host. Slopes and a bias of
        numpy that are read-only are copied to the GPU once.
        """
        if dropout is not None:
            raise TypeError("dropout: expected None on a GPU: there is no training on it")
        paged = _paged(cache, head_size)
        heads = q.shape[1] // head_size
        out = self.empty(*q.shape, dtype=cache.dtype) if out is None else out
        starts, lengths, tables = (self._on_gpu(array) for array in (starts, lengths, tables))
        most = int(np.diff(starts.host if starts.host is not None else starts.numpy()).max(initial=0))
        rows = -1, heads, head_size
        arguments = (
            out.reshape(*rows).raw, _raw(lse), q.reshape(*rows).raw, paged.raw, starts.raw, lengths.raw, tables.raw,
            head_size, scale, rule.get("causal", True), self._raw_of(rule.get("prefix")),
            rule.get("window") or 0, rule.get("sinks", 0), self._constant(rule.get("bias")),
            self._constant(rule.get("slopes")), rule.get("softcap") or 0.0, most,
        )  # fmt: skip
        group, kv_heads = heads // paged.shape[1], paged.shape[1]
        if cache.dtype == FLOAT32:
            self.kernels.plain_attention(*arguments, self.device.stream)
        elif self.invariant or most * group > SPLIT_ROWS:
            wgmma = self._has_wgmma and not self.invariant and head_size in WGMMA_HEADS
            self.kernels.prompt_attention(*arguments, wgmma, self.device.stream)
        else:
            sequences, width = tables.shape
            shape = (sequences, kv_heads, -(-width // SPLIT_BLOCKS), SPLIT_ROWS, head_size + 2)
            self._workspace(math.prod(shape), sequences * kv_heads)
            self.kernels.split_attention(
                *arguments, SPLIT_BLOCKS, self._partial.view(0, shape).raw,
                self._tickets.view(0, (sequences, kv_heads)).raw, self.device.stream,
            )  # fmt: skip
        return out

    def sample(self, logits: Any, inputs: SampleInputs) -> Any:
        """As :meth:`Ops.sample`; the tokens come to the host unless its rows were staged."""
        if not isinstance(logits, DeviceArray):
            return super().sample(logits, inputs)
        out = self.empty(logits.shape[0], dtype=np.dtype(np.int32))
        lists: list[Any] = []
        for given, parts in ((inputs.history, 3), (inputs.bias, 3), (inputs.allowed, 2)):
            lists += [None] * parts if given is None else [self._on_gpu(part) for part in given]
        work = None if inputs.allowed is None else self.empty(len(inputs.allowed[1]))
        rows: Any = inputs.rows
        if not isinstance(rows, DeviceArray):
            rows = self._on_gpu(rows.view(np.uint8).reshape(len(rows), SAMPLE_ROW.itemsize))
        self.kernels.sample(
            out.raw, logits.raw, rows.raw, *(_raw(part) for part in lists), _raw(work), self.device.stream
        )
        return out if isinstance(inputs.rows, DeviceArray) else out.numpy()

    def logprobs(self, logits: Any, ids: Any, top_n: int = 0) -> Any:
        """As :meth:`Ops.logprobs`, the results on the host."""
        if isinstance(logits, DeviceArray) and top_n > TOP_TOKENS:
            logits = logits.numpy()
        if not isinstance(logits, DeviceArray):
            return super().logprobs(logits, ids, top_n)
        rows, int32 = logits.shape[0], np.dtype(np.int32)
        outputs = (
            self.empty(rows), self.empty(rows, dtype=int32), self.empty(rows, top_n),
            self.empty(rows, top_n, dtype=int32),
        )  # fmt: skip
        self.kernels.logprobs(*(out.raw for out in outputs), logits.raw, self._on_gpu(ids).raw, self.device.stream)
        return tuple(out.numpy() for out in outputs)

    def advance(self, tokens: Any, positions: Any, slots: Any, lengths: Any, rows: Any, chosen: Any) -> None:
        """As :meth:`DeviceLoop.advance`."""
        arrays = (tokens, positions, slots, lengths, rows, chosen)
        self.kernels.advance(*(array.raw for array in arrays), self.device.stream)

    def _raw_of(self, array: Any) -> Any:
        return None if array is None else self._on_gpu(array).raw

    def _constant(self, array: Any) -> Any:
        """An array for a kernel. One of numpy that is read-only is copied to the GPU once, and its copy lives as long
        as it does: nothing can be copied while a step is recorded. Others are copied at each call."""
        if array is None or isinstance(array, DeviceArray):
            return _raw(array)
        if array.flags.writeable:
            return self.device.upload(array).raw
        key, constants = id(array), self._constants
        if key not in constants:
            there = self.device.upload(array)
            constants[key] = weakref.ref(array, lambda _: constants.pop(key)), there
        return constants[key][1].raw

    def _workspace(self, floats: int, tickets: int) -> None:
        if floats > self._partial.size:
            self._outgrown.append(self._partial)
            self._partial = self.device.empty([floats], np.float32)
        if tickets > self._tickets.size:
            self._outgrown.append(self._tickets)
            self._tickets = self.device.zeros([tickets], np.uint32)

    def _on_gpu(self, array: Any) -> Any:
        if isinstance(array, DeviceArray | Normed):
            return array
        there = self.device.upload(np.asarray(array))
        there.host = array
        return there

    def _as(self, x: DeviceArray | Normed, dtype: np.dtype[Any]) -> DeviceArray:
        """x of another dtype, in memory that holds until the arena's mark is released."""
        if isinstance(x, Normed):
            return self._as(self.norm(x.x, x.weight, x.bias, kind=x.kind, eps=x.eps), dtype)
        if x.dtype == dtype:
            return x
        out: DeviceArray = self.empty(*x.shape, dtype=dtype)
        rows = x.shape[0]
        flat = x.reshape(rows, -1) if rows else x.view(0, (0, 1))
        self.kernels.activation(out.reshape(*flat.shape).raw, flat.raw, None, 0, self.device.stream)
        return out


def _raw(array: DeviceArray | None) -> Any:
    return None if array is None else array.raw


def _paged(cache: DeviceArray, head_size: int) -> DeviceArray:
    """A layer of the cache [blocks, G, 2, 64 * Ep] as the kernels name its dimensions: [blocks, G, 2, 64, Ep]."""
    padded = -(-head_size // 16) * 16
    return cache.reshape(*cache.shape[:3], -1, padded)
