"""Losses and their gradients from their formulas, in the precision of the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def cross_entropy(
    logits: Array, labels: Array, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Loss [R] and gradient [R, V] of the sum of losses; labels of -100 are ignored."""
    z, smoothing = logits.dtype.type(z_loss), logits.dtype.type(label_smoothing)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1, keepdims=True))
    lse = top + log_sum
    counted = (labels != -100)[:, None]
    target = np.zeros_like(logits)
    np.put_along_axis(target, np.where(counted, labels[:, None], 0), 1, -1)
    target = (1 - smoothing) * target + smoothing / logits.shape[1]
    chosen = np.take_along_axis(logits, np.where(counted, labels[:, None], 0), -1)
    loss = (1 - smoothing) * ((top - chosen) + log_sum) + z * lse * lse
    if label_smoothing:
        loss = loss + smoothing * (lse - logits.mean(-1, keepdims=True))
    gradient = np.exp(logits - lse) * (1 + 2 * z * lse) - target
    return np.where(counted, loss, 0)[:, 0], np.where(counted, gradient, 0)


def sigmoid_cross_entropy(x: Array, targets: Array) -> tuple[Array, Array]:
    """Loss [R], summed over each row, and gradient [R, N]; targets that are NaN do not count."""
    counted, one = ~np.isnan(targets), x.dtype.type(1)
    targets = np.where(counted, targets, 0).astype(x.dtype)
    loss = np.maximum(x, 0) - x * targets + np.log1p(np.exp(-np.abs(x)))
    gradient = one / (one + np.exp(-x)) - targets
    return np.where(counted, loss, 0).sum(-1), np.where(counted, gradient, 0)


def squared_error(x: Array, targets: Array) -> tuple[Array, Array]:
    """As `sigmoid_cross_entropy`, of (x - target)^2."""
    difference = np.where(np.isnan(targets), 0, x - targets).astype(x.dtype)
    return (difference * difference).sum(-1), 2 * difference
