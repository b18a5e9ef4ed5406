"""Recorded steps of decoding: what one is, for which sizes there is one, and how many are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyllm.batch import I32, Batch
from pyllm.ops import F32, Stage
from pyllm.spec import ModelSpec

GPU_WIDTHS = (8, 32, 128, 512, 2048)  # blocks of a sequence: contexts of 512 tokens, 2 k, 8 k, 32 k, 128 k
MOST_STEPS = 256  # kept at most
BLOCK_KERNELS, OTHER_KERNELS = 9, 8  # of a step on a GPU: of a block (as many again with cross attention), and beside
KERNEL_BYTES = 64 << 10  # that a kernel of a CUDA graph is taken to need of the GPU's memory, see docs/gpu.md


class StepKind(NamedTuple):
    """What a recorded step is for."""

    sequences: int
    rows: int  # one for each sequence, or drafts to check besides
    width: int  # blocks in the table of a sequence
    greedy: bool  # tokens are chosen without logits


@dataclass
class RecordedStep:
    """A recorded step of B sequences and R rows with its arrays on the host, which `stage` brings to the kernels.

    `seats` tells whose tables and draws each row has, where each sequence has one row: its residence, and the number of
    its blocks in the table.

    What changes at every step is written through memoryviews, which do it in a fraction of numpy's time.
    """

    graph: Any
    stage: Stage
    batch: Batch
    draws: NDArray[np.void]  # [R] of SAMPLE_ROW: how each token is chosen
    logits: F32
    chosen: I32  # [R] the tokens chosen, where the kernels write them
    seats: list[tuple[int, int]]
    drawn: list[int] = field(default_factory=list)  # the tokens chosen by the last replay

    def __post_init__(self) -> None:
        """Views of the arrays."""
        self.tokens, self.positions = self.batch.tokens.data, self.batch.positions.data
        self.slots, self.lengths = self.batch.slots.data, self.batch.lengths.data
        self.draw_positions = self.draws["position"].data


class RecordedSteps:
    """The `most` steps that were used last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._steps: OrderedDict[StepKind, RecordedStep] = OrderedDict()

    def __len__(self) -> int:
        """Number of steps that are kept."""
        return len(self._steps)

    def get(self, kind: StepKind, record: Callable[[StepKind], RecordedStep]) -> RecordedStep:
        """The step of this kind, made by ``record(kind)`` where it is not kept."""
        if kind not in self._steps:
            while len(self._steps) >= self.most:
                self._steps.popitem(last=False)
            self._steps[kind] = record(kind)
        self._steps.move_to_end(kind)
        return self._steps[kind]

    def clear(self) -> None:
        """Forget all."""
        self._steps.clear()


def table_widths(blocks: int, on_gpu: bool) -> tuple[int, ...]:
    """Widths of the tables of recorded steps, for sequences of at most so many blocks, rising."""
    return (*(width for width in GPU_WIDTHS if on_gpu and width < blocks), blocks)


def steps_kept(spec: ModelSpec, sequences: int, rows: int, blocks: int, memory: int | None) -> int:
    """How many recorded steps to keep: those of all kinds that decoding comes to, at most `MOST_STEPS`.

    Steps are of at most so many sequences, of `blocks` cache blocks each, and so many rows (more than sequences where
    drafts are checked). On a GPU they together take at most `memory` bytes, but one is kept in any case.
    """
    kinds = sequences if rows <= sequences else sequences * rows
    if memory is None:
        return min(kinds, MOST_STEPS)
    kinds *= 2 * len(table_widths(blocks, on_gpu=True))
    return max(1, min(kinds, MOST_STEPS, memory // step_bytes(spec, sequences, blocks)))


def step_bytes(spec: ModelSpec, sequences: int, blocks: int) -> int:
    """What a recorded step takes of a GPU's memory, beside the arena that all share: its kernels, and the tables."""
    crossed = sum(block.cross is not None for block in spec.blocks)
    kernels = BLOCK_KERNELS * (len(spec.blocks) + crossed) + OTHER_KERNELS
    return kernels * KERNEL_BYTES + 4 * sequences * blocks
