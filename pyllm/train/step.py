"""One optimizer step: forward, loss and backward of micro-batches, then the update, each recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.batch import Batch
from pyllm.cache import KVCache
from pyllm.errors import RequestError
from pyllm.model import Model
from pyllm.ops import F32, Arena
from pyllm.ops_training import TrainingOps
from pyllm.spec import Pooling
from pyllm.tape import Dropout, Tape, TapeMemory
from pyllm.train.head_loss import IGNORED, HeadLoss, Labels, Loss
from pyllm.train.memory import (
    StepShape,
    cache_blocks,
    cache_dtype,
    head_rows,
    scored_rows,
    step_floats,
    table_width,
)
from pyllm.train.parameters import Parameters
from pyllm.train.report import I32
from pyllm.train.sources import Sources


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
        loss: Loss | None = None,
        optimizer: AdamW = AdamW(),
        dropout: float = 0.0,
    ) -> None:
        self.parameters, self.ops, self.shape = parameters, ops, shape
        self.optimizer = optimizer
        spec = parameters.spec
        self.model = Model(spec, parameters.model_weights)
        width = table_width(spec, shape.tokens)
        self.batch = Batch.empty(shape.tokens, shape.sequences, width, spec, spec.prefix is not None)
        self._sources: Sources | None = None
        if spec.encoder is not None:
            self._sources = Sources(spec, spec.encoder, shape)
            read = self._sources.batch
            self.batch = replace(self.batch, source_lengths=read.lengths, source_tables=read.tables)
        self.head_loss = HeadLoss(spec, shape, loss or Loss())
        pooled = spec.head.kind.is_pooled
        # What a head of labels gives for each sequence of an evaluation.
        self._scores: F32 | None = np.zeros((shape.sequences, spec.outputs), np.float32) if pooled else None
        self._scale: F32 = np.zeros(1, np.float32)
        self._seed = np.zeros(1, np.uint64)
        self._hyper = np.zeros(7, np.float64)
        self._squares = np.zeros(1, np.float64)
        shared = shape.checkpoint_activations
        blocks = cache_blocks(shape.tokens, shape.sequences)
        self._cache = KVCache(spec, blocks, cache_dtype(shape), shared=shared)
        self._floats = step_floats(spec, shape)
        self._memory: F32 = _cpu.allocate(4 * self._floats.total).view(np.float32)
        self._dropout = Dropout(dropout, self._seed) if dropout > 0 else None
        for _ in range(2):  # the second time, scratch memory has its size: graphs of the first keep smaller pieces
            self._gradients = self._record(self._accumulate)
            self._evaluation = self._record(self._evaluate)
            self._norm = self._record(lambda: ops.square_norm(self._squares, parameters.gradients))
            self._update = self._record(lambda: parameters.update(self._hyper, optimizer.weight_decay))

    # A step

    def fill(self, tokens: I32, labels: Labels, starts: I32, *more: I32) -> None:
        """Take in a micro-batch, as :class:`pyllm.train.Data` gives it; raises `RequestError` for one that is wrong."""
        spec, batch = self.parameters.spec, self.batch
        self._check_count(more)
        types = more[0] if more and spec.is_encoder else None
        positions = more[0] if more and spec.fills_blanks else None
        self._check(tokens, starts, types, positions)
        self.head_loss.check(labels)
        if self._sources is not None:
            self._check_sources(labels, starts, *more)
            self._sources.fill(*more)
        batch.tokens[:] = tokens
        self.head_loss.labels[:] = labels
        if batch.types is not None:
            batch.types[:] = 0 if types is None else types
        batch.fill_whole(starts, self._cache.blocks)
        if batch.rope_rows is not None:
            self._fill_rope(np.diff(starts))
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
        return float(self.head_loss.losses.sum(dtype=np.float64))

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
        """Sum of the losses of the micro-batch that was filled in, without what is added to them; no gradients."""
        self.ops.replay(self._evaluation)
        return float(self.head_loss.losses.sum(dtype=np.float64))

    def right(self) -> int | None:
        """How many labels of sequences the last evaluation was right about; None where labels are of another kind."""
        return None if self._scores is None else self.head_loss.right(self._scores)

    def first_bad(self) -> str:
        """In words, where values stop being numbers in the micro-batch that was filled in."""
        where = self.parameters.first_bad(self.parameters.weights)
        if where is not None:
            return f"the weights {where} are not finite"
        traces: dict[str, list[F32]] = {" of the encoder": [], "": []}
        traces[""].append(self._forward(self.ops, *traces.values()))
        for where, trace in traces.items():
            for layer, values in enumerate(trace):
                if not np.isfinite(values).all():
                    name = "the embedding" if layer == 0 else f"layer {layer - 1}"
                    return f"values are not finite from {name}{where} on. Lower the learning rate, or train in float32"
        return "values are not finite in the head. Lower the learning rate, or train in float32"

    @property
    def nbytes(self) -> int:
        """Bytes of activations, keys and values."""
        of_sources = self._sources.nbytes if self._sources is not None else 0
        return self._memory.nbytes + self._cache.nbytes + of_sources

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
        loss, ops, spec = self.head_loss, self.ops, self.parameters.spec
        assert weights.head is not None
        tape.head_losses(
            self._head_input(tape),
            weights.head,
            lambda logits, span: loss.compute(ops, logits, span, self._scale),
            rows=head_rows(spec, scored_rows(spec, self.shape)),
            bias=weights.head_bias,
            softcap=spec.head.softcap,
        )
        tape.backward()

    def _evaluate(self) -> None:
        self.ops.use_arena(Arena(self._floats.total, self._memory))
        x = self._head_input(self.ops)
        spec = self.parameters.spec
        total = scored_rows(spec, self.shape)
        rows = head_rows(spec, total)
        logits = self.ops.empty(rows, spec.outputs)
        for first in range(0, total, rows):
            span = slice(first, min(first + rows, total))
            out = logits[: span.stop - first] if self._scores is None else self._scores[span]
            piece = self.model.head(self.ops, x[span], out=out)
            self.head_loss.compute(self.ops, piece, span, None)

    def _head_input(self, ops: TrainingOps | Tape) -> F32:
        """What the head's matrix is multiplied with, for every row that has a label."""
        x = self._forward(ops)
        if self.parameters.spec.head.kind.is_pooled:
            x = ops.pool(x, self.batch.starts, Pooling.CLS)
        return self.model.head_input(ops, x)

    def _forward(
        self, ops: TrainingOps | Tape, encoder_trace: list[F32] | None = None, trace: list[F32] | None = None
    ) -> F32:
        """Residual stream [T, D] after the last block, of an encoder's sources first where the model has one."""
        sources = self._sources
        if sources is None:
            return self.model.forward(ops, self.batch, self._cache, trace)
        encoded = sources.encode(self.model, ops, encoder_trace)
        return self.model.forward(ops, self.batch, self._cache, trace, cross=sources.cross, source=encoded)

    def _record(self, calls: Any) -> _cpu.Graph:
        self.ops.begin_recording()
        try:
            calls()
            return self.ops.end_recording()
        finally:
            self.ops.stop()

    # Inside

    def _check_count(self, more: tuple[I32, ...]) -> None:
        spec = self.parameters.spec
        if self._sources is not None:
            if len(more) != 2:
                raise RequestError(
                    f"micro-batch: expected five arrays for this {spec.family} model, the last two being tokens of "
                    f"sources and where each starts, got {3 + len(more)}"
                )
        elif len(more) > (self.batch.types is not None if spec.is_encoder else spec.fills_blanks):
            found = "a fourth" if len(more) == 1 else f"{3 + len(more)}"
            raise RequestError(
                f"micro-batch: expected three arrays for this {spec.family} model, got {found}: it has no types of "
                "tokens, no blanks to fill or no encoder to read sources; leave out what it has not"
            )

    def _check(self, tokens: I32, starts: I32, types: I32 | None, positions: I32 | None) -> None:
        spec, shape = self.parameters.spec, self.shape
        arrays = [("tokens", tokens, shape.tokens), ("starts", starts, shape.sequences + 1)]
        arrays += [("types", types, shape.tokens)] if types is not None else []
        arrays += [("positions", positions, shape.tokens)] if positions is not None else []
        for name, array, size in arrays:
            _check_array(name, array, size)
        _check_starts("starts", "sequences", starts, shape.tokens, spec.max_positions)
        _check_ids("token", tokens, spec.vocab_size)
        if types is not None:
            _check_ids("token type", types, max(spec.embedding.types, 1))

    def _check_sources(self, labels: I32, starts: I32, source: I32, source_starts: I32) -> None:
        encoder, shape = self.parameters.spec.encoder, self.shape
        assert encoder is not None
        _check_array("tokens of sources", source, shape.source)
        _check_array("starts of sources", source_starts, shape.sequences + 1)
        _check_starts("starts of sources", "sources", source_starts, shape.source, encoder.max_positions)
        _check_ids("token of a source", source, encoder.vocab_size)
        counted = np.diff(np.append(0, np.cumsum(labels != IGNORED))[starts])
        empty = np.flatnonzero((counted > 0) & (np.diff(source_starts) == 0))
        if empty.size:
            raise RequestError(
                f"micro-batch: sequence {empty[0]} has labels that count and an empty source: expected at least one "
                "token for the encoder to read"
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


def _check_array(name: str, array: I32, size: int) -> None:
    if array.dtype != np.int32 or array.shape != (size,):
        raise RequestError(f"micro-batch: {name}: expected int32 [{size}], got {array.dtype} {list(array.shape)}")


def _check_starts(name: str, what: str, starts: I32, total: int, longest: int) -> None:
    lengths = np.diff(starts)
    if starts[0] != 0 or starts[-1] != total or (lengths < 0).any():
        raise RequestError(f"micro-batch: {name}: expected to rise from 0 to {total}, got {starts.tolist()}")
    if lengths.max(initial=0) > longest:
        raise RequestError(
            f"micro-batch: expected {what} of at most the model's {longest} positions, got one of {lengths.max()} "
            "tokens: cut the texts shorter"
        )


def _check_ids(name: str, ids: I32, count: int) -> None:
    outside = ids[(ids < 0) | (ids >= count)]
    if outside.size:
        raise RequestError(
            f"micro-batch: {name} {outside[0]} lies outside the model's {count}: was the data tokenized for another "
            "model?"
        )
