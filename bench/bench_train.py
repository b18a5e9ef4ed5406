"""A whole training step of GPT-2 124M: ours, and torch with transformers, stock and tuned, where they are installed.

    pytest bench/bench_train.py -s

Operations are 6 for each parameter and token. Engines take turns, each in a process of its own, step by step, with the
machine's limits measured between the rounds; figures are medians, ratios those of single rounds. Tuned torch has the
fused AdamW and an allocator that keeps memory, on huge pages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from conftest import sized

from pyllm.compare.shapes import GPT2
from pyllm.limits import measure
from pyllm.models import family_of

WORKER = Path(__file__).with_name("train_worker.py")
ROUNDS = sized(3, 1)
SMALL: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}
TUNED = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=17179869184",
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "cores",
}
ENGINES: dict[str, tuple[str, dict[str, str]]] = {
    "pyllm": ("pyllm", {}),
    "torch tuned": ("torch", TUNED),
    "torch stock": ("torch", {}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [sized(64, 16), sized(256, 32)])
def test_training_step(length: int, dtype: str, threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**GPT2, **sized({}, SMALL)}
    parameters, tokens = family_of(config).read(config).num_parameters(), 4 * length
    engines = dict(ENGINES) if importlib.util.find_spec("torch") else {"pyllm": ENGINES["pyllm"]}
    arguments = [dtype, "4", str(length), json.dumps(config), str(threads)]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    peaks = []
    with ExitStack() as stack:
        running = {name: stack.enter_context(Engine(*engine, arguments)) for name, engine in engines.items()}
        for process in running.values():
            process.step()  # the first one takes the memory
        for _ in range(ROUNDS):
            limits = measure(threads)
            peaks.append(limits.bf16_gflops if dtype == "bfloat16" else limits.f32_gflops)
            for name, process in running.items():
                results[name].append(process.step())
    with capsys.disabled():
        print(f"\nGPT-2 {parameters / 1e6:.0f}M, 4 x {length}, {dtype}, {threads} threads, {ROUNDS} rounds")
        for name, rows in results.items():
            seconds = median(row["seconds"] for row in rows)
            shares = [
                6 * parameters * tokens / row["seconds"] / peak / 1e9 for row, peak in zip(rows, peaks, strict=True)
            ]
            ratios = [row["seconds"] / own["seconds"] for row, own in zip(rows, results["pyllm"], strict=True)]
            print(
                f"  {name:12} {seconds * 1e3:8.0f} ms  {tokens / seconds:7.0f} tok/s  {median(shares):6.1%} of peak  "
                f"{rows[-1]['bytes'] / 1e9:5.2f} GB  {median(ratios):5.2f} x pyllm's time"
            )
    for rows in results.values():
        assert abs(rows[0]["loss"] - results["pyllm"][0]["loss"]) < 0.2 * results["pyllm"][0]["loss"]


class Engine:
    """A worker process; use it as a context manager."""

    def __init__(self, name: str, environment: dict[str, str], arguments: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def step(self) -> dict[str, float]:
        """One step; its seconds, loss and memory. Between steps the process stands still, its threads too."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def __enter__(self) -> Engine:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
