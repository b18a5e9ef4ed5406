"""What the server refuses, and with which status; keys; clients that leave; the end."""

from __future__ import annotations

import base64
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_model
from pydantic import ValidationError
from serving import JSON, Running, raw_request, running, slowed, until

from pyllm import LLM, SamplingParams
from pyllm.cli import main
from pyllm.server.app import ROUTES
from pyllm.server.errors import ApiError
from pyllm.server.limits import Limits
from pyllm.server.protocol import CompletionBody, parse

LIMITS = Limits(
    max_body_bytes=4096,
    max_prompt_tokens=40,
    max_tokens=64,
    max_n=4,
    max_stop_strings=2,
    max_stop_chars=5,
    max_logprobs=3,
    max_queue=4,
    max_requests=12,
    max_seconds=20,
    body_seconds=0.3,
)
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def llm(tiny_chat_folder: Path) -> LLM:
    return LLM(tiny_chat_folder, threads=2, max_num_seqs=2)


@pytest.fixture(scope="module")
def shared(llm: LLM) -> Iterator[Running]:
    with running(llm, LIMITS) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.assert_idle()
    assert shared.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x " * 60}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({}, "prompt"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 70}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "abcdef"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 4}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"99999999": 1}}, None),
        ({"prompt_logprob": 1}, "prompt_logprob"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"model": "/etc/passwd"}, "model"),
    ],
)
def test_what_a_completion_may_not_ask(server: Running, body: dict[str, Any], param: str | None) -> None:
    body = body if body.keys() & {"prompt"} or not body else {"prompt": "once", **body}
    for stream in (False, True):
        status = 404 if param == "model" else 400
        assert server.refusal("/v1/completions", status, **body, stream=stream)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x " * 60}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 65}, "max_completion_tokens"),
        ({"max_completion_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"chat_template": "{{ ''.__class__ }}"}, "chat_template"),
    ],
)
def test_what_a_chat_may_not_ask(server: Running, body: dict[str, Any], param: str) -> None:
    assert server.refusal("/v1/chat/completions", 400, **{"messages": HELLO, **body})["param"] == param


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"nonsense", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 4000, b'{"n": NaN}']
)
def test_bodies_that_are_no_json(server: Running, raw: bytes) -> None:
    response = server.client.post("/v1/completions", content=raw, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1.5] * 9999},
        {"prompt": [[1.5] * 9999]},
        {"prompt": "x", "stop": [1] * 9999},
        {"prompt": "x", "logit_bias": {str(i): "x" for i in range(9999)}},
        {"prompt": "x", **{f"field{i}": i for i in range(9999)}},
        {"prompt": "x", "structured_outputs": {f"field{i}": i for i in range(9999)}},
    ],
)
def test_of_many_faults_in_a_body_few_are_looked_at(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        parse(CompletionBody, json.dumps(body).encode())
    cause = refused.value.__cause__
    assert refused.value.status == 400 and isinstance(cause, ValidationError) and cause.error_count() < 10


def test_routes_methods_and_media(server: Running) -> None:
    assert server.client.get("/nothing").status_code == 404
    wrong = server.client.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and "error" in wrong.json()
    for media in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": media})
        assert answer.status_code == 415
    assert server.client.options("/v1/completions", headers={"Origin": "http://evil"}).status_code == 405
    assert not any("access-control" in name for name in server.client.get("/version").headers)


def test_bodies_too_large_and_too_slow(server: Running) -> None:
    assert server.refusal("/v1/completions", 413, prompt="x" * 5000)["code"] is None
    pieces = (b"x" * 1000 for _ in range(10))  # of no length told beforehand
    assert server.client.post("/v1/completions", content=pieces, headers=JSON).status_code == 413
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(raw_request({"prompt": "once"}, of=0.5))
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_back(server: Running, llm: LLM) -> None:
    body = {"prompt": "once", "max_tokens": 64, "ignore_eos": True}
    with slowed(llm, 0.01), ThreadPoolExecutor(6) as crowd:
        running_now = [crowd.submit(server.post, "/v1/completions", **body) for _ in range(6)]
        until(lambda: server.service.engine.open == 6)
        for path, unread in (("/v1/completions", body), ("/v1/chat/completions", {"messages": HELLO})):
            with pytest.MonkeyPatch.context() as patch:  # nothing is read of what cannot be taken
                patch.setattr(llm, "encode", None)
                patch.setattr(llm, "chat_prompt", None)
                response = server.client.post(path, json=unread)
            assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) > 0
        for one in running_now:
            one.result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "encode", None)  # nothing is read of what cannot be taken
        assert "at most 6 completions" in server.refusal("/v1/completions", 400, prompt=["a"] * 7)["message"]


