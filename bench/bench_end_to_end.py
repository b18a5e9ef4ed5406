"""Prefill and decode of whole models on random weights of real shapes: ours, and other engines where they are
installed.

    pytest bench/bench_end_to_end.py --models gpt2:float32,llama-1b:bfloat16

Bytes of a decode step are the weights and the keys and values it reads; operations of a prefill are those of its
matrices and of causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import peers
import pytest
from conftest import Record

from pyllm.models import read_spec
from pyllm.spec import ModelSpec

PREFILL = 512
DECODED = 16
DEPTHS = (16, 896)
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        names = str(metafunc.config.getoption("--models")).split(",")
        rows = [(name, engine) for name in names for engine in peers.ENGINES]
        ids = [f"{name.replace(':', '-')}-{engine}" for name, engine in rows]
        metafunc.parametrize("engine", rows, indirect=True, ids=ids, scope="module")


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, threads: int
) -> Iterator[tuple[peers.Engine, ModelSpec, str]]:
    model, name = request.param
    shape, dtype = model.split(":")
    if absent := peers.missing(name):
        pytest.skip(f"{name} is not installed ({', '.join(absent)})")
    base = request.config.getoption("--model-folder") or tmp_path_factory.getbasetemp()
    folder = models.make(shape, Path(base) / f"{shape}-{dtype}", dtype)
    yield peers.ENGINES[name](folder, dtype, threads, 1024), read_spec(folder), dtype


def test_prefill(benchmark: Any, record: Record, engine: tuple[peers.Engine, ModelSpec, str]) -> None:
    model, spec, dtype = engine
    ids = [7 + i for i in range(PREFILL)]
    record(dtype=dtype, bytes=weight_bytes(spec, dtype), operations=prefill_operations(spec, PREFILL), tokens=PREFILL)
    token = benchmark.pedantic(model.prefill, (ids,), rounds=3, warmup_rounds=1)
    assert 0 <= token < spec.vocab_size


@pytest.mark.parametrize("depth", DEPTHS)
def test_decode(benchmark: Any, record: Record, engine: tuple[peers.Engine, ModelSpec, str], depth: int) -> None:
    model, spec, dtype = engine
    ids = [7 + i for i in range(depth)]
    model.prepare(ids)
    read = weight_bytes(spec, dtype) + cache_bytes(spec, dtype) * (depth + DECODED / 2)
    operations = prefill_operations(spec, 1)
    record(dtype=dtype, bytes=read * DECODED, operations=operations * DECODED, tokens=DECODED, depth=depth)
    count = benchmark.pedantic(model.decode, (DECODED,), rounds=3, warmup_rounds=1)
    assert count == DECODED


def weight_bytes(spec: ModelSpec, dtype: str) -> float:
    """Weights that one token reads: every matrix but the embedding, of which only a row is read, and the head."""
    return BYTES[dtype] * (_block_parameters(spec) + spec.vocab_size * spec.hidden)


def cache_bytes(spec: ModelSpec, dtype: str) -> float:
    """Keys and values of one token, in the weights' dtype."""
    return BYTES[dtype] * sum(2 * b.attention.kv_heads * b.attention.head_dim for b in spec.blocks)


def prefill_operations(spec: ModelSpec, tokens: int) -> float:
    """Multiplications and additions of a prompt: the blocks' matrices, causal attention, the head once."""
    attention = sum(2 * b.attention.heads * b.attention.head_dim for b in spec.blocks) * tokens * (tokens + 1) / 2
    return 2 * (_block_parameters(spec) * tokens + attention + spec.vocab_size * spec.hidden)


def _block_parameters(spec: ModelSpec) -> int:
    slots = spec.slots()
    return sum(s[0] * s[1] for name, s in slots.items() if name.startswith("blocks.") and len(s) == 2)
