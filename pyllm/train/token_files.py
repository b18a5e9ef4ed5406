"""Token files (`.bin`) of nanoGPT and llm.c.

nanoGPT's is uint16 tokens and nothing else. llm.c's begins with 256 int32: a magic number, a version, the number of
tokens; then uint16 tokens (magic 20240520) or uint32 tokens (magic 20240801).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import DataError

HEADER = 256  # int32
MAGIC_16, VERSION_16 = 20240520, 1
MAGIC_32, VERSION_32 = 20240801, 7
LAYOUTS = ("nanogpt", "llm.c")

Tokens = NDArray[Any]  # uint16 or uint32, one-dimensional


def read_bin(path: Path, vocab_size: int | None = None) -> Tokens:
    """The tokens of a file, mapped into memory; `DataError` where it is none or has ids beyond the vocabulary."""
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty")
    header = np.fromfile(path, "<i4", min(HEADER, size // 4))
    dtype, start, count = np.dtype("<u2"), 0, size // 2
    if len(header) == HEADER and int(header[0]) in (MAGIC_16, MAGIC_32):
        expected = VERSION_16 if header[0] == MAGIC_16 else VERSION_32
        if header[1] != expected:
            raise DataError(f"{path}: expected version {expected} of this token file, found {header[1]}")
        dtype = np.dtype("<u2" if header[0] == MAGIC_16 else "<u4")
        start, count = 4 * HEADER, int(header[2])
    if start + count * dtype.itemsize != size or (start == 0 and size % 2):
        raise DataError(
            f"{path}: expected tokens of {dtype.itemsize} bytes, "
            + (f"{count} of them after the header" if start else "and nothing else")
            + f", found {size} bytes"
        )
    if count == 0:
        raise DataError(f"{path}: the file holds no tokens")
    tokens = np.memmap(path, dtype, "r", start, (count,))
    if vocab_size is not None:
        step = 1 << 24
        largest = max(int(tokens[i : i + step].max()) for i in range(0, count, step))
        if largest >= vocab_size:
            raise DataError(
                f"{path}: holds token {largest}, and the vocabulary has {vocab_size} tokens: it was made with another "
                "tokenizer, or is no token file"
            )
    return tokens


def write_bin(path: Path, tokens: Tokens, layout: str = "llm.c") -> None:
    """Write tokens as a file of that layout; it appears whole or not at all."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    largest = int(tokens.max(initial=0))
    wide = largest >= 1 << 16
    if wide and layout == "nanogpt":
        raise DataError(f"{path}: token {largest} does not fit the two bytes of nanoGPT's layout: choose llm.c")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            if layout == "llm.c":
                header = np.zeros(HEADER, "<i4")
                magic = (MAGIC_32, VERSION_32) if wide else (MAGIC_16, VERSION_16)
                header[:3] = (*magic, len(tokens))
                file.write(header.tobytes())
            for i in range(0, len(tokens), 1 << 22):
                file.write(np.ascontiguousarray(tokens[i : i + (1 << 22)], "<u4" if wide else "<u2").tobytes())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
