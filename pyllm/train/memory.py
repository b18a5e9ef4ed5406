"""What training takes, in bytes, before anything is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm import _cpu
from pyllm.cache import BLOCK_TOKENS, KVCache, blocks_for
from pyllm.engine.runner import SCRATCH_DTYPE, arena_floats
from pyllm.errors import ConfigError, InsufficientMemoryError
from pyllm.planning import GB, SPARE
from pyllm.spec import ModelSpec
from pyllm.system import available_memory
from pyllm.train.parameters import layout_of
from pyllm.train.stack_floats import padded, stack_floats

LOGITS_FLOATS = 1 << 25  # of a chunk of rows that pass through the head together, about
SCRATCH_ROWS, SCRATCH_COLUMNS = 1024, 4096  # of an incoming gradient that the kernels copy, at most


@dataclass(frozen=True)
class StepShape:
    """A micro-batch of `tokens` tokens in at most `sequences` sequences, and what decides how it is computed.

    Where the model has an encoder, it reads as many sources of `source` tokens together.
    """

    tokens: int
    sequences: int
    dtype: str = "float32"
    dropout: bool = False
    checkpoint_activations: bool = False
    source: int = 0

    @property
    def all_tokens(self) -> int:
        """Those of the sources included."""
        return self.tokens + self.source


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
    """Bytes by purpose; `available` is what the system can give now, `generator` what a model takes whose
    tokens are detected."""

    spec: ModelSpec
    shape: StepShape
    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    scratch: int
    available: int
    generator: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        own = self.weights + self.gradients + self.optimizer + self.activations + self.cache + self.scratch
        return own + self.generator

    @property
    def fits(self) -> bool:
        """Whether it fits what is available, with some room for the interpreter."""
        return self.total + SPARE <= self.available

    def check(self) -> None:
        """Raise `InsufficientMemoryError` where it does not fit."""
        if self.fits:
            return
        other = f", generator {self.generator / GB:.2f}" if self.generator else ""
        raise InsufficientMemoryError(
            f"not enough memory to train: needed {self.total / GB:.2f} GB (weights {self.weights / GB:.2f}, gradients "
            f"{self.gradients / GB:.2f}, optimizer {self.optimizer / GB:.2f}, activations {self.activations / GB:.2f} "
            f"for {self.shape.all_tokens} tokens, keys and values {self.cache / GB:.2f}, scratch "
            f"{self.scratch / GB:.2f}{other}), free {max(self.available - SPARE, 0) / GB:.2f} GB. Take fewer tokens in "
            "a micro-batch and accumulate more of them, keep fewer activations (checkpoint_activations), or choose a "
            "smaller model."
        )


def plan_training(spec: ModelSpec, shape: StepShape, generator: int = 0) -> TrainPlan:
    """Plan for a model and the shape of its micro-batches, with a generator of so many bytes beside it; nothing is laid
    out."""
    if (spec.encoder is None) != (shape.source == 0):
        raise ConfigError(
            f"data: expected micro-batches {'without' if spec.encoder is None else 'with'} sources for this "
            f"{spec.family} model, which has {'no' if spec.encoder is None else 'an'} encoder to read them, got some "
            f"{'with' if spec.encoder is None else 'without'}"
        )
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
        cache=_cache_bytes(spec, shape),
        scratch=_scratch(spec, shape),
        available=available_memory(),
        generator=generator,
    )


def _cache_bytes(spec: ModelSpec, shape: StepShape) -> int:
    """Of keys and values: the decoder's, those of its encoder, and those of cross attention."""
    dtype, shared = cache_dtype(shape), shape.checkpoint_activations
    total = cache_blocks(shape.tokens, shape.sequences) * KVCache.block_bytes(spec, dtype, shared)
    if spec.encoder is not None:
        block = KVCache.block_bytes(spec.encoder, SCRATCH_DTYPE, shared)
        block += KVCache.block_bytes(spec, dtype, shared, cross=True)
        total += cache_blocks(shape.source, shape.sequences) * block
    return total


def _scratch(spec: ModelSpec, shape: StepShape) -> int:
    """Bytes of the kernels' scratch memory, nearly: that of the widest matrix, and a quarter more."""
    widest = max(m.n * (2 if m.gated else 1) for m in layout_of(spec).matrices)
    return 5 * min(max(shape.tokens, shape.source), SCRATCH_ROWS) * min(widest, SCRATCH_COLUMNS)


def cache_dtype(shape: StepShape) -> str:
    """Of keys and values: as inference stores them."""
    return shape.dtype


def cache_blocks(tokens: int, sequences: int) -> int:
    """Blocks that hold so many tokens, however they are cut into sequences, each of which begins a block."""
    return tokens // BLOCK_TOKENS + min(sequences, tokens)


def table_width(spec: ModelSpec, tokens: int) -> int:
    """Blocks of the longest sequence."""
    return blocks_for(min(tokens, spec.max_positions))


def scored_rows(spec: ModelSpec, shape: StepShape) -> int:
    """Rows of a micro-batch that the head is given: those of all tokens, or one for each sequence."""
    return shape.sequences if spec.head.kind.is_pooled else shape.tokens


def head_rows(spec: ModelSpec, tokens: int) -> int:
    """Rows that pass through the head together: as even as they can be within `LOGITS_FLOATS`."""
    most = max(BLOCK_TOKENS, LOGITS_FLOATS // spec.outputs)
    chunks = -(-tokens // most)
    rows = -(-tokens // max(chunks, 1))
    return min(tokens, -(-rows // 16) * 16)


def step_floats(spec: ModelSpec, shape: StepShape) -> StepFloats:
    """What a :class:`pyllm.tape.Tape` takes from its arenas for one step."""
    scored = scored_rows(spec, shape)
    given, pooled = padded(spec.head_width, scored), padded(spec.hidden, scored)  # what the head's matrix and layer get
    layered = spec.head.transform is not None or spec.projects_to_head
    is_pooled = spec.head.kind.is_pooled
    width = padded(spec.hidden, shape.tokens)
    head = pooled if is_pooled else 0
    if spec.head.transform is not None:
        head += given * (3 if spec.head.transform.norm is not None else 2)  # before the activation, and behind it
    elif spec.projects_to_head:
        head += given
    head += given if spec.head.scale != 1 else 0
    rows = head_rows(spec, scored)
    logits, capped = padded(spec.outputs, rows), spec.head.softcap is not None
    evaluation = arena_floats(spec, shape.tokens, shape.tokens) + logits + pooled
    stack = stack_floats(spec, shape.tokens, shape.source, shape.dropout)
    kept, shared, parts = stack.kept + head, stack.distances, list(stack.parts)
    # The gradients of what the head is given, of what its layer is, and of the stream.
    stream = given + (pooled if layered else 0) + (width if is_pooled else 0)
    inside = max(stack.parts_gradients, stack.before)
    if spec.encoder is not None:
        encoder = stack_floats(spec.encoder, shape.source, 0, shape.dropout)
        kept, parts = kept + encoder.kept, [*parts, *encoder.parts]
        shared += encoder.distances + padded(spec.hidden, shape.source)
        inside = max(inside, stack.before + max(encoder.parts_gradients, encoder.before))
        evaluation += arena_floats(spec.encoder, shape.source, shape.source) + stack.written
    return StepFloats(
        kept=kept + (0 if shape.checkpoint_activations else sum(part.values for part in parts)),
        part=max(part.values for part in parts) if shape.checkpoint_activations else 0,
        gradients=shared + max(given + (padded(2 * spec.outputs, rows) if capped else logits), stream + inside),
        evaluation=evaluation,
    )
