"""`pyllm bench`: this machine's limits, how close a model comes to them, and other engines beside it."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import bench_serve
from pyllm.cli import options as o
from pyllm.cli.inputs import load
from pyllm.cli.output import be_quiet, write, write_json

if TYPE_CHECKING:
    from pyllm.limits import Limits
    from pyllm.llm import LLM


MODEL_OPTIONS = (
    "model", "prompt_tokens", "max_tokens", "device", "dtype", "quantization", "quantization_skip", "kv_cache_dtype",
    "ctx_size", "revision", "offline",
)  # fmt: skip
COMPARE_OPTIONS = (
    "models", "dtypes", "cells", "peers", "quick", "model_folder", "save", "load_files", "plot",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
    group.callback()(bench)
    bench_serve.register(group)
    app.add_typer(group, name="bench")


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        o.option("--model", "-m", env="MODEL", help="Measure this model: folder or hub name; default the package's."),
    ] = None,
    prompt_tokens: Annotated[
        int, o.option("--prompt-tokens", min=1, help="Length of the prompt; default 512, or what fits.")
    ] = 512,
    max_tokens: Annotated[int, o.option("--max-tokens", "-n", min=2, help="Tokens to decode; default 64.")] = 64,
    repeat: Annotated[
        int | None,
        o.option("--repeat", min=1, max=1000, help="Runs, of which the median counts; default 3, with --compare 5."),
    ] = None,
    compare: Annotated[
        bool,
        o.option("--compare", help="Measure pyllm and other engines in turns, on random weights of real shapes."),
    ] = False,
    models: Annotated[str | None, o.option("--models", help="--compare: shapes, as llama-1b,gpt2 (default).")] = None,
    dtypes: Annotated[
        str | None, o.option("--dtypes", help="--compare: some of float32,bfloat16,int8,int4; default all.")
    ] = None,
    cells: Annotated[
        str | None,
        o.option("--cells", help="--compare: some of load,prefill-512,decode,decode-2048,decode-8192,batch-2 to -32."),
    ] = None,
    peers: Annotated[
        str | None, o.option("--peers", help="--compare: some of llama.cpp,ctranslate2,torch; default all.")
    ] = None,
    quick: Annotated[bool, o.option("--quick", help="--compare: GPT-2, few cells, two rounds.")] = False,
    model_folder: Annotated[
        Path | None,
        o.option("--model-folder", help="--compare: where made models are kept; default ~/.cache/pyllm/compare."),
    ] = None,
    save: Annotated[
        Path | None, o.option("--save", help="--compare: keep every round in this JSON file, as it grows.")
    ] = None,
    load_files: Annotated[
        list[Path] | None, o.option("--load", help="--compare: show what --save kept, one file or several.")
    ] = None,
    plot: Annotated[Path | None, o.option("--plot", help="--compare: draw into this file, as .png or .svg.")] = None,
    device: o.Device = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    quantization_skip: o.QuantizationSkip = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Measure read bandwidth and arithmetic peaks, and prefill and decode of a model as fractions of them; with
    --compare the same of pyllm and the other engines that are installed."""
    if context.invoked_subcommand is not None:
        o.refuse(context, tuple(context.params), f"without {context.invoked_subcommand}")
        return 0
    be_quiet(quiet)
    o.refuse(
        context, MODEL_OPTIONS if compare else COMPARE_OPTIONS, "without --compare" if compare else "with --compare"
    )
    if compare:
        from pyllm.cli.compare import compare as run

        return run(
            models=models,
            dtypes=dtypes,
            cells=cells,
            peers=peers,
            threads=threads,
            rounds=repeat,
            quick=quick,
            folder=model_folder,
            save=save,
            load=load_files,
            plot=plot,
            json=json,
        )
    from pyllm.limits import measure

    if device == "cuda":
        raise typer.BadParameter("--device cuda: the limits measured here are the CPU's; use bench/gpu_check.py.")
    llm = load(
        model,
        device="cpu",
        dtype=dtype,
        quantization=quantization,
        quantization_skip=quantization_skip,
        threads=threads,
        ctx_size=ctx_size,
        kv_cache_dtype=kv_cache_dtype,
        revision=revision,
        offline=offline,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    room = llm.max_model_len - max_tokens
    if not o.given(context, "prompt_tokens"):
        prompt_tokens = max(min(prompt_tokens, room), 1)
    if room < prompt_tokens:
        raise typer.BadParameter(
            f"--prompt-tokens {prompt_tokens} + --max-tokens {max_tokens} exceed the context, {llm.max_model_len}."
        )
    limits = measure(threads)
    facts: dict[str, Any] = {"limits": asdict(limits)}
    if not json:
        write(
            f"limits on {limits.threads} threads at {limits.isa}: read {limits.read_gbps:.1f} GB/s, float32 "
            f"{limits.f32_gflops:.0f} GFLOP/s, bfloat16 {limits.bf16_gflops:.0f} GFLOP/s, "
            f"int8 {limits.int8_gops:.0f} GOP/s",
            end="\n",
        )
    facts["model"] = found = _measure(llm, limits, prompt_tokens, max_tokens, repeat or 3)
    if not json:
        write(
            f"prefill {prompt_tokens} tokens: {found['prefill_tokens_per_second']:.1f} tok/s, "
            f"{found['prefill_gflops']:.0f} GFLOP/s, {found['prefill_fraction']:.0%} of the limit",
            end="\n",
        )
        write(
            f"decode at depth {prompt_tokens}: {found['decode_tokens_per_second']:.1f} tok/s, "
            f"{found['decode_gbps']:.1f} GB/s, {found['decode_fraction']:.0%} of the read bandwidth",
            end="\n",
        )
    if json:
        write_json(facts)
    return 0


def _measure(llm: LLM, limits: Limits, prompt_tokens: int, max_tokens: int, repeat: int) -> dict[str, float]:
    """Medians of speeds over `repeat` runs, and what share of the limits they are."""
    ids = [i % llm.spec.vocab_size for i in range(7, 7 + prompt_tokens)]
    prefill, decode = [], []
    for _ in range(repeat):
        before = asdict(llm.stats)
        llm.generate({"prompt_token_ids": ids}, max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        spent = {name: value - before[name] for name, value in asdict(llm.stats).items()}
        prefill.append(spent["prompt_tokens"] / spent["prompt_seconds"])
        decode.append(spent["decode_steps"] / spent["generation_seconds"])
    prefill_rate, decode_rate = statistics.median(prefill), statistics.median(decode)
    gflops = llm.spec.operations(prompt_tokens) * prefill_rate / prompt_tokens / 1e9
    cache_token = llm.plan.cache / max(llm.plan.cache_tokens, 1)
    gbps = (llm.weight_bytes + cache_token * (prompt_tokens + max_tokens / 2)) * decode_rate / 1e9
    peak = {"float32": limits.f32_gflops, "float16": limits.f32_gflops, "bfloat16": limits.bf16_gflops}[
        llm.plan.precision.dtype
    ]
    if llm.plan.precision.integers is not None:
        peak = limits.int8_gops
    return {
        "prefill_tokens_per_second": prefill_rate,
        "prefill_gflops": gflops,
        "prefill_fraction": gflops / peak,
        "decode_tokens_per_second": decode_rate,
        "decode_gbps": gbps,
        "decode_fraction": gbps / limits.read_gbps,
    }
