# The compiled kernels. pyllm.ops is the documented way to call them; arguments are checked at each call.
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[Any]
_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_I32 = NDArray[np.int32]
_I64 = NDArray[np.int64]
_Dropout = tuple[float, NDArray[np.uint64], int]

IGNORED_LABEL: int
BLOCK_TOKENS: int
HEAD_PAD: int
KEY_BLOCK: int
PANEL: int
GREEDY_BELOW: float
LIMITS_CHUNK: int
COMPILER: str
BUILD_TYPE: str

def allocate(bytes: int) -> NDArray[np.uint8]: ...
def isa_levels() -> list[str]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def fast_bf16_dots() -> bool: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]: ...
def uniform(seed: int, stream: int, position: int) -> float: ...

@final
class PackedMatrix:
    def __init__(
        self,
        n: int,
        k: int,
        dtype: str,
        gated: bool = False,
        group_size: int = 0,
        scale_dtype: str = "bfloat16",
        zeros: bool = False,
        memory: _Array | None = None,
    ) -> None: ...
    @property
    def flat(self) -> _F32: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def gated(self) -> bool: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

def packed_bytes(
    n: int,
    k: int,
    dtype: str,
    gated: bool = False,
    group_size: int = 0,
    scale_dtype: str = "bfloat16",
    zeros: bool = False,
) -> int: ...

@final
class Graph:
    def __len__(self) -> int: ...

