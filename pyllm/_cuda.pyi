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
    overlapped: bool,
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
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    window: int,
    most_queries: int,
    stream: int,
) -> None: ...
def split_attention(
    out: Array,
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    window: int,
    most_queries: int,
    split_blocks: int,
    partial: Array,
    tickets: Array,
    stream: int,
) -> None: ...
def plain_attention(
    out: Array,
    q: Array,
    cache: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    head_size: int,
    scale: float,
    window: int,
    most_queries: int,
    stream: int,
) -> None: ...
