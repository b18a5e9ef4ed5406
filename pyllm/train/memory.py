"""What training takes, in bytes, before anything is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm import _cpu
from pyllm.cache import BLOCK_TOKENS, KVCache, blocks_for
from pyllm.engine.runner import arena_floats
from pyllm.errors import ConfigError, InsufficientMemoryError
from pyllm.planning import GB, SPARE
from pyllm.spec import BlockSpec, HeadKind, ModelSpec, Placement
from pyllm.system import available_memory
from pyllm.train.parameters import layout_of

LOGITS_FLOATS = 1 << 25  # of a chunk of rows that pass through the head together, about
SCRATCH_ROWS, SCRATCH_COLUMNS = 1024, 4096  # of an incoming gradient that the kernels copy, at most


@dataclass(frozen=True)
class StepShape:
    """A micro-batch of `tokens` tokens in at most `sequences` sequences, and what decides how it is computed."""

    tokens: int
    sequences: int
    dtype: str = "float32"
    dropout: bool = False
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class StepFloats:
    """Floats of a step's arena: values kept until backward, those of a part of a block that are computed again, and
    gradients."""

    kept: int
    part: int
    gradients: int
    evaluation: int  # of a step without gradients, in the same memory

    @property
    def total(self) -> int:
        """All of them."""
        return max(self.kept + self.part + self.gradients, self.evaluation)


@dataclass(frozen=True)
class TrainPlan:
    """Bytes by purpose; `available` is what the system can give now."""

    spec: ModelSpec
    shape: StepShape
    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    scratch: int
    available: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache + self.scratch

    @property
    def fits(self) -> bool:
        """Whether it fits what is available, with some room for the interpreter."""
        return self.total + SPARE <= self.available

    def check(self) -> None:
        """Raise `InsufficientMemoryError` where it does not fit."""
        if self.fits:
            return
        raise InsufficientMemoryError(
            f"not enough memory to train: needed {self.total / GB:.2f} GB (weights {self.weights / GB:.2f}, gradients "
            f"{self.gradients / GB:.2f}, optimizer {self.optimizer / GB:.2f}, activations {self.activations / GB:.2f} "
            f"for {self.shape.tokens} tokens, keys and values {self.cache / GB:.2f}, scratch "
            f"{self.scratch / GB:.2f}), free {max(self.available - SPARE, 0) / GB:.2f} GB. Take fewer tokens in a "
            "micro-batch and accumulate more of them, keep fewer activations (checkpoint_activations), or choose a "
            "smaller model."
        )


def plan_training(spec: ModelSpec, shape: StepShape) -> TrainPlan:
    """Plan for a model and the shape of its micro-batches; nothing is laid out."""
    if spec.encoder is not None:
        raise ConfigError(f"{spec.family}: expected a model without an encoder: others cannot be trained so far")
    layout = layout_of(spec)
    weights = 4 * layout.size
    if shape.dtype != "float32":
        weights += sum(_cpu.packed_bytes(m.n, m.k, shape.dtype, m.gated) for m in layout.matrices)
    return TrainPlan(
        spec=spec,
        shape=shape,
        weights=weights,
        gradients=4 * layout.size,
        optimizer=8 * layout.size,
        activations=4 * step_floats(spec, shape).total,
        cache=cache_blocks(shape) * KVCache.block_bytes(spec, cache_dtype(shape), shared=shape.checkpoint_activations),
        scratch=_scratch(spec, shape),
        available=available_memory(),
    )


def _scratch(spec: ModelSpec, shape: StepShape) -> int:
    """Bytes of the kernels' scratch memory, nearly: that of the widest matrix, and a quarter more."""
    widest = max(m.n * (2 if m.gated else 1) for m in layout_of(spec).matrices)
    return 5 * min(shape.tokens, SCRATCH_ROWS) * min(widest, SCRATCH_COLUMNS)


def cache_dtype(shape: StepShape) -> str:
    """Of keys and values: as inference stores them."""
    return shape.dtype


def cache_blocks(shape: StepShape) -> int:
    """Blocks that hold a micro-batch, however it is cut into sequences, each of which begins a block."""
    return shape.tokens // BLOCK_TOKENS + min(shape.sequences, shape.tokens)


def table_width(spec: ModelSpec, shape: StepShape) -> int:
    """Blocks of the longest sequence."""
    return blocks_for(min(shape.tokens, spec.max_positions))


def scored_rows(spec: ModelSpec, shape: StepShape) -> int:
    """Rows of a micro-batch that the head is given: those of all tokens, or one for each sequence."""
    return shape.sequences if spec.head.kind is HeadKind.POOLED else shape.tokens