def test_too_many_requests_at_a_time(llm: LLM) -> None:
    with running(llm, Limits(max_requests=1)) as server, slowed(llm, 0.02), ThreadPoolExecutor(1) as other:
        first = other.submit(server.post, "/v1/completions", prompt="once", max_tokens=30, ignore_eos=True)
        until(lambda: server.service.engine.open == 1)
        response = server.client.get("/v1/models")
        assert response.status_code == 429 and response.headers["retry-after"]
        assert server.client.get("/health").status_code == 200
        first.result()


def test_requests_end_when_their_time_is_up(llm: LLM) -> None:
    body = {"prompt": "once", "max_tokens": 100, "ignore_eos": True}
    with running(llm, Limits(max_seconds=0.15)) as server, slowed(llm, 0.02):
        response = server.client.post("/v1/completions", json=body)
        assert response.status_code == 503 and response.json()["error"]["code"] == "deadline_exceeded"
        assert response.headers["retry-after"]
        assert server.refusal("/v1/completions", 400, **body, stream_options={})["param"] == "stream_options"
        text = server.client.post("/v1/completions", json={**body, "stream": True}).text
        *_, error, done = [line for line in text.splitlines() if line]
        assert json.loads(error[6:])["error"]["code"] == "deadline_exceeded" and done == "data: [DONE]"


def test_every_route_needs_the_key_but_health(llm: LLM) -> None:
    with running(llm, keys=("right", "other")) as server, httpx.Client(base_url=server.url) as client:
        paths = {(method, route.path) for route in ROUTES for method in route.methods}
        paths |= {("GET", "/nothing"), ("GET", "/health/"), ("GET", "//health"), ("GET", "/healthz")}
        for method, path in sorted(paths):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic right"},
                {"Authorization": "Basic " + base64.b64encode(b"right:wrong").decode()},
                {"X-Api-Key": "right"},
            ):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == (200 if path == "/health" else 401), (method, path)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"].startswith(
                        "Basic" if answer.url.path == "/" else "Bearer"
                    )
                    assert answer.headers["x-request-id"]
        assert client.get("/version", headers={"Authorization": "Bearer other"}).status_code == 200


def test_clients_with_different_keys_share_no_cache(llm: LLM) -> None:
    body = {"prompt": "the same long prompt for everyone, " * 5, "max_tokens": 1}
    with running(llm, keys=("one", "two")) as server:
        cached = [
            httpx.post(
                server.url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}
            ).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for key in ("one", "two", "one", "two")
        ]  # fmt: skip
    assert cached[:2] == [0, 0] and cached[2] == cached[3] > 0


