"""Encoder-decoders on random weights of real shapes, greedily and with beams, beside CTranslate2 if it is installed.

    pytest bench/bench_encoder_decoder.py

A call reads a source and generates; engines take turns in every round, CTranslate2 on one thread where that is
faster. Bytes are the decoder's weights for each token and the encoder's once, operations those of the decoder for all
beams. In float32 both engines must find the same.
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

SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {
        "model_type": "t5",
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
    },
    "bart-base": {
        "model_type": "bart",
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "vocab_size": 50265,
        "normalize_before": False,
        "forced_eos_token_id": None,
    },
}
SOURCE = [7 + 31 * i % 4000 for i in range(sized(64, 8))]
GENERATED = sized(48, 6)
ROUNDS = sized(5, 1)
Decode = Callable[[int], list[int]]


@pytest.fixture(scope="module", params=[f"{shape}:{dtype}" for shape in SHAPES for dtype in ("float32", "int8")])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, threads: int
) -> tuple[LLM, Decode | None]:
    """Ours, and CTranslate2 where it is installed."""
    shape, dtype = request.param.split(":")
    base = Path(request.config.getoption("--model-folder") or tmp_path_factory.getbasetemp())
    folder = shapes.write(SHAPES[shape], base / f"{shape}-float32", "float32")
    options = {"quantization": "int8"} if dtype == "int8" else {"dtype": dtype}
    llm = LLM(folder, threads=threads, max_model_len=128, max_num_seqs=4, skip_tokenizer_init=True, **options)
    return llm, _peer(folder, dtype, threads)


def _peer(folder: Path, dtype: str, threads: int) -> Decode | None:
    try:
        import ctranslate2

        from pyllm.compare.ctranslate2_engine import converted
    except ImportError:
        return None
    model = converted(folder, dtype)
    translators = [
        ctranslate2.Translator(str(model), compute_type=dtype, intra_threads=count, inter_threads=1)
        for count in sorted({1, threads})
    ]
    fastest: dict[int, Any] = {}

    def timed(beams: int, translator: Any) -> tuple[float, list[int]]:
        began = time.perf_counter()
        [found] = translator.translate_batch(
            [[f"t{i}" for i in SOURCE]],
            beam_size=beams,
            max_decoding_length=GENERATED,
            min_decoding_length=GENERATED,
        )
        return time.perf_counter() - began, [int(token[1:]) for token in found.hypotheses[0]]

    def decode(beams: int) -> list[int]:
        if beams not in fastest:
            fastest[beams] = min(translators, key=lambda each: min(timed(beams, each)[0] for _ in range(2)))
        return timed(beams, fastest[beams])[1]

    return decode


@pytest.mark.parametrize("beams", [1, 4])
def test_generate(benchmark: Any, record: Record, engines: tuple[LLM, Decode | None], beams: int) -> None:
    llm, peer = engines
    params = SamplingParams(num_beams=beams, temperature=0, max_tokens=GENERATED, ignore_eos=True, detokenize=False)

    def ours() -> list[int]:
        [result] = llm.generate({"prompt_token_ids": SOURCE}, params)
        return list(result.outputs[0].token_ids)

    seconds: list[float] = []
    found: list[list[int]] = [] if peer is None else [peer(beams)]  # which chooses its number of threads

    def peers_turn() -> None:
        if peer is not None:
            began = time.perf_counter()
            found.append(peer(beams))
            seconds.append(time.perf_counter() - began)

    best = benchmark.pedantic(ours, setup=peers_turn, rounds=ROUNDS)
    if llm.plan.dtype == "float32":
        assert all(each == best for each in found)
    taken = benchmark.stats.stats.median if benchmark.stats else float("nan")
    encoder = sum(m.nbytes for name, m in llm.model.weights.matrices.items() if name.startswith("encoder."))
    record(
        dtype="int8" if llm.plan.dtype.startswith("int8") else llm.plan.dtype,
        bytes=llm.weight_bytes * GENERATED + encoder,
        operations=llm.spec.operations(1) * GENERATED * beams,
        beams=beams,
        tokens_per_second=round(GENERATED / taken, 1),
        ctranslate2_tokens_per_second=round(GENERATED / median(seconds), 1) if seconds else None,
    )
