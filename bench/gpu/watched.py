"""Tests in processes that are watched: a test that hangs, or that breaks what the GPU holds for its process, ends the
process and is named, and the tests behind it run in another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.process import ROOT, end_of, place, python

AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 2))  # processes: starting one takes longer than most tests
START = 60.0  # seconds that a process may take to its first test
POLL = 0.05
RUNS = 6  # processes that the tests of a kernel may take
BROKEN = re.compile(r"cudaError|CUDA_ERROR|CUDAError")  # no test of the same process can tell any more


@dataclass
class Outcomes:
    """What became of tests, by their ids."""

    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # and why

    def told(self) -> int:
        """Number of tests of which something is known."""
        return len(self.passed) + len(self.skipped) + len(self.failed)


def collect(arguments: Sequence[str], log: Path) -> list[str]:
    """Ids of the tests that pytest finds with these arguments."""
    events = _launch([*arguments, "--collect-only"], log)
    if events.process.wait():
        raise RuntimeError(f"pytest could not find all tests: {end_of(log)}")
    return [test for event in events.new() for test in event["collected"]]


def run_tests(
    ids: Sequence[str],
    log: Path,
    patience: float,
    arguments: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Outcomes:
    """What became of these tests, of which each may take `patience` seconds; pytest's words go to `log`.

    `settings` are variables of the environment.
    """
    found, left = Outcomes(), list(ids)
    for _ in range(RUNS):
        before = found.told()
        _run(_launch([*arguments, *(str(ROOT / test) for test in left)], log, settings), patience, found)
        known = {*found.passed, *found.skipped, *found.failed}
        left = [test for test in left if test not in known]
        if not left:
            return found
        if found.told() == before:
            break
    found.failed[left[0]] = f"not run, with {len(left) - 1} more: {end_of(log).strip() or 'pytest said nothing'}"
    return found


def _run(events: _Events, patience: float, found: Outcomes) -> None:
    """Tests in one process, as far as it comes."""
    running, heard = None, time.monotonic()
    try:
        while True:
            ended = events.process.poll() is not None  # asked first: what it told before it ended is read below
            for event in events.new():
                heard = time.monotonic()
                if "begun" in event:
                    running = event["begun"]
                elif "ended" in event:
                    running, test, reason = None, event["ended"], event["reason"]
                    if event["outcome"] == "failed":
                        found.failed[test] = reason
                        if BROKEN.search(reason):
                            return
                    elif event["outcome"] == "skipped":
                        found.skipped.append(test)
                    else:
                        found.passed.append(test)
            if ended:
                if running is not None:
                    found.failed[running] = f"the process ended with status {events.process.returncode}"
                return
            if time.monotonic() - heard > (START if running is None else patience):
                if running is not None:
                    found.failed[running] = f"hangs: not done after {patience:g} s"
                return
            time.sleep(POLL)
    finally:
        events.process.kill()
        with suppress(subprocess.TimeoutExpired):  # the driver may take its time to end a kernel
            events.process.wait(timeout=10)


class _Events:
    """A process of pytest, and what its plugin has told."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process, self._path, self._read = process, path, 0

    def new(self) -> list[dict[str, Any]]:
        """Events since the last call; a line that is not whole yet is left."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            told = file.read()
        whole = told[: told.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _launch(arguments: Sequence[str], log: Path, settings: Mapping[str, str] | None = None) -> _Events:
    """pytest on the tests of the package, its words added to `log`."""
    path = log.with_suffix(".events")
    path.write_text("")
    where = place()
    paths = [str(ROOT / "bench"), where["env"]["PYTHONPATH"]]
    where["env"] |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GPU_CHECK_EVENTS": str(path.resolve()),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE)),  # of the package and of numpy
        **(settings or {}),
    }
    options = ["-v", "--tb=short", "-p", "gpu.events", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = python("-m", "pytest", *options, "--rootdir", str(ROOT), *arguments)
    with log.open("a") as output:
        return _Events(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **where), path)
