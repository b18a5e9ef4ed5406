"""`pyllm train`: train a model from scratch or go on training one, and watch it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllm.cli import options as o
from pyllm.cli.inputs import present
from pyllm.cli.output import be_quiet, note, progress_bar, write, write_json

if TYPE_CHECKING:
    from pyllm.train.setup import Setup
    from pyllm.train.trainer import Trainer

SETTINGS_FILE = "run.json"

Texts = list[str] | None
Steps = Annotated[int | None, o.option("--steps", min=1, help="Optimizer steps of the whole run.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("train")(train)


def train(
    context: typer.Context,
    data: Annotated[
        list[str] | None, typer.Argument(help="Files to train on: .txt, .jsonl, .bin.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, o.option("--config", help="Settings as YAML: the names of the options, with underscores.")
    ] = None,
    out: Annotated[str | None, o.option("--out", "-o", help="Folder of the run: checkpoints and logs.")] = None,
    resume: Annotated[bool, o.option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    model: Annotated[
        str | None, o.option("--model", "-m", help="Go on training this model: folder or hub name (owner/name).")
    ] = None,
    arch: Annotated[str | None, o.option("--arch", help="Begin a new model: gpt2, llama, t5 or bart.")] = None,
    layers: Annotated[int | None, o.option("--layers", help="Blocks of a new model (of each part); default 6.")] = None,
    hidden: Annotated[int | None, o.option("--hidden", help="Its width; default 384.")] = None,
    heads: Annotated[int | None, o.option("--heads", help="Its attention heads; default 6.")] = None,
    kv_heads: Annotated[
        int | None, o.option("--kv-heads", help="Its heads of keys and values; default as many.")
    ] = None,
    ffn: Annotated[int | None, o.option("--ffn", help="Its width inside blocks; default by the family.")] = None,
    tie: Annotated[
        bool | None, o.option("--tie/--no-tie", help="One matrix for embedding and head; default yes.")
    ] = None,
    vocab_size: Annotated[int | None, o.option("--vocab-size", help="Its tokens; default the tokenizer's.")] = None,
    init_std: Annotated[
        float | None, o.option("--init-std", help="Deviation of its first weights; default 0.02.")
    ] = None,
    context_size: Annotated[
        int | None, o.option("--context", "--ctx-size", "-c", help="Longest sequence; default 256.")
    ] = None,
    tokenizer: Annotated[
        str | None, o.option("--tokenizer", help="Folder with a tokenizer; default the model's.")
    ] = None,
    weights: Annotated[
        str | None, o.option("--weights", help="Shares of the files, as 0.7,0.3; default by their size.")
    ] = None,
    valid: Annotated[Texts, o.option("--valid", help="File of held-out data; may be given several times.")] = None,
    valid_share: Annotated[
        float | None, o.option("--valid-share", help="Held out of each file where there is no --valid; default 0.01.")
    ] = None,
    packing: Annotated[
        str | None, o.option("--packing", help="documents (default): each by itself; plain: one behind the other.")
    ] = None,
    mask_prompt: Annotated[
        bool | None, o.option("--mask-prompt/--no-mask-prompt", help="Only answers count; default no.")
    ] = None,
    mask_share: Annotated[
        float | None, o.option("--mask-share", help="Of a text that is hidden; default 0.15, with denoise 0.3.")
    ] = None,
    mean_span: Annotated[
        float | None, o.option("--mean-span", help="Of what is hidden in one place, with spans or denoise; default 3.")
    ] = None,
    random_share: Annotated[
        float | None, o.option("--random-share", help="Of the masks that are a random token, with denoise; default 0.")
    ] = None,
    mask_rule: Annotated[
        str | None, o.option("--mask-rule", help="bert (default): so many of a text; bernoulli: each by itself.")
    ] = None,
    generator: Annotated[
        str | None, o.option("--generator", help="With rtd: the model that fills masks, whose tokens are detected.")
    ] = None,
    data_cache: Annotated[str | None, o.option("--data-cache", help="Folder for tokens of files.")] = None,
    batch_tokens: Annotated[
        int | None, o.option("--batch-tokens", help="Tokens of a micro-batch; default eight contexts.")
    ] = None,
    accumulation: Annotated[
        int | None, o.option("--accumulation", "--grad-accum", help="Micro-batches of a step; default 1.")
    ] = None,
    steps: Steps = None,
    objective: Annotated[
        str | None,
        o.option(
            "--objective",
            help="causal (default); prefix: a random beginning of each text sees all of itself; blanks: GLM's; mlm: "
            "encoders'; rtd: replaced tokens; classify: labels of texts; seq2seq: pairs; spans: T5's; denoise: BART's; "
            "ul2: UL2's.",
        ),
    ] = None,
    dtype: Annotated[str | None, o.option("--dtype", help="Of the products: float32 (default) or bfloat16.")] = None,
    learning_rate: Annotated[
        float | None, o.option("--learning-rate", "--lr", help="The highest; default 6e-4.")
    ] = None,
    min_learning_rate: Annotated[
        float | None, o.option("--min-learning-rate", "--min-lr", help="Where the schedule ends; default 0.")
    ] = None,
    schedule: Annotated[
        str | None, o.option("--schedule", help="cosine (default), linear, constant or inverse_sqrt.")
    ] = None,
    warmup_steps: Annotated[int | None, o.option("--warmup-steps", help="The rate rises; default 0.")] = None,
    beta1: Annotated[float | None, o.option("--beta1", help="Of AdamW; default 0.9.")] = None,
    beta2: Annotated[float | None, o.option("--beta2", help="Of AdamW; default 0.95.")] = None,
    eps: Annotated[float | None, o.option("--eps", help="Of AdamW; default 1e-8.")] = None,
    weight_decay: Annotated[float | None, o.option("--weight-decay", help="Of matrices; default 0.1.")] = None,
    clip: Annotated[
        float | None, o.option("--clip", "--grad-clip", help="Largest norm of the gradient; 0: none; default 1.")
    ] = None,
    dropout: Annotated[float | None, o.option("--dropout", help="Default 0.")] = None,
    label_smoothing: Annotated[float | None, o.option("--label-smoothing", help="Default 0.")] = None,
    z_loss: Annotated[float | None, o.option("--z-loss", help="Factor of log(Z)^2; default 0.")] = None,
    checkpoint_activations: Annotated[
        bool | None,
        o.option(
            "--checkpoint-activations/--no-checkpoint-activations",
            "--grad-checkpoint/--no-grad-checkpoint",
            help="Less memory, a third more time; default no.",
        ),
    ] = None,
    seed: Annotated[int | None, o.option("--seed", "-s", min=0, help="Of weights, order, dropout; default 0.")] = None,
    threads: o.Threads = None,
    eval_every: Annotated[
        int | None, o.option("--eval-every", help="Steps between evaluations; default at the end.")
    ] = None,
    eval_batches: Annotated[
        int | None, o.option("--eval-batches", help="Micro-batches of one; default 20, of labels all.")
    ] = None,
    save_every: Annotated[
        int | None, o.option("--save-every", help="Steps between checkpoints; default at the end.")
    ] = None,
    keep: Annotated[int | None, o.option("--keep", help="Checkpoints kept beside the best; default 2.")] = None,
    sample_every: Annotated[
        int | None, o.option("--sample-every", help="Steps between samples of text; default none.")
    ] = None,
    sample_prompts: Annotated[
        Texts, o.option("--sample-prompt", help="Beginning of a sample; may be given several times.")
    ] = None,
    sample_tokens: Annotated[int | None, o.option("--sample-tokens", help="Length of a sample; default 64.")] = None,
    sample_temperature: Annotated[float | None, o.option("--sample-temperature", help="Default 0.8.")] = None,
    overfit_batch: Annotated[
        int | None, o.option("--overfit-batch", min=1, help="Train on the first N micro-batches only, as a check.")
    ] = None,
    check_grads: Annotated[
        bool, o.option("--check-grads", help="Compare gradients with slopes of the loss, and stop.")
    ] = False,
    tensorboard: Annotated[bool, o.option("--tensorboard", help="Also log for TensorBoard, into --out.")] = False,
    wandb: Annotated[str | None, o.option("--wandb", help="Also log to this project of Weights & Biases.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Train a language model: a new one, or one that is there.

    Checkpoints in --out are ordinary model folders. Ctrl-C saves one and ends; --resume goes on from it exactly.
    """
    be_quiet(quiet)
    values = _settings(context, config, resume)
    from pyllm.train.run_config import as_json, settings

    run, theirs = settings(values)
    from pyllm.cli.live import LiveLine
    from pyllm.train import RepeatedData, Trainer
    from pyllm.train.logs import RunLog, replace_text
    from pyllm.train.setup import prepare
    from pyllm.train.trackers import TensorBoard, WeightsAndBiases

    with progress_bar("tokenising") as progress:
        setup = prepare(run, theirs.seed, progress, theirs.objective, theirs.threads)
    if setup.eval_batches is not None and "eval_batches" not in values:
        theirs = replace(theirs, eval_batches=setup.eval_batches)
    source = setup.train if overfit_batch is None else RepeatedData(setup.train, overfit_batch)
    trainer = Trainer(
        setup.model,
        source,
        theirs,
        eval_data=setup.valid,
        tokenizer=setup.tokenizer,
        resume=resume,
        body=setup.body,
    )
    for line in setup.notes:
        note(f"note: {line}")
    if check_grads:
        return _check_gradients(trainer)
    of_sources = trainer.shape.source / trainer.shape.all_tokens
    live = LiveLine(trainer.spec, run.context or 0, theirs.dtype, trainer.ops.threads, of_sources)
    trainer.callbacks += [RunLog(theirs.out), live]
    if tensorboard:
        trainer.callbacks.append(TensorBoard(theirs.out / "tensorboard"))
    theirs.out.mkdir(parents=True, exist_ok=True)
    if wandb is not None:  # it takes the system's folder where there is none
        trainer.callbacks.append(WeightsAndBiases(wandb, theirs.out.resolve(), values))
    replace_text(theirs.out / SETTINGS_FILE, [as_json(run, theirs), "\n"])
    _describe(setup, trainer)
    with _stopped_by_ctrl_c(trainer):
        result = trainer.run()
    live.clear()
    if json:
        write_json({**vars(result), "folder": str(result.folder)})
    else:
        loss = f", loss {result.best_loss:.4f} on held-out data" if result.best_loss is not None else ""
        write(f"{result.folder}: step {result.step}{loss}", end="\n")
    if not result.finished:
        repeated = f" --overfit-batch {overfit_batch}" if overfit_batch is not None else ""
        note(f"stopped; go on with: pyllm train --resume --out {theirs.out}{repeated}")
        return 130
    return 0


