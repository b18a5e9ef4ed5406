"""Speculative decoding by n-gram lookup on random weights of real shapes, beside plain decoding (0 drafts).

    pytest bench/bench_speculative.py --models gpt2:float32,llama-1b:bfloat16

Greedy decoding of random weights falls into loops, as text with much repetition does: `acceptance` says how far the
drafts were right and `tokens_per_step` what a step gave. `step_ms` is what a step costs that checks so many drafts; it
is the same kernels' cost whatever the text. The result is that of plain decoding, token by token. Bytes and operations
are those of the steps that were needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_end_to_end import cache_bytes, weight_bytes
from conftest import Record, sized

from pyllm import LLM
from pyllm.compare import shapes
from pyllm.engine.speculative import Speculation

PROMPT = [7 + i % 40 for i in range(sized(200, 60))]
GENERATED = sized(96, 12)
DRAFTS = (0, 3, 7, 15)
ROUNDS = sized(3, 1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = str(metafunc.config.getoption("--models")).split(",")
    metafunc.parametrize("loaded", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, threads: int
) -> tuple[LLM, list[int]]:
    """The model, and what it gives without drafts."""
    shape, dtype = request.param.split(":")
    base = Path(request.config.getoption("--model-folder") or tmp_path_factory.getbasetemp())
    llm = LLM(
        shapes.make(shape, base / f"{shape}-{dtype}", dtype),
        dtype=dtype,
        threads=threads,
        max_model_len=len(PROMPT) + GENERATED,
        max_num_seqs=1,
        skip_tokenizer_init=True,
        speculative="ngram",
        num_speculative_tokens=max(DRAFTS),
    )
    return llm, decode(llm, 0)[0]


@pytest.mark.parametrize("drafts", DRAFTS)
def test_decode(benchmark: Any, record: Record, loaded: tuple[LLM, list[int]], drafts: int) -> None:
    llm, expected = loaded
    found, counts = benchmark.pedantic(decode, (llm, drafts), rounds=ROUNDS)
    assert found == expected
    steps, dtype = counts["decode_steps"], llm.plan.dtype
    rows = steps + counts["drafted_tokens"]
    record(
        dtype=dtype,
        bytes=(weight_bytes(llm.spec, dtype) + cache_bytes(llm.spec, dtype) * len(PROMPT)) * steps,
        operations=llm.spec.operations(1, len(PROMPT)) * rows,
        tokens=GENERATED,
        drafts=drafts,
        tokens_per_step=round(counts["decode_tokens"] / steps, 2),
        acceptance=round(counts["accepted_tokens"] / max(counts["drafted_tokens"], 1), 2),
        step_ms=round(counts["generation_seconds"] / steps * 1e3, 2),
        tokens_per_second=round(counts["decode_tokens"] / counts["generation_seconds"], 1),
    )


def decode(llm: LLM, drafts: int) -> tuple[list[int], dict[str, float]]:
    """The tokens behind `PROMPT`, and what the engine counted meanwhile."""
    names = ("decode_steps", "decode_tokens", "drafted_tokens", "accepted_tokens", "generation_seconds")
    before = {name: getattr(llm.stats, name) for name in names}
    speculation = llm.engine.speculation
    assert speculation is not None
    llm.engine.speculation = Speculation(speculation.proposer, drafts, speculation.max_rows) if drafts else None
    try:
        request = {"prompt_token_ids": PROMPT}
        [out] = llm.generate(request, max_tokens=GENERATED, temperature=0, ignore_eos=True, detokenize=False)
    finally:
        llm.engine.speculation = speculation
    return out.outputs[0].token_ids, {name: getattr(llm.stats, name) - before[name] for name in names}
