"""The sources of a micro-batch, which an encoder reads beside the decoder that is trained to write about them."""

from __future__ import annotations

from pyllm.batch import Batch
from pyllm.cache import KVCache
from pyllm.engine.runner import SCRATCH_DTYPE
from pyllm.model import EncodedSource, Model
from pyllm.ops import F32
from pyllm.ops_training import TrainingOps
from pyllm.spec import ModelSpec
from pyllm.tape import Tape
from pyllm.train.memory import StepShape, cache_blocks, cache_dtype, table_width
from pyllm.train.report import I32


class Sources:
    """Arrays and caches for the sources of a micro-batch: `batch` is what the encoder reads, `cross` the cache of what
    cross attention makes of it, where each source has the blocks that it has in the encoder's own cache."""

    def __init__(self, spec: ModelSpec, encoder: ModelSpec, shape: StepShape) -> None:
        shared, self._blocks = shape.checkpoint_activations, cache_blocks(shape.source, shape.sequences)
        self.batch = Batch.empty(shape.source, shape.sequences, table_width(encoder, shape.source), encoder)
        self.cross = KVCache(spec, self._blocks, cache_dtype(shape), shared=shared, cross=True)
        self._cache = KVCache(encoder, self._blocks, SCRATCH_DTYPE, shared=shared)

    def fill(self, tokens: I32, starts: I32) -> None:
        """Take in the tokens int32 [S] of all sources and where each starts, int32 [B + 1]."""
        self.batch.tokens[:] = tokens
        self.batch.fill_whole(starts, self._blocks)

    def encode(self, model: Model, ops: TrainingOps | Tape, trace: list[F32] | None = None) -> EncodedSource:
        """The encoder's states of them, and where cross keys and values go; `trace` collects states of every layer."""
        states = model.encode(ops, self.batch, self._cache, trace)
        if trace is not None:
            trace.append(states)
        return EncodedSource(states, self.batch.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of both caches."""
        return self.cross.nbytes + self._cache.nbytes
