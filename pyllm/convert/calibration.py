"""How strongly each input of each matrix is driven: mean squares of activations while the model reads a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.cache import BLOCK_TOKENS, BlockPool, KVCache
from pyllm.engine.runner import Runner
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence as EngineSequence
from pyllm.errors import NonFiniteError, RequestError
from pyllm.model import Model
from pyllm.ops import F32, Ops
from pyllm.packed import matrices_of, pack_weights
from pyllm.planning import plan_memory
from pyllm.weights import Checkpoint

WINDOW = 512  # tokens read together


class RecordingOps(Ops):
    """Kernel calls that also sum the squares of each input of each matrix."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)
        self.squares: dict[int, NDArray[np.float64]] = {}  # by the identity of the matrix
        self.rows: dict[int, int] = {}

    def matmul(self, x: F32, w: _cpu.PackedMatrix, *arguments: Any, **named: Any) -> F32:
        """As `Ops.matmul`."""
        sums = np.einsum("tk,tk->k", x, x, dtype=np.float64)
        self.squares[id(w)] = self.squares.get(id(w), 0) + sums
        self.rows[id(w)] = self.rows.get(id(w), 0) + len(x)
        return super().matmul(x, w, *arguments, **named)


def mean_squares(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, F32]:
    """Slot of a block's matrix -> mean square of each of its inputs, float32 [K], over all `tokens`.

    Every window is read as a text of its own. The model is held in memory meanwhile; `InsufficientMemoryError` if it
    does not fit, `NonFiniteError` if what it computes are no numbers.
    """
    if checkpoint.spec.encoder is not None:
        raise RequestError(
            "calibration: not of models with an encoder, which a text by itself says nothing to: convert without it"
        )
    window = min(WINDOW, checkpoint.spec.max_positions)
    plan = plan_memory(checkpoint, max_model_len=window, max_num_seqs=1, max_num_batched_tokens=window)
    plan.check()
    ops = RecordingOps(threads)
    weights = pack_weights(checkpoint, ops, plan.precision)
    cache = KVCache(checkpoint.spec, -(-window // BLOCK_TOKENS), plan.cache_dtype)
    runner = Runner(Model(checkpoint.spec, weights), ops, cache, window, 1, window)
    pool = BlockPool(cache.blocks)
    for at in range(0, len(tokens), window):
        rule, ids = checkpoint.spec.prefix, tokens[at : at + window]
        sequence = EngineSequence(ids, 0, share_prefix=False, prefix=0 if rule is None else rule.length(ids))
        assert sequence.reserve(pool, len(sequence.tokens))
        runner.forward([Work(sequence, 0, len(sequence.tokens), False)])
        sequence.leave(pool)
        if progress:
            progress(min(at + window, len(tokens)) / len(tokens))
    means: dict[str, F32] = {}
    for parts in matrices_of(checkpoint.spec):
        if parts.name.startswith("blocks."):
            key = id(weights.matrices[parts.name])
            means |= dict.fromkeys(parts.all_slots, (ops.squares[key] / ops.rows[key]).astype(np.float32))
    for slot, mean in means.items():
        if not np.all(np.isfinite(mean)):
            raise NonFiniteError(f"the inputs of {slot} are no longer numbers on the calibration text")
    return means
