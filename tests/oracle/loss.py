"""Softmax cross-entropy and its gradient from their formulas, in the precision of the logits."""

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
