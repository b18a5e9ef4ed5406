"""What a decode step costs beside its kernels: scheduling, filling the step's arrays, taking in the tokens.

A model so small that its kernels leave the caches alone shows the engine by itself (warm). A large model's step drives
the interpreter and all that the engine looks at out of the caches; a pass over more memory than they hold, made right
after each step's kernels, does the same (flushed). The overhead is the time from the end of one step's kernels, and of
that pass, to the begin of the next one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm import LLM, SamplingParams
from pyllm.compare import shapes

TOKENS = sized(32, 4)
ROUNDS = 3
FLUSHED_BYTES = sized(256 << 20, 1 << 20)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, threads: int) -> LLM:
    folder = shapes.make("stories-260k", tmp_path_factory.mktemp("engine") / "model", "float32")
    return LLM(folder, skip_tokenizer_init=True, threads=threads)


@pytest.mark.parametrize("draw", ["greedy", "sampled"])
@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("caches", ["warm", "flushed"])
@pytest.mark.parametrize("face", ["generate", "stream"])
def test_overhead_of_a_decode_step(benchmark: Any, llm: LLM, face: str, caches: str, sequences: int, draw: str) -> None:
    if face == "stream" and sequences > 1:
        pytest.skip("a stream is one sequence")
    temperature = 0.0 if draw == "greedy" else 1.0
    params = SamplingParams(temperature=temperature, top_k=40, max_tokens=TOKENS, ignore_eos=True, seed=1)
    prompts = [{"prompt_token_ids": [1, 2 + i]} for i in range(sequences)]

    def run() -> int:
        if face == "stream":
            return sum(len(piece.token_ids) for piece in llm.stream(prompts[0], params))
        return sum(len(out.outputs[0].token_ids) for out in llm.generate(prompts, params))

    memory = np.ones(FLUSHED_BYTES // 8 if caches == "flushed" else 0)
    with gaps(llm, memory) as seconds:
        count = benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert count == TOKENS * sequences
    assert len(seconds) >= TOKENS - 2  # of one run at least, which is all there is with --benchmark-disable
    deciles = statistics.quantiles(seconds, n=10)
    benchmark.extra_info["overhead_us"] = round(statistics.median(seconds) * 1e6, 1)
    benchmark.extra_info["overhead_us_p10"], benchmark.extra_info["overhead_us_p90"] = (
        round(deciles[place] * 1e6, 1) for place in (0, -1)
    )
    benchmark.extra_info.update(threads=llm.ops.threads, sequences=sequences, flushed_bytes=memory.nbytes)


@contextmanager
def gaps(llm: LLM, memory: np.ndarray) -> Iterator[list[float]]:
    """Seconds between the kernels of successive recorded steps, while this lasts; `memory` is read after each step."""
    ops, seconds, ended = llm.ops, [], 0.0
    run = ops.replay

    def replay(graph: Any) -> None:
        nonlocal ended
        if ended:
            seconds.append(time.perf_counter() - ended)
        run(graph)
        memory.sum()
        ended = time.perf_counter()

    def sample(*args: Any) -> Any:  # an eager draw, where a prompt ends: no gap between recorded steps
        nonlocal ended
        ended = 0.0
        return type(ops).sample(ops, *args)

    ops.replay, ops.sample = replay, sample  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        del ops.replay, ops.sample
