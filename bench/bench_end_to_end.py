"""Prefill and decode of whole models on random weights of real shapes: ours, and other engines where they are
installed; and of ours what recording the decode step saves, and what a step costs beside its kernels.

    pytest bench/bench_end_to_end.py --models gpt2:float32,llama-1b:bfloat16

Bytes of a decode step are the weights and the keys and values it reads; operations are those of the matrices and of
causal attention. Depths that a model's context does not hold are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Record, sized

from pyllm.compare import shapes
from pyllm.compare.engine import ENGINES, Engine, Settings, Unsupported
from pyllm.compare.ours import Pyllm
from pyllm.models import read_spec
from pyllm.spec import ModelSpec

PREFILL = sized(512, 40)
DECODED = sized(16, 2)
ROUNDS = 3
DEPTHS = (16, 896, 2048)
LONGEST = DEPTHS[-1] + DECODED * (ROUNDS + 2)
SMALL = "stories-42m:bfloat16"  # so little work in a kernel that what stands between kernels shows
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = str(metafunc.config.getoption("--models")).split(",")
    if "engine" in metafunc.fixturenames:
        rows = [(name, engine) for name in names for engine in ENGINES]
        ids = [f"{name.replace(':', '-')}-{engine}" for name, engine in rows]
        metafunc.parametrize("engine", rows, indirect=True, ids=ids, scope="module")
    if "ours" in metafunc.fixturenames:
        metafunc.parametrize("ours", list(dict.fromkeys([SMALL, *names])), indirect=True, scope="module")


Folder = Callable[[str], tuple[Path, ModelSpec, str]]


@pytest.fixture(scope="module")
def folder_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Of a "shape:dtype" the folder, made where it is not there, what it describes, and the dtype."""
    base = Path(request.config.getoption("--model-folder") or tmp_path_factory.getbasetemp())

    def find(model: str) -> tuple[Path, ModelSpec, str]:
        shape, dtype = model.split(":")
        folder = shapes.make(shape, base / f"{shape}-{dtype}", dtype)
        return folder, read_spec(folder), dtype

    return find


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, folder_of: Folder, threads: int) -> tuple[Engine, ModelSpec, str]:
    model, name = request.param
    if absent := ENGINES[name].missing:
        pytest.skip(f"{name} is not installed ({', '.join(absent)})")
    folder, spec, dtype = folder_of(model)
    kind = ENGINES[name].load()
    longest = min(LONGEST, spec.max_positions)
    try:
        made = kind(kind.prepare(folder, dtype), Settings(dtype, threads, length=longest, tokens=longest))
        made.reserve(1, longest)
    except Unsupported as reason:
        pytest.skip(f"{name} cannot run {model} here: {reason}")
    return made, spec, dtype


@pytest.fixture(scope="module")
def ours(request: pytest.FixtureRequest, folder_of: Folder, threads: int) -> tuple[Pyllm, ModelSpec, str]:
    folder, spec, dtype = folder_of(request.param)
    longest = min(LONGEST, spec.max_positions)
    return Pyllm(folder, Settings(dtype, threads, length=longest, tokens=longest)), spec, dtype


def test_prefill(benchmark: Any, record: Record, engine: tuple[Engine, ModelSpec, str]) -> None:
    model, spec, dtype = engine
    ids = [7 + i for i in range(PREFILL)]
    record(dtype=dtype, bytes=weight_bytes(spec, dtype), operations=spec.operations(PREFILL), tokens=PREFILL)
    [token] = benchmark.pedantic(model.start, ([ids],), rounds=ROUNDS, warmup_rounds=1)
    assert 0 <= token < spec.vocab_size


@pytest.mark.parametrize("depth", DEPTHS)
def test_decode(benchmark: Any, record: Record, engine: tuple[Engine, ModelSpec, str], depth: int) -> None:
    model, spec, dtype = engine
    if depth + DECODED * (ROUNDS + 2) > spec.max_positions:
        pytest.skip(f"the model's context holds {spec.max_positions} tokens")
    model.start([[7 + i for i in range(depth)]])
    record(**decode_work(spec, dtype, depth))
    decoded = benchmark.pedantic(model.decode, (DECODED,), rounds=ROUNDS, warmup_rounds=1)
    assert [len(row) for row in decoded.tokens] == [DECODED]


@pytest.mark.parametrize("step", ["replayed", "eager"])
def test_decode_step(benchmark: Any, record: Record, ours: tuple[Pyllm, ModelSpec, str], step: str) -> None:
    """The two rows' difference is what recording saves. Replayed, a step is its kernels and the engine's own work."""
    model, spec, dtype = ours
    model.llm.engine.use_graphs = step == "replayed"
    model.start([[7 + i for i in range(DEPTHS[0])]])
    model.decode(DECODED)
    record(**decode_work(spec, dtype, DEPTHS[0]))
    with timed(model.llm.ops, "replay", "sample") as inside:
        decoded = benchmark.pedantic(model.decode, (DECODED,), rounds=ROUNDS)
    assert [len(row) for row in decoded.tokens] == [DECODED]
    assert (inside["replay"] > 0) == (step == "replayed")
    if benchmark.stats is not None:
        whole = sum(benchmark.stats.stats.data)
        benchmark.extra_info["step_us"] = round(whole / (DECODED * ROUNDS) * 1e6, 1)
        if step == "replayed":
            beside = whole - sum(inside.values())
            benchmark.extra_info["overhead_us"] = round(beside / (DECODED * ROUNDS) * 1e6, 1)
            benchmark.extra_info["overhead_share"] = round(beside / whole, 3)


@contextmanager
def timed(target: object, *methods: str) -> Iterator[dict[str, float]]:
    """Seconds spent in these methods of `target` while this lasts."""
    spent = dict.fromkeys(methods, 0.0)

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(target, name)

        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name in methods:
        setattr(target, name, watched(name))
    try:
        yield spent
    finally:
        for name in methods:
            delattr(target, name)


def decode_work(spec: ModelSpec, dtype: str, depth: int) -> dict[str, Any]:
    """What decoding `DECODED` tokens behind `depth` others has to read and do, for `record`."""
    middle = depth + DECODED // 2
    read = weight_bytes(spec, dtype) + cache_bytes(spec, dtype) * middle
    operations = spec.operations(1, middle)
    return {
        "dtype": dtype,
        "bytes": read * DECODED,
        "operations": operations * DECODED,
        "tokens": DECODED,
        "depth": depth,
    }


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Weights that one token reads: every matrix but the embedding, of which only a row is read, and the head."""
    return BYTES[dtype] * (spec.block_weights + spec.vocab_size * spec.hidden)


def cache_bytes(spec: ModelSpec, dtype: str) -> int:
    """Keys and values of one token, in the weights' dtype."""
    return BYTES[dtype] * sum(2 * b.attention.kv_heads * b.attention.head_dim for b in spec.blocks)
