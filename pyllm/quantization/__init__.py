"""Weights as integers in groups with scales: how checkpoints store them, and one form for all of them."""

from pyllm.quantization.scheme import Layout, Quantization, Scheme
from pyllm.quantization.stored import MARKS, StoredWeight, collect
from pyllm.quantization.tensor import KernelForm, QuantizedTensor, in_one_form

__all__ = [
    "MARKS",
    "KernelForm",
    "Layout",
    "Quantization",
    "QuantizedTensor",
    "Scheme",
    "StoredWeight",
    "collect",
    "in_one_form",
]
