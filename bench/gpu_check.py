"""Everything that a GPU has to show, in one command of at most 8 minutes:

    python bench/gpu_check.py OUT

Steps run one after the other, each in a process of its own with a deadline, and leave OUT/<step>.json and, with all
that they said, OUT/<step>.log; what fails, hangs or is missing is told there and stops no other step, nor does a figure
that fails the figures after it; at its deadline a step ends with all processes that it started, and what it had found
stays. A table of at most 40 lines comes last. ``--only STEP,...`` runs some steps, ``--emulated`` all on tiny sizes on
the emulated GPU of the tests, to check the program itself.

Figures are fractions of roofs of the same run: bytes over the read stream, operations over torch's product of 8192^3
where torch is installed with CUDA. Weights and caches lie in as many copies as the L2 cannot hold.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
Row = dict[str, Any]
MOST_LINES = 40
PATIENCE = 10  # what the emulated GPU may take of a deadline
NOT_TOLD = ("rows", "state", "seconds", "error")
DECODE_ROWS = (1, 4, 8, 16, 64)
MODELS, DEPTHS, BATCHES, TOKENS = ("gpt2", "llama-1b", "llama-8b"), (128, 2048), (1, 4, 8), 64


@dataclass(frozen=True)
class Step:
    """A part of the check: `run` gives what its JSON file holds beside seconds and state; "rows" may be an iterator."""

    run: Callable[[bool], Row]
    seconds: int


# Timing


@contextmanager
def device(emulated: bool) -> Iterator[Any]:
    """The GPU, or the emulated one."""
    if emulated:
        from emulated_cuda import emulated_gpu

        with emulated_gpu() as gpu:
            yield gpu
        return
    from pyllm.device import open_device

    yield open_device()


def seconds_of(gpu: Any, launch: Callable[[int], None], count: int, rounds: int = 5) -> float:
    """Seconds of one launch: the median over rounds of a graph of `count` launches, launch(i) being the i-th.

    A round replays the graph for at least 5 ms, so that what the host does at its ends is little of it.
    """
    launch(0)
    gpu.synchronize()
    gpu.begin_graph()
    try:
        for i in range(count):
            launch(i)
    except BaseException:
        gpu.drop_graph()
        raise
    graph = gpu.end_graph()

    def replayed(times: int) -> float:
        """Seconds of one replay, of so many one after the other."""
        began = time.perf_counter()
        for _ in range(times):
            gpu.replay(graph)
        gpu.synchronize()
        return (time.perf_counter() - began) / times

    replayed(1)
    repeats = max(1, math.ceil(5e-3 / replayed(1)))
    return float(np.median([replayed(repeats) for _ in range(rounds)])) / count


@functools.cache
def noise_block(gpu: Any, scale: float, dtype: Any) -> Any:
    """4 Mi small normals on the GPU."""
    return gpu.upload((np.random.default_rng(0).standard_normal(1 << 22) * scale).astype(dtype))


def noise(gpu: Any, shape: tuple[int, ...], scale: float, dtype: Any) -> Any:
    """An array of small normals on the GPU, made there: a block of them, which is doubled until the array is full."""
    source, count = noise_block(gpu, scale, dtype), int(np.prod(shape))
    flat, done = gpu.empty([count], dtype), min(count, source.size)
    gpu.write(flat[:done], source[:done])
    while done < count:
        piece = min(done, count - done)
        gpu.write(flat[done : done + piece], flat[:piece])
        done += piece
    return flat.reshape(*shape)


def torch_gpu() -> Any:
    """torch, where it is installed and sees a GPU; else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


# Steps


def missing() -> str | None:
    """Why the pyllm that a fresh process imports cannot use a GPU here; None where it can."""
    code = "from pyllm.device import unavailable; print(unavailable() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **place())
    if done.returncode:
        return f"pyllm cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return done.stdout.strip() or None


