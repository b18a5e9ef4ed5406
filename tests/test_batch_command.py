"""`pyllm batch`: files of requests, answered once each however often the run is ended."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import COMMAND, environment, interruptible, pyllm, refused

from pyllm import LLM

STORIES = Path(__file__).parents[1] / "pyllm" / "data" / "stories"


def line(custom_id: Any, body: Any, url: str = "/v1/completions", **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def ask(number: int, tokens: int = 8) -> str:
    body = {"prompt": f"Once upon a time {number}", "max_tokens": tokens, "temperature": 0.7, "seed": number}
    return line(f"task-{number}", {**body, "ignore_eos": True})


def answers(path: Path) -> dict[str, Any]:
    """By id; every id stands there once."""
    listed = [json.loads(text) for text in path.read_text().splitlines()]
    found = {answer["id"]: answer for answer in listed}
    assert len(found) == len(listed)
    return found


def test_answers_are_those_of_the_server(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        ask(1),
        "",
        line("vector", {"input": "a dog"}, "/v1/embeddings"),
        line("chat", {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 3}, "/v1/chat/completions"),
        line("refused", {"prompt": "a", "temperature": -1}),
        line("other model", {"prompt": "a", "model": "other"}),
    ]
    source.write_text("\n".join(lines))
    result = pyllm("batch", source, target, "--pooling", "mean")
    assert result.returncode == 0 and not result.stdout, result.stderr
    assert b"5 of 5 answered" in result.stderr and b"2 of them with an error" in result.stderr
    found = {answer["custom_id"]: answer for answer in answers(target).values()}
    llm = LLM(STORIES, threads=2)
    [expected] = llm.generate("Once upon a time 1", max_tokens=8, temperature=0.7, seed=1, ignore_eos=True)
    first = found["task-1"]
    assert first["id"] == "batch_req_1" and first["error"] is None
    assert first["response"]["status_code"] == 200 and first["response"]["request_id"]
    assert first["response"]["body"]["choices"][0]["text"] == expected.outputs[0].text
    vector = found["vector"]["response"]["body"]["data"][0]["embedding"]
    assert vector == llm.embed(["a dog"], pooling="mean")[0].tolist()
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert found["refused"]["response"]["status_code"] == 400
    assert found["refused"]["response"]["body"]["error"]["param"] == "temperature"
    assert found["other model"]["response"]["status_code"] == 404


def test_faulty_lines_are_answered_with_what_is_wrong(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    faulty = {
        "{": "not valid JSON",
        "[1]": "custom_id",
        line(7, {}): "custom_id",
        line("task-1", {}): "another line",
        line("method", {}, method="GET"): "method",
        line("url", {}, "/tokenize"): "url",
        line("body", []): "body",
        line("stream", {"prompt": "a", "stream": True}): "stream",
        line("long", {"prompt": "a" * (9 << 20)}): "longer",
    }
    source.write_text("\n".join([ask(1), *faulty]))
    assert pyllm("batch", source, target).returncode == 0
    found = answers(target)
    assert found["batch_req_1"]["error"] is None
    for number, message in enumerate(faulty.values(), 2):
        answer = found[f"batch_req_{number}"]
        assert answer["response"] is None
        assert message in answer["error"]["message"] and f"line {number}" in answer["error"]["message"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on(tmp_path: Path, end: signal.Signals) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(ask(number, 40) for number in range(30)))
    command = [*COMMAND, "batch", str(source), str(target), "--max-num-seqs", "2"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, preexec_fn=interruptible)
    until = time.monotonic() + 30
    while not target.exists() or target.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(end)
    _, stderr = process.communicate(timeout=30)
    if end is signal.SIGINT:
        assert process.returncode == 130 and b"goes on with the rest" in stderr
    first = target.read_bytes()
    whole = first[: first.rindex(b"\n") + 1]
    assert 3 <= whole.count(b"\n") < 30
    target.write_bytes(whole + b'{"id": "batch_req_9", "cust')  # as if it had been killed while it wrote
    assert pyllm("batch", source, target).returncode == 0
    assert target.read_bytes().startswith(whole)  # nothing is done twice
    found = answers(target)
    assert sorted(found) == sorted(f"batch_req_{number}" for number in range(1, 31))
    again = tmp_path / "again.jsonl"
    assert pyllm("batch", source, again).returncode == 0
    assert {i: a["response"]["body"]["choices"] for i, a in found.items()} == {
        i: a["response"]["body"]["choices"] for i, a in answers(again).items()
    }


def test_faults_of_the_server_are_asked_again(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(ask(1) + "\n" + line("refused", {"prompt": "a", "temperature": -1}))
    fault = {"id": "batch_req_1", "custom_id": "task-1", "response": {"status_code": 500}, "error": None}
    refusal = {"id": "batch_req_2", "custom_id": "refused", "response": {"status_code": 400}, "error": None}
    target.write_text(json.dumps(fault) + "\n" + json.dumps(refusal) + "\n")
    assert pyllm("batch", source, target).returncode == 0
    *first, again = map(json.loads, target.read_text().splitlines())
    assert first == [fault, refusal] and again["id"] == "batch_req_1" and again["response"]["status_code"] == 200


def test_other_files_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(ask(1))
    refused(pyllm("batch", source, source), 1, "over the requests")
    refused(pyllm("batch", tmp_path / "none", target), 1, "none")
    for other in ("a text\n", '{"id": "batch_req_1", "custom_id": "x"}\n', '{"id": "batch_req_5", "custom_id": "x"}\n'):
        target.write_text(other)
        refused(pyllm("batch", source, target), 1, "give another file")
        assert target.read_text() == other  # nothing is lost
