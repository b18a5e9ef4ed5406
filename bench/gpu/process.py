"""Steps of the check in processes of their own: each ends by its deadline with all that it started, what it had found
stays in its JSON file, and what it said in its log."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENDING = 10.0  # seconds that a process may take to end: one whose kernel hangs can stay in the driver
PATIENCE = 10  # deadlines that the emulated GPU may take
Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A run of the check: where results go, whether on the emulated GPU, on tiny sizes, and the seconds of a step."""

    out: Path
    emulated: bool
    seconds: float = math.inf

    @property
    def patience(self) -> float:
        """What deadlines are multiplied by."""
        return PATIENCE if self.emulated else 1

    def found(self, step: str) -> Row:
        """What a step that has run left in its JSON file; nothing where it left none."""
        path = self.out / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Step:
    """A part of the check: `run` gives what its JSON file holds beside seconds and state; "rows" may be an iterator."""

    run: Callable[[Check], Row]
    seconds: int


def run_apart(command: list[str], check: Check, name: str, seconds: float) -> Row:
    """A step in a process of its own, which is this command; what it found, or what became of it."""
    began = time.perf_counter()
    path, log = check.out / f"{name}.json", check.out / f"{name}.log"
    path.unlink(missing_ok=True)
    told: Row = {}
    with log.open("w") as output:
        # A session of its own, so that what the step has started ends with it.
        step = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if status := step.wait(timeout=seconds):
                told = {"state": "crashed", "error": f"{end_of(log)}\nended with status {status}"}
        except subprocess.TimeoutExpired:
            told = {"state": "too long", "error": f"{end_of(log)}\nnot done after {seconds:.3g} s"}
        finally:
            if step.returncode is None:
                os.killpg(step.pid, signal.SIGKILL)
                try:
                    step.wait(timeout=ENDING)
                except subprocess.TimeoutExpired:
                    told["error"] = f"{told.get('error', '')}, and could not be ended"
    found: Row = {"state": "crashed", **check.found(name), **told}
    found["seconds"] = time.perf_counter() - began
    write(path, found)
    return found


def run_here(step: Step, check: Check, name: str) -> None:
    """A step in this process, its rows written as they come."""
    found: Row = {"state": "crashed"}
    path = check.out / f"{name}.json"
    try:
        found |= step.run(check)
        rows, found["rows"] = found.get("rows", ()), []
        for row in rows:
            found["rows"].append(row)
            write(path, found)
        failed = [f"{row['name']}: {row['error']}" for row in found["rows"] if "error" in row]
        found |= {"state": "failed", "error": failed[0]} if failed else {"state": "done"}
    except Exception:
        found |= {"state": "failed", "error": traceback.format_exc()[-6000:]}
    write(path, found)


def write(path: Path, found: Row) -> None:
    """Put a step's results into its file, which holds a whole one at any time."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(path)


def end_of(log: Path) -> str:
    """The last 2,000 characters that a step has said."""
    return log.read_text(errors="replace")[-2000:]


def place() -> Row:
    """Where Python is to run: in a folder beside the package, whose sources it else takes for the installed one."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"cwd": ROOT / "bench", "env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}}


def run_aloud(command: list[str], seconds: float = math.inf, **settings: str) -> tuple[int, str]:
    """Exit status and output of a program, printed as it comes too: a step's log has it at the deadline.

    It is ended after so many seconds; what it has started may live on until the step ends. `settings` are variables of
    its environment.
    """
    said, where = [], place()
    where["env"] |= settings
    pipes: Row = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    program = subprocess.Popen(command, **pipes, **where)

    def listen() -> None:
        for line in program.stdout or ():
            print(line, end="", flush=True)
            said.append(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    listener.join(min(seconds, threading.TIMEOUT_MAX))
    if listener.is_alive():
        program.kill()
        listener.join(1)
    with suppress(subprocess.TimeoutExpired):
        program.wait(timeout=ENDING)
    return -1 if program.returncode is None else program.returncode, "".join(said)


def python(*arguments: str) -> list[str]:
    """The command that runs this interpreter."""
    return [sys.executable, *arguments]
