"""A masked language model that proposes what may stand in place of hidden tokens, for a discriminator to detect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyllm.batch import Batch
from pyllm.cache import KVCache
from pyllm.engine.runner import HEAD_ROWS, SCRATCH_DTYPE, arena_floats
from pyllm.errors import ConfigError, NonFiniteError
from pyllm.model import Model
from pyllm.models import open_checkpoint
from pyllm.ops import Ops
from pyllm.packed import pack_weights, packed_bytes, precision_of
from pyllm.sampling import GREEDY_ROW, SampleInputs
from pyllm.spec import HeadKind, ModelSpec
from pyllm.train.memory import cache_blocks, table_width
from pyllm.train.report import I32
from pyllm.train.token_store import digest

DTYPE = "float32"  # of its weights


def generator_bytes(folder: Path, reader: ModelSpec, context: int, tokens: int, sequences: int) -> int:
    """What a `Generator` of the same arguments takes: weights, keys and values, activations and logits."""
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        _check(folder, spec, reader, context)
        weights = packed_bytes(checkpoint, precision_of(checkpoint, DTYPE))
    cache = cache_blocks(tokens, sequences) * KVCache.block_bytes(spec, SCRATCH_DTYPE, shared=True)
    return weights + cache + 4 * (arena_floats(spec, tokens, HEAD_ROWS) + HEAD_ROWS * spec.outputs)


class Generator:
    """The model in `folder`, in float32, for micro-batches of `tokens` tokens in at most `sequences` sequences.

    Raises `ConfigError` for a model that fills no masks, or not for texts of `reader`, the spec of who reads what it
    proposes, of up to `context` tokens. `key` identifies the content of its config.json and its weights.
    """

    def __init__(self, folder: Path, reader: ModelSpec, context: int, tokens: int, sequences: int, ops: Ops) -> None:
        with open_checkpoint(folder) as checkpoint:
            spec = checkpoint.spec
            _check(folder, spec, reader, context)
            weights = pack_weights(checkpoint, ops, precision_of(checkpoint, DTYPE))
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        self.key = "-".join(map(digest, files))
        self._model, self._ops = Model(spec, weights), ops
        self._batch = Batch.empty(tokens, sequences, table_width(spec, tokens), spec)
        self._cache = KVCache(spec, cache_blocks(tokens, sequences), SCRATCH_DTYPE, shared=True)
        self._arena = ops.arena(arena_floats(spec, tokens, HEAD_ROWS))
        self._logits = np.empty((HEAD_ROWS, spec.outputs), np.float32)

    def propose(self, hidden: I32, starts: I32, places: NDArray[np.intp], seed: int) -> I32:
        """A token for each of these places [n] of a masked micro-batch [T], drawn from what the model gives there.

        The i-th is draw number i of the `seed`. Raises `NonFiniteError` where the model gives no numbers.
        """
        ops, batch = self._ops, self._batch
        batch.tokens[:] = hidden
        batch.fill_whole(starts, self._cache.blocks)
        drawn = np.empty(len(places), np.int32)
        draws = np.repeat(GREEDY_ROW, len(places))
        draws["temperature"], draws["seed"], draws["position"] = 1, seed, np.arange(len(places))
        ops.use_arena(self._arena)
        ops.release(0)
        try:
            x = self._model.forward(ops, batch, self._cache)
            for first in range(0, len(places), HEAD_ROWS):
                rows, mark = places[first : first + HEAD_ROWS].astype(np.int32), ops.mark()
                logits = self._model.logits(ops, x, rows, out=self._logits[: len(rows)])
                ops.release(mark)
                drawn[first : first + len(rows)] = ops.sample(logits, SampleInputs(draws[first : first + len(rows)]))
        finally:
            ops.use_arena(None)
        if (drawn < 0).any():
            raise NonFiniteError("generator: its values are no numbers: train it anew, at a lower learning rate")
        return drawn


def _check(folder: Path, spec: ModelSpec, reader: ModelSpec, context: int) -> None:
    if not spec.is_encoder or spec.head.kind is not HeadKind.TOKENS:
        raise ConfigError(f"generator: expected an encoder that fills masks, {folder} is none")
    if spec.vocab_size != reader.vocab_size or spec.max_positions < context:
        raise ConfigError(
            f"generator: expected the model's {reader.vocab_size} tokens and a context of at least {context}, "
            f"{folder} has {spec.vocab_size} and {spec.max_positions}"
        )
