"""Quantized weights among the tensors of a checkpoint: recognised by their names, checked, and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllm.errors import shown
from pyllm.quantization import awq, compressed_tensors, gptq
from pyllm.quantization.part import Arrays, Part, order_or_none
from pyllm.quantization.scheme import Layout, Quantization, Scheme
from pyllm.quantization.tensor import KernelForm, QuantizedTensor, kernel_form
from pyllm.safetensors_file import DTYPES, StoredTensor

Parts = Callable[[Scheme, int, int], dict[str, Part]]
Unpack = Callable[[Scheme, int, int, Arrays], QuantizedTensor]

LAYOUTS: dict[Layout, tuple[Parts, Unpack]] = {
    Layout.PACK_QUANTIZED: (compressed_tensors.packed_parts, compressed_tensors.unpack_packed),
    Layout.INT_QUANTIZED: (compressed_tensors.int_parts, compressed_tensors.unpack_int),
    Layout.GPTQ: (gptq.parts, gptq.unpack),
    Layout.GPTQ_V2: (gptq.parts, gptq.unpack),
    Layout.AWQ: (awq.parts, awq.unpack),
}
MARKS = ("weight_packed", "qweight")  # a weight that has a part of this name is quantized; so is one of int8
ENDINGS = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("qweight", "qzeros", "scales", "g_idx"),
)


@dataclass(frozen=True)
class StoredWeight:
    """The stored parts of one quantized weight, by the endings of their names."""

    parts: Mapping[str, StoredTensor]

    @property
    def place(self) -> str:
        """File and name of the integers."""
        return next(self.parts[name].place for name in (*MARKS, "weight") if name in self.parts)

    def match(self, quantization: Quantization, outputs: int, inputs: int) -> tuple[Scheme | None, list[str]]:
        """The scheme that a weight [outputs, inputs] is stored by, and what is wrong with it.

        Shapes tell schemes apart. Scales must be finite and not 0: no quantizer writes others, they are damage.
        """
        misfits = {scheme: self._misfits(scheme, outputs, inputs) for scheme in quantization.schemes}
        fitting = [scheme for scheme in quantization.schemes if not misfits[scheme]]
        if not fitting:
            nearest = min(misfits, key=lambda scheme: len(misfits[scheme]))
            of_many = f" (nearest of {len(misfits)} schemes: {nearest})" if len(misfits) > 1 else f" ({nearest})"
            return None, [problem + of_many for problem in misfits[nearest]]
        problems = self._wrong_values(fitting[0], outputs, inputs)
        return (None, problems) if problems else (fitting[0], [])

    def read(self, scheme: Scheme, outputs: int, inputs: int) -> QuantizedTensor:
        """The weight; `match` gave the scheme."""
        arrays = {name: part.view() for name, part in self.parts.items()}
        return LAYOUTS[scheme.layout][1](scheme, outputs, inputs, arrays)

    def form(self, scheme: Scheme, inputs: int) -> KernelForm | None:
        """What `QuantizedTensor.for_kernels` of it will be, as far as that can be told without its integers: zero
        points may turn out to be none, and scales of 32 bits not to fit 16."""
        order = next((self.parts[name].view() for name in ("g_idx", "weight_g_idx") if name in self.parts), None)
        if order_or_none(order, inputs, scheme.group_size) is not None:
            return None
        scales = next(self.parts[name].entry for name in ("weight_scale", "scales") if name in self.parts)
        zeros = any(name in self.parts for name in ("qzeros", "weight_zero_point"))
        return kernel_form(scheme.bits, scheme.group_size, str(DTYPES[scales.dtype]), zeros)

    def release(self) -> None:
        """Give back the memory of the pages that the parts were read from."""
        for part in self.parts.values():
            part.file.release(part.name)

    def _misfits(self, scheme: Scheme, outputs: int, inputs: int) -> list[str]:
        expected = LAYOUTS[scheme.layout][0](scheme, outputs, inputs)
        problems = []
        if scheme.group_size and inputs > scheme.group_size and inputs % scheme.group_size:
            problems.append(f"{self.place}: groups of {scheme.group_size} do not divide its {inputs} inputs")
        for name, part in expected.items():
            if name not in self.parts:
                if not part.optional:
                    shapes = " or ".join(str(list(shape)) for shape in part.shapes)
                    problems.append(f"{self.place}: missing {name} beside it, expected shape {shapes}")
                continue
            entry = self.parts[name].entry
            if entry.shape not in part.shapes:
                shapes = " or ".join(str(list(shape)) for shape in part.shapes)
                problems.append(f"{self.parts[name].place}: expected shape {shapes}, found {shown(list(entry.shape))}")
            if entry.dtype not in part.dtypes:
                dtypes = ", ".join(part.dtypes)
                problems.append(f"{self.parts[name].place}: expected dtype {dtypes}, found {entry.dtype}")
        for name in self.parts:
            if name not in expected:
                problems.append(f"{self.parts[name].place}: not part of this layout")
        return problems

    def _wrong_values(self, scheme: Scheme, outputs: int, inputs: int) -> list[str]:
        problems = []
        for name in ("weight_scale", "scales"):
            if name in self.parts:
                problem = _wrong_scales(self.parts[name].view())
                if problem:
                    problems.append(f"{self.parts[name].place}: {problem}")
        if "weight_shape" in self.parts:
            found = self.parts["weight_shape"].view().tolist()
            if found != [outputs, inputs]:
                problems.append(f"{self.parts['weight_shape'].place}: expected {[outputs, inputs]}, found {found}")
        for name in ("g_idx", "weight_g_idx"):
            if name in self.parts:
                order, groups = self.parts[name].view(), scheme.groups(inputs)
                if not np.all(order == -1) and (order.min() < 0 or order.max() >= groups):
                    problems.append(f"{self.parts[name].place}: expected groups from 0 to {groups - 1}, found "
                                    f"{order.min()} to {order.max()}")  # fmt: skip
        return problems


def collect(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredWeight], dict[str, StoredTensor]]:
    """Quantized weights under the name that the weight would have unquantized, and the tensors that are left."""
    rest = dict(tensors)
    weights: dict[str, StoredWeight] = {}
    for name in tensors:
        at, _, ending = name.rpartition(".")
        is_int8 = ending == "weight" and tensors[name].entry.dtype == "I8"
        if (ending not in MARKS and not is_int8) or not at or f"{at}.weight" in weights:
            continue
        endings = (*ENDINGS, "weight") if is_int8 else ENDINGS
        parts = {ending: rest.pop(f"{at}.{ending}") for ending in endings if f"{at}.{ending}" in rest}
        weights[f"{at}.weight"] = StoredWeight(parts)
    return weights, rest


def _wrong_scales(scales: np.ndarray[Any, Any]) -> str | None:
    values = scales.astype(np.float32, copy=False)
    bad = ~np.isfinite(values) | (values == 0)
    count = int(np.count_nonzero(bad))
    if count == 0:
        return None
    first = np.unravel_index(int(np.argmax(bad)), values.shape)
    more = f" and {count - 1} more like it" if count > 1 else ""
    return f"expected finite scales other than 0, found {values[first]} at {[int(i) for i in first]}{more}"
