"""The kernels on arrays: one method per kernel, which allocates the output and calls the compiled code.

This is how the model calls kernels and the public way to call one by itself::

    import numpy as np
    from pyllm.ops import Ops

    ops = Ops(threads=2)
    w = ops.pack(np.random.randn(1000, 64).astype("float32"))
    y = ops.matmul(np.ones((3, 64), "float32"), w)  # float32 [3, 1000]

Shapes: T tokens (rows) of all sequences of a step, B sequences, D model width, H heads, G key/value heads, E head size,
N outputs, K inner dimension, V vocabulary, R rows. Activations are float32; the last dimension of every array is
contiguous. A wrong dtype is a ``TypeError``, a wrong shape or value a ``ValueError``; both say what was expected and
what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.isa import default_threads
from pyllm.sampling import SampleInputs
from pyllm.spec import Activation, ModelSpec, NormKind, Pooling

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array: TypeAlias = NDArray[Any]
F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
Dropout: TypeAlias = tuple[float, NDArray[np.uint64], int]  # rate, seed [1], read when a kernel runs, and site

ACTIVATIONS = {
    None: 0,
    Activation.GELU_ERF: 1,
    Activation.GELU_TANH: 2,
    Activation.SILU: 3,
    Activation.RELU: 4,
    Activation.TANH: 5,
    Activation.SIGMOID: 6,
    Activation.QUICK_GELU: 7,
    Activation.RELU_SQUARED: 8,
}
GROUP_SIZES = {"int8": 0, "int4": 64}  # by default; 0: one scale for a row
NORMS = {NormKind.LAYER: 0, NormKind.RMS: 1}
POOLINGS = {Pooling.LAST: 0, Pooling.CLS: 1, Pooling.MEAN: 2, Pooling.MAX: 3}


class AttentionRule(TypedDict, total=False):
    """Which keys a query sees, and what becomes of its scores. A query stands at position p, its sequence's rows being
    the last of its keys.

    It sees key j of its sequence where both hold: ``j <= p``, or ``j < prefix``, or attention is not causal; and ``p -
    j < window``, without causal ``|p - j| < window``, or ``j < sinks``, or there is no window. Where neither causal nor
    a window is wanted, queries and keys need not be those of one sequence: that is cross-attention.

    A score becomes ``softcap * tanh(score / softcap)`` and then receives ``bias[h, j - p] + slopes[h] * (j - p)``. The
    bias has a column for each distance from -n to n, in order, of which the outer ones stand for those beyond.
    """

    causal: bool  # default True
    prefix: NDArray[np.int32] | None  # [B], read when the kernel runs; at most lengths; causal only
    window: int | None
    sinks: int  # first keys that every later query sees, besides its window
    bias: F32 | None  # [H, 2n + 1]
    slopes: F32 | None  # [H]
    softcap: float | None  # above 0


class HeadNorms(NamedTuple):
    """The norms of heads of queries and keys: weights [E], or [H, E] and [G, E] where heads have their own."""

    q: F32
    k: F32
    kind: NormKind
    eps: float


class DeviceLoop(Protocol):
    """What decoding on a GPU has beside the kernels: tokens are chosen, and the next step's inputs made, without the
    host, which takes the tokens as they come."""

    @property
    def recorded_memory(self) -> int:
        """Bytes of the GPU that recorded steps may take together."""

    def joins_argmax(self, w: Any, rows: int) -> bool:
        """Whether :meth:`argmax` is to be had for so many rows."""

    def argmax(self, x: Any, w: Any, bias: Any = None) -> Any:
        """The column of the largest of ``x w^T + bias`` in each row, the lowest of equals; -1 where one is NaN or +inf.

        x [R, K], w [N, K] -> int32 [R].
        """

    def advance(self, tokens: Any, positions: Any, slots: Any, lengths: Any, rows: Any, chosen: Any) -> None:
        """Make the inputs of the next step of decoding out of this one's: each sequence takes the token it chose.

        tokens, positions, lengths and chosen int32 [B], slots int64 [B], rows of SAMPLE_ROW [B], all on the GPU.
        """

    def fetch(self, array: Any) -> Any:
        """Begin to bring a small array to the host; the result's ``wait()`` gives it."""


