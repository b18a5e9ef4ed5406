"""Steps: whole models with random weights, made on the GPU, and the same through transformers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from gpu.process import Check, Row
from gpu.timing import device, noise, row_of, torch_gpu

MODELS, DEPTHS, BATCHES, TOKENS = ("gpt2", "llama-1b", "llama-8b"), (128, 2048), (1, 4, 8), 64


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


def model(name: str) -> Callable[[Check], Row]:
    """The step of a shape: tokens a second with random weights, made on the GPU."""

    def step(check: Check) -> Row:
        depths, batches, tokens = ((8,), (1,), 3) if check.emulated else (DEPTHS, BATCHES, TOKENS)
        return {"rows": rows(check.emulated, depths, batches, tokens)}

    def rows(emulated: bool, *sizes: Any) -> Iterator[Row]:
        with device(emulated) as gpu:
            yield from engine_rows(gpu, name, shape_of(name, emulated), *sizes)

    return step


def transformers(check: Check) -> Row:
    """The same shapes through transformers, where it is installed."""
    torch = None if check.emulated else torch_gpu()
    if torch is None:
        return {"skipped": "torch with CUDA is not installed"}
    every = (transformers_rows(torch, name, shape_of(name, False), BATCHES, TOKENS) for name in MODELS)
    return {"rows": itertools.chain.from_iterable(every)}


def random_model(gpu: Any, spec: Any) -> Any:
    """A model of this shape in bfloat16."""
    from pyllm.cuda_weights import DeviceMatrix
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
