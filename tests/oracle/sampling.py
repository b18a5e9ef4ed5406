"""The sampling chain by sorting, one row at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def adjust(logits: Array, params: Any, prompt: list[int], output: list[int], forbidden: list[int]) -> Array:
    """float32 logits [V] after penalties, biases and allowed tokens."""
    x = logits.copy()
    for token in sorted({*prompt, *output}):
        penalty = np.float32(params.repetition_penalty)
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
        count = output.count(token)
        if count:
            x[token] -= np.float32(params.frequency_penalty) * np.float32(count) + np.float32(params.presence_penalty)
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    x[forbidden] = -np.inf
    if params.allowed_token_ids is not None:
        allowed = np.zeros(x.size, bool)
        allowed[list(params.allowed_token_ids)] = True
        x[~allowed] = -np.inf
    return x


def probabilities(x: Array, params: Any) -> Array:
    """float64 [V]: what each token is drawn with, 0 where it is out. Ties in the nucleus go by rising id."""
    keep = x > -np.inf
    if 0 < params.top_k < x.size:
        keep &= x >= np.sort(x)[-params.top_k]
    weights = np.where(keep, np.exp((x.astype(np.float64) - x.max()) / np.float32(params.temperature)), 0)
    order = np.argsort(-x, kind="stable")
    if params.top_p < 1:
        sorted_weights = weights[order]
        before = np.cumsum(sorted_weights) - sorted_weights
        weights[order[before >= np.float32(params.top_p) * sorted_weights.sum()]] = 0
    weights[weights < np.float32(params.min_p)] = 0
    return np.asarray(weights / weights.sum())


def log_softmax(x: Array) -> Array:
    """float64 [R, V]."""
    x = x.astype(np.float64)
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