class Ops:
    """Kernel calls on `threads` threads (default: the physical cores available to the process).

    Between :meth:`begin_recording` and :meth:`end_recording` calls are not run but recorded into a graph, which
    :meth:`replay` runs with one call as often as wanted; what changes from run to run is changed in the arrays.
    """

    on_gpu = False  # the rest is what the engine asks, to run on either
    packs_integers = True

    def __init__(self, threads: int | None = None) -> None:
        self.context = _cpu.Context(threads if threads is not None else default_threads())
        self._arena: Any = None  # an Arena, or what stands for one on a GPU

    @property
    def threads(self) -> int:
        """Number of threads that kernels run on."""
        return self.context.threads

    @property
    def loop(self) -> DeviceLoop | None:
        """What decoding on a GPU has besides; None on the CPU."""
        return None

    # Memory

    def empty(self, *shape: int) -> F32:
        """A float32 array for an output: fresh memory, or a piece of the arena inside :meth:`use_arena`."""
        if self._arena is not None:
            return self._arena.take(shape)  # type: ignore[no-any-return]
        return np.empty(shape, np.float32)

    def place(self, array: Array) -> Array:
        """An array of the host, where kernels read it: itself."""
        return array

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Memory that is kept, outside of any arena."""
        return host_memory(shape, dtype)

    def arena(self, floats: int) -> Any:
        """An arena of so many float32, for :meth:`use_arena`."""
        return Arena(floats)

    def reserve(self, spec: ModelSpec, sequences: int, width: int) -> None:
        """Have what attention of so many sequences of `width` cache blocks works with, before a recording."""

    def stage(self, arrays: Sequence[Any], lasting: bool = True) -> Stage:
        """Arrays that the host writes and kernels read, those of a recorded step being `lasting`."""
        return Stage(arrays, arrays)

    def tokens(self, chosen: NDArray[np.int32]) -> list[int]:
        """Tokens that a replayed step chose."""
        return chosen.tolist()  # type: ignore[no-any-return]

    def use_arena(self, arena: Any) -> None:
        """Take outputs from `arena` from here on; None goes back to fresh memory."""
        self._arena = arena

    def mark(self) -> int:
        """Where the arena stands now, for :meth:`release`."""
        return self._arena.used if self._arena is not None else 0

    def release(self, mark: int) -> None:
        """Give back what was taken from the arena since `mark`."""
        if self._arena is not None:
            self._arena.used = mark

    def shared(self, x: F32) -> F32:
        """x, which several blocks use: a tape has to know it."""
        return x

    # Recording

    def begin_recording(self) -> None:
        """From here kernel calls are recorded, not run."""
        self.context.begin_recording()

    def end_recording(self) -> _cpu.Graph:
        """The graph of the calls since :meth:`begin_recording`; it keeps their arrays alive."""
        return self.context.end_recording()

    def replay(self, graph: _cpu.Graph) -> None:
        """Run a recorded graph."""
        self.context.replay(graph)

    def stop(self) -> None:
        """End what a failure interrupted: a recording is dropped, outputs are fresh memory again."""
        if self.context.recording:
            self.context.end_recording()
        self.use_arena(None)

    # Weights

    def pack(
        self, *weights: Array, dtype: str | None = None, gate: Array | None = None, group_size: int | None = None
    ) -> _cpu.PackedMatrix:
        """Pack weights[i] [Ni, K] (float32, float16 or bfloat16, any strides), stacked along N, for :meth:`matmul`.

        `dtype` is "float32", "float16", "bfloat16", "int8" or "int4" (default: that of the first weight). With `gate`
        [N, K] the result is gated: matmul computes ``act(x gate^T) * (x weight^T)``.

        Integers are rounded here, symmetrically: each `group_size` weights of a row (32, 64 or 128; 0: all of them; by
        default 0 for int8, 64 for int4) share a scale, bfloat16 or for whole rows float32. It is max|w| / 127 for int8,
        and for int4 the one of several that leaves the least squared error. A weight that is not finite makes its
        group NaN.
        """
        to = dtype or str(weights[0].dtype)
        rows = sum(w.shape[0] for w in weights)
        group = GROUP_SIZES.get(to, 0) if group_size is None else group_size
        packed = _cpu.PackedMatrix(rows, weights[0].shape[1], to, gate is not None, group)
        if gate is not None:
            self.context.pack(packed, gate, 0, 0)
        row = 0
        for w in weights:
            self.context.pack(packed, w, row, int(gate is not None))
            row += w.shape[0]
        return packed

    def pack_qkv(self, *weights: Array, head_size: int, half: int, dtype: str | None = None) -> _cpu.PackedMatrix:
        """:meth:`pack` the weights of queries, keys and values, of heads of so many channels, of which `half` pairs are
        rotated; on a GPU for :meth:`queries`."""
        return self.pack(*weights, dtype=dtype)

    def pack_quantized(
        self,
        values: NDArray[np.uint8],
        scales: Array,
        zeros: NDArray[np.uint8] | None = None,
        *,
        dtype: str,
        group_size: int,
        columns: int | None = None,
        gate: tuple[NDArray[np.uint8], Array, NDArray[np.uint8] | None] | None = None,
    ) -> _cpu.PackedMatrix:
        """Pack integers that exist already, losslessly: weights are ``(values - zeros) * scales``.

        values: uint8, int8 as w + 128 [N, K], or int4 as w + 8, two a byte, the lower column in the low nibble [N,
        ceil(K / 2)]. scales: [N, ceil(K / group_size)] float16 or bfloat16, or for group_size 0 [N, 1] of any float
        dtype. zeros: uint8 like scales; None: 128 or 8. K is `columns`, by default what values hold. `gate` is another
        (values, scales, zeros) of the same kind, as in :meth:`pack`.
        """
        k = columns if columns is not None else values.shape[1] * (2 if dtype == "int4" else 1)
        scale_dtype = str(scales.dtype)
        packed = _cpu.PackedMatrix(
            values.shape[0], k, dtype, gate is not None, group_size, scale_dtype, zeros is not None
        )
        if gate is not None:
            self.context.pack_quantized(packed, *gate, 0, 0)
        self.context.pack_quantized(packed, values, scales, zeros, 0, int(gate is not None))
        return packed

    def unpack(self, packed: _cpu.PackedMatrix, out: F32 | None = None) -> F32:
        """The weights of a packed matrix of floats, exactly: [N, K], or of a gated one [2N, K], gate above up."""
        n, k = packed.shape
        out = np.empty((n * (1 + packed.gated), k), np.float32) if out is None else out
        self.context.unpack(out, packed)
        return out

    # Kernels

    def matmul(
        self,
        x: F32,
        w: _cpu.PackedMatrix,
        bias: F32 | None = None,
        bias_up: F32 | None = None,
        activation: Activation | None = None,
        residual: F32 | None = None,
        out: F32 | None = None,
        pre: F32 | None = None,
    ) -> F32:
        """``act(x w^T + bias) + residual``: x [T, K], w packed [N, K], bias [N], residual [T, N] -> [T, N].

        A gated w gives ``act(x gate^T + bias) * (x up^T + bias_up) + residual``. `out` may be `residual` itself.

        What `act` is applied to is also stored in `pre` [T, N] where given; gated: [T, 2N], ``x up^T + bias_up`` right
        of it.
        """
        out = self.empty(x.shape[0], w.shape[0]) if out is None else out
        self.context.matmul(out, x, w, bias, bias_up, residual, ACTIVATIONS[activation], pre)
        return out

    def queries(
        self,
        x: F32,
        w: _cpu.PackedMatrix,
        bias: F32 | None,
        cache: Array,
        slots: NDArray[np.int64],
        head_size: int,
        cos: F32 | None = None,
        sin: F32 | None = None,
        norms: HeadNorms | None = None,
    ) -> F32 | None:
        """On a GPU, what comes before attention: queries [T, H * E] of x [T, D], with w of :meth:`pack_qkv`, normed
        head by head and rotated where `norms` and cos are given; keys, alike, and values go into the cache.

        None: a product, :meth:`norm`, :meth:`rope` and :meth:`kv_write` do it one after the other.
        """
        return None

    def product_norm(self, x: F32, weight: F32, bias: F32 | None = None, *, kind: NormKind, eps: float) -> F32:
        """:meth:`norm` of x [R, D] for products that come before x is changed: on a GPU they may form it themselves."""
        return self.norm(x, weight, bias, kind=kind, eps=eps)

    def norm(
        self,
        x: F32,
        weight: F32 | None,
        bias: F32 | None = None,
        *,
        kind: NormKind,
        eps: float,
        residual: F32 | None = None,
        sum_out: F32 | None = None,
        out: F32 | None = None,
    ) -> F32:
        """Layer norm or RMS norm of ``x + residual`` over the last dimension: x [R, D], weight and bias [D] -> [R, D].

        x [T, H, E] with adjacent heads has each of its heads normalised, with one weight [E]; tokens may stand apart.
        With a weight [H, E] each head has its own, and there is neither bias nor residual.

        The sum itself is also written to `sum_out` [R, D] where given (it may be x); `out` may be x.
        """
        out = self.empty(*x.shape) if out is None else out
        if weight is not None and weight.ndim == 2:
            check_weights_of_heads(x, weight)
            for head in range(len(weight)):
                self.context.norm(out[:, head], x[:, head], weight[head], bias, residual, sum_out, eps, NORMS[kind])
            return out
        self.context.norm(out, x, weight, bias, residual, sum_out, eps, NORMS[kind])
        return out

    def activation(self, x: F32, activation: Activation, up: F32 | None = None, out: F32 | None = None) -> F32:
        """``act(x)``, or ``act(x) * up``: x and up [R, D] -> [R, D]."""
        out = self.empty(*x.shape) if out is None else out
        self.context.activation(out, x, up, ACTIVATIONS[activation])
        return out

    def axpby(self, x: F32, a: float, y: F32 | None = None, b: float = 1.0, out: F32 | None = None) -> F32:
        """``a * x + b * y``, without y ``a * x``: x and y [R, D] -> [R, D]. `out` may be x or y."""
        out = self.empty(*x.shape) if out is None else out
        self.context.axpby(out, x, a, y, b)
        return out

    def clamp(self, x: F32, limit: float) -> F32:
        """``min(max(x, -limit), limit)``: x [R, D], in place; NaN stays."""
        self.context.clamp(x, limit)
        return x

    def softcap(self, x: F32, cap: float, pre: F32 | None = None, out: F32 | None = None) -> F32:
        """``cap * tanh(x / cap)``: x [R, D] -> [R, D]. `out` may be x.

        For a backward pass `pre` receives x / cap; else that stands in `out` meanwhile.
        """
        out = self.empty(*x.shape) if out is None else out
        pre = self.axpby(x, 1 / cap, out=out if pre is None else pre)
        self.activation(pre, Activation.TANH, out=out)
        return self.axpby(out, cap, out=out)

    def add(self, x: F32, branch: F32, scale: float = 1.0, out: F32 | None = None) -> F32:
        """``scale * x + branch``, what a part of a block adds to the residual stream: [T, D] each; `out` may be x."""
        return self.axpby(x, scale, branch, out=out)

    def embedding(
        self,
        tokens: NDArray[np.int32],
        table: _cpu.PackedMatrix | Array,
        positions: NDArray[np.int32] | None = None,
        position_table: F32 | None = None,
        types: NDArray[np.int32] | None = None,
        type_table: F32 | None = None,
        out: F32 | None = None,
    ) -> F32:
        """``table[tokens] + position_table[positions] + type_table[types]``, the latter two where given: ids int32 [T],
        table [V, D] packed or plain, the others float32 [any, D] -> [T, D].
        """
        out = self.empty(tokens.shape[0], table.shape[1]) if out is None else out
        self.context.embedding(out, tokens, table, positions, position_table, types, type_table)
        return out

    def gather(self, x: F32, index: NDArray[np.int32]) -> F32:
        """``x[index]``: x [T, D], index int32 [R] -> [R, D]."""
        out = self.empty(index.shape[0], x.shape[1])
        self.context.gather(out, x, index)
        return out

    def pool(self, x: F32, starts: NDArray[np.int32], pooling: Pooling, out: F32 | None = None) -> F32:
        """One row from those of each sequence: x [T, D], starts int32 [B + 1], rising from 0 to T -> [B, D].

        Rows are taken in order, so that a sequence's result depends on nothing but its rows; one without rows gives 0.
        A maximum is NaN where a row has NaN.
        """
        out = self.empty(starts.shape[0] - 1, x.shape[1]) if out is None else out
        self.context.pool(out, x, starts, POOLINGS[pooling])
        return out

    def gather_columns(self, x: F32, index: NDArray[np.int32], out: F32 | None = None) -> F32:
        """``x[:, index]``: x [R, D], index int32 [N] -> [R, N]."""
        out = self.empty(x.shape[0], index.shape[0]) if out is None else out
        self.context.gather_columns(out, x, index)
        return out

    def rope_angles(
        self,
        positions: NDArray[np.int32],
        inv_freq: F32,
        table: NDArray[np.int32] | None = None,
        scaling: float = 1.0,
        out: tuple[F32, F32] | None = None,
    ) -> tuple[F32, F32]:
        """Cosines and sines [T, half] of ``positions[t] * inv_freq[table[t]]``, times `scaling`.

        positions int32 [T]; inv_freq float32 [C, half]; table int32 [T], the row of inv_freq for each token (default
        0).
        """
        shape = positions.shape[0], inv_freq.shape[1]
        cos, sin = (self.empty(*shape), self.empty(*shape)) if out is None else out
        self.context.rope_angles(cos, sin, positions, inv_freq, table, scaling)
        return cos, sin

    def rope(self, x: F32, cos: F32, sin: F32, head_size: int, inverse: bool = False) -> F32:
        """Rotate, in place, channels (i, i + half) of each head: x [T, heads * E], cos and sin [T, half]. Returns x.

        Inverse: by the angle's opposite, times the scaling, which is what takes gradients back.
        """
        self.context.rope(x, cos, sin, head_size, inverse)
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
        """Write keys (rotated first where cos is given) and values into one layer's cache.

        cache [blocks, G, 2, 64 * Ep] float32 or bfloat16, or [blocks, G, 2, 64 * (Ep + 2)] int8 with room for scales,
        Ep = E rounded up to 16; k and v [T, G * E]; slots int64 [T], each block * 64 + offset, negative to skip; cos
        and sin [T, half]. In int8 a head's key or value that is not finite in every channel is NaN as a whole.
        """
        self.context.kv_write(cache, k, v, slots, head_size, cos, sin)

    def attention(
        self,
        q: F32,
        cache: Array,
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        tables: NDArray[np.int32],
        *,
        head_size: int,
        scale: float,
        lse: F32 | None = None,
        dropout: Dropout | None = None,
        out: F32 | None = None,
        **rule: Unpack[AttentionRule],
    ) -> F32:
        """Attention of a ragged batch over the paged cache, which already holds this step's keys and values.

        q [T, H * E], already rotated; cache as in :meth:`kv_write`; starts int32 [B + 1], first row of each sequence;
        lengths int32 [B], keys in the cache, this step's included; tables int32 [B, width], block numbers -> [T, H *
        E]. A query sees keys up to its own position, or what `rule` says, see :class:`AttentionRule`; one that sees no
        key gives 0.

        For a backward pass `lse` [T, H] receives the log of the sum of exponentials of scores. `dropout`
        (rate, seed, site), the site being the layer, sets weights to 0 and divides the others by 1 - rate; which is a
        function of seed, site, head, row of q and position of the key.
        """
        out = self.empty(*q.shape) if out is None else out
        self.context.attention(
            out, q, cache, starts, lengths, tables, head_size, scale, lse=lse, dropout=dropout, **rule
        )
        return out

    def sample(self, logits: F32, inputs: SampleInputs) -> NDArray[np.int32]:
        """Choose a token for each row: logits [R, V], changed in place by penalties and biases -> int32 [R].

        `inputs` says how, row by row: see :func:`pyllm.sampling.sample_inputs`. In this order: penalties, bias, allowed
        tokens, temperature, top-k, top-p, min-p, a draw. Nothing but a row and its own inputs decides its token. It is
        -1 where nothing can be chosen: a NaN or +inf logit, or none that is allowed.
        """
        out = np.empty(logits.shape[0], np.int32)
        self.context.sample(out, logits, inputs.rows, inputs.history, inputs.bias, inputs.allowed)
        return out

    def logprobs(
        self, logits: F32, ids: NDArray[np.int32], top_n: int = 0
    ) -> tuple[F32, NDArray[np.int32], F32, NDArray[np.int32]]:
        """Log-softmax of logits [R, V] at ids int32 [R] and at the `top_n` largest.

        Returns log-probabilities [R] and ranks int32 [R] of `ids` (1 is the most probable), then log-probabilities [R,
        top_n] and ids int32 [R, top_n] of the most probable, falling, the lowest id first among equals. A row with a
        NaN or +inf logit gives NaN, rank 0 and ids -1; where fewer than top_n logits are finite, -inf and -1 fill up.
        """
        rows = logits.shape[0]
        chosen, ranks = np.empty(rows, np.float32), np.empty(rows, np.int32)
        top, top_ids = np.empty((rows, top_n), np.float32), np.empty((rows, top_n), np.int32)
        self.context.logprobs(chosen, ranks, top, top_ids, logits, ids)
        return chosen, ranks, top, top_ids


def check_weights_of_heads(x: F32, weight: F32) -> None:
    """Raise ``ValueError`` where the weights [H, E] of a norm are not those of the heads of x [T, H, E]."""
    if x.shape[1:] != weight.shape:
        raise ValueError(f"weight: expected {list(x.shape[1:])}, a row for each head of x, got {list(weight.shape)}")


def host_memory(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An array on huge pages where granted, whose memory is taken from the system as it is first written."""
    return _cpu.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).view(dtype).reshape(shape)


class Stage:
    """Arrays where the host writes them, and where kernels find them: the same on the CPU."""

    def __init__(self, host: Sequence[Any], placed: Sequence[Any]) -> None:
        self.host, self.placed = host, placed

    def send(self) -> None:
        """Bring what was written to where kernels find it."""

    def wait(self) -> None:
        """Wait until what was sent may be changed."""


class Arena:
    """One block of memory, laid out once per recorded step: outputs are taken in order and given back by mark.

    `memory` float32 [floats] is taken over where given, else it is allocated.
    """

    def __init__(self, floats: int, memory: F32 | None = None) -> None:
        self.memory: F32 = _cpu.allocate(floats * 4).view(np.float32) if memory is None else memory[:floats]
        self.used = 0

    def take(self, shape: Sequence[int]) -> F32:
        """The next prod(shape) floats, 64-byte aligned, as an array of that shape."""
        count = math.prod(shape)  # numpy's takes as long as a small kernel
        start = self.used
        self.used = start + (count + 15) // 16 * 16
        if self.used > self.memory.size:
            raise MemoryError(f"arena: {self.used * 4} bytes needed, {self.memory.nbytes} laid out")
        return self.memory[start : start + count].reshape(shape)