@final
class Context:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def recording(self) -> bool: ...
    def begin_recording(self) -> None: ...
    def end_recording(self) -> Graph: ...
    def replay(self, graph: Graph) -> None: ...
    def pack(self, dst: PackedMatrix, src: _Array, row: int = 0, part: int = 0) -> None: ...
    def pack_quantized(
        self,
        dst: PackedMatrix,
        values: NDArray[np.uint8],
        scales: _Array,
        zeros: NDArray[np.uint8] | None,
        row: int = 0,
        part: int = 0,
    ) -> None: ...
    def matmul(
        self,
        out: _F32,
        x: _F32,
        w: PackedMatrix,
        bias: _F32 | None,
        bias_up: _F32 | None,
        residual: _F32 | None,
        activation: int,
        pre: _F32 | None,
    ) -> None: ...
    def unpack(self, out: _F32, packed: PackedMatrix) -> None: ...
    def norm(
        self,
        y: _F32,
        x: _F32,
        weight: _F32 | None,
        bias: _F32 | None,
        residual: _F32 | None,
        sum: _F32 | None,
        eps: float,
        kind: int,
    ) -> None: ...
    def norm_backward(
        self,
        dx: _F32,
        dweight: _F32 | None,
        dbias: _F32 | None,
        dy: _F32,
        x: _F32,
        weight: _F32 | None,
        residual: _F32 | None,
        eps: float,
        kind: int,
    ) -> None: ...
    def activation(self, y: _F32, x: _F32, up: _F32 | None, activation: int) -> None: ...
    def axpby(self, out: _F32, x: _F32, a: float, y: _F32 | None, b: float) -> None: ...
    def clamp(self, x: _F32, limit: float) -> None: ...
    def clamp_backward(self, dx: _F32, x: _F32, limit: float) -> None: ...
    def embedding(
        self,
        y: _F32,
        tokens: _I32,
        table: PackedMatrix | _Array,
        positions: _I32 | None,
        position_table: _F32 | None,
        types: _I32 | None,
        type_table: _F32 | None,
    ) -> None: ...
    def embedding_backward(
        self,
        dtable: PackedMatrix | _F32,
        dposition_table: _F32 | None,
        d_type_table: _F32 | None,
        dy: _F32,
        tokens: _I32,
        positions: _I32 | None,
        types: _I32 | None,
    ) -> None: ...
    def gather(self, y: _F32, x: _F32, index: _I32) -> None: ...
    def gather_backward(self, dx: _F32, dy: _F32, index: _I32) -> None: ...
    def pool(self, y: _F32, x: _F32, starts: _I32, pooling: int) -> None: ...
    def pool_backward(self, dx: _F32, dy: _F32, x: _F32 | None, starts: _I32, pooling: int) -> None: ...
    def gather_columns(self, y: _F32, x: _F32, index: _I32) -> None: ...
    def gather_columns_backward(self, dx: _F32, dy: _F32, index: _I32) -> None: ...
    def rope_angles(
        self, cos: _F32, sin: _F32, positions: _I32, inv_freq: _F32, table: _I32 | None, scaling: float
    ) -> None: ...
    def rope(self, x: _F32, cos: _F32, sin: _F32, head_size: int, inverse: bool = False) -> None: ...
    def kv_write(
        self, cache: _Array, k: _F32, v: _F32, slots: _I64, head_size: int, cos: _F32 | None, sin: _F32 | None
    ) -> None: ...
    def attention(
        self,
        out: _F32,
        q: _F32,
        cache: _Array,
        starts: _I32,
        lengths: _I32,
        tables: _I32,
        head_size: int,
        scale: float,
        window: int | None = None,
        lse: _F32 | None = None,
        dropout: _Dropout | None = None,
        bf16_dots: bool | None = None,
        causal: bool = True,
        prefix: _I32 | None = None,
        sinks: int = 0,
        bias: _F32 | None = None,
        slopes: _F32 | None = None,
        softcap: float | None = None,
    ) -> None: ...
    def attention_backward(
        self,
        dq: _F32,
        dk: _F32,
        dv: _F32,
        dout: _F32,
        out: _F32,
        q: _F32,
        cache: _Array,
        lse: _F32,
        starts: _I32,
        lengths: _I32,
        tables: _I32,
        head_size: int,
        scale: float,
        window: int | None = None,
        dropout: _Dropout | None = None,
        bf16_dots: bool | None = None,
        causal: bool = True,
        prefix: _I32 | None = None,
        sinks: int = 0,
        bias: _F32 | None = None,
        slopes: _F32 | None = None,
        softcap: float | None = None,
        dbias: _F32 | None = None,
        add_dbias: bool = False,
    ) -> None: ...
    def dropout(self, y: _F32, x: _F32, residual: _F32 | None, dropout: _Dropout | None) -> None: ...
    def cross_entropy(
        self,
        logits: _F32,
        loss: _F32,
        labels: _I32,
        scale: _F32 | None,
        z_loss: float,
        label_smoothing: float,
    ) -> None: ...
    def sigmoid_cross_entropy(self, x: _F32, loss: _F32, targets: _F32, scale: _F32 | None) -> None: ...
    def squared_error(self, x: _F32, loss: _F32, targets: _F32, scale: _F32 | None) -> None: ...
    def sample(
        self,
        tokens: _I32,
        logits: _F32,
        rows: NDArray[np.void],
        history: tuple[_I64, _I32, _I32] | None,
        bias: tuple[_I64, _I32, _F32] | None,
        allowed: tuple[_I64, _I32] | None,
    ) -> None: ...
    def logprobs(self, chosen: _F32, ranks: _I32, top: _F32, top_ids: _I32, logits: _F32, ids: _I32) -> None: ...
    def matmul_dx(self, out: _F32, dy: _F32, w: PackedMatrix, add: bool) -> None: ...
    def matmul_dw(self, dw: PackedMatrix, dy: _F32, x: _F32) -> None: ...
    def column_sum(self, out: _F32, x: _F32) -> None: ...
    def activation_backward(self, out: _F32, dy: _F32, pre: _F32, activation: int, gated: bool) -> None: ...
    def adamw(
        self,
        params: _F32,
        grads: _F32,
        m: _F32,
        v: _F32,
        hyper: _F64,
        weight_decay: float,
        narrow: PackedMatrix | None,
        clear: bool,
    ) -> None: ...
    def square_norm(self, out: _F64, x: _F32) -> None: ...
    def limits(
        self, limit: str, data: _F32 | None = None, streams: int = 1, chunks: int = 0, rounds: int = 0
    ) -> int: ...
