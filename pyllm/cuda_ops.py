"""The kernels of :mod:`pyllm.ops` on a GPU: the methods that inference calls, with the same signatures.

Products take bfloat16 and add in float32; the residual stream, queries before they are rotated and logits are float32.
Which kernel runs depends on sizes alone. A row's bits do not depend on the rows around it as long as the kernel stays
the same: up to 16 rows go to the kernels of decoding, products of up to 64 to one between, more to those of prompts
(on Hopper by wgmma), unless the object is `invariant`, which takes those that do with any number of rows for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pyllm.device import Device
from pyllm.ops import ACTIVATIONS, NORMS, Ops, Stage, check_weights_of_heads
from pyllm.sampling import SAMPLE_ROW, SampleInputs
from pyllm.spec import Activation, ModelSpec, NormKind
from pyllm.tensor import DTYPES, DeviceArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
SPLIT_BLOCKS = 4  # cache blocks whose keys one thread block of decode attention takes: the order of sums hangs on it
SPLIT_ROWS = 16  # queries times heads of a group that it takes at most
WGMMA_HEADS = 64, 128  # head sizes of attention by wgmma
MATMUL_ROWS, MATMUL_BLOCKS = 64, 256  # rows and thread blocks of a product that is split over K
MATMUL_FLOATS = MATMUL_BLOCKS * MATMUL_ROWS * 128  # its workspace
TOP_TOKENS = 256  # that its log-probabilities list at most
SLOTS = 32  # small arrays on their way to the host
PIECE = 256  # bytes that arrays in one block of memory begin at


class DeviceMatrix:
    """Weights [N, K] on the GPU, row-major; gated: [2N, K], rows of gate and up in turn."""

    def __init__(self, values: DeviceArray, gated: bool) -> None:
        self.values, self.gated = values, gated
        rows, columns = values.shape
        self.shape = (rows // 2 if gated else rows, columns)
        self.dtype, self.nbytes = values.dtype, values.nbytes
        self._biases: tuple[Any, Any, DeviceArray] | None = None

    def biases(self, gate: DeviceArray, up: DeviceArray) -> DeviceArray:
        """Those of gate and up in turn, as the kernels read them; made at their first use."""
        if self._biases is None or self._biases[0] is not gate or self._biases[1] is not up:
            joined = np.stack([gate.numpy(), up.numpy()], axis=1).reshape(-1)
            self._biases = gate, up, gate.device.upload(joined)
        return self._biases[2]


class DeviceArena:
    """One block of GPU memory, laid out once per recorded step: outputs are taken in order and given back by mark."""

    def __init__(self, memory: DeviceArray) -> None:
        self.memory = memory
        self.used = 0

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """The next elements, as an array of that shape."""
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        start, self.used = self.used, self.used + -(-count // PIECE) * PIECE
        if self.used > self.memory.nbytes:
            raise MemoryError(f"arena: {self.used} bytes needed, {self.memory.nbytes} laid out")
        return _typed(self.memory, start, shape, dtype)


class DeviceStage(Stage):
    """Arrays of the host in one block, page-locked if it is `lasting`, and their copies in one block of the GPU's."""

    def __init__(self, device: Device, arrays: Sequence[Any], lasting: bool) -> None:
        places, total = [], 0
        for array in arrays:
            places.append(total)
            total += -(-(array.nbytes if isinstance(array, np.ndarray) else 0) // PIECE) * PIECE
        self._device, self._lasting = device, lasting
        self._sent: Any = None
        self._memory = device.pinned(total) if lasting else np.empty(total, np.uint8)
        self._block = device.empty([total], np.uint8)
        host: list[Any] = []
        placed: list[Any] = []
        for array, start in zip(arrays, places, strict=True):
            if not isinstance(array, np.ndarray):
                host.append(array)
                placed.append(array)
                continue
            mine = self._memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            mine[...] = array
            raw = array.dtype == SAMPLE_ROW
            shape = (*array.shape, SAMPLE_ROW.itemsize) if raw else array.shape
            there = _typed(self._block, start, shape, np.dtype(np.uint8) if raw else array.dtype)
            there.host = mine
            host.append(mine)
            placed.append(there)
        super().__init__(host, placed)

    def send(self) -> None:
        """Copy all arrays to the GPU."""
        if not self._lasting:
            self._device.write(self._block, self._memory)
            return
        self._device.send(self._block, self._memory)
        self._sent = self._device.record()

    def wait(self) -> None:
        """Wait until the copy has been made, so that the arrays may be changed."""
        if self._sent is not None:
            self._sent.sync()


class Pending:
    """What a kernel wrote, on its way to the host."""

    def __init__(self, memory: NDArray[Any], event: Any) -> None:
        self._memory, self._event = memory, event

    def wait(self) -> NDArray[Any]:
        """The array, once it is there."""
        self._event.sync()
        return self._memory


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
        self._slots = device.pinned(0).reshape(SLOTS, 0)
        self._slot = 0
        self._constants: dict[int, tuple[Any, DeviceArray]] = {}  # by the identity of what they are copies of
        self._partial = device.empty([0], np.float32)  # workspace of decode attention
        self._tickets = device.zeros([0], np.uint32)
        self._has_wgmma = self.kernels.has_wgmma()
        self._matmul_partial = device.empty([MATMUL_FLOATS], np.float32)
        self._matmul_tickets = device.zeros([MATMUL_BLOCKS], np.uint32)

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
        """Begin to bring a small array to the host. It must be taken before the next but `SLOTS` is."""
        if array.nbytes > self._slots.shape[1]:  # what was fetched before keeps its memory
            room = -(-array.nbytes // PIECE) * PIECE
            self._slots = self.device.pinned(SLOTS * room).reshape(SLOTS, room)
        memory = self._slots[self._slot][: array.nbytes].view(array.dtype).reshape(array.shape)
        self._slot = (self._slot + 1) % SLOTS
        self.device.fetch(memory, array)
        return Pending(memory, self.device.record())

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
        to = dtype or str(weights[0].dtype)
        if to not in ("float32", "bfloat16"):
            raise TypeError(f"dtype: expected float32 or bfloat16 on a GPU, got {to}")
        kind = BFLOAT16 if to == "bfloat16" else FLOAT32
        starts = np.cumsum([0, *(w.shape[0] for w in weights)])

        def write(first: int, rows: NDArray[Any]) -> None:
            """Rows of the stacked weights, from row `first` on."""
            for weight, start in zip(weights, starts[:-1], strict=True):
                low, high = max(first, start), min(first + len(rows), start + weight.shape[0])
                if low < high:
                    rows[low - first : high - first] = weight[low - start : high - start]

        if gate is None:
            return DeviceMatrix(self.device.load((int(starts[-1]), weights[0].shape[1]), kind, write), False)

        def write_pairs(first: int, pairs: NDArray[Any]) -> None:
            pairs[:, 0] = gate[first : first + len(pairs)]
            write(first, pairs[:, 1])

        pairs = self.device.load((int(starts[-1]), 2, weights[0].shape[1]), kind, write_pairs)
        return DeviceMatrix(pairs.reshape(-1, pairs.shape[2]), True)

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
        x = self._on_gpu(x)
        if bias_up is not None:
            bias = w.biases(bias, bias_up)
        rows, columns = x.shape
        if out is None:
            out = self.empty(rows, w.shape[0], dtype=self.dtype if w.gated or activation is not None else FLOAT32)
        mark = self.mark()
        tail = (_raw(bias), _raw(residual), ACTIVATIONS[activation], w.gated)
        y, values = out.raw, w.values.raw
        if w.dtype == FLOAT32 or columns % 8:
            self.kernels.plain_matmul(y, self._as(x, w.dtype).raw, values, *tail, self.device.stream)
        elif not self.invariant and self.kernels.skinny_fits(rows, columns, False):
            x = x if self.kernels.skinny_fits(rows, columns, True) else self._as(x, BFLOAT16)
            self.kernels.skinny_matmul(
                y, x.raw, values, *tail, None, None, 0, 0.0, self.device.multiprocessors, self.device.stream
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
        return out

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
        """As :meth:`Ops.embedding`, without types; a row whose id is outside the table is NaN."""
        if type_table is not None:
            raise TypeError("type_table: expected None on a GPU: encoders do not run on it yet")
        rows = table.values if isinstance(table, DeviceMatrix) else table
        tokens = self._on_gpu(tokens)
        out = self.empty(tokens.shape[0], rows.shape[1]) if out is None else out
        places = None if positions is None else self._on_gpu(positions)
        self.kernels.embedding(out.raw, tokens.raw, rows.raw, _raw(places), _raw(position_table), self.device.stream)
        return out

    def gather(self, x: Any, index: Any) -> Any:
        """As :meth:`Ops.gather`."""
        return self.embedding(index, x)

    def gather_columns(self, x: Any, index: Any, out: Any = None) -> Any:
        """As :meth:`Ops.gather_columns`; an index of numpy is copied to the GPU once."""
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
        numpy are copied to the GPU once.
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
            fast = self._has_wgmma and not self.invariant and head_size in WGMMA_HEADS
            kernel = self.kernels.wgmma_attention if fast else self.kernels.prompt_attention
            kernel(*arguments, self.device.stream)
        else:
            sequences, width = tables.shape
            shape = (sequences, kv_heads, -(-width // SPLIT_BLOCKS), SPLIT_ROWS, head_size + 2)
            self._workspace(int(np.prod(shape, dtype=np.int64)), sequences * kv_heads)
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
        """Make the inputs of the next step of decoding out of this one's: each sequence takes the token it chose.

        tokens, positions, lengths and chosen int32 [B], slots int64 [B], rows of SAMPLE_ROW [B], all on the GPU.
        """
        arrays = (tokens, positions, slots, lengths, rows, chosen)
        self.kernels.advance(*(array.raw for array in arrays), self.device.stream)

    def _raw_of(self, array: Any) -> Any:
        return None if array is None else self._on_gpu(array).raw

    def _constant(self, array: Any) -> Any:
        """A model's array, copied to the GPU once: nothing can be copied while a step is recorded."""
        if array is None or isinstance(array, DeviceArray):
            return _raw(array)
        if id(array) not in self._constants:
            self._constants[id(array)] = array, self.device.upload(array)
        return self._constants[id(array)][1].raw

    def _workspace(self, floats: int, tickets: int) -> None:
        if floats > self._partial.size:
            self._outgrown.append(self._partial)
            self._partial = self.device.empty([floats], np.float32)
        if tickets > self._tickets.size:
            self._outgrown.append(self._tickets)
            self._tickets = self.device.zeros([tickets], np.uint32)

    def _on_gpu(self, array: Any) -> DeviceArray:
        if isinstance(array, DeviceArray):
            return array
        there = self.device.upload(np.asarray(array))
        there.host = array
        return there

    def _as(self, x: DeviceArray, dtype: np.dtype[Any]) -> DeviceArray:
        """x of another dtype, in memory that holds until the arena's mark is released."""
        if x.dtype == dtype:
            return x
        out: DeviceArray = self.empty(*x.shape, dtype=dtype)
        rows = x.shape[0]
        flat = x.reshape(rows, -1) if rows else x.view(0, (0, 1))
        self.kernels.activation(out.reshape(*flat.shape).raw, flat.raw, None, 0, self.device.stream)
        return out


def refusal(
    spec: ModelSpec,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> str | None:
    """Why a model with these options of `LLM` cannot run on a GPU, in a sentence; None where it can."""
    if quantization is not None:
        return f"quantization: expected None on a GPU, got {quantization!r}: there are no kernels of integers yet"
    if dtype == "float16":
        return "dtype: expected auto, float32 or bfloat16 on a GPU, got 'float16'"
    if kv_cache_dtype == "int8" or (kv_cache_dtype == "bfloat16" and not takes_bfloat16(spec)):
        return f"kv_cache_dtype: expected auto or float32 on a GPU for this model, got {kv_cache_dtype!r}"
    if spec.is_encoder or spec.encoder is not None:
        return f"device: expected a decoder on a GPU, got {spec.family}: what encodes runs on the CPU so far"
    return None


def takes_bfloat16(spec: ModelSpec) -> bool:
    """Whether the kernels of attention take a bfloat16 cache of this model: its heads are cut into pieces of 8."""
    return all(block.attention.head_dim % 8 == 0 for block in spec.blocks)


def attention_workspace(spec: ModelSpec, sequences: int, width: int) -> tuple[int, int]:
    """Floats and tickets that decode attention of so many sequences, of `width` cache blocks each, works with."""
    splits = -(-width // SPLIT_BLOCKS)
    attentions = [block.attention for block in spec.blocks]
    floats = max(sequences * a.kv_heads * splits * SPLIT_ROWS * (a.head_dim + 2) for a in attentions)
    return floats, sequences * max(a.kv_heads for a in attentions)


def _raw(array: DeviceArray | None) -> Any:
    return None if array is None else array.raw


def _paged(cache: DeviceArray, head_size: int) -> DeviceArray:
    """A layer of the cache [blocks, G, 2, 64 * Ep] as the kernels name its dimensions: [blocks, G, 2, 64, Ep]."""
    padded = -(-head_size // 16) * 16
    return cache.reshape(*cache.shape[:3], -1, padded)


def _typed(memory: DeviceArray, start: int, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
    """Bytes of `memory` from `start` on as an array."""
    raw = memory.device.kernels.Array(memory.raw.pointer + start, list(shape), DTYPES[dtype], owner=memory.raw.owner)
    return DeviceArray(memory.device, raw)
