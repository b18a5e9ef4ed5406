"""What a model is, as data: frozen dataclasses and enums, the whole vocabulary of architectures.

Families differ only in the values they put here; code that computes reads these values and never asks for a family's
name. Sizes in shape comments: D hidden, H query heads, K key/value heads, E head size, F feed-forward, V vocabulary,
P learned positions, S token types, W width of the embedding table.
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

ENCODER = "encoder."  # what names of an encoder's weights, beside those of its decoder, begin with
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
    """Attention: query head h reads key/value head h // (heads / kv_heads); scores are multiplied by `scale`.

    Where it is `causal`, a token sees itself and those before it, else all of its sequence. Values of q, k and v are
    kept between -`clip` and `clip`. `qk_norm` normalises each head of q and k before the rotation, with weights that
    all heads share or, where `qk_norm_each`, have of their own. With a `window` of W, token i sees keys i-W+1 .. i.
    Scores s become `softcap` * tanh(s / softcap), and then receive a `bias` by the distance of their key.
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
    causal: bool = True
    bias: Alibi | Buckets | None = None
    softcap: float | None = None
    clip: float | None = None

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
        require(self.clip is None or (math.isfinite(self.clip) and self.clip > 0), "limit of q, k and v",
                "a finite number above 0, or None", self.clip)  # fmt: skip
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

    Between the two, with a norm of its own placed like theirs, stands the `cross` attention of a decoder to the states
    of its encoder, if there is one.

    `residual_scale` is what a NORMED block multiplies the residual stream by.
    """

    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    placement: Placement = Placement.PRE
    residual_scale: float = 1.0
    cross: AttentionSpec | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.cross is None or not self.placement.is_parallel, "cross attention",
                "none in a block of parallel parts", self.placement)  # fmt: skip
        plain = self.cross is None or not (
            self.cross.causal
            or self.cross.window
            or self.cross.qk_norm
            or self.cross.bias
            or self.cross.softcap
            or self.cross.clip
        )
        require(
            plain, "cross attention", "one to all of the source, without q/k norm, bias, soft cap or clip", self.cross
        )
        allowed = self.placement is Placement.NORMED or self.residual_scale == 1
        require(allowed and math.isfinite(self.residual_scale), "residual scale",
                "a finite number, and 1 unless the residual stream is normed", self.residual_scale)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingSpec:
    """How tokens become the residual stream: norm(project(scale * table[token]) + positions[position + offset] +
    second_positions[second position] + types[type]).

    `width` is that of the table where a projection brings it to that of the model; with `projects_sum` the other tables
    are as narrow, and it is the normed sum that is projected. `positions` is the rows of the position table, 0 for
    none; the first `position_offset` of them belong to no position. `second_positions` is that of the table of second
    positions, see :class:`pyllm.prefix.PrefixSpec`. `types` is the number of token types, which tell the texts of a
    pair apart.
    """

    width: int | None = None
    projects_sum: bool = False
    project_bias: bool = False
    positions: int = 0
    position_offset: int = 0
    second_positions: int = 0
    types: int = 0
    scale: float = 1.0
    norm: NormSpec | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.width is None or self.width > 0, "embedding width", "at least 1", self.width)
        require(0 <= self.position_offset <= self.positions, "offset in the position table",
                f"0 to its {self.positions} rows", self.position_offset)  # fmt: skip
        require(math.isfinite(self.scale), "embedding scale", "a finite number", self.scale)
        require(self.types >= 0, "token types", "at least 0", self.types)
        require(self.width is not None or not (self.projects_sum or self.project_bias), "embedding projection",
                "a width of the table where there is one", self.width)  # fmt: skip
        alone = self.width is not None and not self.projects_sum
        require(not (alone and self.types), "embedding projection", "of the sum where there are token types",
                "one of the table's row alone")  # fmt: skip
        require(self.scale == 1 or not (self.types or self.projects_sum), "embedding scale",
                "1 where there are token types or the sum is projected", self.scale)  # fmt: skip


class Pooling(str, Enum):
    """Which hidden states of a text make its vector: that of the last or first token, or the mean or maximum of all."""

    LAST = "last"
    CLS = "cls"
    MEAN = "mean"
    MAX = "max"


class HeadKind(str, Enum):
    """What a head says, and of what."""

    TOKENS = "tokens"  # a logit for each token of the vocabulary, at every token
    EACH = "each"  # whether it was put in place of another, at every token
    LABELS = "labels"  # scores of labels at every token
    POOLED = "pooled"  # scores of labels of a sequence, from its first token
    NEXT = "next"  # the same of two labels: whether the second text of a pair follows the first in some document
    NONE = "none"  # nothing: the model gives hidden states only

    @property
    def is_pooled(self) -> bool:
        """Whether it says one thing of a whole sequence."""
        return self in (HeadKind.POOLED, HeadKind.NEXT)


class Problem(str, Enum):
    """What scores of labels mean, as `problem_type` in a config.json."""

    SINGLE_LABEL = "single_label_classification"  # one label holds: softmax
    MULTI_LABEL = "multi_label_classification"  # each holds or not: sigmoid
    REGRESSION = "regression"  # the scores are the values


@dataclass(frozen=True)
class TransformSpec:
    """A layer before the head's matrix: norm(act(dense x)), with a bias."""

    activation: Activation
    norm: NormSpec | None = None


