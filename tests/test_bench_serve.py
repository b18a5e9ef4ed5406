"""`pyllm bench serve`: the load generator against a server in this process, and the command from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running, slowed
from test_cli import pyllm, refused
from test_compare import TINY

from pyllm import LLM
from pyllm.cli import main
from pyllm.compare import llama_cpp_server, shapes
from pyllm.server.load import IDS, Address, Answer, Job, jobs, send, summary
from pyllm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Running]:
    with running(LLM(tiny_folder, threads=1, max_num_seqs=8), keys=("secret",)) as found:
        yield found


def address(server: Running, key: str | None = "secret") -> Address:
    return Address("127.0.0.1", server.port, key)


def test_jobs_have_the_lengths_and_arrivals_asked_for() -> None:
    listed = jobs(2000, 40, 21, 50.0, 1, "a")
    assert {len(job.prompt) for job in listed} == set(range(10, 41))
    assert {job.tokens for job in listed} == set(range(5, 22))
    times = [job.due for job in listed if job.due is not None]
    assert len(times) == 2000 and times == sorted(times)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.04)  # 1/e: exponential
    assert listed == jobs(2000, 40, 21, 50.0, 1, "a")
    others = jobs(2000, 40, 21, None, 1, "b")
    assert [(len(job.prompt), job.tokens) for job in others] == [(len(job.prompt), job.tokens) for job in listed]
    assert all(job.due is None for job in others)
    assert not {job.prompt[:10] for job in listed} & {job.prompt[:10] for job in others}
    assert [len(job.prompt) for job in jobs(3, 1, 2, None, 1, "c")] == [1, 1, 1]


def test_summary_counts_what_was_answered() -> None:
    answers = [Answer(0.1 * i, 0.1 * i + 0.9, 10) for i in range(1, 4)] + [Answer(error="status 429")]
    found = summary(2.0, answers)
    assert (found["requests"], found["failed"], found["generated_tokens"]) == (4, 1, 30)
    assert (found["tokens_per_second"], found["requests_per_second"]) == (15.0, 1.5)
    assert found["time_to_first_token"]["p50"] == pytest.approx(0.2)
    assert found["time_to_first_token"]["p99"] == pytest.approx(0.298)
    assert found["time_per_token"]["p95"] == pytest.approx(0.1)
    assert found["time_to_last_token"]["p50"] == pytest.approx(1.1)
    assert summary(1.0, [Answer(error="x")])["time_per_token"] is None


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_run_at_a_time_and_no_more(server: Running, concurrency: int) -> None:
    together: list[int] = []
    step = server.llm.engine.step

    def watched() -> None:
        together.append(server.service.engine.open)
        step()

    told: list[int] = []
    server.llm.engine.step = watched  # type: ignore[method-assign]
    try:
        with slowed(server.llm, 0.003):
            seconds, answers = send(address(server), jobs(7, 8, 12, None, 1, "run"), concurrency, told.append)
    finally:
        server.llm.engine.step = step  # type: ignore[method-assign]
    assert max(together) == concurrency
    assert sorted(told) == list(range(1, 8))
    assert [answer.error for answer in answers] == [None] * 7
    assert [answer.tokens for answer in answers] == [job.tokens for job in jobs(7, 8, 12, None, 1, "run")]
    assert all(0 < answer.first < answer.total <= seconds for answer in answers)


def test_waiting_counts_from_when_a_request_is_due(server: Running) -> None:
    listed = [Job((2, 3, 4), 5, due) for due in (0.0, 0.01, 0.02, 3.0)]
    with slowed(server.llm, 0.02):
        seconds, answers = send(address(server), listed, 1, lambda done: None)
    assert seconds > 3.0  # none is sent before its time
    first, second, third, last = (answer.first for answer in answers)
    assert second > first + 0.05 and third > second + 0.05  # each waited for those before it
    assert last < second


def test_what_is_refused_is_an_error_with_its_reason(server: Running) -> None:
    [(_, [long]), (_, [locked])] = (
        send(address(server), [Job((2,) * 5000, 2)], 1, lambda done: None),
        send(address(server, None), [Job((2,), 2)], 1, lambda done: None),
    )
    assert long.error is not None and "status 400" in long.error
    assert locked.error is not None and "status 401" in locked.error
    _, [gone] = send(Address("127.0.0.1", 1), [Job((2,), 2)], 1, lambda done: None)
    assert gone.error is not None and "refused" in gone.error


def test_command_measures_a_server_that_runs(server: Running) -> None:
    url = f"http://127.0.0.1:{server.port}"
    more = ("--requests", 5, "--sequential", 2, "--prompt-tokens", 8, "-n", 6, "--rate", 200)
    result = pyllm("bench", "serve", "--url", url, *more, env={"PYLLM_API_KEY": "secret"})
    assert result.returncode == 0, result.stderr
    shown = result.stdout.decode()
    assert "200 a second: 5 requests in" in shown and "one at a time: 2 requests in" in shown
    assert shown.count("time to first token: median") == shown.count("p99") // 3 == 2
    assert "x the tokens per second of one at a time" in shown
    refused(pyllm("bench", "serve", "--url", url, *more), 1, "the first request", "status 401")


def test_command_starts_a_server_and_ends_it(tiny_folder: Path) -> None:
    more = ("--requests", 4, "--sequential", 0, "--prompt-tokens", 8, "-n", 6, "--json")
    result = pyllm("bench", "serve", *more, "--", "-m", tiny_folder, "--max-num-seqs", 2)
    assert result.returncode == 0 and not result.stderr, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert set(found) == {"together"} and found["together"]["failed"] == 0
    failed = pyllm("bench", "serve", *more, "--", "-m", tiny_folder / "nowhere")
    assert failed.returncode == 1 and not failed.stdout
    assert b"nowhere" in failed.stderr and b"exit code" in failed.stderr


def test_an_answer_may_be_read_whole(server: Running) -> None:
    plain = Address("127.0.0.1", server.port, "secret", text=True)
    [job] = jobs(1, 8, 6, None, 1, "run")
    _, [answer] = send(plain, [job], 1, lambda done: None)
    assert answer.error is None and answer.tokens == job.tokens and answer.first == answer.total > 0
    _, [refused] = send(plain, [Job((120,) * 5000, 2)], 1, lambda done: None)
    assert refused.error is not None and "status 400" in refused.error


def test_command_takes_turns_with_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := llama_cpp_server.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY | {"vocab_size": 4000})  # few of which are mere bytes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ("--requests", "3", "--concurrency", "2", "--prompt-tokens", "8", "-n", "5", "--rounds", "2")
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "serve", "--compare", "tiny", *few])
    shown = capsys.readouterr()
    assert "llama-cpp-python: " in shown.out and " x llama-cpp-python, median of 2 rounds" in shown.out
    assert shown.err.count("round 2 of 2: ") == 2  # of each one
    folder, gguf = llama_cpp_server.prepare("tiny", tmp_path / "pyllm" / "compare")
    text = "".join(map(chr, IDS))
    tokenize = "import sys, llama_cpp; print(llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)"
    found = subprocess.run(
        [sys.executable, "-c", f"{tokenize}.tokenize(sys.argv[2].encode()))", str(gguf), text],
        capture_output=True,
        check=True,
    )
    assert json.loads(found.stdout) == Tokenizer.load(folder).encode(text) == list(IDS)


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (("serve", "--url", "http://example.com:80"), "this machine"),
        (("serve", "--url", "https://127.0.0.1"), "this machine"),
        (("serve", "--url", "http://127.0.0.1:8000/v1"), "this machine"),
        (("serve", "--url", "http://127.0.0.1:99999"), "this machine"),
        (("serve", "--url", "http://127.0.0.1:8000", "--", "--threads", "1"), "either"),
        (("--repeat", "2", "serve"), "--repeat: only without serve"),
        (("serve", "--rounds", "2"), "only with --compare"),
        (("serve", "--compare", "gpt2", "--rate", "2"), "only without --compare"),
        (("serve", "--compare", "gpt3"), "expected one of"),
    ],
)
def test_command_lines_that_are_wrong(given: tuple[str, ...], fragment: str) -> None:
    refused(pyllm("bench", *given), 2, fragment)
