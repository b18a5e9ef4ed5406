"""Engines that only pretend, for the tests of the comparison; they run in its worker processes.

Every call is written down in the file that FAKE_ENGINE_LOG names.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pyllm.compare.engine import Decoded, Settings, Unsupported


class Fast:
    """Decodes a token in 10 ms, by its own clock; chooses the numbers from 1."""

    weight_bytes: int | None = 1000
    cache_value_bytes = 2.0
    seconds = 0.01

    def __init__(self, model: Path, settings: Settings) -> None:
        print("libraries talk on stdout")
        self.note("load")
        self.sequences = 0

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        return folder

    def reserve(self, sequences: int, length: int) -> None:
        self.sequences = sequences

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self.note(f"start {len(prompts)} x {len(prompts[0])}")
        return [1] * len(prompts)

    def decode(self, steps: int) -> Decoded:
        self.note(f"decode {steps}")
        return Decoded(self.seconds * steps, [list(range(2, 2 + steps))] * self.sequences)

    def note(self, what: str) -> None:
        with open(os.environ["FAKE_ENGINE_LOG"], "a") as file:
            file.write(f"{type(self).__name__} {what}\n")


class Slow(Fast):
    """Three times as slow; its weights are a share of its files."""

    seconds = 0.03
    weight_bytes = None


class Picky(Fast):
    """Has no int8, and no two sequences together."""

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        if dtype == "int8":
            raise Unsupported("knows no int8")
        return folder

    def reserve(self, sequences: int, length: int) -> None:
        if sequences > 1:
            raise Unsupported("one at a time")
        super().reserve(sequences, length)


class Failing(Fast):
    """Raises in the middle of the rounds."""

    def decode(self, steps: int) -> Decoded:
        if steps > 4:
            raise ArithmeticError("out of\nnumbers")
        return super().decode(steps)


class Dying(Fast):
    """Is killed when it is to decode."""

    def decode(self, steps: int) -> Decoded:
        sys.stderr.write("last words\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)
        raise AssertionError
