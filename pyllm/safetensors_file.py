"""One memory-mapped safetensors file.

The `safetensors` library validates the header (length, JSON, dtypes, shapes against offsets, gaps, overlaps, trailing
bytes); what its reader lets pass, a tensor that is named twice and unknown fields, is refused here. Data is never
copied: a tensor is a numpy view of the mapping.
"""

from __future__ import annotations

import json
import mmap
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors

from pyllm.errors import CheckpointError, shown
from pyllm.folder import unique_names

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS: dict[str, np.dtype[Any]] = {  # what quantized weights are stored in
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file dtype name, shape, and byte range from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A validated, read-only mapping of `path`; raises `CheckpointError` for anything malformed.

    `entries` maps tensor names to where they lie. A file that shrinks while it is mapped would end the process at the
    next read beyond its end, so every access through `view` checks the size first.
    """

    def __init__(self, path: Path) -> None:
        """Validate and map `path`."""
        self.path = path
        _require_regular(path)
        _validate(path)
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
        self._size = len(self._map)
        self.entries = _read_entries(path, self._map)

    def view(self, name: str) -> Array:
        """The tensor, read-only and without a copy; its base may be unaligned for its dtype."""
        self._check_size()
        entry = self.entries[name]
        data = np.frombuffer(self._map, np.uint8, count=entry.stop - entry.start, offset=entry.start)
        return data.view(DTYPES.get(entry.dtype) or INTEGERS[entry.dtype]).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; a later read fetches them again."""
        if not hasattr(self._map, "madvise"):  # not every system can
            return
        entry = self.entries[name]
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)

    def close(self) -> None:
        """Unmap the file, at once or, where views of it are still alive, with the last of them."""
        try:
            self._map.close()
        except BufferError:
            self.entries = {}

    def _check_size(self) -> None:
        size = self._map.size()
        if size < self._size:
            raise CheckpointError(
                f"{self.path}: became shorter while it was in use: expected {self._size} bytes, found {size}; "
                "load the model again once the file is complete"
            )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file names it."""

    file: SafetensorsFile
    name: str

    @property
    def place(self) -> str:
        """File and name, for messages."""
        return f"{self.file.path.name}: {shown(self.name)}"

    @property
    def entry(self) -> TensorEntry:
        """Its dtype and shape."""
        return self.file.entries[self.name]

    def view(self) -> Array:
        """Its values, as `SafetensorsFile.view` gives them."""
        return self.file.view(self.name)


def _require_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path}: expected a regular file, found something else")


def _validate(path: Path) -> None:
    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path}: not a valid safetensors file ({reason}); fetch or export it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_entries(path: Path, data: mmap.mmap) -> dict[str, TensorEntry]:
    (length,) = struct.unpack_from("<Q", data, 0)
    problem = f"{path}: not a valid safetensors file"
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=unique_names)
    except RecursionError:
        raise CheckpointError(f"{problem} (header nested too deeply)") from None
    except ValueError as error:
        raise CheckpointError(f"{problem} ({error})") from error
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    for name, fields in header.items():
        if set(fields) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                f"{problem}: tensor {shown(name)}: expected the fields dtype, shape and data_offsets, "
                f"found {shown(sorted(fields))}"
            )
        start, stop = fields["data_offsets"]
        entries[name] = TensorEntry(fields["dtype"], tuple(fields["shape"]), 8 + length + start, 8 + length + stop)
    return entries