def place() -> Row:
    """Where Python is to run: in a folder beside the package, whose sources it else takes for the installed one."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"cwd": ROOT / "bench", "env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}}


def run_aloud(command: list[str]) -> tuple[int, str]:
    """Exit status and output of a program, printed as it comes too: a step's log has it at the deadline."""
    said = []
    pipes: Row = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **pipes, **place()) as program:
        for line in program.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    return program.returncode, "".join(said)


def build(emulated: bool) -> Row:
    """The package with its CUDA kernels, compiled for this GPU alone where nvidia-smi names it, unless it is there."""
    reason = None if emulated else missing()
    if reason is None:
        return {"already built": True}
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-index", "--no-deps", str(ROOT)]
    if architecture := architecture_here():
        command.append(f"-Ccmake.define.PYLLM_CUDA_ARCHITECTURES={architecture}")
    settings = {"PYLLM_CUDA": "on", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reason}; then pip said: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    if (still := missing()) is not None:
        raise RuntimeError(f"built, but {still}")
    return {"already built": False}


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the GPUs, a line for each; nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def architecture_here() -> str | None:
    """The first GPU's architecture as the build takes it, such as 80 or 90a; None where nvidia-smi does not say."""
    found = re.match(r"(\d+)\.(\d)", nvidia_smi("compute_cap"))
    if found is None:
        return None
    return "90a" if found[0] == "9.0" else found[1] + found[2]


