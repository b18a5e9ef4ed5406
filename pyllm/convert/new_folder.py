"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write into; renamed to `path` at the end, or removed if anything fails.

    Raises `FileExistsError` when there is something at `path` already: nothing is ever overwritten.
    """
    refuse_existing(path)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        yield partial
        refuse_existing(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(path.parent)


def refuse_existing(path: Path) -> None:
    """`FileExistsError` for a path that is taken, `FileNotFoundError` for one whose parent is no folder."""
    if os.path.lexists(path):
        raise FileExistsError(17, "already exists, and nothing is overwritten: choose another name", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(2, "no such folder to write into", str(path.parent))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
