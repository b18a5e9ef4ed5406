"""Writes one safetensors file tensor by tensor, in any order: only what is being written is in memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.safetensors_file import DTYPES, INTEGERS, TensorEntry

NAMES = {dtype: name for name, dtype in {**DTYPES, **INTEGERS}.items()}
METADATA = {"format": "pt"}  # some readers refuse a file that does not name a framework


@dataclass(frozen=True)
class Shape:
    """A tensor to come: numpy dtype and sizes."""

    dtype: np.dtype[Any]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * math.prod(self.sizes)


class SafetensorsWriter:
    """The file at `path`, which must not exist, laid out for `tensors`; use it as a context manager.

    Larger elements come first, so that every tensor is aligned to its own. Raises `OSError` with the file's name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Shape]) -> None:
        self.path = path
        self._shapes = dict(tensors)
        self._missing = set(tensors)
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": METADATA}
        self._entries: dict[str, TensorEntry] = {}
        at = 0
        for name in order:
            shape = tensors[name]
            entry = TensorEntry(NAMES[shape.dtype], shape.sizes, at, at + shape.nbytes)
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.stop]}
            self._entries[name] = entry
            at = entry.stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._data = 8 + len(text)
        self._file = path.open("xb")
        self._put(0, struct.pack("<Q", len(text)) + text)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """The values of a tensor, in the dtype and shape that were announced."""
        shape = self._shapes[name]
        if values.dtype != shape.dtype or values.shape != shape.sizes or name not in self._missing:
            raise ValueError(f"{name}: expected {shape.dtype} {list(shape.sizes)}, once, got {values.dtype} "
                             f"{list(values.shape)}")  # fmt: skip
        self._put(self._data + self._entries[name].start, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._missing.remove(name)

    def close(self) -> None:
        """Put everything on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close; a tensor that was announced and not written is a mistake of the caller."""
        if kind is not None:
            self._file.close()
            return
        self.close()
        if self._missing:
            raise ValueError(f"{self.path}: not written: {', '.join(sorted(self._missing))}")

    def _put(self, at: int, data: bytes | memoryview) -> None:
        try:
            self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
