"""Quantizing a model folder into a new one that this and other engines read (the layout of compressed-tensors)."""

from pyllm.convert.converter import Converted, convert

__all__ = ["Converted", "convert"]
