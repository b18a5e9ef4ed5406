"""Beam search beside greedy decoding on random weights of real shapes, and both in CTranslate2, if it is installed.

    pytest bench/bench_beam.py --models gpt2:float32,gpt2:int8

Engines take turns in every round. Bytes are the weights' and the operations those of all beams, prompt left out;
`tokens_per_second` counts tokens of the best beam. Both engines must find the same best beam.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from conftest import Record, sized

from pyllm import LLM, SamplingParams
from pyllm.compare import shapes

PROMPT = [7 + 31 * i % 40 for i in range(sized(64, 8))]
GENERATED = sized(64, 8)
ROUNDS = sized(5, 1)
BEAMS = (1, 4)
Decode = Callable[[int], list[int]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = str(metafunc.config.getoption("--models")).split(",")
    metafunc.parametrize("engines", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, threads: int
) -> tuple[LLM, Decode | None]:
    """Ours, and the search of CTranslate2 where it can have the model."""
    shape, dtype = request.param.split(":")
    stored = "float32" if dtype == "int8" else dtype
    base = Path(request.config.getoption("--model-folder") or tmp_path_factory.getbasetemp())
    folder = shapes.make(shape, base / f"{shape}-{stored}", stored)
    length = len(PROMPT) + GENERATED
    options = {"quantization": "int8"} if dtype == "int8" else {"dtype": dtype}
    llm = LLM(folder, threads=threads, max_model_len=length, max_num_seqs=4, skip_tokenizer_init=True, **options)
    return llm, _peer(folder, dtype, threads)


def _peer(folder: Path, dtype: str, threads: int) -> Decode | None:
    try:
        from pyllm.compare.ctranslate2_engine import CTranslate2
        from pyllm.compare.engine import Settings, Unsupported
    except ImportError:
        return None
    try:
        engine = CTranslate2(CTranslate2.prepare(folder, dtype), Settings(dtype, threads))
    except Unsupported:
        return None

    def decode(beams: int) -> list[int]:
        [found] = engine.generator.generate_batch(
            [[f"t{i}" for i in PROMPT]],
            beam_size=beams,
            max_length=GENERATED,
            min_length=GENERATED,
            include_prompt_in_result=False,
            end_token=[],
        )
        return list(found.sequences_ids[0])

    return decode


@pytest.mark.parametrize("beams", BEAMS)
def test_beams(benchmark: Any, record: Record, engines: tuple[LLM, Decode | None], beams: int) -> None:
    llm, peer = engines
    params = SamplingParams(num_beams=beams, temperature=0, max_tokens=GENERATED, ignore_eos=True, detokenize=False)

    def ours() -> list[int]:
        [result] = llm.generate({"prompt_token_ids": PROMPT}, params)
        return result.outputs[0].token_ids

    seconds: list[float] = []

    def peers_turn() -> None:
        if peer is not None:
            began = time.perf_counter()
            found.append(peer(beams))
            seconds.append(time.perf_counter() - began)

    found: list[list[int]] = []
    best = benchmark.pedantic(ours, setup=peers_turn, rounds=ROUNDS)
    if llm.plan.dtype == "float32":
        assert all(each == best for each in found)
    taken = benchmark.stats.stats.median if benchmark.stats else float("nan")
    record(
        dtype="int8" if llm.plan.dtype.startswith("int8") else llm.plan.dtype,
        bytes=llm.weight_bytes * GENERATED,
        operations=llm.spec.operations(1, len(PROMPT)) * GENERATED * beams,
        beams=beams,
        tokens_per_second=round(GENERATED / taken, 1),
        ctranslate2_tokens_per_second=round(GENERATED / median(seconds), 1) if seconds else None,
    )
