"""`pyllm bench serve`: load on a server of this machine, and one request at a time beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from pyllm.cli import FAILED, OK
from pyllm.cli import options as o
from pyllm.cli.output import be_quiet, complain, progress_bar, write, write_json
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
    from pyllm.server.load import Address, jobs, summary

    alone = min(requests, 16) if sequential is None else sequential
    with _started(server or ()) if url is None else _running(url) as (host, port):
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


@contextmanager
def _running(url: str) -> Iterator[tuple[str, int]]:
    """Host and port of a URL of this machine."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if host is None or parts.scheme != "http" or parts.path not in ("", "/") or not is_loopback(host):
        raise typer.BadParameter(f"--url: expected a server of this machine, as http://127.0.0.1:8000, got {url!r}.")
    yield host, port


@contextmanager
def _started(options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Host and port of a server that runs while this lasts. What it complains of goes to stderr.

    Raises `OSError` where it ends before it serves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pyllm", "serve", *options, "--host", "127.0.0.1", "--port", str(port), "--quiet"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(os.environ))
    try:
        while not _healthy(port):
            if (code := process.poll()) is not None:
                raise OSError(0, f"it ended with exit code {code} before it served", "pyllm serve")
            time.sleep(0.05)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(port: int) -> bool:
    from pyllm.server.load import Address

    client = Address("127.0.0.1", port).connect()
    try:
        client.request("GET", "/health")
        return client.getresponse().status == 200
    except OSError:
        return False
    finally:
        client.close()
