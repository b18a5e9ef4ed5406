"""Runs one step of the model: fills the step's arrays from the scheduler's plan and calls the kernels.

A step in which every sequence has one token (decoding), or one token and drafts to check, is recorded once for each
number of sequences and of rows and replayed; any other step calls the kernels directly. All are the same model code and
give the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from pyllm import _cpu
from pyllm.batch import I32, Batch
from pyllm.cache import BLOCK_TOKENS, KVCache
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence
from pyllm.model import Model
from pyllm.ops import F32, Arena, Ops
from pyllm.spec import BlockSpec, ModelSpec

MAX_GRAPHS = 8  # recorded steps kept of a kind
HEAD_ROWS = 64  # rows that pass through the head together; bounds the memory of logits


@dataclass
class _Recorded:
    """A recorded decode step of B sequences with its arrays; `rows` tells whose block table stands in which row."""

    graph: _cpu.Graph
    batch: Batch
    logits: F32
    rows: list[tuple[Sequence | None, int, int]] = field(default_factory=list)


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
        self._recorded: OrderedDict[int, _Recorded] = OrderedDict()
        self._verifying: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()  # by sequences and rows
        self._inv_freq: dict[object, F32] = {}

    def decode(self, plan: Seq[Work]) -> F32:
        """Logits [B, V] after one more token of each sequence; the array is reused by the next step."""
        step = self._recorded.get(len(plan))
        if step is None:
            if len(self._recorded) >= MAX_GRAPHS:
                self._recorded.popitem(last=False)
            step = self._recorded[len(plan)] = self._record(len(plan), len(plan))
        self._recorded.move_to_end(len(plan))
        batch = step.batch
        for i, work in enumerate(plan):
            sequence, position = work.sequence, work.start
            batch.tokens[i] = sequence.tokens[position]
            batch.positions[i] = position
            batch.slots[i] = sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            batch.lengths[i] = position + 1
            count = len(sequence.blocks)
            holder, residence, known = step.rows[i]
            if holder is not sequence or residence != sequence.residence or known != count:
                batch.tables[i, :count] = sequence.table[:count]
                step.rows[i] = (sequence, sequence.residence, count)
            if batch.rope_rows is not None:
                self._fill_rope(batch, i, sequence, position)
        self.ops.replay(step.graph)
        return step.logits

    def verify(self, plan: Seq[Work]) -> F32:
        """Logits [R, V] of all rows of the plan, at most `max_rows`; the array is reused by the next step."""
        key = len(plan), sum(work.rows for work in plan)
        step = self._verifying.get(key)
        if step is None:
            if len(self._verifying) >= MAX_GRAPHS:
                self._verifying.popitem(last=False)
            step = self._verifying[key] = self._record(*key)
        self._verifying.move_to_end(key)
        self._fill(step.batch, plan)
        self.ops.replay(step.graph)
        return step.logits

    def forward(self, plan: Seq[Work], trace: list[F32] | None = None) -> F32:
        """Residual stream [T, D] of all tokens of the plan; valid until the next step."""
        tokens = sum(work.rows for work in plan)
        width = max((len(work.sequence.blocks) for work in plan), default=0)
        batch = Batch.empty(tokens, len(plan), width, self.model.spec.rope)
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

    def last_logits(self, plan: Seq[Work], x: F32) -> F32:
        """Logits [n, V] of the works that reach their sequence's end, in order: at its last token and its drafts."""
        ends = np.cumsum([work.rows for work in plan])
        spans = [np.arange(end - 1 - len(w.drafts), end) for end, w in zip(ends, plan, strict=True) if w.last]
        rows = np.concatenate([np.zeros(0, np.int32), *spans], dtype=np.int32)
        return self.model.logits(self.ops, x, rows, out=self._logits[: len(rows)])

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
        batch = Batch.empty(tokens, sequences, self.table_width, spec.rope)
        batch.starts[:] = [*range(sequences), tokens]
        rows = np.arange(tokens, dtype=np.int32)
        try:
            self.ops.use_arena(self._decode_arena)
            self.ops.release(0)
            self.ops.begin_recording()
            x = self.model.forward(self.ops, batch, self.cache)
            logits = self.model.logits(self.ops, x, rows)
            graph = self.ops.end_recording()
        finally:
            self.ops.stop()
        return _Recorded(graph, batch, logits, [(None, 0, 0)] * sequences)


def head_rows(sequences: int, drafts: int) -> int:
    """Rows of a step that need logits at most: every draft of a few sequences, `HEAD_ROWS` with some of many."""
    return min(sequences * (1 + drafts), max(sequences, HEAD_ROWS))


def arena_floats(spec: ModelSpec, tokens: int, rows: int) -> int:
    """Floats that a step of so many tokens takes, with so many rows through the head's norm (logits not counted)."""

    def padded(columns: int, count: int = tokens) -> int:
        return columns * count + 16  # pieces start on 64 bytes

    def block(b: BlockSpec) -> int:
        a = b.attention
        attention = padded((a.heads + 2 * a.kv_heads) * a.head_dim) + padded(a.heads * a.head_dim)
        return 2 * padded(spec.hidden) + attention + padded(b.mlp.hidden)

    angles = 2 * padded(spec.rope.dim // 2) if spec.rope else 0
    return padded(spec.hidden) + angles + max(block(b) for b in spec.blocks) + 2 * padded(spec.hidden, rows)


def decode_floats(spec: ModelSpec, rows: int) -> int:
    """Floats of a recorded step of so many rows, the logits of all included."""
    return arena_floats(spec, rows, rows) + rows * spec.vocab_size + 16