def head_rows(spec: ModelSpec, tokens: int) -> int:
    """Rows that pass through the head together: as even as they can be within `LOGITS_FLOATS`."""
    most = max(BLOCK_TOKENS, LOGITS_FLOATS // spec.outputs)
    chunks = -(-tokens // most)
    rows = -(-tokens // max(chunks, 1))
    return min(tokens, -(-rows // 16) * 16)


def step_floats(spec: ModelSpec, shape: StepShape) -> StepFloats:
    """What a :class:`pyllm.tape.Tape` takes from its arenas for one step."""
    tokens = shape.tokens

    def floats(columns: int, rows: int = tokens) -> int:
        return -(-columns * rows // 16) * 16

    width = floats(spec.hidden)
    branch = width if shape.dropout else 0

    def attention(b: BlockSpec) -> _Part:
        a = b.attention
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        normed = floats(queries) + floats(keys) if a.qk_norm is not None else 0
        qkv = floats(queries + 2 * keys)
        return _Part(
            qkv + normed + floats(queries) + floats(a.heads),
            floats(queries) + qkv + normed,
        )

    def mlp(b: BlockSpec) -> _Part:
        inner, pre = floats(b.mlp.hidden), floats(b.mlp.hidden * (2 if b.mlp.gated else 1))
        return _Part(inner + pre, inner)

    def parts(b: BlockSpec) -> list[_Part]:
        """With the norms before them, and what is added to the residual stream where it stands by itself."""
        norm, first, second = _Part(width, width), attention(b), mlp(b)
        if b.placement is Placement.NORMED:
            return [_Part(width, width) + part for part in (first, second)]
        if b.placement is Placement.SANDWICH:
            return [_Part(3 * width, 2 * width) + part for part in (first, second)]
        first, second = first + _Part(branch, branch), second + _Part(branch, branch)
        if b.placement is Placement.POST:
            return [first, second]
        if b.placement is Placement.SHARED:
            return [norm + first + second]
        if b.placement is Placement.PARALLEL:
            return [norm + norm + first + second]
        return [norm + first, norm + second]

    def streams(b: BlockSpec) -> int:
        """States of the residual stream that it makes, norms behind its parts included."""
        return 4 if b.placement in (Placement.POST, Placement.NORMED) else 2

    each = [part for b in spec.blocks for part in parts(b)]
    table = floats(spec.table_width)
    projected = spec.embedding.width is not None
    angles = sum(2 * floats(rope.dim // 2) for rope in (spec.rope, spec.local_rope) if rope is not None)
    biases = spec.relative_bias
    distances = floats(2 * biases[1].max_distance + 1, biases[0]) if biases is not None else 0
    places = width if spec.embedding.positions else 0  # where they are looked up by themselves
    scaled = spec.embedding.scale != 1
    norms = 0 if spec.embedding.norm is None else 1
    if spec.embedding.projects_sum:
        embedded = width + table * (1 + norms)
    else:
        embedded = width * (1 + norms)
        if projected:
            embedded += places + table * (2 if scaled else 1) + branch
        elif scaled:
            embedded += places + width
    if spec.embedding.second_positions:
        embedded += 2 * width  # what is looked up, and the sum
    scored = scored_rows(spec, shape)
    given, pooled = floats(spec.head_width, scored), floats(spec.hidden, scored)  # what the head's matrix and layer get
    layered = spec.head.transform is not None or spec.projects_to_head
    is_pooled = spec.head.kind is HeadKind.POOLED
    head = (width if spec.final_norm is not None else 0) + (pooled if is_pooled else 0)
    if spec.head.transform is not None:
        head += given * (3 if spec.head.transform.norm is not None else 2)  # before the activation, and behind it
    elif spec.projects_to_head:
        head += given
    head += given if spec.head.scale != 1 else 0
    kept = embedded + angles + distances + width * sum(streams(b) for b in spec.blocks) + head
    rows = head_rows(spec, scored)
    logits, capped = floats(spec.outputs, rows), spec.head.softcap is not None
    # The gradients of what the head is given, of what its layer is, and of the stream.
    stream = given + (pooled if layered else 0) + (width if is_pooled else 0)
    before = table + branch if projected else places if scaled else 0
    inside = max(max(part.gradients for part in each), before)
    return StepFloats(
        kept=kept + (0 if shape.checkpoint_activations else sum(part.values for part in each)),
        part=max(part.values for part in each) if shape.checkpoint_activations else 0,
        gradients=distances + max(given + (floats(2 * spec.outputs, rows) if capped else logits), stream + inside),
        evaluation=arena_floats(spec, tokens, tokens) + logits + pooled,
    )


@dataclass(frozen=True)
class _Part:
    """Floats of what is computed together: values and gradients."""

    values: int
    gradients: int

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.values + other.values, self.gradients + other.gradients)
