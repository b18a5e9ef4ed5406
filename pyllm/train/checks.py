"""Two checks that show a broken setup before hours are spent: gradients against slopes, and fitting one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllm.errors import RequestError
from pyllm.ops import F32
from pyllm.train.head_loss import count_labels
from pyllm.train.parameters import Parameters
from pyllm.train.report import Data, MicroBatch
from pyllm.train.step import Step

CHANGE = 4e-3  # of the loss, by the longer of the two steps along a gradient
LEAST = 3e-3  # of all gradients together: smaller ones, such as those of key biases, which are rounding, count as this


@dataclass(frozen=True)
class GradientCheck:
    """The norm of a weight's gradient, and the slope of the loss along it, which should be the same.

    `scale` is what a difference is compared with: the gradient, but at least `LEAST` of those of all weights
    together.
    """

    slot: str
    gradient: float
    slope: float
    scale: float

    @property
    def error(self) -> float:
        """The difference, relative to its scale."""
        return abs(self.slope - self.gradient) / self.scale if self.scale else 0.0


class RepeatedData:
    """The first `batches` micro-batches of other data, over and over: a model that learns fits them quickly."""

    def __init__(self, data: Data, batches: int) -> None:
        self._data, self._at = data, 0
        state = data.state()
        self._batches: list[Any] = [tuple(array.copy() for array in data.next_batch()) for _ in range(batches)]
        data.load_state(state)

    def next_batch(self) -> MicroBatch:
        """See :class:`Data`."""
        batch: MicroBatch = self._batches[self._at % len(self._batches)]
        self._at += 1
        return batch

    def state(self) -> dict[str, Any]:
        """See :class:`Data`."""
        return {"repeated": self._at, "batches": len(self._batches), "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`Data`."""
        if "repeated" not in state:
            raise RequestError("the run was not one that repeats a batch: start another run to overfit one")
        if state.get("batches") != len(self._batches):
            raise RequestError(
                f"data: the run repeats {state.get('batches')} micro-batches, now it is {len(self._batches)}"
            )
        self._data.load_state(state["data"])
        self._at = state["repeated"]


def check_gradients(parameters: Parameters, step: Step, batch: MicroBatch) -> Iterator[GradientCheck]:
    """For every weight, in float32, the slope of the loss along its gradient from four points on it.

    Weights are as before afterwards; gradients are not. Raises `RequestError` for rounded weights, whose loss has no
    slope.
    """
    if parameters.compute != "float32":
        raise RequestError(f"gradients can be checked in float32 only, and the run computes in {parameters.compute}")
    counted = count_labels(batch[1])
    if counted == 0:
        raise RequestError("the batch has no token that counts")
    step.fill(*batch)
    parameters.zero_gradients()
    loss = step.accumulate(counted, 0) / counted
    gradients = {slot: parameters.gradient(slot) for slot in parameters.spec.slots()}

    def loss_at(slot: str, before: F32, direction: F32, width: float) -> float:
        parameters.set(slot, before + np.float32(width) * direction)
        return step.accumulate(counted, 0) / counted

    norms = {slot: float(np.linalg.norm(gradient.astype(np.float64))) for slot, gradient in gradients.items()}
    total = float(np.linalg.norm(list(norms.values())))
    for slot, gradient in gradients.items():
        norm = norms[slot]
        scale = max(norm, LEAST * total)
        if norm == 0:
            yield GradientCheck(slot, 0.0, 0.0, scale)
            continue
        before, direction = parameters.get(slot), gradient / np.float32(norm)
        width = CHANGE * abs(loss) / scale / 2
        largest = float(np.abs(before).max(initial=0)) * before.size**0.5
        width = min(width, 0.02 * largest if largest else width)
        try:
            near = loss_at(slot, before, direction, width) - loss_at(slot, before, direction, -width)
            far = loss_at(slot, before, direction, 2 * width) - loss_at(slot, before, direction, -2 * width)
        finally:
            parameters.set(slot, before)
        yield GradientCheck(slot, norm, (8 * near - far) / (12 * width), scale)