def test_the_routes_are_these() -> None:
    assert sorted((route.path, *sorted(route.methods or ())) for route in ROUTES) == [
        ("/", "GET", "HEAD"),
        ("/detokenize", "POST"),
        ("/health", "GET", "HEAD"),
        ("/metrics", "GET", "HEAD"),
        ("/tokenize", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/embeddings", "POST"),
        ("/v1/models", "GET", "HEAD"),
        ("/v1/models/{model:path}", "GET", "HEAD"),
        ("/version", "GET", "HEAD"),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("generated", [0, 3])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(tiny_folder: Path, stream: bool, generated: int) -> None:
    """`generated` 0: it leaves in the middle of its prompt, which takes 40 steps."""
    llm = LLM(tiny_folder, threads=2, max_num_seqs=2, max_num_batched_tokens=2 if generated == 0 else 512)
    body = {"prompt": "word " * 40, "max_tokens": 60, "ignore_eos": True, "stream": stream}
    with running(llm) as server, slowed(llm, 0.02):
        engine = server.service.engine
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw_request(body))
            until(lambda: engine.steps >= 2 and llm.stats.generated_tokens >= generated)
            assert llm.engine.scheduler.pool.free < llm.engine.scheduler.pool.size
        steps = engine.steps
        until(lambda: llm.engine.idle)
        # One step may be under way when the connection closes, another before the event loop hears of it.
        assert engine.steps <= steps + 2
        assert llm.engine.scheduler.pool.free == llm.engine.scheduler.pool.size
        until(lambda: bool(server.log) and server.log[-1]["status"] in (499, 200))
        assert server.log[-1]["finish_reasons"] == ["abort"]


class PanicError(BaseException):
    """As extensions written in Rust raise it."""


@pytest.mark.parametrize("error", [OSError, ValueError, PanicError])
def test_a_failing_step_ends_its_requests_and_nothing_else(
    server: Running, llm: LLM, error: type[BaseException]
) -> None:
    step = llm.engine.step

    def broken() -> None:
        llm.engine.step = step  # type: ignore[method-assign]
        llm.engine._reset()
        raise error("secret path /root")

    llm.engine.step = broken  # type: ignore[method-assign]
    response = server.client.post("/v1/completions", json={"prompt": "once"})
    assert response.status_code == 500 and "secret" not in response.text
    assert server.post("/v1/completions", prompt="once", max_tokens=2)["choices"]
    [line] = [line for line in server.log if "secret path" in line.get("error", "")]
    server.log.remove(line)
    assert line["event"] == "error" and "Traceback" in line["error"]


def test_an_error_between_steps_ends_what_runs_but_not_the_thread(server: Running, llm: LLM) -> None:
    def broken() -> None:
        raise RuntimeError("between steps")

    with slowed(llm, 0.05), ThreadPoolExecutor(1) as other:
        running = other.submit(server.client.post, "/v1/completions", json={"prompt": "once", "max_tokens": 50})
        until(lambda: not llm.engine.idle)
        server.service.engine.command(broken)
        assert running.result(10).status_code == 500
    assert server.post("/v1/completions", prompt="once", max_tokens=2)["choices"]


@pytest.mark.parametrize("error", [ValueError, PanicError])
def test_a_fault_of_the_server_is_none_of_the_request(
    server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise error("secret path /root")

    for owner, name in ((llm.engine, "add"), (llm.engine, "prepare"), (llm, "encode")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            response = server.client.post("/v1/completions", json={"prompt": "once", "bad_words": ["twice"]})
        assert response.status_code == 500 and "secret" not in response.text
        until(lambda: any("secret path" in line.get("error", "") for line in server.log))
        server.log[:] = [line for line in server.log if "error" not in line]


def test_what_completions_share_is_made_once(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made, prepare = [], llm.engine.prepare

    def counted(params: SamplingParams) -> Any:
        made.append(params)
        return prepare(params)

    monkeypatch.setattr(llm.engine, "prepare", counted)
    answer = server.post("/v1/completions", prompt=["a", "b"], n=2, bad_words=["once"], max_tokens=2)
    assert len(answer["choices"]) == 4 and len(made) == 1


def test_an_end_that_comes_as_the_thread_looks_for_work_is_seen(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(llm) as server:
        thread, seen = server.service.engine, threading.Event()
        clear = thread._wake.clear

        def late() -> None:
            thread._stopping = True
            thread._wake.set()
            clear()
            seen.set()

        monkeypatch.setattr(thread._wake, "clear", late)
        thread._wake.set()
        assert seen.wait(10)
        thread._thread.join(10)
        assert not thread._thread.is_alive()


def test_a_broken_model_is_an_error_of_the_server(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "bad", poison="model.norm.weight")
    with running(LLM(folder, threads=1)) as server:
        assert server.client.post("/v1/completions", json={"prompt": "once"}).status_code == 500


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% set x = namespace(__class__=1) %}",
        "{{ '%s' | format(self._TemplateReference__context) }}",
        "{{ ''|attr('format')('{0.__class__}') }}{{ '{0.__class__}'.format(1) }}",
        "{{ range(100000000) | list }}",
        "{{ 'x' * 999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
    ],
)  # fmt: skip
def test_templates_do_not_escape_their_sandbox(server: Running, llm: LLM, template: str) -> None:
    llm.chat_template = template
    try:
        assert server.refusal("/v1/chat/completions", 400, messages=HELLO)
    finally:
        llm.chat_template = None


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SystemExit) as ended:
        main(["serve"])
    assert ended.value.code == 1
    expected = "pyllm: error: pyllm serve needs the package prometheus-client: pip install 'pyllm[serve]'\n"
    assert capsys.readouterr().err == expected


def test_every_limit_is_a_flag(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("pyllm.server.run.serve", lambda service, *_: made.append(service) or signal.SIGTERM)
    flags = {
        "max_body_bytes": 1, "max_prompt_tokens": 2, "max_output_tokens": 3, "max_n": 4, "max_stop_strings": 5,
        "max_stop_chars": 6, "max_logprobs": 7, "max_queue": 8, "max_requests": 9, "max_seconds": 10.5,
        "body_seconds": 11.5, "drain_seconds": 12.5,
    }  # fmt: skip
    options = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setenv("PYLLM_API_KEY", "secret")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "-m", str(tiny_folder), "--max-num-seqs", "3", *options])
    assert ended.value.code == 0
    [service] = made
    values = {("max_output_tokens" if name == "max_tokens" else name): v for name, v in asdict(service.limits).items()}
    assert values == flags and service.keys == [b"secret"] and service.model == "model"
    assert service.engine.capacity == 3 + 8


