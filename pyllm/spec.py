"""What a model is, as data: frozen dataclasses and enums, the whole vocabulary of architectures.

Families differ only in the values they put here; code that computes reads these values and never asks for a family's
name. Sizes in shape comments: D hidden, H query heads, K key/value heads, E head size, F feed-forward, V vocabulary,
P learned positions, W width of the embedding table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from pyllm.errors import require
from pyllm.position_bias import Alibi, Buckets
from pyllm.prefix import PrefixSpec
from pyllm.rope import RopeSpec

MAX_HEAD_DIM = 256  # the attention kernels keep a head's row in registers and on the stack


class NormKind(str, Enum):
    """How a normalisation layer scales its input."""

    LAYER = "layer"
    RMS = "rms"


class Activation(str, Enum):
    """Pointwise function of a feed-forward part or a head."""

    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    RELU = "relu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    QUICK_GELU = "quick_gelu"  # x sigmoid(1.702 x)
    RELU_SQUARED = "relu_squared"


@dataclass(frozen=True)
class NormSpec:
    """A layer norm or RMS norm; `eps` is added to the variance or mean square, inside the root."""

    kind: NormKind
    eps: float
    bias: bool

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(math.isfinite(self.eps) and 0 <= self.eps < 1, "norm eps", "0 <= eps < 1", self.eps)


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention: query head h reads key/value head h // (heads / kv_heads); scores are multiplied by `scale`.

    `qk_norm` normalises each head of q and k before the rotation, with weights that all heads share or, where
    `qk_norm_each`, have of their own. With a `window` of W, token i sees keys i-W+1 .. i. Scores s become
    `softcap` * tanh(s / softcap), and then receive a `bias` by the distance of their key.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_each: bool = False
    window: int | None = None
    bias: Alibi | Buckets | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.heads > 0, "attention heads", "at least 1", self.heads)
        require(self.kv_heads > 0 and self.heads % self.kv_heads == 0, "key/value heads",
                 f"a divisor of the {self.heads} query heads", self.kv_heads)  # fmt: skip
        require(0 < self.head_dim <= MAX_HEAD_DIM, "head size", f"1 to {MAX_HEAD_DIM}", self.head_dim)
        require(math.isfinite(self.scale) and self.scale > 0, "attention scale", "a finite number above 0", self.scale)
        require(self.window is None or self.window > 0, "attention window", "at least 1, or None", self.window)
        require(self.softcap is None or (math.isfinite(self.softcap) and self.softcap > 0), "soft cap of scores",
                "a finite number above 0, or None", self.softcap)  # fmt: skip
        require(self.qk_norm is None or not self.qk_norm.bias, "q/k norm", "a norm without bias", self.qk_norm)


@dataclass(frozen=True)
class MlpSpec:
    """down(act(up x)), or when gated down(act(gate x) * (up x))."""

    hidden: int
    activation: Activation
    gated: bool
    bias: bool

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.hidden > 0, "feed-forward size", "at least 1", self.hidden)


class Placement(str, Enum):
    """Where the norms N1 and N2 of a block stand; A is attention, M the feed-forward part, x the residual stream."""

    PRE = "pre"  # x += A(N1 x), then x += M(N2 x)
    POST = "post"  # x = N1(x + A x), then x = N2(x + M x)
    PARALLEL = "parallel"  # x += A(N1 x) + M(N2 x)
    SHARED = "shared"  # x += A(N1 x) + M(N1 x)
    SANDWICH = "sandwich"  # x += N1b(A(N1 x)), then x += N2b(M(N2 x))
    NORMED = "normed"  # x = s N1(x) + A(N1 x), then x = s N2(x) + M(N2 x), s being the residual scale

    @property
    def is_parallel(self) -> bool:
        """Whether attention and feed-forward part read the same residual stream."""
        return self in (Placement.PARALLEL, Placement.SHARED)


@dataclass(frozen=True)
class BlockSpec:
    """An attention and a feed-forward part, added to the residual stream; all norms are of one spec.

    `residual_scale` is what a NORMED block multiplies the residual stream by.
    """

    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    placement: Placement = Placement.PRE
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        allowed = self.placement is Placement.NORMED or self.residual_scale == 1
        require(allowed and math.isfinite(self.residual_scale), "residual scale",
                "a finite number, and 1 unless the residual stream is normed", self.residual_scale)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingSpec:
    """How tokens become the residual stream: norm(project(scale * table[token]) + positions[position + offset] +
    second_positions[second position]).

    `width` is that of the table where a projection brings it to that of the model. `positions` is the rows of the
    position table, 0 for none; the first `position_offset` of them belong to no position. `second_positions` is that of
    the table of second positions, see :class:`pyllm.prefix.PrefixSpec`.
    """

    width: int | None = None
    positions: int = 0
    position_offset: int = 0
    second_positions: int = 0
    scale: float = 1.0
    norm: NormSpec | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.width is None or self.width > 0, "embedding width", "at least 1", self.width)
        require(0 <= self.position_offset <= self.positions, "offset in the position table",
                f"0 to its {self.positions} rows", self.position_offset)  # fmt: skip
        require(math.isfinite(self.scale), "embedding scale", "a finite number", self.scale)


@dataclass(frozen=True)
class HeadSpec:
    """How the residual stream becomes logits: scale * project(final norm(x)) head^T + bias.

    A `tied` head is the embedding table. It projects where the table is not as wide as the model. With a `softcap` c
    logits l become c * tanh(l / c).
    """

    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(math.isfinite(self.scale), "scale of the head", "a finite number", self.scale)
        require(self.softcap is None or (math.isfinite(self.softcap) and self.softcap > 0), "soft cap of logits",
                "a finite number above 0, or None", self.softcap)  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embedding, blocks, final norm, head.

    With a `prefix` the first tokens of a sequence see one another.

    Layers that have a window rotate by `local_rope` where there is one, and all others by `rope`.

    `family` is for messages only. `max_positions` is the longest context that the checkpoint is made for, rope scaling
    included. `dtype` is the checkpoint's declared one ("float32", "float16" or "bfloat16"), if any.
    """

    family: str
    vocab_size: int
    hidden: int
    blocks: tuple[BlockSpec, ...]
    final_norm: NormSpec | None
    max_positions: int
    embedding: EmbeddingSpec = EmbeddingSpec()
    rope: RopeSpec | None = None
    local_rope: RopeSpec | None = None
    head: HeadSpec = HeadSpec()
    prefix: PrefixSpec | None = None
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.vocab_size > 0, "vocabulary size", "at least 1", self.vocab_size)
        require(self.hidden > 0, "hidden size", "at least 1", self.hidden)
        require(len(self.blocks) > 0, "number of layers", "at least 1", len(self.blocks))
        require(self.max_positions > 0, "context length", "at least 1", self.max_positions)
        e = self.embedding
        require(e.positions == 0 or e.positions - e.position_offset >= self.max_positions,
                "rows of the position table", f"0, or at least the context of {self.max_positions} beyond the offset "
                f"of {e.position_offset}", e.positions)  # fmt: skip
        require(e.second_positions == 0 or e.second_positions > self.max_positions, "rows of the second position table",
                f"0, or more than the context of {self.max_positions}", e.second_positions)  # fmt: skip
        start = None if self.prefix is None else self.prefix.start_id
        require(start is not None or not self.counts_twice, "second positions", "a prefix with a start token, where "
                "they begin", self.prefix)  # fmt: skip
        biases = {(a.heads, a.bias) for a in (b.attention for b in self.blocks) if isinstance(a.bias, Buckets)}
        require(len(biases) <= 1, "learned biases of distances", "the same heads and buckets in all layers that have "
                "them, as these share one table", sorted(map(str, biases)))  # fmt: skip
        smallest = min(block.attention.head_dim for block in self.blocks)
        for rope in filter(None, (self.rope, self.local_rope)):
            require(rope.dim <= smallest, "rotated channels of a head", f"at most the head size of {smallest}",
                    rope.dim)  # fmt: skip
        require(self.local_rope is None or (self.rope is not None and self.local_rope.length_class(1) is None),
                "rotary embedding of layers with a window", "one whose frequencies do not depend on the length, beside "
                "that of the other layers", self.local_rope)  # fmt: skip

    @property
    def table_width(self) -> int:
        """Columns of the embedding table and of the head."""
        return self.embedding.width or self.hidden

    @property
    def counts_twice(self) -> bool:
        """Whether tokens have two positions."""
        return self.embedding.second_positions > 0 or (self.rope is not None and self.rope.sections == 2)

    @property
    def relative_bias(self) -> tuple[int, Buckets] | None:
        """Heads and buckets of the table of learned biases that layers share; None where no layer has them."""
        for attention in (block.attention for block in self.blocks):
            if isinstance(attention.bias, Buckets):
                return attention.heads, attention.bias
        return None

    def untied(self) -> ModelSpec:
        """The same model with a head of its own."""
        return replace(self, head=replace(self.head, tied=False))

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model needs: canonical name -> shape, matrices as [out, in]."""
        return dict(self._slots)

    @cached_property
    def _slots(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.table_width)}
        if self.embedding.width is not None:
            shapes["embed.project.weight"] = (self.hidden, self.table_width)
        if self.embedding.positions:
            shapes["positions.weight"] = (self.embedding.positions, self.hidden)
        if self.embedding.second_positions:
            shapes["second_positions.weight"] = (self.embedding.second_positions, self.hidden)
        if self.embedding.norm is not None:
            shapes.update(_norm_slots("embed.norm", self.embedding.norm, self.hidden))
        if self.relative_bias is not None:
            heads, buckets = self.relative_bias
            shapes["relative_bias.weight"] = (heads, buckets.count)
        for index, block in enumerate(self.blocks):
            shapes.update(self._block_slots(f"blocks.{index}", block))
        if self.final_norm is not None:
            shapes.update(_norm_slots("final_norm", self.final_norm, self.hidden))
        if self.embedding.width is not None:
            shapes["head.project.weight"] = (self.table_width, self.hidden)
        if not self.head.tied:
            shapes["head.weight"] = (self.vocab_size, self.table_width)
        if self.head.bias:
            shapes["head.bias"] = (self.vocab_size,)
        return shapes

    def num_parameters(self) -> int:
        """Numbers in all slots; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.slots().values())

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of all blocks: what every token is multiplied with."""
        slots = self.slots().items()
        return sum(math.prod(shape) for name, shape in slots if name.startswith("blocks.") and is_matrix(name, shape))

    def operations(self, tokens: int, past: int = 0) -> int:
        """Multiplications and additions of `tokens` tokens that follow `past` others, with the head for the last one.

        They are those of the matrices and of causal attention; windows are not counted off.
        """
        keys = tokens * past + tokens * (tokens + 1) // 2  # that the queries see, all together
        attention = sum(2 * b.attention.heads * b.attention.head_dim for b in self.blocks) * keys
        return 2 * (self.block_weights * tokens + attention + self.vocab_size * self.table_width)

    def _block_slots(self, at: str, block: BlockSpec) -> dict[str, tuple[int, ...]]:
        attention, mlp = block.attention, block.mlp
        rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        shapes = _norm_slots(f"{at}.attn_norm", block.norm, self.hidden)
        for name, out in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            shapes.update(_linear_slots(f"{at}.attn.{name}", out, self.hidden, attention.qkv_bias))
        if attention.qk_norm is not None:
            for name, heads in (("q_norm", attention.heads), ("k_norm", attention.kv_heads)):
                each = (heads, attention.head_dim) if attention.qk_norm_each else (attention.head_dim,)
                shapes[f"{at}.attn.{name}.weight"] = each
        shapes.update(_linear_slots(f"{at}.attn.o", self.hidden, rows, attention.out_bias))
        if block.placement is Placement.SANDWICH:
            for name in ("attn_post_norm", "mlp_post_norm"):
                shapes.update(_norm_slots(f"{at}.{name}", block.norm, self.hidden))
        if block.placement is not Placement.SHARED:
            shapes.update(_norm_slots(f"{at}.mlp_norm", block.norm, self.hidden))
        for name in ("gate", "up") if mlp.gated else ("up",):
            shapes.update(_linear_slots(f"{at}.mlp.{name}", mlp.hidden, self.hidden, mlp.bias))
        shapes.update(_linear_slots(f"{at}.mlp.down", self.hidden, mlp.hidden, mlp.bias))
        return shapes


def is_matrix(slot: str, shape: tuple[int, ...]) -> bool:
    """Whether a slot is a matrix: a norm's weights are none, even if each head has some of its own."""
    return len(shape) == 2 and not slot.endswith("norm.weight")


def _norm_slots(name: str, norm: NormSpec, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    if norm.bias:
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _linear_slots(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes
