"""The inputs of one step of the model: the tokens of all sequences in one row of arrays, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import F32
from pyllm.spec import ModelSpec

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences. A recorded step reads these arrays anew at every replay, so they are filled in place."""

    tokens: I32  # [T]
    positions: I32  # [T]
    second_positions: I32 | None  # [T] where there is a table of them
    pairs: I32 | None  # [T, 2] first and second positions, where both turn channels
    types: I32 | None  # [T] which text of a pair each token belongs to; None where the model has no token types
    slots: I64  # [T] where the cache takes each token: block * block tokens + offset
    starts: I32  # [B + 1] first token of each sequence
    lengths: I32  # [B] keys in the cache after this step
    tables: I32  # [B, width] block numbers
    rope_rows: I32 | None  # [T] row of inv_freq for each token; None: row 0
    inv_freq: F32 | None  # [C, R / 2], or of one of two sections [C, R / 4]
    prefix: I32 | None  # [B] first tokens of each sequence that all of its tokens see; None: each sees those before it
    source_lengths: I32 | None  # [B] tokens of the source of each sequence, where the model has an encoder
    source_tables: I32 | None  # [B, width] their block numbers in the cross cache

    @classmethod
    def empty(
        cls, tokens: int, sequences: int, width: int, spec: ModelSpec, prefix: bool = False, source_width: int = 0
    ) -> Batch:
        """Arrays for a step of this shape, with those of a `prefix` or not; sources have at most `source_width` blocks.

        Where frequencies depend on the length, each token has a row of its own.
        """
        rope = spec.rope
        varies = rope is not None and rope.length_class(1) is not None
        rows = tokens if varies else 1
        return cls(
            tokens=np.zeros(tokens, np.int32),
            positions=np.zeros(tokens, np.int32),
            second_positions=np.zeros(tokens, np.int32) if spec.embedding.second_positions else None,
            pairs=np.zeros((tokens, 2), np.int32) if rope is not None and rope.sections == 2 else None,
            types=np.zeros(tokens, np.int32) if spec.embedding.types else None,
            slots=np.full(tokens, -1, np.int64),
            starts=np.zeros(sequences + 1, np.int32),
            lengths=np.zeros(sequences, np.int32),
            tables=np.zeros((sequences, width), np.int32),
            rope_rows=np.arange(tokens, dtype=np.int32) if varies else None,
            inv_freq=None if rope is None else np.tile(rope.inv_freq(1), (rows, 1)),
            prefix=np.zeros(sequences, np.int32) if prefix else None,
            source_lengths=None if spec.encoder is None else np.zeros(sequences, np.int32),
            source_tables=None if spec.encoder is None else np.zeros((sequences, source_width), np.int32),
        )

    def fill_whole(self, starts: I32, blocks: int) -> None:
        """Place whole sequences, `starts` [B + 1], in a cache of so many blocks; each begins one of its own."""
        lengths = np.diff(starts)
        held = -(-lengths // _cpu.BLOCK_TOKENS)
        first = np.cumsum(held) - held
        self.starts[:] = starts
        self.lengths[:] = lengths
        self.positions[:] = np.arange(len(self.tokens)) - np.repeat(starts[:-1], lengths)
        self.slots[:] = np.repeat(first * _cpu.BLOCK_TOKENS, lengths) + self.positions
        self.tables[:] = np.minimum(first[:, None] + np.arange(self.tables.shape[1]), blocks - 1)

    def place(self, rows: slice, first: I32 | int, second: I32 | int) -> None:
        """Give these rows their first and second positions."""
        self.positions[rows] = first
        if self.second_positions is not None:
            self.second_positions[rows] = second
        if self.pairs is not None:
            self.pairs[rows, 0], self.pairs[rows, 1] = first, second
