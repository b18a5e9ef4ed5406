"""What a head is trained with: the labels of a micro-batch, by the kind of head, and the losses of what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, RequestError
from pyllm.ops import F32
from pyllm.ops_training import IGNORED_LABEL, TrainingOps
from pyllm.spec import HeadKind, ModelSpec, Problem
from pyllm.train.memory import StepShape, scored_rows

IGNORED = IGNORED_LABEL  # the label of a token, or sequence, that does not count
Labels = NDArray[Any]


@dataclass(frozen=True)
class Loss:
    """What is added to cross entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class HeadLoss:
    """Labels and losses of R rows: those of all tokens, or with a pooled head of all sequences.

    Where one answer is right (a token of the vocabulary, one of the labels), `labels` are int32 [R] and the loss is
    cross entropy; where each label holds or not, float32 [R, N] and sigmoid cross-entropy; where they are values,
    float32 [R, N] and the squared error. -100 or NaN does not count. Raises `ConfigError` for a `loss` that adds to
    cross entropy where that is not the loss.
    """

    def __init__(self, spec: ModelSpec, shape: StepShape, loss: Loss) -> None:
        self._spec, self._loss = spec, loss
        rows = scored_rows(spec, shape)
        if spec.head.problem in (Problem.MULTI_LABEL, Problem.REGRESSION):
            for name, value in vars(loss).items():
                if value:
                    raise ConfigError(
                        f"{name}: expected 0, as it belongs to cross entropy, and this head is trained for "
                        f"{spec.head.problem.value}, got {value}"
                    )
        self._of_numbers = {
            None: None,
            Problem.SINGLE_LABEL: None,
            Problem.MULTI_LABEL: TrainingOps.sigmoid_cross_entropy,
            Problem.REGRESSION: TrainingOps.squared_error,
        }[spec.head.problem]
        self.labels: Labels = (
            np.full(rows, IGNORED, np.int32)
            if self._of_numbers is None
            else np.full((rows, spec.outputs), np.nan, np.float32)
        )
        self.losses: F32 = np.zeros(rows, np.float32)

    def compute(self, ops: TrainingOps, logits: F32, rows: slice, scale: F32 | None) -> None:
        """Losses of what the head gave for these rows; logits become their gradient times `scale`, unless it is None,
        which gives the losses alone, without what is added to them."""
        labels, losses = self.labels[rows], self.losses[rows]
        if self._of_numbers is not None:
            self._of_numbers(ops, logits, labels, scale, loss=losses)
        elif scale is None:
            ops.cross_entropy(logits, labels, None, loss=losses)
        else:
            z_loss, smoothing = self._loss.z_loss, self._loss.label_smoothing
            ops.cross_entropy(logits, labels, scale, z_loss=z_loss, label_smoothing=smoothing, loss=losses)

    def right(self, scores: F32) -> int | None:
        """How many of the labels that count the scores [R, N] of a head of labels are right about: the largest stands
        at the right one, or each is above 0 where its label holds. None where labels are values."""
        if self._spec.head.problem is Problem.SINGLE_LABEL:
            return int((scores.argmax(1) == self.labels)[self.labels != IGNORED].sum())
        if self._spec.head.problem is Problem.MULTI_LABEL:
            return int(((scores > 0) == (self.labels > 0.5))[~np.isnan(self.labels)].sum())
        return None

    def check(self, labels: Labels) -> None:
        """Raise `RequestError` for labels of a micro-batch that do not fit."""
        wanted = self.labels
        if labels.dtype != wanted.dtype or labels.shape != wanted.shape:
            of = "sequence" if self._spec.head.kind.is_pooled else "token"
            raise RequestError(
                f"micro-batch: labels: expected {wanted.dtype} {list(wanted.shape)}, for each {of}, got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if self._of_numbers is not None:
            if np.isinf(labels).any():
                raise RequestError("micro-batch: labels: expected finite numbers, or NaN where none counts, got inf")
            return
        counted = labels[labels != IGNORED]
        bad = counted[(counted < 0) | (counted >= self._spec.outputs)]
        if bad.size:
            what = "vocabulary" if self._spec.head.kind is HeadKind.TOKENS else "labels"
            raise RequestError(
                f"micro-batch: label {bad[0]} lies outside the model's {what} of {self._spec.outputs}: was the data "
                "made for another model?"
            )


def count_labels(labels: Labels) -> int:
    """How many of them count."""
    return int((~np.isnan(labels)).sum() if labels.dtype == np.float32 else (labels != IGNORED).sum())
