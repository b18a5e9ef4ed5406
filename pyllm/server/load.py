"""A load generator: requests to a server on this machine, and how long each took.

Prompts are random token ids, so that no two begin alike. The clients are threads of this process, a connection a
request. Where requests have times at which they are due, waiting is counted from then on, whether the request could be
sent at once or not: a server that falls behind shows it.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import numpy as np

IDS = range(33, 127)  # of prompts: every vocabulary has them, and each is the code of a character
SECONDS = 600  # that a client waits for a server that sends nothing


@dataclass(frozen=True)
class Address:
    """Where the server listens, and the key it wants, if any.

    One of `text` is sent prompts as text, the characters of its ids, and answers at once: more is not known to every
    server of OpenAI's interface.
    """

    host: str
    port: int
    key: str | None = None
    text: bool = False

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is made with the first request."""
        return http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}


@dataclass(frozen=True)
class Job:
    """A request: its prompt's token ids, how many tokens it gets, and when it is due in seconds; None: at once."""

    prompt: tuple[int, ...]
    tokens: int
    due: float | None = None


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token and to the last, and how many tokens came; `error` says why they did not."""

    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    error: str | None = None


def jobs(number: int, prompt_tokens: int, tokens: int, rate: float | None, seed: int, run: str) -> list[Job]:
    """Requests whose lengths are drawn between a quarter of the given ones and all of it, and whose arrivals are a
    Poisson process of `rate` a second; None: nobody waits for a time.

    The lengths depend on `seed` alone; the token ids on `run` too, so that no run finds the prompts of another cached.
    """
    draw = random.Random(seed)
    lengths = [(_length(draw, prompt_tokens, 1), _length(draw, tokens, 2)) for _ in range(number)]
    draw = random.Random(f"{seed} {run}")
    times = list(accumulate(draw.expovariate(rate) for _ in lengths)) if rate is not None else [None] * number
    return [Job(tuple(draw.choices(IDS, k=p)), n, due) for (p, n), due in zip(lengths, times, strict=True)]


def send(
    address: Address, listed: Sequence[Job], concurrency: int, told: Callable[[int], None]
) -> tuple[float, list[Answer]]:
    """Send all requests, at most `concurrency` at a time; `told` is called with the number of each that has ended.

    Gives the seconds that all of them took, and their answers in the order of the requests.
    """
    began = time.perf_counter()
    done = count(1)

    def one(job: Job) -> Answer:
        answer = ask(address, job, time.perf_counter() if job.due is None else began + job.due)
        told(next(done))
        return answer

    with ThreadPoolExecutor(concurrency) as clients:
        futures = []
        try:
            for job in listed:
                if job.due is not None:
                    time.sleep(max(0.0, began + job.due - time.perf_counter()))
                futures.append(clients.submit(one, job))
            answers = [future.result() for future in futures]
        except BaseException:  # Ctrl-C: those that wait are not sent any more
            clients.shutdown(cancel_futures=True)
            raise
    return time.perf_counter() - began, answers


def ask(address: Address, job: Job, since: float) -> Answer:
    """Send one request, and measure from `since`, a time of `time.perf_counter`."""
    body: dict[str, Any] = {"prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0, "ignore_eos": True}
    if address.text:
        body["prompt"] = "".join(map(chr, job.prompt))
    else:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    client = address.connect()
    try:
        client.request("POST", "/v1/completions", json.dumps(body), address.headers)
        response = client.getresponse()
        if response.status != 200:
            return Answer(error=f"status {response.status}: {response.read(1000).decode('utf-8', 'replace')}")
        answer = _whole(response, since) if address.text else _streamed(response, since)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    finally:
        client.close()
    if answer.error is None and answer.tokens != job.tokens:
        return Answer(error=f"the answer ended after {answer.tokens} of {job.tokens} tokens")
    return answer


def _streamed(response: http.client.HTTPResponse, since: float) -> Answer:
    first = last = 0.0
    tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            return Answer(error=str(event["error"]))
        if event["choices"]:
            last = time.perf_counter() - since
            first = first or last
        if event.get("usage") is not None:
            tokens = event["usage"]["completion_tokens"]
    return Answer(first, last, tokens)


def _whole(response: http.client.HTTPResponse, since: float) -> Answer:
    tokens = json.load(response)["usage"]["completion_tokens"]
    seconds = time.perf_counter() - since
    return Answer(seconds, seconds, tokens)


def summary(seconds: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput, and median, 95th and 99th percentile of the times in seconds; failed requests are only counted.

    `time_per_token` is that of the tokens after the first, a mean over each request. None where nothing was answered.
    """
    good = [answer for answer in answers if answer.error is None]
    tokens = sum(answer.tokens for answer in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "seconds": seconds,
        "generated_tokens": tokens,
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": _percentiles([answer.first for answer in good]),
        "time_per_token": _percentiles([(answer.total - answer.first) / (answer.tokens - 1) for answer in good]),
        "time_to_last_token": _percentiles([answer.total for answer in good]),
    }


def _length(draw: random.Random, most: int, least: int) -> int:
    return draw.randint(max(least, most // 4), most)


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return dict(zip(("p50", "p95", "p99"), np.percentile(values, (50, 95, 99)).tolist(), strict=True))