@pytest.mark.parametrize("keys", [(), ("right",)])
def test_requests_that_name_another_host_are_refused(llm: LLM, keys: tuple[str, ...]) -> None:
    with running(llm, hosts=("localhost", "127.0.0.1", "[::1]", "My.Host"), keys=keys) as server:
        for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "my.host", "localhost:"):
            assert server.client.get("/version", headers={"Host": name}).status_code == 200, name
        for name in (
            "evil.example",
            "127.0.0.1.evil.example:8000",
            "evil.example:80",
            "localhost:80:80",
            "::1",
            "[::1",
        ):
            for path in ("/", "/health", "/v1/models", "/nothing"):
                answer = server.client.get(path, headers={"Host": name})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
        body = {"prompt": "once", "max_tokens": 1}
        evil = server.client.post("/v1/completions", json=body, headers={"Host": "evil.example"})
        assert evil.status_code == 403 and "--allowed-hosts" in evil.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--allowed-hosts", "a.example:80"), "without a port"),
        (("--allowed-hosts", "::1"), "without a port"),
        (("--max-seconds", "inf"), "finite"),
        (("--drain-seconds", "inf"), "finite"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *options])
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_loopback_is_told_by_the_address(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("pyllm.server.run.serve", lambda *given: made.append(given) or signal.SIGTERM)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    for address, warned in (("127.0.0.3", False), ("192.0.2.1", True)):
        known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="0"):
            patch.setattr(socket, "getaddrinfo", lambda *given, known=known: known)
            main(["serve", "-m", str(tiny_folder), "--host", "localhost"])
        service, bound, *_ = made.pop()
        assert bound == address and bool(service.hosts) is not warned
        assert ("no --api-key" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ((), {"localhost", "127.0.0.1", "[::1]"}),
        (("--host", "127.0.0.2"), {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}),
        (("--api-key", "k"), set()),
        (("--host", "0.0.0.0"), set()),
        (("--allowed-hosts", "a.example"), {"localhost", "127.0.0.1", "[::1]", "a.example"}),
        (("--api-key", "k", "--allowed-hosts", "a.example"), {"localhost", "127.0.0.1", "[::1]", "a.example"}),
        (("--allowed-hosts", "*"), set()),
    ],
)
def test_hosts_are_checked_where_a_page_could_reach_the_server(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], hosts: set[str]
) -> None:
    made = []
    monkeypatch.setattr("pyllm.server.run.serve", lambda service, *_: made.append(service) or signal.SIGTERM)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "-m", str(tiny_folder), *options])
    assert set(made[0].hosts) == hosts


