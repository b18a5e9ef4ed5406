"""How a checkpoint's weights were quantized, as its config.json declares it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Layout(str, Enum):
    """How integers, scales and zero points of a weight lie in the files."""

    PACK_QUANTIZED = "pack-quantized"  # compressed-tensors: words along the inputs, a row per output
    INT_QUANTIZED = "int-quantized"  # compressed-tensors: plain int8
    GPTQ = "gptq"  # words along the inputs, a column per output; zero points are stored less one
    GPTQ_V2 = "gptq_v2"  # the same with zero points as they are
    AWQ = "awq"  # words along the outputs, interleaved


@dataclass(frozen=True)
class Scheme:
    """One way of quantizing a weight [N, K]: ``w = (value - zero) * scale``.

    A scale serves `group_size` inputs of one output; 0 is all of them. With `per_tensor` there is a single scale. A
    `symmetric` scheme stores no zero points (GPTQ and AWQ store them always).
    """

    layout: Layout
    bits: int
    group_size: int
    symmetric: bool = True
    per_tensor: bool = False

    @property
    def zero(self) -> int:
        """The zero point of a symmetric scheme: values are offset-binary."""
        return 1 << (self.bits - 1)

    @property
    def per_word(self) -> int:
        """Values in a stored 32-bit word."""
        return 32 // self.bits

    def groups(self, inputs: int) -> int:
        """Groups of a row of `inputs` values."""
        return -(-inputs // self.group_size) if self.group_size else 1

    def __str__(self) -> str:
        """For messages: layout, bits and group."""
        group = f"groups of {self.group_size}" if self.group_size else "one scale per output"
        return f"{self.layout.value} int{self.bits}, {'one scale' if self.per_tensor else group}"


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says. Which weights are quantized, and by which of the schemes, is not read from its
    lists of layer names and patterns: the stored tensors themselves tell, by their names and shapes."""

    method: str
    schemes: tuple[Scheme, ...]
