"""An engine in a process of its own: `Worker` drives one, and this module run as a program is the process.

Calls go down a pipe and results come back, a line of JSON each; the process times every call itself. Between calls it
is stopped, so that no thread of an idle engine spins while another one has its turn.
"""

from __future__ import annotations

import ctypes
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pyllm.compare.engine import EngineInfo, Settings, Unsupported


class WorkerError(Exception):
    """A call failed, or the process ended; the message says how."""


class Reply(NamedTuple):
    """What a call gave, and the seconds it took inside the process."""

    result: Any
    seconds: float


class Worker:
    """Starts a process and imports the engine there; `load` then makes the engine, `call` calls its methods."""

    def __init__(self, info: EngineInfo, threads: int) -> None:
        self.info = info
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # until close()
        own = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyllm.compare.worker", info.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **own, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        try:
            self._receive()  # imported
        except BaseException:
            self.close()
            raise

    def prepare(self, folder: Path, dtype: str) -> Path:
        """The engine's own form of the model in `folder`."""
        return Path(self.call("prepare", str(folder), dtype).result)

    def load(self, model: Path, settings: Settings) -> Reply:
        """Make the engine; the result has its `weight_bytes` and `cache_value_bytes`."""
        return self.call("load", str(model), vars(settings))

    def call(self, method: str, *arguments: Any) -> Reply:
        """Call a method of the engine: `Unsupported` where it says so, `WorkerError` for whatever else goes wrong."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
            return self._receive()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None
        finally:
            self._process.send_signal(signal.SIGSTOP)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: the most it had resident, and what is resident now of its own and of mapped files."""
        names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "files"}
        found = {}
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                found[names[name]] = int(value.split()[0]) * 1024
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # a call that never arrived
                pass

    def __enter__(self) -> Worker:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""
        self.close()

    def _receive(self) -> Reply:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._end())
        kind, value, seconds = json.loads(line)
        if kind == "unsupported":
            raise Unsupported(value)
        if kind == "error":
            raise WorkerError(value)
        return Reply(value, seconds)

    def _end(self) -> str:
        """How the process ended, with the last line it wrote."""
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", as the system does where memory runs out"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return f"its process {how}" + (f": {said[-1]}" if said else "")


def engine_version(info: EngineInfo) -> str:
    """Version of an engine's package."""
    if info.distribution == "pyllm":
        from pyllm import __version__

        return __version__
    try:
        return version(info.distribution)
    except PackageNotFoundError:
        return "unknown"


def serve(target: str) -> None:
    """Answer calls from stdin until it ends; what libraries print goes to stderr."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(kind: str, value: Any, seconds: float = 0.0) -> None:
        replies.write(json.dumps([kind, value, seconds], default=str) + "\n")
        replies.flush()

    try:
        kind = pkgutil.resolve_name(target)
    except Exception as error:
        reply("error", _described(error))
        return
    reply("result", None)
    engine: Any = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        began = time.perf_counter()
        try:
            if method == "load":
                engine = kind(Path(arguments[0]), Settings(**arguments[1]))
                result: Any = {name: getattr(engine, name) for name in ("weight_bytes", "cache_value_bytes")}
            elif method == "prepare":
                result = kind.prepare(Path(arguments[0]), arguments[1])
            else:
                result = getattr(engine, method)(*arguments)
            reply("result", result, time.perf_counter() - began)
        except Unsupported as error:
            reply("unsupported", str(error))
        except Exception as error:
            reply("error", _described(error))


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, even while it is stopped (Linux)."""
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    serve(sys.argv[1])
