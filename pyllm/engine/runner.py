"""Runs one step of the model: fills the step's arrays from the scheduler's plan and calls the kernels.

A step in which every sequence has one token (decoding), or one token and drafts to check, is recorded once for each
number of sequences and of rows, up to the choice of the next tokens, and replayed (:mod:`pyllm.engine.recorded`); any
other step calls the kernels directly. All are the same model code. On the CPU they give the same bits; on a GPU a row's
kernels, and with them its last bits, depend on how many rows a step has (:mod:`pyllm.cuda_ops`).

On a GPU a recorded step is a CUDA graph, one for each size of block tables too. It ends by making the inputs of the
next step, so that while the same sequences go on in the same blocks it is replayed several steps ahead of what the host
has seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.batch import I32, Batch
from pyllm.cache import BLOCK_TOKENS, KVCache, blocks_for
from pyllm.engine.recorded import RecordedStep, RecordedSteps, StepKind, steps_kept, table_widths
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence
from pyllm.engine.sources import Source
from pyllm.model import AttentionTrace, EncodedSource, Model
from pyllm.ops import F32, Ops, Stage
from pyllm.prefix import Place
from pyllm.sampling import GREEDY_ROW, SampleInputs, SamplingState
from pyllm.spec import BlockSpec, ModelSpec

SCRATCH_DTYPE = "float32"  # at most, of an encoder's keys and values: they are read at once, and dropped
AHEAD = 8  # steps that a GPU computes before the tokens of the first are taken in
HEAD_ROWS = 64  # rows that pass through the head together; bounds the memory of logits


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
        cross: KVCache | None = None,
        max_source: int = 0,
    ) -> None:
        """`cross` is the cache of a model that has an encoder, `max_source` the tokens of its longest source."""
        self.model, self.ops, self.cache, self.cross = model, ops, cache, cross
        self.max_tokens = max_tokens
        self.max_rows = head_rows(max_sequences, max_drafts)
        self.table_width = -(-max_length // BLOCK_TOKENS)
        self._encoder: _Encoder | None = None
        if model.encoder is not None and cross is not None:
            dtype = cross.dtype if ops.on_gpu else SCRATCH_DTYPE
            self._encoder = _Encoder(model.encoder.spec, max(max_source, max_tokens), max_sequences, dtype, ops)
        self.max_source = max_source
        self._widths = table_widths(self.table_width, ops.on_gpu)
        self._arena = ops.arena(step_floats(model.spec, max_tokens, max_source))
        self._decode_arena = ops.arena(decode_floats(model.spec, self.max_rows))  # for every recorded step
        self._logits = ops.empty(min(self.max_rows, max_tokens), model.spec.outputs)
        ops.reserve(model.spec, max_sequences, max(self.table_width, blocks_for(max_source)))
        self._loop = ops.loop
        memory = None if self._loop is None else self._loop.recorded_memory
        most = steps_kept(model.spec, max_sequences, self.max_rows, self.table_width, memory)
        self._recorded = RecordedSteps(most)
        self._ahead: deque[Any] = deque()  # tokens on their way, of steps after the last one taken in
        self._inv_freq: dict[object, F32] = {}
        self._counts_twice = model.spec.counts_twice
        self._last: RecordedStep | None = None  # of the last `decode`

    def decode(self, plan: Seq[Work], states: Seq[SamplingState]) -> tuple[F32, list[int] | None]:
        """Logits [R, V] after one more token of each sequence and after its drafts, and tokens [R] chosen from them.

        `states` choose, each at its sequence's end and behind every draft, as if the drafts were right. Tokens are None
        unless all states are plain; where these choose the largest logit, a GPU may make none: [R, 0]. R is at most
        `max_rows`. The arrays are reused by the next step.
        """
        rows = sum(work.rows for work in plan)
        greedy = rows == len(plan) and self.model.joins_choice(self.ops, rows)
        greedy = greedy and all(state.plain and state.greedy for state in states)
        width = self.table_width
        if len(self._widths) > 1:
            most = max(len(work.sequence.blocks) for work in plan)
            width = next(width for width in self._widths if width >= most)
        step = self._last = self._recorded.get(StepKind(len(plan), rows, width, greedy), self._record)
        self._ahead.clear()
        step.stage.wait()
        if rows > len(plan):
            return self._decode_drafts(step, plan, states)
        plain = True
        for i, (work, state) in enumerate(zip(plan, states, strict=True)):
            sequence, position = work.sequence, work.start
            step.tokens[i] = sequence.tokens[position]
            step.positions[i] = position
            if self._counts_twice:
                self._place(step.batch, i, sequence, position)
            step.slots[i] = sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            step.lengths[i] = position + 1
            count = len(sequence.blocks)
            if step.seats[i] != (sequence.residence, count):
                step.batch.tables[i, :count] = sequence.table[:count]
                _fill_source(step.batch, i, sequence)
                step.draws[i : i + 1] = state.row if state.plain else GREEDY_ROW
                step.seats[i] = (sequence.residence, count)
            step.draw_positions[i] = state.position
            plain = plain and state.plain
            if step.batch.rope_rows is not None:
                self._fill_rope(step.batch, i, sequence, position)
        return self._run(step, plain)

    def decode_on(self, plan: Seq[Work], more: int = 0) -> list[int]:
        """Tokens [B] after the ones that the last `decode` gave, for the same sequences in the same blocks, which have
        room for as many steps `more` after this one."""
        step = self._last
        assert step is not None
        if self._loop is not None and step.batch.rope_rows is None and not self._counts_twice:
            while len(self._ahead) <= min(more, AHEAD - 1):
                self.ops.replay(step.graph)
                self._ahead.append(self._loop.fetch(step.chosen))
            return self._ahead.popleft().wait().tolist()  # type: ignore[no-any-return]
        step.stage.wait()
        for i, work in enumerate(plan):
            step.tokens[i] = step.drawn[i]
            step.positions[i] = work.start
            if self._counts_twice:
                self._place(step.batch, i, work.sequence, work.start)
            step.slots[i] += 1
            step.lengths[i] += 1
            step.draw_positions[i] += 1
            if step.batch.rope_rows is not None:
                self._fill_rope(step.batch, i, work.sequence, work.start)
        self._run(step, True)
        return step.drawn

    def encode(
        self, sources: Seq[Source], trace: list[F32] | None = None, attentions: AttentionTrace | None = None
    ) -> F32 | None:
        """Run the encoder over these sources, as many together as fit, and keep what cross attention reads of them.

        Where `trace` collects the encoder's states, the last ones [S, D], after the final norm, are returned.
        `attentions` collects its attention weights, of one source.
        """
        states, encoder = None, self._encoder
        assert encoder is not None and self.cross is not None
        while sources:
            lengths = np.array([len(source.tokens) for source in sources])
            count = int(np.searchsorted(np.cumsum(lengths), encoder.max_tokens, side="right"))
            together, sources = sources[:count], sources[count:]
            batch = whole_texts(encoder.spec, [source.tokens for source in together], encoder.scratch.blocks)
            stage, slots = self.ops.stage(_arrays(batch), lasting=False), self.ops.place(cross_slots(together))
            stage.send()
            self.ops.use_arena(self._arena)
            self.ops.release(0)
            try:
                states = self.model.encode(self.ops, Batch(*stage.placed), encoder.scratch, trace, attentions)
                self.model.write_cross(self.ops, EncodedSource(states, slots), self.cross)
                states = states.copy() if trace is not None else None
            finally:
                self.ops.use_arena(None)
            for source in together:
                source.encoded = True
        return states

    def steps(self, lengths: Seq[int]) -> Iterator[slice]:
        """Texts of these lengths, in order, as many at a time as a step of an encoder takes whole."""
        first = tokens = blocks = 0
        for i, length in enumerate(lengths):
            tokens, blocks = tokens + length, blocks + blocks_for(length)
            if tokens > self.max_tokens or blocks > self.cache.blocks:
                yield slice(first, i)
                first, tokens, blocks = i, length, blocks_for(length)
        if first < len(lengths):
            yield slice(first, len(lengths))

    def read(self, texts: Seq[Seq[int]], types: Seq[Seq[int] | None]) -> F32:
        """Hidden states [T, D], after the final norm, of a step of an encoder over whole texts; on the host, and valid
        until the next step. See `whole_texts`."""
        x = self._forward(whole_texts(self.model.spec, texts, self.cache.blocks, types))
        return np.asarray(self.model.final_norm(self.ops, x, out=x))

    def forward(
        self,
        plan: Seq[Work],
        trace: list[F32] | None = None,
        attentions: AttentionTrace | None = None,
        states: F32 | None = None,
    ) -> F32:
        """Residual stream [T, D] of all tokens of the plan; valid until the next step. See :meth:`Model.forward`.

        `states` are those of the one source, which attention weights of an encoder-decoder need.
        """
        tokens = sum(work.rows for work in plan)
        width = max((len(work.sequence.blocks) for work in plan), default=0)
        # Those behind a prefix see no more than before; an encoder's texts are seen whole anyway.
        prefix = not self.model.spec.is_encoder and any(work.start < work.sequence.prefix for work in plan)
        batch = Batch.empty(tokens, len(plan), width, self.model.spec, prefix, blocks_for(self.max_source))
        self._fill(batch, plan)
        source = plan[0].sequence.source if states is not None else None
        if states is None or source is None:
            return self._forward(batch, trace, attentions)
        return self._forward(batch, trace, attentions, EncodedSource(states, cross_slots([source])))

    def _forward(
        self,
        batch: Batch,
        trace: list[F32] | None = None,
        attentions: AttentionTrace | None = None,
        source: EncodedSource | None = None,
    ) -> F32:
        stage = self.ops.stage(_arrays(batch), lasting=False)
        stage.send()
        self.ops.use_arena(self._arena if source is None else None)  # which has no room for keys of a source
        self.ops.release(0)
        try:
            batch = Batch(*stage.placed)
            return self.model.forward(self.ops, batch, self.cache, trace, attentions, cross=self.cross, source=source)
        finally:
            self.ops.use_arena(None)

    def logits(self, x: F32, rows: I32) -> Iterator[tuple[int, F32]]:
        """What the head gives for these rows of the residual stream, as pieces (index of the first row, logits [<=
        HEAD_ROWS, V])."""
        piece = self.ops.empty(min(len(rows), HEAD_ROWS), self.model.spec.outputs)
        for first in range(0, len(rows), HEAD_ROWS):
            count = min(HEAD_ROWS, len(rows) - first)
            yield first, self.model.logits(self.ops, x, rows[first : first + count], out=piece[:count])

    def final_states(self, x: F32) -> F32:
        """Rows [R, D] of the residual stream after the final norm, on the host, in memory of their own."""
        states = self.model.final_norm(self.ops, x, self.ops.empty(*x.shape))
        return np.asarray(states.copy() if states is x else states)

    def last_logits(self, plan: Seq[Work], x: F32) -> F32:
        """Logits [n, V] of the works that reach their sequence's end, in order: at its last token and its drafts."""
        ends = np.cumsum([work.rows for work in plan])
        spans = [np.arange(end - 1 - len(w.drafts), end) for end, w in zip(ends, plan, strict=True) if w.last]
        rows = np.concatenate([np.zeros(0, np.int32), *spans], dtype=np.int32)
        if not len(rows):
            return self._logits[:0]
        return self.model.logits(self.ops, x, rows, out=self._logits[: len(rows)])

    def _decode_drafts(
        self, step: RecordedStep, plan: Seq[Work], states: Seq[SamplingState]
    ) -> tuple[F32, list[int] | None]:
        self._fill(step.batch, plan)
        for i, (work, state) in enumerate(zip(plan, states, strict=True)):
            span = slice(step.batch.starts[i], step.batch.starts[i + 1])
            step.draws[span] = state.row if state.plain else GREEDY_ROW
            step.draws["position"][span] += np.maximum(np.arange(work.rows) - (work.count - 1), 0).astype(np.uint64)
        return self._run(step, all(state.plain for state in states))

    def _run(self, step: RecordedStep, plain: bool) -> tuple[F32, list[int] | None]:
        """Logits of a step whose arrays are filled, and the tokens that it chose where they are wanted."""
        step.stage.send()
        self.ops.replay(step.graph)
        if not plain:
            return step.logits, None
        step.drawn = self.ops.tokens(step.chosen)
        return step.logits, step.drawn

    def _fill(self, batch: Batch, plan: Seq[Work]) -> None:
        at = 0
        for i, work in enumerate(plan):
            sequence, end = work.sequence, work.start + work.rows
            span = slice(at, at + work.rows)
            positions = np.arange(work.start, end)
            batch.tokens[span] = [*sequence.tokens[work.start : work.start + work.count], *work.drafts]
            batch.positions[span] = positions
            if batch.types is not None:
                batch.types[span] = sequence.types[work.start : end] if sequence.types else 0
            if self._counts_twice:
                self._place(batch, at, sequence, work.start, work.count, work.drafts)
            batch.slots[span] = (
                sequence.table[positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
            )
            batch.tables[i, : len(sequence.blocks)] = sequence.blocks
            batch.lengths[i] = end
            if batch.prefix is not None:
                batch.prefix[i] = work.sequence.prefix
            _fill_source(batch, i, sequence)
            if batch.rope_rows is not None:
                for j in range(work.rows):
                    self._fill_rope(batch, at + j, sequence, work.start + j)
            at += work.rows
            batch.starts[i + 1] = at

    def _place(
        self, batch: Batch, row: int, sequence: Sequence, start: int, count: int = 1, drafts: Seq[int] = ()
    ) -> None:
        """Both positions of `count` tokens from `start` on, and of drafts behind them, in the rows from `row` on."""
        rule, end, place = self.model.spec.prefix, start + count, sequence.place
        assert rule is not None
        if count > 1 or place is None or place.at != start - 1:
            first, second = rule.positions(sequence.tokens[:end])
            batch.place(slice(row, row + count), first[start:], second[start:])
            place = Place(end - 1, int(first[-1]), int(second[-1]))
        else:
            place = rule.positions_after(place, sequence.tokens)
            batch.place(slice(row, row + 1), place.first, place.second)
        sequence.place = place
        tokens = [*sequence.tokens[:end], *drafts] if drafts else []
        for draft_row in range(row + count, row + count + len(drafts)):
            place = rule.positions_after(place, tokens)
            batch.place(slice(draft_row, draft_row + 1), place.first, place.second)

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

    def _record(self, kind: StepKind) -> RecordedStep:
        sequences, tokens, width, greedy = kind
        batch = Batch.empty(tokens, sequences, width, self.model.spec, source_width=blocks_for(self.max_source))
        batch.starts[:] = [*range(sequences), tokens]
        stage = self.ops.stage([*_arrays(batch), np.repeat(GREEDY_ROW, tokens)])
        *arrays, draws = stage.host
        try:
            if self.ops.on_gpu:  # what takes memory or loads code does so before the recording
                stage.send()
                self._compute(stage, greedy)
            self.ops.begin_recording()
            logits, chosen = self._compute(stage, greedy)
            graph = self.ops.end_recording()
        finally:
            self.ops.stop()
        return RecordedStep(graph, stage, Batch(*arrays), draws, logits, chosen, [(0, 0)] * sequences)

    def _compute(self, stage: Stage, greedy: bool) -> tuple[F32, I32]:
        """Logits of all rows of a step, and the tokens chosen from them."""
        *arrays, draws = stage.placed
        batch = Batch(*arrays)
        self.ops.use_arena(self._decode_arena)
        self.ops.release(0)
        x = self.model.forward(self.ops, batch, self.cache, cross=self.cross)
        if greedy:
            logits, chosen = self.ops.empty(len(batch.tokens), 0), self.model.best_tokens(self.ops, x)
        else:
            logits = self.model.head(self.ops, self.model.head_input(self.ops, x))
            chosen = self.ops.sample(logits, SampleInputs(draws))
        if self._loop is not None and len(batch.tokens) == len(batch.lengths):
            self._loop.advance(batch.tokens, batch.positions, batch.slots, batch.lengths, draws, chosen)
        return logits, chosen


def _arrays(batch: Batch) -> list[Any]:
    return [getattr(batch, each.name) for each in fields(batch)]


class _Encoder:
    """What encoding at most `max_tokens` tokens of at most `max_sources` sources together takes."""

    def __init__(self, spec: ModelSpec, max_tokens: int, max_sources: int, dtype: str, ops: Ops) -> None:
        self.spec, self.max_tokens = spec, max_tokens
        self.scratch = KVCache(spec, scratch_blocks(max_tokens, max_sources), dtype, ops.allocate, shared=True)


def whole_texts(spec: ModelSpec, texts: Seq[Seq[int]], blocks: int, types: Seq[Seq[int] | None] | None = None) -> Batch:
    """One step of an encoder over these texts, each in blocks of its own in a cache of so many.

    `types` tell which text of a pair each token belongs to; None: the first.
    """
    lengths = [len(text) for text in texts]
    batch = Batch.empty(sum(lengths), len(texts), blocks_for(max(lengths)), spec)
    batch.tokens[:] = np.concatenate(texts)
    batch.fill_whole(np.cumsum([0, *lengths]), blocks)
    for i, given in enumerate(types or ()):
        if batch.types is not None and given is not None:
            batch.types[batch.starts[i] : batch.starts[i + 1]] = given
    return batch


def _fill_source(batch: Batch, row: int, sequence: Sequence) -> None:
    source = sequence.source
    if batch.source_lengths is not None and batch.source_tables is not None and source is not None:
        batch.source_lengths[row] = len(source.tokens)
        batch.source_tables[row, : len(source.table)] = source.table


def cross_slots(sources: Seq[Source]) -> NDArray[np.int64]:
    """Where the cross cache takes each token of these sources."""
    slots = []
    for source in sources:
        positions = np.arange(len(source.tokens))
        slots.append(source.table[positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS)
    return np.concatenate(slots)


def scratch_blocks(tokens: int, sources: int) -> int:
    """Blocks that hold so many sources of so many tokens together, each of which begins a block."""
    return tokens // BLOCK_TOKENS + sources


def head_rows(sequences: int, drafts: int) -> int:
    """Rows of a step that need logits at most: every draft of a few sequences, one for each of some of many."""
    return min(sequences * (1 + drafts), max(HEAD_ROWS, sequences + HEAD_ROWS // 2))


def step_floats(spec: ModelSpec, tokens: int, max_source: int) -> int:
    """Floats that a step of so many tokens takes, or encoding sources for it, of which the longest has `max_source`."""
    floats = arena_floats(spec, tokens, min(HEAD_ROWS, tokens))
    if spec.encoder is None:
        return floats
    together = max(tokens, max_source)
    written = max(2 * b.cross.kv_heads * b.cross.head_dim for b in spec.blocks if b.cross is not None)
    return max(floats, arena_floats(spec.encoder, together, together) + (written * together + 16))


def arena_floats(spec: ModelSpec, tokens: int, rows: int) -> int:
    """Floats that a step of so many tokens takes, with so many rows through the head's norm (logits not counted)."""

    def padded(columns: int, count: int = tokens) -> int:
        return columns * count + 16  # pieces start on 64 bytes

    def block(b: BlockSpec) -> int:
        a, c = b.attention, b.cross
        attention = padded((a.heads + 2 * a.kv_heads) * a.head_dim) + padded(a.heads * a.head_dim)
        attention = max(attention, 0 if c is None else 2 * padded(c.heads * c.head_dim))
        return 2 * padded(spec.hidden) + attention + padded(b.mlp.hidden)

    angles = sum(2 * padded(rope.dim // 2) for rope in (spec.rope, spec.local_rope) if rope is not None)
    projected = 0 if spec.embedding.width is None else padded(spec.table_width)
    if spec.embedding.scale != 1 and spec.embedding.positions:
        projected += padded(spec.hidden)
    head = 2 * padded(spec.hidden, rows) + padded(spec.head_width, rows) * (1 if spec.head.scale == 1 else 2)
    biases = spec.relative_bias
    distances = padded(2 * biases[1].max_distance + 1, biases[0]) if biases is not None else 0
    embedded = padded(spec.hidden) * (2 if spec.embedding.second_positions else 1)
    return embedded + projected + angles + distances + max(block(b) for b in spec.blocks) + head


def decode_floats(spec: ModelSpec, rows: int) -> int:
    """Floats of a recorded step of so many rows, the logits of all included."""
    return arena_floats(spec, rows, rows) + rows * spec.outputs + 16
