"""One optimizer step: forward, loss and backward of micro-batches, then the update, each recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.batch import Batch
from pyllm.cache import BLOCK_TOKENS, KVCache
from pyllm.errors import RequestError
from pyllm.model import Model
from pyllm.ops import F32, Arena
from pyllm.ops_training import IGNORED_LABEL, TrainingOps
from pyllm.tape import Dropout, Tape, TapeMemory
from pyllm.train.memory import StepShape, cache_blocks, cache_dtype, cached, head_rows, step_floats, table_width
from pyllm.train.parameters import Parameters
from pyllm.train.report import I32

IGNORED = IGNORED_LABEL  # the label of a token that does not count


@dataclass(frozen=True)
class Loss:
    """What is added to cross entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class AdamW:
    """Constants of the optimizer; the rate comes with each update."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


class Step:
    """The computations of a training step for micro-batches of one shape, on the buffers of `parameters`."""

    def __init__(
        self,
        parameters: Parameters,
        ops: TrainingOps,
        shape: StepShape,
        *,
        loss: Loss = Loss(),
        optimizer: AdamW = AdamW(),
        dropout: float = 0.0,
    ) -> None:
        self.parameters, self.ops, self.shape = parameters, ops, shape
        self.loss, self.optimizer = loss, optimizer
        spec = parameters.spec
        self.model = Model(spec, parameters.model_weights)
        self.batch = Batch.empty(shape.tokens, shape.sequences, table_width(spec, shape), spec, spec.prefix is not None)
        self.labels: I32 = np.full(shape.tokens, IGNORED, np.int32)
        self.losses: F32 = np.zeros(shape.tokens, np.float32)
        self._scale: F32 = np.zeros(1, np.float32)
        self._seed = np.zeros(1, np.uint64)
        self._hyper = np.zeros(7, np.float64)
        self._squares = np.zeros(1, np.float64)
        self._cache = KVCache(cached(spec, shape), cache_blocks(shape), cache_dtype(shape))
        self._cache.layers *= len(spec.blocks) // len(self._cache.layers)
        self._floats = step_floats(spec, shape)
        self._memory: F32 = _cpu.allocate(4 * self._floats.total).view(np.float32)
        self._dropout = Dropout(dropout, self._seed) if dropout > 0 else None
        for _ in range(2):  # the second time, scratch memory has its size: graphs of the first keep smaller pieces
            self._gradients = self._record(self._accumulate)
            self._evaluation = self._record(self._evaluate)
            self._norm = self._record(lambda: ops.square_norm(self._squares, parameters.gradients))
            self._update = self._record(lambda: parameters.update(self._hyper, optimizer.weight_decay))

    # A step

    def fill(self, tokens: I32, labels: I32, starts: I32, positions: I32 | None = None) -> None:
        """Take in a micro-batch, as :class:`pyllm.train.Data` gives it; raises `RequestError` for one that is wrong."""
        self._check(tokens, labels, starts, positions)
        batch, lengths = self.batch, np.diff(starts)
        blocks = -(-lengths // BLOCK_TOKENS)
        first = np.cumsum(blocks) - blocks
        batch.tokens[:] = tokens
        self.labels[:] = labels
        batch.starts[:] = starts
        batch.lengths[:] = lengths
        batch.positions[:] = np.arange(self.shape.tokens) - np.repeat(starts[:-1], lengths)
        batch.slots[:] = np.repeat(first * BLOCK_TOKENS, lengths) + batch.positions
        width = batch.tables.shape[1]
        batch.tables[:] = np.minimum(first[:, None] + np.arange(width), self._cache.blocks - 1)
        if batch.rope_rows is not None:
            self._fill_rope(lengths)
        if batch.prefix is not None:
            self._fill_prefixes(tokens, labels, starts, positions)

    def accumulate(self, counted: int, seed: int) -> float:
        """Add the gradients of the micro-batch that was filled in, and give the sum of its losses.

        `counted` is the number of labels in all micro-batches of the step, which divides the gradient; `seed` is that
        of dropout.
        """
        self._scale[0] = 1 / counted
        self._seed[0] = seed
        self.ops.replay(self._gradients)
        return float(self.losses.sum(dtype=np.float64))

    def gradient_norm(self) -> float:
        """Of all gradients together."""
        self._squares[0] = 0
        self.ops.replay(self._norm)
        return float(np.sqrt(self._squares[0]))

    def update(self, step: int, learning_rate: float, gradient_scale: float) -> None:
        """The AdamW update that makes step `step`, counted from 1, from gradients times `gradient_scale`."""
        o = self.optimizer
        self._hyper[:] = [learning_rate, o.beta1, o.beta2, o.eps, 1 - o.beta1**step, 1 - o.beta2**step, gradient_scale]
        self.ops.replay(self._update)

    def evaluate(self) -> float:
        """Sum of the losses of the micro-batch that was filled in: cross entropy alone, no gradients."""
        self.ops.replay(self._evaluation)
        return float(self.losses.sum(dtype=np.float64))

    def first_bad(self) -> str:
        """In words, where values stop being numbers in the micro-batch that was filled in."""
        where = self.parameters.first_bad(self.parameters.weights)
        if where is not None:
            return f"the weights {where} are not finite"
        trace: list[F32] = []
        x = self.model.forward(self.ops, self.batch, self._cache, trace)
        for layer, values in enumerate([*trace, x]):
            if not np.isfinite(values).all():
                name = "the embedding" if layer == 0 else f"layer {layer - 1}"
                return f"values are not finite from {name} on. Lower the learning rate, or train in float32"
        return "values are not finite in the head. Lower the learning rate, or train in float32"

    @property
    def nbytes(self) -> int:
        """Bytes of activations, keys and values."""
        caches = {id(layer): layer.nbytes for layer in self._cache.layers}
        return self._memory.nbytes + sum(caches.values())

    # What is recorded

    def _accumulate(self) -> None:
        floats, memory, weights = self._floats, self._memory, self.parameters.model_weights
        part_at, gradients_at = floats.kept, floats.kept + floats.part
        arenas = TapeMemory(
            kept=Arena(floats.kept, memory),
            part=Arena(floats.part, memory[part_at:]) if floats.part else None,
            gradients=Arena(floats.gradients, memory[gradients_at:]),
        )
        tape = Tape(self.ops, arenas, self.parameters.gradient_of, self._dropout)
        x = self.model.head_input(tape, self.model.forward(tape, self.batch, self._cache))
        tape.token_losses(
            x,
            weights.head,
            self.labels,
            self._scale,
            self.losses,
            rows=head_rows(self.parameters.spec, self.shape.tokens),
            bias=weights.head_bias,
            softcap=self.parameters.spec.head.softcap,
            z_loss=self.loss.z_loss,
            label_smoothing=self.loss.label_smoothing,
        )
        tape.backward()

    def _evaluate(self) -> None:
        self.ops.use_arena(Arena(self._floats.total, self._memory))
        x = self.model.head_input(self.ops, self.model.forward(self.ops, self.batch, self._cache))
        rows = head_rows(self.parameters.spec, self.shape.tokens)
        logits = self.ops.empty(rows, self.parameters.spec.vocab_size)
        for first in range(0, self.shape.tokens, rows):
            span = slice(first, min(first + rows, self.shape.tokens))
            piece = self.model.head(self.ops, x[span], out=logits[: span.stop - first])
            self.ops.cross_entropy(piece, self.labels[span], None, loss=self.losses[span])

    def _record(self, calls: Any) -> _cpu.Graph:
        self.ops.begin_recording()
        try:
            calls()
            return self.ops.end_recording()
        finally:
            self.ops.stop()

    # Inside

    def _check(self, tokens: I32, labels: I32, starts: I32, positions: I32 | None) -> None:
        spec, shape = self.parameters.spec, self.shape
        expected = [("tokens", tokens, shape.tokens), ("labels", labels, shape.tokens)]
        expected += [("starts", starts, shape.sequences + 1)]
        expected += [("positions", positions, shape.tokens)] if positions is not None else []
        for name, array, size in expected:
            if array.dtype != np.int32 or array.shape != (size,):
                raise RequestError(
                    f"micro-batch: {name}: expected int32 [{size}], got {array.dtype} {list(array.shape)}"
                )
        if starts[0] != 0 or starts[-1] != shape.tokens or (np.diff(starts) < 0).any():
            raise RequestError(f"micro-batch: starts: expected to rise from 0 to {shape.tokens}, got {starts.tolist()}")
        longest = int(np.diff(starts).max(initial=0))
        if longest > spec.max_positions:
            raise RequestError(
                f"micro-batch: a sequence of {longest} tokens does not fit the model's context of {spec.max_positions}"
            )
        for name, ids, low in (("token", tokens, 0), ("label", labels[labels != IGNORED], 0)):
            if ids.size and (ids.min() < low or ids.max() >= spec.vocab_size):
                bad = int(ids[(ids < low) | (ids >= spec.vocab_size)][0])
                raise RequestError(
                    f"micro-batch: {name} {bad} lies outside the model's vocabulary of {spec.vocab_size}: was the data "
                    "tokenized for another model?"
                )

    def _fill_prefixes(self, tokens: I32, labels: I32, starts: I32, positions: I32 | None) -> None:
        """Where each sequence's bidirectional prefix ends: before its start token, or with the first label that counts,
        as everything before is given."""
        rule, batch = self.parameters.spec.prefix, self.batch
        assert rule is not None and batch.prefix is not None
        for i, (first, end) in enumerate(pairwise(starts.tolist())):
            counted = np.flatnonzero(labels[first:end] != IGNORED)
            if rule.start_id is None:
                batch.prefix[i] = counted[0] + 1 if len(counted) else end - first
                continue
            ids = tokens[first:end]
            batch.prefix[i] = rule.length(ids.tolist())
            if len(counted) and counted[0] < batch.prefix[i]:
                raise RequestError(
                    f"micro-batch: sequence {i}: label {counted[0]} counts, but stands in the prefix, whose tokens see "
                    f"it: expected labels from the start token (id {rule.start_id}) on"
                )
            places, second = rule.positions(ids)
            batch.place(slice(first, end), places if positions is None else positions[first:end], second)

    def _fill_rope(self, lengths: NDArray[Any]) -> None:
        """Frequencies that depend on a sequence's length."""
        rope, at = self.parameters.spec.rope, 0
        assert rope is not None and self.batch.inv_freq is not None
        for length in lengths.tolist():
            self.batch.inv_freq[at : at + length] = rope.inv_freq(max(length, 1))
            at += length
