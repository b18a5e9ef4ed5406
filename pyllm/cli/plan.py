"""`pyllm plan`: the memory a model will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import present
from pyllm.cli.output import progress_bar, write, write_json

GENERATION_OPTIONS = (
    "quantization", "quantization_skip", "kv_cache_dtype", "prefix", "max_num_seqs", "speculative", "draft_model",
    "num_speculative_tokens", "revision", "offline",
)  # fmt: skip
TRAINING_OPTIONS = ("config", "batch_tokens", "checkpoint_activations")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("plan")(plan)


def plan(
    context: typer.Context,
    model: o.DefaultModel = None,
    dtype: o.Dtype = None,
    quantization: o.Quantization = None,
    quantization_skip: o.QuantizationSkip = None,
    kv_cache_dtype: o.CacheDtype = None,
    ctx_size: o.ContextSize = None,
    prefix: o.Prefix = False,
    max_num_seqs: Annotated[
        int | None, o.option("--max-num-seqs", env="MAX_NUM_SEQS", min=1, help="Completions that run together.")
    ] = None,
    speculative: o.Speculative = None,
    draft_model: o.DraftModel = None,
    num_speculative_tokens: o.DraftTokens = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    train: Annotated[bool, o.option("--train", help="Of training: --model, or the settings in --config.")] = False,
    config: Annotated[
        Path | None, o.option("--config", help="--train: settings of a run, as `pyllm train` takes them.")
    ] = None,
    batch_tokens: Annotated[
        int | None, o.option("--batch-tokens", help="--train: tokens of a micro-batch; default eight contexts.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, o.option("--checkpoint-activations", "--grad-checkpoint", help="--train: keep few activations.")
    ] = False,
    json: o.Json = False,
) -> int:
    """Bytes for weights, cache and workspace, from config.json and the headers of the weights alone; with --train those
    of a training run."""
    o.refuse(context, GENERATION_OPTIONS if train else TRAINING_OPTIONS, "without --train" if train else "with --train")
    if train:
        flags = {
            "model": model,
            "dtype": dtype,
            "context": ctx_size,
            "batch_tokens": batch_tokens,
            "checkpoint_activations": checkpoint_activations or None,
        }
        return _training(config, present(flags), json)
    from pyllm.default_model import default_model
    from pyllm.planning import plan as plan_of

    result = plan_of(
        model or default_model(),
        revision=revision,
        offline=offline,
        **present(
            {
                "dtype": dtype,
                "quantization": quantization,
                "quantization_skip": quantization_skip,
                "kv_cache_dtype": kv_cache_dtype,
                "max_model_len": ctx_size,
                "max_num_seqs": max_num_seqs,
                "prefix": prefix or None,
                "speculative": speculative,
                "draft_model": draft_model,
                "num_speculative_tokens": num_speculative_tokens,
            }
        ),
    )
    spec = result.spec
    if json:
        names = ("dtype", "cache_dtype", "max_model_len", "cache_tokens", "weights", "cache", "workspace", "total")
        facts = {name: getattr(result, name) for name in (*names, "available", "fits")}
        if result.cross:
            facts["cross"] = result.cross
        if result.draft_model is not None:
            facts["draft_model"] = result.draft_model.total
        write_json({"family": spec.family, "parameters": spec.num_parameters(), **facts})
        return 0
    lines = [
        f"{spec.family}, {spec.num_parameters() / 1e6:.1f} million parameters, {len(spec.blocks)} layers",
        f"weights    {_size(result.weights)}  as {result.dtype}",
        f"cache      {_size(result.cache)}  {result.cache_tokens} tokens as {result.cache_dtype}",
        f"workspace  {_size(result.workspace)}",
        f"total      {_size(result.total)}  for a context of {result.max_model_len} tokens",
        f"available  {_size(result.available)}  {'it fits' if result.fits else 'it does not fit'}",
    ]
    if result.cross:
        lines.insert(3, f"sources    {_size(result.cross)}  their cache, each of up to {result.max_source} tokens")
    if (draft := result.draft_model) is not None:
        lines.insert(
            4, f"draft      {_size(draft.total)}  model as {draft.precision}, its cache as {draft.cache_dtype}"
        )
    write("\n".join(lines), end="\n")
    return 0


def _training(config: Path | None, flags: dict[str, Any], json: bool) -> int:
    """Bytes for weights, gradients, optimizer, activations, keys and values of a run."""
    from pyllm.train.run_config import read_yaml
    from pyllm.train.setup import plan_of_run

    values = read_yaml(config) if config is not None else {}
    if "model" in flags:
        values.pop("arch", None)
    with progress_bar("tokenising") as progress:
        result = plan_of_run({**values, **flags}, progress)
    spec, shape = result.spec, result.shape
    names = ["weights", "gradients", "optimizer", "activations", "cache", "scratch"]
    parts = {name: getattr(result, name) for name in names + ["generator"] * bool(result.generator)}
    if json:
        facts = {"total": result.total, "available": result.available, "fits": result.fits}
        write_json({"family": spec.family, "parameters": spec.num_parameters(), **parts, **facts})
        return 0
    lines = [
        f"{spec.family}, {spec.num_parameters() / 1e6:.1f} million parameters, {len(spec.blocks)} layers, products in "
        f"{shape.dtype}",
        *(f"{name:12}{_size(count)}" for name, count in parts.items()),
        f"total       {_size(result.total)}  for micro-batches of {shape.all_tokens} tokens",
        f"available   {_size(result.available)}  {'it fits' if result.fits else 'it does not fit'}",
    ]
    write("\n".join(lines), end="\n")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:8.3f} GB" if count >= 10_000_000 else f"{count / 1e6:8.3f} MB"
