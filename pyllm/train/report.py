"""What a run tells whoever watches it, and what it expects of its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
MicroBatch: TypeAlias = (
    "tuple[I32, NDArray[Any], I32] | tuple[I32, NDArray[Any], I32, I32] | tuple[I32, NDArray[Any], I32, I32, I32]"
)


class Data(Protocol):
    """Micro-batches without end, all of one shape: T tokens, at most B sequences, with an encoder beside the decoder S
    tokens of sources."""

    def next_batch(self) -> MicroBatch:
        """Tokens int32 [T], labels int32 [T] (-100: not counted), starts int32 [B + 1], and int32 [T] where they are
        needed: first positions, where blanks are filled in another order than that of their masks, or with an encoder
        token types, where texts are pairs. With an encoder beside the decoder, the tokens of sources int32 [S], and
        where that of each sequence starts, int32 [B + 1]: from 0 to S like the others.

        Label t is what should follow token t, or stand in its place where the model predicts that; for heads of labels
        see :class:`pyllm.train.head_loss.HeadLoss`. Sequence b is tokens starts[b] to starts[b + 1]; it sees nothing of
        the others. Sequences may be empty; starts[0] is 0 and starts[B] is T.
        """
        ...

    def state(self) -> dict[str, Any]:
        """The position and what identifies the data, as JSON: what `load_state` needs to go on from here."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there; raises `PyllmError` when the state is one of other data."""
        ...


@dataclass(frozen=True)
class StepReport:
    """An optimizer step that was made; `step` counts from 1."""

    step: int
    loss: float  # mean over counted tokens, in nats; z-loss and smoothing included
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # all tokens of the step
    counted_tokens: int  # those with a label
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """All tokens over the step's time."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class EvalReport:
    """Loss on the evaluation data after `step` steps, without smoothing and z-loss.

    `accuracy` is the share of labels that a classifier of texts got right: of texts, where one label holds, else of all
    labels of all texts, at a probability of 0.5; None for values and for other heads.
    """

    step: int
    loss: float
    perplexity: float | None  # None for heads of labels
    tokens: int  # counted ones, or labels
    best: bool  # the lowest so far
    seconds: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt and how the model goes on after `step` steps."""

    step: int
    prompt: str
    text: str


class Callbacks:
    """Called while a run goes on; every method does nothing here."""

    def started(self, step: int, steps: int, parameters: int) -> None:
        """The run begins, or goes on after `step` of `steps` steps."""

    def stepped(self, report: StepReport) -> None:
        """A step was made."""

    def evaluated(self, report: EvalReport) -> None:
        """The loss on the evaluation data was measured."""

    def sampled(self, sample: Sample) -> None:
        """Text was generated."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint stands in `folder`."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `run` returns: `finished` is False when it was asked to stop before."""

    step: int
    finished: bool
    last_loss: float | None
    best_loss: float | None  # on the evaluation data
    folder: Path  # the last checkpoint