@dataclass(frozen=True)
class HeadSpec:
    """How the residual stream becomes logits or scores: scale * transform(final norm(x)) head^T + bias.

    A `tied` head is the embedding table. Where that is not as wide as the model, the transform, or else a projection
    without bias, leads to it. With a `softcap` c logits l become c * tanh(l / c). `labels` are the names of what a head
    of labels scores, `problem` what the scores mean.
    """

    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    kind: HeadKind = HeadKind.TOKENS
    transform: TransformSpec | None = None
    labels: tuple[str, ...] = ()
    problem: Problem | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(math.isfinite(self.scale), "scale of the head", "a finite number", self.scale)
        require(self.softcap is None or (math.isfinite(self.softcap) and self.softcap > 0), "soft cap of logits",
                "a finite number above 0, or None", self.softcap)  # fmt: skip
        scores = self.kind not in (HeadKind.TOKENS, HeadKind.NONE)
        require(bool(self.labels) == scores, "labels of the head", "some for a head of labels, else none", self.labels)
        require(not (scores and self.tied), "head", "a matrix of its own for a head of labels", "a tied one")
        none = self.tied and not self.bias and self.transform is None
        require(self.kind is not HeadKind.NONE or none, "head", "tied and without weights where there is none", self)

    @property
    def at(self) -> str:
        """What the names of its weights begin with."""
        return "head" if self.kind in (HeadKind.TOKENS, HeadKind.NONE) else f"{self.kind.value}_head"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder or an encoder: embedding, blocks, final norm, head.

    A decoder with an `encoder` writes about a source: the encoder's states of it, after its final norm, are what cross
    attention reads, and the decoder's text begins with `decoder_start_token_id`. The encoder reads the embedding table
    of the decoder; its weights stand under "encoder.", and its head means nothing.

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
    encoder: ModelSpec | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.vocab_size > 0, "vocabulary size", "at least 1", self.vocab_size)
        require(self.hidden > 0, "hidden size", "at least 1", self.hidden)
        require(len(self.blocks) > 0, "number of layers", "at least 1", len(self.blocks))
        require(len({block.attention.causal for block in self.blocks}) == 1, "attention of the blocks",
                "causal in all of them or in none", "both")  # fmt: skip
        require(self.max_positions > 0, "context length", "at least 1", self.max_positions)
        e = self.embedding
        require(e.positions == 0 or e.positions - e.position_offset >= self.max_positions,
                "rows of the position table", f"0, or at least the context of {self.max_positions} beyond the offset "
                f"of {e.position_offset}", e.positions)  # fmt: skip
        crossed = {block.cross is not None for block in self.blocks}
        require(crossed == {self.encoder is not None}, "cross attention",
                "one in every block of a decoder with an encoder, else in none", crossed)  # fmt: skip
        if self.encoder is not None:
            shared = self.encoder.vocab_size, self.encoder.hidden, self.encoder.table_width
            require(shared == (self.vocab_size, self.hidden, self.table_width), "vocabulary and width of the encoder",
                    "those of its decoder", shared)  # fmt: skip
            bare = self.encoder.head == HeadSpec(tied=True) and self.encoder.encoder is None
            require(bare, "head of the encoder", "none: one that is tied and has no weights", self.encoder.head)
            require(self.encoder.is_encoder, "attention of the encoder", "one that is not causal", "a causal one")
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
        """Columns of the embedding table."""
        return self.embedding.width or self.hidden

    @property
    def fills_blanks(self) -> bool:
        """Whether the model predicts what stands in blanks, behind a start token, and nothing else."""
        return self.prefix is not None and self.prefix.start_id is not None

    @property
    def stream_width(self) -> int:
        """Columns of what the embedding's tables add up to, before a projection of the sum."""
        return self.table_width if self.embedding.projects_sum else self.hidden

    @property
    def head_width(self) -> int:
        """Columns of the head's matrix."""
        return self.table_width if self.head.kind in (HeadKind.TOKENS, HeadKind.NONE) else self.hidden

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a row: logits of the vocabulary, or scores of labels."""
        return len(self.head.labels) or self.vocab_size

    @property
    def projects_to_head(self) -> bool:
        """Whether a projection without bias leads to the head."""
        return self.head_width != self.hidden and self.head.transform is None and self.head.kind is HeadKind.TOKENS

    @property
    def is_encoder(self) -> bool:
        """Whether tokens see those that follow them, so that nothing can be generated."""
        return not self.blocks[0].attention.causal

    def rope_of(self, block: BlockSpec) -> RopeSpec | None:
        """The rotation of a block's queries and keys."""
        return self.local_rope if block.attention.window is not None and self.local_rope is not None else self.rope

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
        embedding, head = self.embedding, self.head
        if embedding.width is not None:
            shapes.update(_linear_slots("embed.project", self.hidden, self.table_width, embedding.project_bias))
        if embedding.positions:
            shapes["positions.weight"] = (embedding.positions, self.stream_width)
        if embedding.second_positions:
            shapes["second_positions.weight"] = (embedding.second_positions, self.hidden)
        if embedding.types:
            shapes["types.weight"] = (embedding.types, self.stream_width)
        if embedding.norm is not None:
            shapes.update(_norm_slots("embed.norm", embedding.norm, self.stream_width))
        if self.relative_bias is not None:
            heads, buckets = self.relative_bias
            shapes["relative_bias.weight"] = (heads, buckets.count)
        for index, block in enumerate(self.blocks):
            shapes.update(self._block_slots(f"blocks.{index}", block))
        if self.final_norm is not None:
            shapes.update(_norm_slots("final_norm", self.final_norm, self.hidden))
        if self.projects_to_head:
            shapes["head.project.weight"] = (self.table_width, self.hidden)
        if head.transform is not None:
            shapes.update(_linear_slots(f"{head.at}.transform", self.head_width, self.hidden, bias=True))
            if head.transform.norm is not None:
                shapes.update(_norm_slots(f"{head.at}.norm", head.transform.norm, self.head_width))
        if not head.tied:
            shapes[f"{head.at}.weight"] = (self.outputs, self.head_width)
        if head.bias:
            shapes[f"{head.at}.bias"] = (self.outputs,)
        if self.encoder is not None:
            own = self.encoder.slots().items()
            shapes.update((f"{ENCODER}{name}", shape) for name, shape in own if name != "embed.weight")
        return shapes

    def num_parameters(self) -> int:
        """Numbers in all slots; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.slots().values())

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of all blocks that every token is multiplied with."""
        slots = self.slots().items()
        of_source = (".cross.k.weight", ".cross.v.weight")  # once for each token of the source
        return sum(
            math.prod(shape)
            for name, shape in slots
            if name.startswith("blocks.") and is_matrix(name, shape) and not name.endswith(of_source)
        )

    def operations(self, tokens: int, past: int = 0) -> int:
        """Multiplications and additions of `tokens` tokens that follow `past` others, with the head for the last one.

        They are those of the matrices and of attention; windows are not counted off.
        """
        seen = tokens * tokens if self.is_encoder else tokens * (tokens + 1) // 2
        keys = tokens * past + seen  # that the queries see, all together
        attention = sum(2 * b.attention.heads * b.attention.head_dim for b in self.blocks) * keys
        return 2 * (self.block_weights * tokens + attention + self.outputs * self.head_width)

    def _block_slots(self, at: str, block: BlockSpec) -> dict[str, tuple[int, ...]]:
        attention, mlp = block.attention, block.mlp
        shapes = _norm_slots(f"{at}.attn_norm", block.norm, self.hidden)
        shapes.update(self._attention_slots(f"{at}.attn", attention))
        if block.cross is not None:
            shapes.update(_norm_slots(f"{at}.cross_norm", block.norm, self.hidden))
            shapes.update(self._attention_slots(f"{at}.cross", block.cross))
        if block.placement is Placement.SANDWICH:
            for name in ("attn_post_norm", "mlp_post_norm"):
                shapes.update(_norm_slots(f"{at}.{name}", block.norm, self.hidden))
        if block.placement is not Placement.SHARED:
            shapes.update(_norm_slots(f"{at}.mlp_norm", block.norm, self.hidden))
        for name in ("gate", "up") if mlp.gated else ("up",):
            shapes.update(_linear_slots(f"{at}.mlp.{name}", mlp.hidden, self.hidden, mlp.bias))
        shapes.update(_linear_slots(f"{at}.mlp.down", self.hidden, mlp.hidden, mlp.bias))
        return shapes

    def _attention_slots(self, at: str, attention: AttentionSpec) -> dict[str, tuple[int, ...]]:
        rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        for name, out in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            shapes.update(_linear_slots(f"{at}.{name}", out, self.hidden, attention.qkv_bias))
        if attention.qk_norm is not None:
            for name, heads in (("q_norm", attention.heads), ("k_norm", attention.kv_heads)):
                each = (heads, attention.head_dim) if attention.qk_norm_each else (attention.head_dim,)
                shapes[f"{at}.{name}.weight"] = each
        shapes.update(_linear_slots(f"{at}.o", self.hidden, rows, attention.out_bias))
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