def facts(emulated: bool) -> Row:
    """What this machine is."""
    from importlib.metadata import PackageNotFoundError, version

    found: Row = {"python": sys.version.split()[0]}
    for name in ("pyllm", "cuda-core", "cuda-bindings", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    found["nvidia-smi"] = nvidia_smi(query) or None
    with device(emulated) as gpu:
        found |= {"gpu": gpu.name, "multiprocessors": gpu.multiprocessors, "memory": gpu.memory()}
        found |= {"cuda": gpu.kernels.RUNTIME_VERSION, "architectures": gpu.kernels.ARCHITECTURES}
    return found


def roofs(emulated: bool) -> Row:
    """Bytes a second of reading and of copying, operations a second of a product, and an edge of a graph."""
    with device(emulated) as gpu:
        size = (1 << 16) if emulated else (4 << 30)
        x, blocks = gpu.zeros([size], np.uint8), 2 if emulated else gpu.multiprocessors * 8
        out = gpu.zeros([blocks], np.uint32)
        read = seconds_of(gpu, lambda _: gpu.kernels.read_probe(out.raw, x.raw, gpu.stream), 2)
        half = size // 2
        copy = seconds_of(gpu, lambda _: gpu.write(x[:half], x[half:]), 2)
        edges = 10 if emulated else 1000
        edge = {
            overlapped: seconds_of(gpu, lambda _, o=overlapped: gpu.kernels.empty_probe(o, gpu.stream), edges)
            for overlapped in (False, True)
        }
    found: Row = {
        "read GB/s": size / read / 1e9,
        "copy GB/s": 2 * half / copy / 1e9,
        "edge us": edge[False] * 1e6,
        "programmatic edge us": edge[True] * 1e6,
        "torch TFLOP/s": None,
    }
    torch = torch_gpu()
    if torch is not None and not emulated:
        found["torch TFLOP/s"] = torch_product(torch, 8192, 8192, 8192)
    return found


def torch_product(torch: Any, m: int, n: int, k: int) -> float:
    """TFLOP/s of torch's bfloat16 product of random matrices."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    count = max(3, int(4e12 / (2 * m * n * k)))
    for repeat in (3, count):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeat):
            a @ b.T
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / repeat
    return 2 * m * n * k / seconds / 1e12


def tests(emulated: bool) -> Row:
    """Every test that is marked gpu; the log names each."""
    command = [sys.executable, "-m", "pytest", "-v", "-rA", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    if emulated:
        command += ["--emulated-gpu", "-k", "memory_goes", str(ROOT / "tests" / "test_gpu.py")]
    else:
        command += [str(ROOT / "tests")]
    status, said = run_aloud(command)
    if status:
        raise RuntimeError(said[-4000:])
    return {"summary": said.strip().splitlines()[-1:]}


def sanitizer(emulated: bool) -> Row:
    """compute-sanitizer over a tiny model: memory errors and races of shared memory."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tiny = [sys.executable, str(Path(__file__).resolve()), "-", "--tiny"]
    if emulated:
        subprocess.run([*tiny, "--emulated"], check=True, capture_output=True)
        return {"skipped": "nothing to find on the emulated GPU"}
    if not Path(program).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    found: Row = {}
    for tool in ("memcheck", "racecheck"):
        status, said = run_aloud([program, "--tool", tool, "--error-exitcode", "9", *tiny])
        found[tool] = "clean" if status == 0 else said[-3000:]
    if any(text != "clean" for text in found.values()):
        raise RuntimeError(json.dumps(found))
    return found


def tiny(emulated: bool) -> None:
    """A tiny model, a short prompt and one of several tiles, and decoding."""
    import tempfile

    import tiny_model

    from pyllm import LLM

    with tempfile.TemporaryDirectory() as folder, device(emulated):
        sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
        model = tiny_model.make(Path(folder) / "model", **sizes)
        llm = LLM(model, device="cuda", dtype="bfloat16", max_num_seqs=2)
        prompts = ["Once upon a time", {"prompt_token_ids": [3 + i % 200 for i in range(300)]}]
        llm.generate(prompts, max_tokens=4, temperature=0)


def kernels(emulated: bool) -> Row:
    """Kernels by themselves, as a share of their roof."""
    return {"rows": kernel_rows(emulated)}


def kernel_rows(emulated: bool) -> Iterator[Row]:
    """Products of decoding and of prompts, then attention."""
    from pyllm.cuda_ops import CudaOps

    decode = {"1B qkv": (3072, 2048), "1B gate+up": (16384, 2048), "1B down": (2048, 8192),
              "8B down": (4096, 14336), "1B head": (128256, 2048)}  # fmt: skip
    products = [(4096, 4096, 4096), (8192, 8192, 8192), (512, 4096, 4096), (2048, 4096, 4096)]
    attentions, length, batches = [(64, 32, 8), (128, 32, 8)], 2048, DECODE_ROWS
    cached = 256 << 20  # bytes of weights, or of caches, beyond any L2
    if emulated:
        decode, products, cached = {"tiny": (16, 64), "long": (16, 14336)}, [(32, 16, 64)], 4096
        attentions, length, batches = [(64, 2, 1)], 64, (1, 8)
    with device(emulated) as gpu:
        ops = CudaOps(gpu)
        for name, (n, k) in decode.items():
            yield from guarded(f"decode {name}", functools.partial(decoding, gpu, ops, n, k, batches, cached))
        for m, n, k in products:
            yield from guarded(f"product {m}x{n}x{k}", functools.partial(product, gpu, ops, m, n, k))
        for size, heads, kv_heads in attentions:
            measure = functools.partial(attention, gpu, ops, size, heads, kv_heads, length, cached)
            yield from guarded(f"attention E={size}", measure)


def guarded(name: str, measure: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``measure(name)``, and one that tells of its failure."""
    try:
        yield from measure(name)
    except Exception as error:
        yield {"name": name, "error": f"{type(error).__name__}: {error}"}


def row_of(name: str, unit: str, value: float, **more: Any) -> Row:
    """A figure as the JSON files hold it."""
    return {"name": name, "value": value, "unit": unit, **more}


def decoding(gpu: Any, ops: Any, n: int, k: int, batches: tuple[int, ...], cached: int, name: str) -> Iterator[Row]:
    """Products of few rows with weights [n, k], in turns over copies of at least `cached` bytes together."""
    from ml_dtypes import bfloat16

    from pyllm.cuda_ops import DeviceMatrix

    copies = max(2, -(-cached // (n * k * 2)))
    weights = [DeviceMatrix(noise(gpu, (n, k), 0.02, bfloat16), False) for _ in range(copies)]
    for batch in batches:
        x, y = noise(gpu, (batch, k), 1, bfloat16), gpu.empty((batch, n), np.float32)
        took = seconds_of(gpu, lambda i, x=x, y=y: ops.matmul(x, weights[i % copies], out=y), copies)
        yield row_of(name, "GB/s", n * k * 2 / took / 1e9, batch=batch, us=took * 1e6)


def product(gpu: Any, ops: Any, m: int, n: int, k: int, name: str) -> Iterator[Row]:
    """The product of a prompt, and torch's; an error where some of its rows are wrong."""
    from ml_dtypes import bfloat16

    from pyllm.cuda_ops import DeviceMatrix

    w = DeviceMatrix(noise(gpu, (n, k), 0.02, bfloat16), False)
    x, y = noise(gpu, (m, k), 1, bfloat16), gpu.empty((m, n), bfloat16)
    took = seconds_of(gpu, lambda _: ops.matmul(x, w, out=y), 3)
    some = sorted({0, m // 3, m - 1})
    expected = x[some].numpy().astype("f8") @ w.values.numpy().astype("f8").T
    error = float(np.linalg.norm(y[some].numpy().astype("f8") - expected) / np.linalg.norm(expected))
    if not error <= 1e-2:
        raise RuntimeError(f"rows {some} are wrong: relative error {error:.3g}, expected at most 0.01")
    torch = torch_gpu()
    torchs = {} if torch is None else {"torch": torch_product(torch, m, n, k)}
    yield row_of(name, "TFLOP/s", 2 * m * n * k / took / 1e12, us=took * 1e6, **torchs)


def attention(
    gpu: Any, ops: Any, size: int, heads: int, kv_heads: int, length: int, cached: int, name: str
) -> Iterator[Row]:
    """Attention of a prompt of `length` tokens, and of one token after so many; caches of `cached` bytes take turns."""
    from ml_dtypes import bfloat16

    blocks = length // 64
    copies = max(2, -(-cached // (2 * length * kv_heads * size * 2)))
    caches = [noise(gpu, (blocks, kv_heads, 2, 64 * size), 1, bfloat16) for _ in range(copies)]
    table, end = gpu.upload(np.arange(blocks, dtype=np.int32)[None]), gpu.upload(np.array([length], np.int32))
    for rows in (length, 1):
        q, out = noise(gpu, (rows, heads * size), 1, bfloat16), gpu.empty((rows, heads * size), bfloat16)
        starts = ops.stage([np.array([0, rows], np.int32)])
        starts.send()

        def launch(i: int, q: Any = q, out: Any = out, starts: Any = starts.placed[0]) -> None:
            ops.attention(q, caches[i % copies], starts, end, table, head_size=size, scale=size**-0.5, out=out)

        took = seconds_of(gpu, launch, copies)
        if rows == 1:
            yield row_of(f"{name} decode at {length}", "GB/s", caches[0].nbytes / took / 1e9, us=took * 1e6)
        else:
            work = 2 * rows * rows * heads * size  # half of the scores are masked
            yield row_of(f"{name} prompt of {length}", "TFLOP/s", work / took / 1e12, us=took * 1e6)


def shape_of(name: str, emulated: bool) -> dict[str, Any]:
    """The config of a model."""
    from pyllm.compare.shapes import SHAPES

    if emulated:
        return SHAPES["stories-260k"] | {"num_hidden_layers": 1}
    llama_8b = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    return SHAPES["llama-1b"] | llama_8b if name == "llama-8b" else SHAPES[name]


def model(name: str) -> Callable[[bool], Row]:
    """The step of a shape: tokens a second with random weights, made on the GPU."""

    def step(emulated: bool) -> Row:
        depths, batches, tokens = ((8,), (1,), 3) if emulated else (DEPTHS, BATCHES, TOKENS)
        return {"rows": rows(emulated, depths, batches, tokens)}

    def rows(emulated: bool, *sizes: Any) -> Iterator[Row]:
        with device(emulated) as gpu:
            yield from engine_rows(gpu, name, shape_of(name, emulated), *sizes)

    return step


def transformers(emulated: bool) -> Row:
    """The same shapes through transformers, where it is installed."""
    torch = None if emulated else torch_gpu()
    if torch is None:
        return {"skipped": "torch with CUDA is not installed"}
    every = (transformers_rows(torch, name, shape_of(name, False), BATCHES, TOKENS) for name in MODELS)
    return {"rows": itertools.chain.from_iterable(every)}


def random_model(gpu: Any, spec: Any) -> Any:
    """A model of this shape in bfloat16."""
    from ml_dtypes import bfloat16

    from pyllm.cuda_ops import DeviceMatrix
    from pyllm.model import Model
    from pyllm.packed import assemble

    slots = spec.slots()

    def matrix(parts: Any) -> Any:
        n, k = parts.shape(spec)
        gated = parts.gate is not None
        order = None if parts.heads is None else np.arange(n)  # of noise any order is as good
        return DeviceMatrix(noise(gpu, (n * (1 + gated), k), 0.02, bfloat16), gated, order)

    def vector(*names: str) -> Any:
        if names[0] not in slots:
            return None
        shape = (sum(slots[name][0] for name in names), *slots[names[0]][1:])
        return noise(gpu, shape, 0.02, np.float32)

    return Model(spec, assemble(spec, "bfloat16", matrix, vector))


def engine_rows(
    gpu: Any, name: str, config: dict[str, Any], depths: tuple[int, ...], batches: tuple[int, ...], tokens: int
) -> Iterator[Row]:
    """Prompt and decode speed of a shape, after one run that records its steps."""
    from pyllm.cache import BlockPool, KVCache, blocks_for
    from pyllm.cuda_ops import CudaOps
    from pyllm.engine.engine import Engine
    from pyllm.engine.runner import Runner
    from pyllm.models import family_of
    from pyllm.sampling import SamplingParams

    spec = family_of(config).read(config)
    depths = tuple(depth for depth in depths if depth + tokens <= spec.max_positions)
    model, ops, longest = random_model(gpu, spec), CudaOps(gpu), max(depths) + tokens
    cache = KVCache(spec, blocks_for(longest) * max(batches), "bfloat16", ops.allocate)
    runner = Runner(model, ops, cache, 2048, max(batches), longest)
    for depth in depths:
        for batch in batches:
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
            for counted in (False, True):
                engine = Engine(
                    runner, BlockPool(cache.blocks), None, [], max_sequences=batch, max_tokens=2048,
                    max_length=longest, share_prefixes=False,
                )  # fmt: skip
                rng = np.random.default_rng(batch)
                for _ in range(batch):
                    engine.add(None, rng.integers(0, spec.vocab_size, depth).tolist(), params, 0)
                while not engine.idle:
                    engine.step()
                stats = engine.stats
                if counted:
                    decode = stats.decode_tokens / stats.generation_seconds
                    read = model.weights.bytes_per_token * decode / batch / 1e9
                    prompt = stats.prompt_tokens / stats.prompt_seconds
                    more = {"batch": batch, "GB/s": read, "prompt tok/s": prompt}
                    yield row_of(f"{name} depth {depth}", "tok/s", decode, **more)


def transformers_rows(
    torch: Any, name: str, config: dict[str, Any], batches: tuple[int, ...], tokens: int
) -> Iterator[Row]:
    """Decode speed of the same shape through transformers, at depth 128."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    shape = AutoConfig.for_model(config["model_type"], **values)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    for batch in batches:
        prompt = torch.randint(0, config["vocab_size"], (batch, 128), device="cuda")
        took = {}
        for count in (1, 2, tokens + 1):  # the first warms up
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            torch.cuda.synchronize()
            took[count] = time.perf_counter() - began
        speed = (tokens - 1) * batch / (took[tokens + 1] - took[2])
        yield row_of(f"{name} depth 128", "tok/s", speed, batch=batch)
    del model
    torch.cuda.empty_cache()


STEPS = {
    "build": Step(build, 90),
    "facts": Step(facts, 15),
    "roofs": Step(roofs, 25),
    "tests": Step(tests, 110),
    "sanitizer": Step(sanitizer, 45),
    "kernels": Step(kernels, 45),
    "gpt2": Step(model("gpt2"), 25),
    "llama-1b": Step(model("llama-1b"), 35),
    "llama-8b": Step(model("llama-8b"), 50),
    "transformers": Step(transformers, 40),
}


# The command


def table(results: dict[str, Row]) -> list[str]:
    """The results in words, at most `MOST_LINES` lines."""
    roof, lines = results.get("roofs", {}), []
    for name, found in results.items():
        told = ", ".join(f"{key} {shown(value)}" for key, value in found.items() if key not in NOT_TOLD and value)
        if "error" in found:
            told = found["error"].strip().splitlines()[-1]
        lines.append(f"{name:12} {found['state']:8} {found['seconds']:5.1f} s  {told}"[:160])
        together: dict[str, list[str]] = {}
        for row in found.get("rows", []):
            if "error" in row:
                together.setdefault(row["name"], []).append(row["error"].strip().splitlines()[-1])
                continue
            batch = f"x{row['batch']} " if "batch" in row else ""
            together.setdefault(row["name"], []).append(f"{batch}{row['value']:.4g} {row['unit']}{share(row, roof)}")
        lines += [f"  {label:34} {', '.join(figures)}"[:160] for label, figures in together.items()]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} lines more, in the JSON files"]
    return lines


def shown(value: Any) -> str:
    """A value of a step in words."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share(row: Row, roof: Row) -> str:
    """How much of the machine's limit a figure is, where that was measured."""
    if row["unit"] == "TFLOP/s":
        limit, value = row.get("torch") or roof.get("torch TFLOP/s"), row["value"]
    else:
        limit, value = roof.get("read GB/s"), row["value"] if row["unit"] == "GB/s" else row.get("GB/s")
    return f" ({value / limit:.0%})" if limit and value else ""


def run(out: Path, name: str, emulated: bool) -> Row:
    """A step in a process of its own; what it found, or what became of it."""
    began = time.perf_counter()
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), str(out.resolve()), "--step", name]
    seconds = STEPS[name].seconds * (PATIENCE if emulated else 1)
    told: Row = {}
    log = out / f"{name}.log"
    with log.open("w") as output:
        # A session of its own, so that what the step has started ends with it.
        step = subprocess.Popen(
            [*command, "--emulated"] if emulated else command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if status := step.wait(timeout=seconds):
                told = {"state": "crashed", "error": f"{end_of(log)}\nended with status {status}"}
        except subprocess.TimeoutExpired:
            told = {"state": "too long", "error": f"{end_of(log)}\nnot done after {seconds} s"}
        finally:
            if step.returncode is None:
                os.killpg(step.pid, signal.SIGKILL)
                step.wait()
    found: Row = {**(json.loads(path.read_text()) if path.exists() else {"state": "crashed"}), **told}
    found["seconds"] = time.perf_counter() - began
    write(path, found)
    return found


def end_of(log: Path) -> str:
    """The last 2,000 characters that a step has said."""
    return log.read_text(errors="replace")[-2000:]


def run_here(path: Path, step: Step, emulated: bool) -> None:
    """A step in this process, its rows written as they come."""
    found: Row = {"state": "crashed"}
    try:
        found |= step.run(emulated)
        rows, found["rows"] = found.get("rows", ()), []
        for row in rows:
            found["rows"].append(row)
            write(path, found)
        failed = [row["error"] for row in found["rows"] if "error" in row]
        found |= {"state": "failed", "error": failed[0]} if failed else {"state": "done"}
    except Exception:
        found |= {"state": "failed", "error": traceback.format_exc()[-6000:]}
    write(path, found)


def write(path: Path, found: Row) -> None:
    """Put a step's results into its file, which holds a whole one at any time."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 where all did what they should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for a JSON file of each step")
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU of the tests, on tiny sizes")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.tiny:
        tiny(given.emulated)
        return 0
    if given.step is not None:
        run_here(given.out / f"{given.step}.json", STEPS[given.step], given.emulated)
        return 0
    names = given.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    results = {name: run(given.out, name, given.emulated) for name in names}
    print("\n".join(table(results)))
    return 0 if all(found["state"] == "done" for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
