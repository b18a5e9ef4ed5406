"""`pyllm bench`: this machine's limits, and how close a model comes to them."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import load
from pyllm.cli.output import be_quiet, write, write_json

if TYPE_CHECKING:
    from pyllm.limits import Limits
    from pyllm.llm import LLM


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("bench")(bench)


def bench(
    model: Annotated[
        str | None, o.option("--model", "-m", env="MODEL", help="Also measure this model: folder or hub name.")
    ] = None,
    prompt_tokens: Annotated[int, o.option("--prompt-tokens", min=1, help="Length of the prompt; default 512.")] = 512,
    max_tokens: Annotated[int, o.option("--max-tokens", "-n", min=2, help="Tokens to decode; default 64.")] = 64,
    repeat: Annotated[
        int, o.option("--repeat", min=1, max=1000, help="Runs, of which the median counts; default 3.")
    ] = 3,
    device: o.Device = None,
    threads: o.Threads = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Measure read bandwidth and arithmetic peaks; with --model also prefill and decode, as fractions of them."""
    be_quiet(quiet)
    from pyllm.limits import measure

    llm = None
    if model is not None:
        llm = load(
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            ctx_size=ctx_size,
            kv_cache_dtype=kv_cache_dtype,
            revision=revision,
            offline=offline,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        room = llm.max_model_len - prompt_tokens
        if room < max_tokens:
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
    if llm is not None:
        facts["model"] = found = _measure(llm, limits, prompt_tokens, max_tokens, repeat)
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
