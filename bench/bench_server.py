"""What serving costs beside the model: HTTP for each request, the engine thread for each step.

The model is the package's. A request's overhead is what a client on loopback, in the same process, waits for one token,
less what `LLM.generate` takes for it. A step's is the time from the end of one step's kernels to the begin of the next
one's in the engine thread, 16 sequences running for clients in a process of their own: streamed, the event loop writes
16 events meanwhile.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
from conftest import sized

from pyllm import LLM, SamplingParams
from pyllm.default_model import default_model

pytest.importorskip("uvicorn", reason="needs the extra serve")

from pyllm.cli.serve import SWITCH_SECONDS
from pyllm.server.limits import Limits
from pyllm.server.run import Server, listen
from pyllm.server.service import Service

SEQUENCES = 16
TOKENS = sized(200, 100)
REQUESTS = sized(300, 5)


@pytest.fixture(scope="module")
def llm(threads: int) -> LLM:
    return LLM(default_model(), threads=threads)


@pytest.fixture(scope="module")
def port(llm: LLM) -> Iterator[int]:
    """Of a server of it in this process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    server = Server(Service(llm, "tiny", Limits(), (), lambda line: None))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()
    sys.setswitchinterval(before)


def test_overhead_of_a_request(benchmark: Any, llm: LLM, port: int) -> None:
    ids = list(range(1, 9))
    params = SamplingParams(max_tokens=1, temperature=0)
    client = http.client.HTTPConnection("127.0.0.1", port)

    def ask() -> None:
        assert post(client, {"prompt": ids, "max_tokens": 1, "temperature": 0})

    served, direct = [], []
    for _ in range(REQUESTS):  # in turns: the machine's speed drifts
        served.append(seconds(ask))
        direct.append(seconds(lambda: llm.generate({"prompt_token_ids": ids}, params)))
    benchmark.pedantic(ask, rounds=3)
    client.close()
    overhead = [a - b for a, b in zip(served, direct, strict=True)]
    benchmark.extra_info["overhead_ms"] = round(statistics.median(overhead) * 1e3, 3)
    benchmark.extra_info["overhead_ms_p95"] = round(statistics.quantiles(overhead, n=20)[-1] * 1e3, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_overhead_of_a_step(benchmark: Any, llm: LLM, port: int, stream: bool) -> None:
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}

    with ProcessPoolExecutor(1, get_context("spawn")) as clients, gaps(llm) as found:
        benchmark.pedantic(lambda: clients.submit(crowd, port, body).result(), rounds=3, warmup_rounds=1)
    benchmark.extra_info["overhead_us"] = round(statistics.median(found) * 1e6, 1)
    benchmark.extra_info["overhead_us_p90"] = round(statistics.quantiles(found, n=10)[-1] * 1e6, 1)
    benchmark.extra_info["steps"] = len(found)


def crowd(port: int, body: dict[str, Any]) -> None:
    """As many clients at a time as sequences."""
    with ThreadPoolExecutor(SEQUENCES) as threads:
        jobs = [threads.submit(one, port, {**body, "prompt": [1, 2 + i]}) for i in range(SEQUENCES)]
        assert all(job.result() for job in jobs)


def one(port: int, body: dict[str, Any]) -> bytes:
    client = http.client.HTTPConnection("127.0.0.1", port)
    try:
        return post(client, body)
    finally:
        client.close()


def post(client: http.client.HTTPConnection, body: dict[str, Any]) -> bytes:
    client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    text = response.read()
    assert response.status == 200, text
    return text


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def gaps(llm: LLM) -> Iterator[list[float]]:
    """Seconds between the kernels of successive recorded steps, while this lasts."""
    ops = llm.ops
    found: list[float] = []
    run, ended = ops.replay, 0.0

    def replay(graph: Any) -> None:
        nonlocal ended
        if ended and len(llm.engine.scheduler.running) == SEQUENCES:
            found.append(time.perf_counter() - ended)
        run(graph)
        ended = time.perf_counter()

    def sample(*args: Any) -> Any:  # an eager draw, where a prompt ends: no gap between recorded steps
        nonlocal ended
        ended = 0.0
        return type(ops).sample(ops, *args)

    ops.replay, ops.sample = replay, sample  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del ops.replay, ops.sample