def _settings(context: typer.Context, config: Path | None, resume: bool) -> dict[str, Any]:
    """Of the run to be resumed, then the YAML file's, then those of flags."""
    from pyllm.errors import ConfigError
    from pyllm.train.run_config import read_yaml

    other = ("config", "resume", "overfit_batch", "check_grads", "tensorboard", "wandb", "json", "quiet")
    flags = present({name: value for name, value in context.params.items() if name not in other})
    if "context_size" in flags:
        flags["context"] = flags.pop("context_size")
    if "weights" in flags:
        flags["weights"] = [part.strip() for part in flags["weights"].split(",")]
    for name in ("data", "valid", "sample_prompts"):
        if not flags.get(name):
            flags.pop(name, None)
    values = read_yaml(config) if config is not None else {}
    if resume:
        out = flags.get("out", values.get("out"))
        if out is None:
            raise typer.BadParameter("--resume needs the folder of the run: --out FOLDER.")
        path = Path(out) / SETTINGS_FILE
        if not path.is_file():
            raise ConfigError(f"{out}: no run to resume: expected {SETTINGS_FILE} in it")
        values = {**read_yaml(path), **values}
    merged = {**values, **flags}
    for one, other_name in (("model", "arch"), ("arch", "model")):  # a flag replaces what a file says
        if one in flags and other_name not in flags:
            merged.pop(other_name, None)
    return merged


def _describe(setup: Setup, trainer: Trainer) -> None:
    plan, data = trainer.plan, setup.packed
    note(
        f"{trainer.spec.num_parameters() / 1e6:.2f} million parameters | {data.tokens_per_epoch} tokens an epoch, "
        f"{data.tokens * trainer.config.accumulation} a step | memory {(plan.total + setup.beside) / 1e9:.2f} GB"
    )


def _check_gradients(trainer: Trainer) -> int:
    """Print the comparison; 1 where a gradient is wrong."""
    worst = 0.0
    for check in trainer.check_gradients():
        worst = max(worst, check.error)
        write(f"{check.error:9.2e}  {check.gradient:12.6g}  {check.slope:12.6g}  {check.slot}", end="\n")
    good = worst < 0.02
    note("error, gradient and slope of every weight: " + ("they agree" if good else "they do not agree"))
    return 0 if good else 1


@contextmanager
def _stopped_by_ctrl_c(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C lets the step end and saves, the second ends at once."""

    def stop(signum: int, frame: Any) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, before)
        note("\nsaving after this step; Ctrl-C again ends without saving")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
