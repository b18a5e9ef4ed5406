"""Types of the compiled CUDA module: launchers of kernels over device memory. Shapes and meanings: csrc/cuda/*.h.

Launchers return before the kernel has ended. A wrong dtype is a ``TypeError``, a wrong shape, range or alignment a
``ValueError``, an error of CUDA itself a ``RuntimeError``. `stream` is an address, `activation` and `norm` are numbers
of :data:`pyllm.ops.ACTIVATIONS` and :data:`pyllm.ops.NORMS`.
"""

from collections.abc import Sequence
from typing import Any

RUNTIME_VERSION: int
ARCHITECTURES: str

def driver_version() -> int: ...
def let_launches_overlap(yes: bool) -> None: ...

class Array:
    def __init__(
        self,
        pointer: int,
        shape: Sequence[int],
        dtype: str,
        *,
        strides: Sequence[int] | None = None,
        owner: object = None,
    ) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def owner(self) -> Any: ...
    @property
    def nbytes(self) -> int: ...

def memory_info() -> tuple[int, int]: ...
def to_dlpack(array: Array, kind: int, device: int) -> Any: ...
def from_dlpack(capsule: object, kind: int, device: int) -> Array: ...
def read_probe(out: Array, x: Array, stream: int) -> None: ...
def empty_probe(overlapped: bool, stream: int) -> None: ...
def skinny_fits(rows: int, k: int, whole: bool) -> bool: ...
def skinny_matmul(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    activation: int,
    gated: bool,
    norm_weight: Array | None,
    norm_bias: Array | None,
    norm: int,
    eps: float,
    multiprocessors: int,
    stream: int,
) -> None: ...
def skinny_qkv(
    q: Array,
    cache: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    cos: Array | None,
    sin: Array | None,
    slots: Array,
    head_size: int,
    norm_weight: Array | None,
    norm_bias: Array | None,
    norm: int,
    eps: float,
    multiprocessors: int,
    stream: int,
) -> None: ...
def skinny_argmax(
    tokens: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    norm: int,
    eps: float,
    partial: Array,
    ticket: Array,
    multiprocessors: int,
    stream: int,
) -> None: ...
def split_matmul(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    activation: int,
    gated: bool,
    partial: Array,
    tickets: Array,
    stream: int,
) -> None: ...
def has_wgmma() -> bool: ...
def wgmma_clusters(size: int) -> int: ...
def wgmma_matmul(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    activation: int,
    gated: bool,
    multiprocessors: int,
    stream: int,
) -> None: ...
def mma_matmul(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    activation: int,
    gated: bool,
    stream: int,
) -> None: ...
def plain_matmul(
    y: Array,
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    activation: int,
    gated: bool,
    stream: int,
) -> None: ...
def prompt_attention(
    out: Array,
    lse: Array | None,
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    causal: bool,
    prefix: Array | None,
    window: int,
    sinks: int,
    bias: Array | None,
    slopes: Array | None,
    softcap: float,
    most_queries: int,
    wgmma: bool,
    stream: int,
) -> None: ...
def split_attention(
    out: Array,
    lse: Array | None,
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    causal: bool,
    prefix: Array | None,
    window: int,
    sinks: int,
    bias: Array | None,
    slopes: Array | None,
    softcap: float,
    most_queries: int,
    split_blocks: int,
    partial: Array,
    tickets: Array,
    stream: int,
) -> None: ...
def plain_attention(
    out: Array,
    lse: Array | None,
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    causal: bool,
    prefix: Array | None,
    window: int,
    sinks: int,
    bias: Array | None,
    slopes: Array | None,
    softcap: float,
    most_queries: int,
    stream: int,
) -> None: ...
def norm(
    y: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    sum: Array | None,
    eps: float,
    kind: int,
    stream: int,
) -> None: ...
def activation(y: Array, x: Array, up: Array | None, activation: int, stream: int) -> None: ...
def axpby(out: Array, x: Array, a: float, y: Array | None, b: float, stream: int) -> None: ...
def gather_columns(y: Array, x: Array, index: Array, stream: int) -> None: ...
def embedding(
    y: Array, tokens: Array, table: Array, positions: Array | None, position_table: Array | None, stream: int
) -> None: ...
def rope_angles(
    cos: Array, sin: Array, positions: Array, inv_freq: Array, table: Array | None, scaling: float, stream: int
) -> None: ...
def rope(x: Array, cos: Array, sin: Array, head_size: int, inverse: bool, stream: int) -> None: ...
def kv_write(
    cache: Array,
    k: Array,
    v: Array,
    slots: Array,
    head_size: int,
    cos: Array | None,
    sin: Array | None,
    stream: int,
) -> None: ...
def qkv_write(
    q: Array,
    cache: Array,
    qkv: Array,
    slots: Array,
    head_size: int,
    paired: bool,
    cos: Array | None,
    sin: Array | None,
    q_norm: Array | None,
    k_norm: Array | None,
    norm: int,
    eps: float,
    stream: int,
) -> None: ...
def sample(
    tokens: Array,
    logits: Array,
    rows: Array,
    history_starts: Array | None,
    history_ids: Array | None,
    history_counts: Array | None,
    bias_starts: Array | None,
    bias_ids: Array | None,
    bias_values: Array | None,
    allowed_starts: Array | None,
    allowed_ids: Array | None,
    workspace: Array | None,
    stream: int,
) -> None: ...
def logprobs(
    chosen: Array, ranks: Array, top: Array, top_ids: Array, logits: Array, ids: Array, stream: int
) -> None: ...
def advance(
    tokens: Array, positions: Array, slots: Array, lengths: Array, rows: Array, chosen: Array, stream: int
) -> None: ...
