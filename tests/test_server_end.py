"""The server as a process: how it begins to serve, what signals do to it and to its clients, what a long run leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tiny_model
from serving import raw_request, running, until

from pyllm import LLM
from pyllm.errors import PyllmError
from pyllm.server.limits import Limits
from pyllm.server.run import serve
from pyllm.server.service import Service


def test_a_soak_leaves_nothing_behind(tiny_folder: Path) -> None:
    """PYLLM_SOAK=1000 for a long one."""
    from soak import IDLE_TASKS, soak

    requests = int(os.environ.get("PYLLM_SOAK", "100"))
    report = soak(tiny_folder, requests, warm_up=2000 if requests >= 1000 else 0)
    assert report.answered == report.sent and report.health_failures == 0 and report.tasks <= IDLE_TASKS
    assert report.health_seconds < 3  # 0.015 at most in 300 requests, on two cores
    if report.sent >= 1000:
        assert report.slope_kib < 0.5, report.memory  # for each request, over the second half: noise


def serve_process(folder: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """`pyllm serve` as a process of its own, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyllm", "serve", "-m", str(folder), "--port", "0", "--threads", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving"):
            return process, int(line.rsplit(":", 1)[1])
    raise AssertionError(f"it ended with {process.wait()}")


def test_sigterm_lets_requests_finish_or_ends_them_cleanly(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "model", max_position_embeddings=200_000)
    process, port = serve_process(folder, "--drain-seconds", "4", "--kv-cache-bytes", "300000000")
    lengths = 2000, 2000, 190_000  # two that end within the drain's seconds even on a busy machine, one that does not
    bodies = [{"prompt": "once", "max_tokens": n, "ignore_eos": True, "stream": True} for n in lengths]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client, ThreadPoolExecutor(3) as crowd:
        answers = [crowd.submit(client.post, "/v1/completions", json=body) for body in bodies]
        until(lambda: 'pyllm:num_requests_running{model_name="model"} 3' in client.get("/metrics").text)
        assert client.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403  # by default
        process.send_signal(signal.SIGTERM)
        texts = [answer.result().text for answer in answers]
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    assert all('"finish_reason":"length"' in text for text in texts[:2])
    assert '"code":"shutting_down"' in texts[2]
    assert process.wait(10) == 0
    assert process.stderr is not None
    lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
    assert {line["event"] for line in lines} == {"request"}


def test_a_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "model", max_position_embeddings=200_000)
    process, port = serve_process(folder, "--kv-cache-bytes", "300000000")
    body = {"prompt": "once", "max_tokens": 190_000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
        ThreadPoolExecutor(1) as crowd,
        socket.create_connection(("127.0.0.1", port)) as deaf,
    ):
        deaf.sendall(raw_request(body))  # and never reads
        answer = crowd.submit(client.post, "/v1/completions", json=body)
        until(lambda: 'pyllm:num_requests_running{model_name="model"} 2' in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None and not answer.done()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        *_, error, done = answer.result().text.splitlines()[::2]
        assert '"code":"shutting_down"' in error and done == "data: [DONE]"
        assert process.wait(20) == 0
    assert time.monotonic() - began < 10  # the drain would be 30


def test_a_second_signal_does_not_wait_for_the_step_under_way(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, threads=1)
    step, entered, gate = llm.engine.step, threading.Event(), threading.Event()

    def held() -> None:
        if server.service.engine.open == len(llm.engine._running) == 2:
            entered.set()
            assert gate.wait(20)
        time.sleep(0.02)
        step()

    body = {"prompt": "once", "max_tokens": 50, "ignore_eos": True}
    with running(llm) as server, ThreadPoolExecutor(2) as crowd:
        llm.engine.step = held  # type: ignore[method-assign]
        whole, streamed = (
            crowd.submit(server.client.post, "/v1/completions", json={**body, "stream": stream})
            for stream in (False, True)
        )
        assert entered.wait(10)
        for _ in range(2):
            server.server.handle_exit(signal.SIGTERM, None)
        assert whole.result(10).json()["error"]["code"] == "shutting_down"
        assert '"code":"shutting_down"' in streamed.result(10).text
        gate.set()
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert server.service.engine.open == 0


def test_the_drain_ends_for_clients_that_neither_send_nor_read(tiny_folder: Path) -> None:
    with (
        running(LLM(tiny_folder, threads=1), Limits(drain_seconds=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as silent,
    ):
        silent.sendall(raw_request({"prompt": "once"}, of=0.5))
        until(lambda: len(server.server.server_state.tasks) == 1)
        began = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(20)
        assert not server.thread.is_alive() and time.monotonic() - began < 6  # uvicorn's own wait is 10


def test_what_does_not_start_does_not_serve(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("can't start new thread")

    service = Service(LLM(tiny_folder, threads=1), "tiny", Limits(), (), lambda line: None)
    monkeypatch.setattr(service.engine, "start", broken)
    ready: list[int] = []
    with pytest.raises(PyllmError, match="did not start"):
        serve(service, "127.0.0.1", 0, lambda at, port: ready.append(port))
    assert not ready


def test_an_address_in_use_and_a_wide_one_are_told(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "pyllm", "serve", "-m", str(tiny_folder)]
        ended = subprocess.run(
            [*command, "--port", str(taken.getsockname()[1])], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 1 and "in use" in ended.stderr.lower() and "Traceback" not in ended.stderr
    process, _ = serve_process_with_warning(tiny_folder)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def serve_process_with_warning(folder: Path) -> tuple[subprocess.Popen[str], list[str]]:
    command = [sys.executable, "-m", "pyllm", "serve", "-m", str(folder), "--host", "0.0.0.0", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving"):
            break
    assert any("no --api-key" in line for line in lines)
    return process, lines
