"""Runs one step of the model: fills the step's arrays from the scheduler's plan and calls the kernels.

A step in which every sequence has one token (decoding), or one token and drafts to check, is recorded once for each
number of sequences and of rows, up to the choice of the next tokens, and replayed; any other step calls the kernels
directly. All are the same model code and give the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.batch import I32, Batch
from pyllm.cache import BLOCK_TOKENS, KVCache
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence
from pyllm.model import Model
from pyllm.ops import F32, Arena, Ops
from pyllm.sampling import GREEDY_ROW, SampleInputs, SamplingState
from pyllm.spec import BlockSpec, ModelSpec

MAX_GRAPHS = 16  # recorded steps kept
HEAD_ROWS = 64  # rows that pass through the head together; bounds the memory of logits


@dataclass
class _Recorded:
    """A recorded step of B sequences and R rows with its arrays; `seats` tells who has which row of tables and draws,
    where each sequence has one row.

    What changes at every step is written through memoryviews, which do it in a fraction of numpy's time.
    """

    graph: _cpu.Graph
    batch: Batch
    logits: F32
    draws: NDArray[np.void]  # [R] of SAMPLE_ROW: how each token is chosen
    chosen: I32  # [R] the tokens chosen
    seats: list[tuple[Sequence | None, int, int]]  # sequence, residence, number of its blocks in the table

    def __post_init__(self) -> None:
        """Views of the arrays."""
        self.tokens, self.positions = self.batch.tokens.data, self.batch.positions.data
        self.slots, self.lengths = self.batch.slots.data, self.batch.lengths.data
        self.draw_positions, self.drawn = self.draws["position"].data, self.chosen.data


class Runner:
    """Model, kernels and memory of the steps."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        cache: KVCache,
        max_tokens: int,
        max_sequences: int,
        max_length: int,
        max_drafts: int = 0,
    ) -> None:
        self.model, self.ops, self.cache = model, ops, cache
        self.max_tokens = max_tokens
        self.max_rows = head_rows(max_sequences, max_drafts)
        self.table_width = -(-max_length // BLOCK_TOKENS)
        self._arena = Arena(arena_floats(model.spec, max_tokens, min(HEAD_ROWS, max_tokens)))
        self._decode_arena = Arena(decode_floats(model.spec, self.max_rows))  # for every recorded step
        self._logits = np.empty((min(self.max_rows, max_tokens), model.spec.vocab_size), np.float32)
        self._recorded: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()  # by sequences and rows
        self._inv_freq: dict[object, F32] = {}
        self._last: _Recorded | None = None  # of the last `decode`

    def decode(self, plan: Seq[Work], states: Seq[SamplingState]) -> tuple[F32, list[int] | None]:
        """Logits [R, V] after one more token of each sequence and after its drafts, and tokens [R] chosen from them.

        `states` choose, each at its sequence's end and behind every draft, as if the drafts were right. Tokens are None
        unless all states are plain. R is at most `max_rows`. The arrays are reused by the next step.
        """
        rows = sum(work.rows for work in plan)
        step = self._last = self._step(len(plan), rows)
        if rows > len(plan):
            return self._decode_ahead(step, plan, states)
        plain = True
        for i, (work, state) in enumerate(zip(plan, states, strict=True)):
            sequence, position = work.sequence, work.start
            step.tokens[i] = sequence.tokens[position]
            step.positions[i] = position
            step.slots[i] = sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            step.lengths[i] = position + 1
            count = len(sequence.blocks)
            holder, residence, known = step.seats[i]
            if holder is not sequence or residence != sequence.residence or known != count:
                step.batch.tables[i, :count] = sequence.table[:count]
                step.draws[i : i + 1] = state.row if state.plain else GREEDY_ROW
                step.seats[i] = (sequence, sequence.residence, count)
            step.draw_positions[i] = state.position
            plain = plain and state.plain
            if step.batch.rope_rows is not None:
                self._fill_rope(step.batch, i, sequence, position)
        self.ops.replay(step.graph)
        return step.logits, step.drawn.tolist() if plain else None

    def decode_on(self, plan: Seq[Work]) -> list[int]:
        """Tokens [B] after the ones that the last `decode` gave, for the same sequences in the same blocks."""
        step = self._last
        assert step is not None
        for i, work in enumerate(plan):
            step.tokens[i] = step.drawn[i]
            step.positions[i] = work.start
            step.slots[i] += 1
            step.lengths[i] += 1
            step.draw_positions[i] += 1
            if step.batch.rope_rows is not None:
                self._fill_rope(step.batch, i, work.sequence, work.start)
        self.ops.replay(step.graph)
        return step.drawn.tolist()

    def forward(self, plan: Seq[Work], trace: list[F32] | None = None) -> F32:
        """Residual stream [T, D] of all tokens of the plan; valid until the next step."""
        tokens = sum(work.rows for work in plan)
        width = max((len(work.sequence.blocks) for work in plan), default=0)
        prefix = any(work.start < work.sequence.prefix for work in plan)  # those behind it see no more than before
        batch = Batch.empty(tokens, len(plan), width, self.model.spec, prefix)
        self._fill(batch, plan)
        self.ops.use_arena(self._arena)
        self.ops.release(0)
        try:
            return self.model.forward(self.ops, batch, self.cache, trace)
        finally:
            self.ops.use_arena(None)

    def logits(self, x: F32, rows: I32) -> Iterator[tuple[int, F32]]:
        """Logits of these rows of the residual stream, as pieces (index of the first row, logits [<= HEAD_ROWS, V])."""
        piece = np.empty((min(len(rows), HEAD_ROWS), self.model.spec.vocab_size), np.float32)
        for first in range(0, len(rows), HEAD_ROWS):
            count = min(HEAD_ROWS, len(rows) - first)
            yield first, self.model.logits(self.ops, x, rows[first : first + count], out=piece[:count])

    def final_states(self, x: F32) -> F32:
        """Rows [R, D] of the residual stream after the final norm, in memory of their own."""
        states = self.model.final_norm(self.ops, x)
        return states.copy() if states is x else states

    def last_logits(self, plan: Seq[Work], x: F32) -> F32:
        """Logits [n, V] of the works that reach their sequence's end, in order: at its last token and its drafts."""
        ends = np.cumsum([work.rows for work in plan])
        spans = [np.arange(end - 1 - len(w.drafts), end) for end, w in zip(ends, plan, strict=True) if w.last]
        rows = np.concatenate([np.zeros(0, np.int32), *spans], dtype=np.int32)
        return self.model.logits(self.ops, x, rows, out=self._logits[: len(rows)])

    def _decode_ahead(
        self, step: _Recorded, plan: Seq[Work], states: Seq[SamplingState]
    ) -> tuple[F32, list[int] | None]:
        self._fill(step.batch, plan)
        for i, (work, state) in enumerate(zip(plan, states, strict=True)):
            span = slice(step.batch.starts[i], step.batch.starts[i + 1])
            step.draws[span] = state.row if state.plain else GREEDY_ROW
            step.draws["position"][span] += np.maximum(np.arange(work.rows) - (work.count - 1), 0).astype(np.uint64)
        self.ops.replay(step.graph)
        return step.logits, step.drawn.tolist() if all(state.plain for state in states) else None

    def _step(self, sequences: int, tokens: int) -> _Recorded:
        """The recorded step of this many sequences and tokens."""
        key = sequences, tokens
        if key not in self._recorded:
            if len(self._recorded) >= MAX_GRAPHS:
                self._recorded.popitem(last=False)
            self._recorded[key] = self._record(sequences, tokens)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _fill(self, batch: Batch, plan: Seq[Work]) -> None:
        at = 0
        for i, work in enumerate(plan):
            sequence, end = work.sequence, work.start + work.rows
            span = slice(at, at + work.rows)
            positions = np.arange(work.start, end)
            batch.tokens[span] = [*sequence.tokens[work.start : work.start + work.count], *work.drafts]
            batch.positions[span] = positions
            batch.slots[span] = (
                sequence.table[positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
            )
            batch.tables[i, : len(sequence.blocks)] = sequence.blocks
            batch.lengths[i] = end
            if batch.prefix is not None:
                batch.prefix[i] = work.sequence.prefix
            if batch.rope_rows is not None:
                for j in range(work.rows):
                    self._fill_rope(batch, at + j, sequence, work.start + j)
            at += work.rows
            batch.starts[i + 1] = at

    def _fill_rope(self, batch: Batch, row: int, sequence: Sequence, position: int) -> None:
        """Frequencies that depend on the length: a prompt's are those of all of it, later tokens' of their own."""
        rope = self.model.spec.rope
        assert rope is not None and batch.inv_freq is not None
        length = max(sequence.prompt_length, position + 1)
        key = rope.length_class(length)
        if key not in self._inv_freq:
            if len(self._inv_freq) > 4096:
                self._inv_freq.clear()
            self._inv_freq[key] = rope.inv_freq(length)
        batch.inv_freq[row] = self._inv_freq[key]

    def _record(self, sequences: int, tokens: int) -> _Recorded:
        """Record a step of this many sequences and tokens, one each where the numbers are equal."""
        spec = self.model.spec
        batch = Batch.empty(tokens, sequences, self.table_width, spec)
        batch.starts[:] = [*range(sequences), tokens]
        rows = np.arange(tokens, dtype=np.int32)
        draws = np.repeat(GREEDY_ROW, tokens)
        try:
            self.ops.use_arena(self._decode_arena)
            self.ops.release(0)
            self.ops.begin_recording()
            x = self.model.forward(self.ops, batch, self.cache)
            logits = self.model.logits(self.ops, x, rows)
            drawn = self.ops.sample(logits, SampleInputs(draws))
            graph = self.ops.end_recording()
        finally:
            self.ops.stop()
        return _Recorded(graph, batch, logits, draws, drawn, [(None, 0, 0)] * sequences)


def head_rows(sequences: int, drafts: int) -> int:
    """Rows of a step that need logits at most: every draft of a few sequences, one for each of some of many."""
    return min(sequences * (1 + drafts), max(HEAD_ROWS, sequences + HEAD_ROWS // 2))


def arena_floats(spec: ModelSpec, tokens: int, rows: int) -> int:
    """Floats that a step of so many tokens takes, with so many rows through the head's norm (logits not counted)."""

    def padded(columns: int, count: int = tokens) -> int:
        return columns * count + 16  # pieces start on 64 bytes

    def block(b: BlockSpec) -> int:
        a = b.attention
        attention = padded((a.heads + 2 * a.kv_heads) * a.head_dim) + padded(a.heads * a.head_dim)
        return 2 * padded(spec.hidden) + attention + padded(b.mlp.hidden)

    angles = sum(2 * padded(rope.dim // 2) for rope in (spec.rope, spec.local_rope) if rope is not None)
    projected = 0 if spec.embedding.width is None else padded(spec.table_width) + padded(spec.table_width, rows)
    if spec.embedding.scale != 1 and spec.embedding.positions:
        projected += padded(spec.hidden)
    head = 2 * padded(spec.hidden, rows) + (padded(spec.table_width, rows) if spec.head.scale != 1 else 0)
    biases = spec.relative_bias
    distances = padded(2 * biases[1].max_distance + 1, biases[0]) if biases is not None else 0
    return padded(spec.hidden) + projected + angles + distances + max(block(b) for b in spec.blocks) + head


def decode_floats(spec: ModelSpec, rows: int) -> int:
    """Floats of a recorded step of so many rows, the logits of all included."""
    return arena_floats(spec, rows, rows) + rows * spec.vocab_size + 16
