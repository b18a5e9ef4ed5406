"""Bit for bit: how a batch is cut, ordered, threaded or replayed never changes a token's logits."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM, SamplingParams, active_isa, available_isas, set_isa
from pyllm.cache import KVCache
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence
from pyllm.models import read_spec
from pyllm.sampling import SamplingState

GOLDEN = Path(__file__).resolve().parent / "golden"
MODELS = ["bloom", "gemma3", "glm4", "gpt2", "llama", "llama-tied-biased", "mistral", "qwen3"]
SHARED = np.random.default_rng(0).integers(0, 60, 130).tolist()  # a beginning of more than two cache blocks


@pytest.fixture(params=available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = active_isa()
    set_isa(request.param)
    yield request.param
    set_isa(before)


def load(name: str, dtype: str, **options: object) -> LLM:
    options.setdefault("threads", 2)
    if dtype.startswith("int"):
        options["quantization"], dtype = dtype, "float32"
    return LLM(GOLDEN / name, dtype=dtype, skip_tokenizer_init=True, **options)


def logits_of(llm: LLM, ids: list[int], chunks: list[int]) -> np.ndarray:
    """Logits of every token when the tokens are computed in these chunks; a chunk of 1 is a recorded decode step."""
    pool = llm.engine.scheduler.pool
    sequence = Sequence(ids, 1, share_prefix=False)
    assert sequence.reserve(pool, len(ids))
    rows, start = [], 0
    for count in chunks:
        work = Work(sequence, start, count, True)
        if count == 1:
            logits, _ = llm._runner.decode([work], [SamplingState(SamplingParams(), ids, seed=0)])
            rows.append(logits.copy())
        else:
            x = llm._runner.forward([work])
            rows += [piece.copy() for _, piece in llm._runner.logits(x, np.arange(count, dtype=np.int32))]
        start += count
    sequence.leave(pool)
    assert start == len(ids)
    return np.concatenate(rows)


def prompt_of(llm: LLM, length: int) -> list[int]:
    length = min(length, llm.max_model_len)
    return np.random.default_rng(length).integers(0, llm.spec.vocab_size, length).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_equals_decode_equals_any_chunking(name: str, dtype: str) -> None:
    llm = load(name, dtype)
    ids = prompt_of(llm, 100)
    n = len(ids)
    whole = llm.forward(ids).logits
    assert np.isfinite(whole).all()
    for chunks in ([1] * n, [n // 2, n - n // 2], [1, 2, 3, 5, 8, n - 19], [17] * (n // 17) + [1] * (n % 17)):
        np.testing.assert_array_equal(logits_of(llm, ids, chunks), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_threads_and_reruns_do_not_matter(name: str, dtype: str) -> None:
    ids = prompt_of(load(name, dtype), 80)
    first = load(name, dtype, threads=1).forward(ids).logits
    for threads in (1, 2, 3):
        llm = load(name, dtype, threads=threads)
        np.testing.assert_array_equal(llm.forward(ids).logits, first)
        np.testing.assert_array_equal(logits_of(llm, ids, [1] * len(ids)), first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sequence_alone_equals_the_same_in_any_batch(name: str, dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5, prompt_logprobs=3)
    llm = load(name, dtype)
    prompts = [{"prompt_token_ids": prompt_of(llm, n)} for n in (1, 2, 17, 40, 64, 65, 90)]
    alone = [llm.generate([p], params)[0] for p in prompts]
    for options in ({}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 13}, {"enable_prefix_caching": False}):
        together = load(name, dtype, **options).generate(prompts, params)
        for a, b in zip(alone, together, strict=True):
            assert a.outputs == b.outputs
            assert a.prompt_logprobs == b.prompt_logprobs


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_every_cache_keeps_the_promises(name: str, cache: str) -> None:
    llm = load(name, "bfloat16", kv_cache_dtype=cache)
    ids = prompt_of(llm, 100)
    n = len(ids)
    whole = llm.forward(ids).logits
    assert np.isfinite(whole).all()
    for threads, chunks in ((2, [1] * n), (1, [n]), (3, [1, 2, 3, 5, 8, n - 19]), (2, [17] * (n // 17) + [n % 17])):
        other = load(name, "bfloat16", kv_cache_dtype=cache, threads=threads)
        np.testing.assert_array_equal(logits_of(other, ids, [c for c in chunks if c]), whole)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    prompts = [{"prompt_token_ids": prompt_of(llm, k)} for k in (1, 17, 64, 90)]
    together = llm.generate(prompts, params)
    assert [llm.generate([p], params)[0].outputs for p in prompts] == [o.outputs for o in together]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_graph_equals_eager(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3)
    llm = load("llama", dtype)
    prompts = [{"prompt_token_ids": prompt_of(llm, n)} for n in (5, 30)]
    replayed = llm.generate(prompts, params)
    llm.engine.use_graphs = False
    assert [o.outputs for o in llm.generate(prompts, params)] == [o.outputs for o in replayed]


@pytest.mark.parametrize("sharing", [True, False])
def test_shared_prefix_and_preemption_give_the_same(tmp_path: Path, sharing: bool) -> None:
    shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    options = {"dtype": "float32", "skip_tokenizer_init": True, "threads": 2, "max_model_len": 256}
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    prompts = [{"prompt_token_ids": [*SHARED, *range(n, 2 * n)]} for n in (10, 11, 12)]
    plain = LLM(tmp_path / "llama", enable_prefix_caching=False, **options)
    expected = [o.outputs for o in plain.generate(prompts, params)]
    # All begin in 3 blocks, of which 2 can be shared, and end in 4: 7 are too few, whether or not they share.
    block = KVCache.block_bytes(read_spec(tmp_path / "llama"), "float32")
    tight = LLM(tmp_path / "llama", kv_cache_bytes=7 * block, enable_prefix_caching=sharing, **options)
    assert [o.outputs for o in tight.generate(prompts, params)] == expected
    assert tight.stats.preemptions > 0
    assert (tight.stats.cached_tokens > 0) == sharing
    assert [o.outputs for o in tight.generate(prompts, params)] == expected