def test_a_grammar_that_takes_long_holds_nobody_up(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    gate, make = threading.Event(), llm.engine.prepare

    def slow(params: SamplingParams) -> Any:
        assert params.structured_outputs is None or gate.wait(10)
        return make(params)

    monkeypatch.setattr(llm.engine, "prepare", slow)
    with ThreadPoolExecutor(1) as crowd:
        body = {"prompt": "once", "structured_outputs": {"choice": ["yes"]}}
        held = crowd.submit(server.post, "/v1/completions", **body)
        for _ in range(3):
            assert server.post("/v1/completions", prompt="once", max_tokens=2)["choices"]
        assert not held.done()
        gate.set()
        assert held.result(10)["choices"][0]["text"] == "yes"


def test_a_grammar_is_compiled_for_those_alone_who_wait_for_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    gate, entered, make = threading.Event(), threading.Event(), llm.engine.prepare
    compiled: list[str] = []

    def slow(params: SamplingParams) -> Any:
        if params.structured_outputs is not None:
            compiled.append(str(params.structured_outputs.regex))
            entered.set()
            assert gate.wait(10)
        return make(params)

    monkeypatch.setattr(llm.engine, "prepare", slow)
    with running(llm, Limits(max_seconds=0.5)) as server, ThreadPoolExecutor(1) as crowd:
        late = crowd.submit(server.client.post, "/v1/completions", json=grammar("first"))
        assert entered.wait(10)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw_request(grammar("second")))
            until(lambda: server.service._grammars._work_queue.qsize() == 1)
        until(lambda: any(line["status"] == 499 for line in server.log))
        answer = late.result(10)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_exceeded"
        gate.set()
        until(lambda: server.service._grammars._work_queue.qsize() == 0)
        server.post("/v1/completions", **grammar("third"))
    assert compiled == ["first", "third"]


def grammar(regex: str) -> dict[str, Any]:
    return {"prompt": "once", "structured_outputs": {"regex": regex}}


def test_no_answer_repeats_the_host_header(server: Running) -> None:
    response = server.client.get("/version/", headers={"Host": "elsewhere.example"})
    assert response.status_code == 404 and "elsewhere" not in str(response.headers)


@pytest.mark.parametrize("value", [1 << 31, 1 << 63, 1 << 70, 10**400])
@pytest.mark.parametrize(
    "field", ["top_k", "min_tokens", "seed", "stop_token_ids", "allowed_token_ids", "logit_bias", "temperature"]
)
def test_huge_numbers_never_are_a_failure_of_the_server(server: Running, field: str, value: int) -> None:
    given = {"stop_token_ids": [value], "allowed_token_ids": [value], "logit_bias": {str(value): 1.0}}.get(field, value)
    body = {"prompt": "hello", "max_tokens": 2, field: given}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("arguments", [r'{"a": "\ud800"}', '{"a": NaN}', '{"a": ' + "[" * 900 + "]" * 900 + "}"])
def test_odd_arguments_of_earlier_calls_are_never_a_failure_of_the_server(server: Running, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, *HELLO]
    response = server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert response.status_code in (200, 400), response.text
