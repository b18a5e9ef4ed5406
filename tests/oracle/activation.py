"""Activation functions from their formulas, in the precision of the input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def activation(x: Array, name: str) -> Array:
    """`name` is a value of pyllm.spec.Activation."""
    one = x.dtype.type(1)
    half = x.dtype.type(0.5)
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "gelu_erf":
            root = x / x.dtype.type(math.sqrt(2))
            erf = np.array([math.erf(v) for v in root.ravel().tolist()]).reshape(x.shape)  # numpy has none
            return np.asarray(half * x * (one + erf.astype(x.dtype)))
        if name == "gelu_tanh":
            inner = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
            return np.asarray(half * x * (one + np.tanh(inner)))
        if name == "silu":
            return np.asarray(x / (one + np.exp(-x)))
        if name == "quick_gelu":
            return np.asarray(x / (one + np.exp(-x.dtype.type(1.702) * x)))
        if name == "sigmoid":
            return np.asarray(one / (one + np.exp(-x)))
        if name == "tanh":
            return np.tanh(x)
        positive = np.maximum(x, x.dtype.type(0))
        if name == "relu_squared":
            return np.asarray(positive * positive)
    assert name == "relu"
    return positive


def slope(x: Array, name: str) -> Array:
    """The derivative of `activation`."""
    one = x.dtype.type(1)
    half = x.dtype.type(0.5)
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "gelu_erf":
            root = x / x.dtype.type(math.sqrt(2))
            erf = np.array([math.erf(v) for v in root.ravel().tolist()]).reshape(x.shape).astype(x.dtype)
            return np.asarray(half * (one + erf) + x * np.exp(-half * x * x) * x.dtype.type(1 / math.sqrt(2 * math.pi)))
        if name == "gelu_tanh":
            root, cubic = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
            tanh = np.tanh(root * (x + cubic * x * x * x))
            inner = root * (one + x.dtype.type(3) * cubic * x * x)
            return np.asarray(half * (one + tanh) + half * x * (one - tanh * tanh) * inner)
        if name == "silu":
            logistic = one / (one + np.exp(-x))
            return np.asarray(logistic * (one + x * (one - logistic)))
        if name == "quick_gelu":
            steep = x.dtype.type(1.702)
            logistic = one / (one + np.exp(-steep * x))
            return np.asarray(logistic * (one + steep * x * (one - logistic)))
        if name == "sigmoid":
            return np.asarray(one / (one + np.exp(-x)) / (one + np.exp(x)))
        if name == "tanh":
            return np.asarray(one / np.cosh(x) ** 2)
        if name == "relu_squared":
            return np.asarray(x.dtype.type(2) * np.maximum(x, x.dtype.type(0)))
    assert name == "relu"
    return (x > 0).astype(x.dtype)
