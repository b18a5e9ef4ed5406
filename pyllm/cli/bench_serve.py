"""`pyllm bench serve`: load on a server of this machine, and one request at a time beside it."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from pyllm.cli import FAILED, OK
from pyllm.cli import options as o
from pyllm.cli.compare import models_folder
from pyllm.cli.output import be_quiet, complain, note, progress_bar, write, write_json
from pyllm.cli.serve import is_loopback, missing_extra

if TYPE_CHECKING:
    from pyllm.server.load import Address, Answer, Job

END_SECONDS = 60  # for a server that was told to end: its drain is 30


def register(group: typer.Typer) -> None:
    """Add this command to `pyllm bench`."""
    group.command("serve")(bench_serve)


def bench_serve(
    server: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS OF pyllm serve]", help="How the server is started.", show_default=False),
    ] = None,
    url: Annotated[
        str | None, o.option("--url", help="Start none: measure the pyllm server there, as http://127.0.0.1:8000.")
    ] = None,
    api_key: Annotated[str | None, o.option("--api-key", env="API_KEY", help="That the server wants.")] = None,
    requests: Annotated[
        int, o.option("--requests", min=1, max=10000, help="How many are sent together; default 64.")
    ] = 64,
    rate: Annotated[
        float | None,
        o.option("--rate", min=0.001, max=10000, help="Arrivals a second, at random; default: as clients get free."),
    ] = None,
    concurrency: Annotated[
        int, o.option("--concurrency", min=1, max=256, help="Most requests at a time; default 16.")
    ] = 16,
    sequential: Annotated[
        int | None,
        o.option("--sequential", min=0, max=10000, help="Requests sent one at a time, to compare; default 16."),
    ] = None,
    prompt_tokens: Annotated[
        int, o.option("--prompt-tokens", min=1, help="Longest prompt; the shortest is a quarter; default 128.")
    ] = 128,
    max_tokens: Annotated[
        int, o.option("--max-tokens", "-n", min=2, help="Longest completion; the shortest is a quarter; default 64.")
    ] = 64,
    seed: Annotated[int, o.option("--seed", "-s", min=0, help="Of lengths, prompts and arrivals; default 0.")] = 0,
    compare: Annotated[
        str | None,
        o.option("--compare", help="In turns with llama-cpp-python's server, on random weights: llama-1b, gpt2, ..."),
    ] = None,
    rounds: Annotated[
        int | None, o.option("--rounds", min=1, max=100, help="--compare: turns, medians count; default 3.")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Send requests of mixed lengths to a server on this machine, together and one at a time, and say how long they
    took. Starts a server of its own, with the options after --, unless --url names one."""
    be_quiet(quiet)
    if url is None and (missing := missing_extra()) is not None:
        complain(f"pyllm bench serve needs the package {missing}: pip install 'pyllm[serve]'")
        return FAILED
    if url is not None and server:
        raise typer.BadParameter("give either --url or options of a server to start.")
    if compare is None and rounds is not None:
        raise typer.BadParameter("--rounds: only with --compare.")
    if compare is not None:
        if url is not None or rate is not None or sequential is not None:
            raise typer.BadParameter("--url, --rate, --sequential: only without --compare.")
        return _compare(
            compare, server or (), requests, concurrency, prompt_tokens, max_tokens, seed, rounds or 3, json
        )
    from pyllm.server.load import Address, jobs, summary

    alone = min(requests, 16) if sequential is None else sequential
    with _pyllm(server or ()) if url is None else _running(url) as (host, port):
        address = Address(host, port, api_key)
        first = _sent(address, jobs(1, prompt_tokens, max_tokens, None, seed, "first"), 1, "warming up")
        if (error := _error(first[1])) is not None:
            complain(f"the server answered the first request with {error}")
            return FAILED
        together = _sent(
            address, jobs(requests, prompt_tokens, max_tokens, rate, seed, "together"), concurrency, "together"
        )
        runs = {"together": together}
        if alone:
            runs["sequential"] = _sent(
                address, jobs(alone, prompt_tokens, max_tokens, None, seed, "alone"), 1, "one at a time"
            )
    facts: dict[str, Any] = {name: summary(*run) for name, run in runs.items()}
    if json:
        write_json(facts)
    else:
        _show(facts, f"{concurrency} at a time" if rate is None else f"{rate:g} a second")
    for _, answers in runs.values():
        if (error := _error(answers)) is not None:
            complain(f"a request failed: {error}")
            return FAILED
    return OK


def _sent(address: Address, listed: Sequence[Job], concurrency: int, what: str) -> tuple[float, list[Answer]]:
    from pyllm.server.load import send

    with progress_bar(what) as bar:
        return send(address, listed, concurrency, lambda done: bar(done / len(listed)) if bar else None)


def _error(answers: Sequence[Answer]) -> str | None:
    """Of the first request that has one."""
    return next((answer.error for answer in answers if answer.error is not None), None)


def _show(facts: dict[str, Any], how: str) -> None:
    for name, found in facts.items():
        write(
            f"{how if name == 'together' else 'one at a time'}: {found['requests']} requests in "
            f"{found['seconds']:.2f} s, {found['requests_per_second']:.2f} requests/s, "
            f"{found['tokens_per_second']:.1f} tok/s" + (f", {found['failed']} failed" if found["failed"] else ""),
            end="\n",
        )
        for what in ("time_to_first_token", "time_per_token", "time_to_last_token"):
            if (times := found[what]) is not None:
                shown = ", ".join(
                    f"{label} {times[key] * 1e3:.1f} ms"
                    for label, key in (("median", "p50"), ("p95", "p95"), ("p99", "p99"))
                )
                write(f"  {what.replace('_', ' ')}: {shown}", end="\n")
    if "sequential" in facts and facts["sequential"]["tokens_per_second"]:
        ratio = facts["together"]["tokens_per_second"] / facts["sequential"]["tokens_per_second"]
        write(f"together {ratio:.2f} x the tokens per second of one at a time", end="\n")


def _compare(
    shape: str,
    options: Sequence[str],
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    max_tokens: int,
    seed: int,
    rounds: int,
    json: bool,
) -> int:
    """Both servers on the same weights and requests, in turns; each is stopped while the other has its turn."""
    from pyllm.compare import llama_cpp_server as other
    from pyllm.compare.shapes import SHAPES
    from pyllm.isa import default_threads
    from pyllm.server.load import Address, jobs

    if shape not in SHAPES:
        raise typer.BadParameter(f"--compare: expected one of {', '.join(SHAPES)}, got {shape!r}.")
    if missing := other.missing():
        complain(f"--compare needs {', '.join(missing)}: pip install 'pyllm[compare]'")
        return FAILED
    threads, length = default_threads(), -(-(prompt_tokens + max_tokens) // 256) * 256
    folder, gguf = other.prepare(shape, models_folder())
    shared = ("-m", str(folder), "--threads", str(threads), "--ctx-size", str(length))
    speeds: dict[str, list[float]] = {"pyllm": [], "llama-cpp-python": []}
    with (
        tempfile.TemporaryFile() as log,
        _started("pyllm serve", _our_command([*shared, *options]), "/health") as ours,
        _started("llama-cpp-python", other.command(gguf, threads, length), "/v1/models", log) as theirs,
    ):
        servers = dict(zip(speeds, (ours, theirs), strict=True))
        for process, _ in servers.values():
            process.send_signal(signal.SIGSTOP)
        for number in range(-1, rounds):  # the first time to warm up
            listed = jobs(requests if number >= 0 else 1, prompt_tokens, max_tokens, None, seed, f"round {number}")
            for name, (process, port) in servers.items():
                note(f"round {number + 1} of {rounds}: {name}")
                process.send_signal(signal.SIGCONT)
                seconds, answers = _sent(Address("127.0.0.1", port, text=True), listed, concurrency, name)
                process.send_signal(signal.SIGSTOP)
                if (error := _error(answers)) is not None:
                    complain(f"{name}: a request failed: {error}")
                    return FAILED
                if number >= 0:
                    speeds[name].append(sum(answer.tokens for answer in answers) / seconds)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*speeds.values(), strict=True))
    if json:
        write_json({"tokens_per_second": speeds, "ratio": ratio, "concurrency": concurrency, "threads": threads})
        return OK
    for name, found in speeds.items():
        write(f"{name}: {statistics.median(found):.1f} tok/s, {concurrency} clients at a time", end="\n")
    write(f"pyllm {ratio:.2f} x llama-cpp-python, median of {rounds} rounds", end="\n")
    return OK


@contextmanager
def _running(url: str) -> Iterator[tuple[str, int]]:
    """Host and port of a URL of this machine."""
    from pyllm.server.run import address_of

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        here = bool(host) and parts.scheme == "http" and parts.path in ("", "/") and is_loopback(address_of(host))
    except (ValueError, OSError):
        host, port, here = "", 0, False
    if not here:
        raise typer.BadParameter(f"--url: expected a server of this machine, as http://127.0.0.1:8000, got {url!r}.")
    yield host, port


@contextmanager
def _pyllm(options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Host and port of a `pyllm serve` that runs while this lasts. What it complains of goes to stderr."""
    with _started("pyllm serve", _our_command(options), "/health") as (_, port):
        yield "127.0.0.1", port


def _our_command(options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pyllm", "serve", "--host", "127.0.0.1", "--quiet", *options]


@contextmanager
def _started(
    name: str, command: Sequence[str], path: str, log: IO[bytes] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server, and its port, that runs while this lasts and answers GET `path` with 200 once it serves.

    `command` starts it, but for its port. Raises `OSError` where it ends before it serves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ)
    )
    try:
        while not _answers(port, path):
            if (code := process.poll()) is not None:
                raise OSError(0, f"it ended with exit code {code} before it served{_last_line(log)}", name)
            time.sleep(0.05)
        yield process, port
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: IO[bytes] | None) -> str:
    if log is None:
        return ""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:500]}" if lines else ""


def _answers(port: int, path: str) -> bool:
    from pyllm.server.load import Address

    client = Address("127.0.0.1", port).connect()
    try:
        client.request("GET", path)
        return client.getresponse().status == 200
    except OSError:
        return False
    finally:
        client.close()
