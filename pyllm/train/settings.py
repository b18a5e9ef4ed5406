"""What a training run is told: one frozen dataclass, checked as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError, listed

OBJECTIVES = ("causal", "prefix", "blanks", "mlm", "rtd", "seq2seq", "spans", "denoise", "ul2", "classify")
WITH_PREFIX = ("prefix", "spans", "ul2")  # with these, what a decoder is given before what counts sees all of itself
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; `ConfigError` names every value that is out of range.

    A step takes `accumulation` micro-batches from the data. `out` is the run's folder, which holds the checkpoints.
    Settings in `FREE` may differ when a run is resumed: they do not touch what is computed.
    """

    out: Path
    steps: int  # optimizer steps of the whole run
    objective: str = "causal"
    accumulation: int = 1  # micro-batches of a step
    dtype: str = "float32"  # of the products: "float32" or "bfloat16"; weights, gradients and moments are float32
    learning_rate: float = 6e-4  # the highest
    min_learning_rate: float = 0.0  # where the schedule ends, or its floor
    schedule: str = "cosine"
    warmup_steps: int = 0  # the rate rises linearly
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms, biases and positions have none
    clip: float = 1.0  # largest norm of the gradient; 0: none
    dropout: float = 0.0  # of embedding, attention weights and both residual branches
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # factor of log(Z)^2
    checkpoint_activations: bool = False  # keep only what stands between blocks, compute the rest again
    seed: int = 0  # of initial weights and dropout
    threads: int | None = None  # None: the physical cores
    eval_every: int = 0  # steps between evaluations; 0: none but at the end
    eval_batches: int = 20  # micro-batches of an evaluation
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept beside the best
    sample_every: int = 0  # steps between samples of text; 0: none
    sample_prompts: tuple[str, ...] = ("",)
    sample_tokens: int = 64
    sample_temperature: float = 0.8

    FREE = (
        "out",
        "threads",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep",
        "sample_every",
        "sample_prompts",
        "sample_tokens",
        "sample_temperature",
    )

    def __post_init__(self) -> None:
        """Refuse impossible values, all at once."""
        problems: list[str] = []

        def need(name: str, holds: bool, expected: str) -> None:
            if not holds:
                problems.append(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        for name, least in (("steps", 1), ("accumulation", 1), ("warmup_steps", 0), ("eval_every", 0),
                            ("eval_batches", 1), ("save_every", 0), ("keep", 1), ("sample_every", 0),
                            ("sample_tokens", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            need(name, _is_integer(value) and least <= value < 1 << 53, f"an integer of at least {least}")
        need(
            "threads", self.threads is None or (_is_integer(self.threads) and self.threads >= 1), "at least 1, or None"
        )
        need("dtype", self.dtype in DTYPES, " or ".join(DTYPES))
        need("objective", self.objective in OBJECTIVES, ", ".join(OBJECTIVES))
        need("schedule", self.schedule in SCHEDULES, ", ".join(SCHEDULES))
        for name in ("learning_rate", "eps"):
            need(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a finite number above 0")
        for name in ("min_learning_rate", "weight_decay", "clip", "z_loss", "sample_temperature"):
            need(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a finite number of at least 0")
        for name in ("beta1", "beta2", "dropout", "label_smoothing"):
            need(name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "0 <= value < 1")
        if not problems:
            need("min_learning_rate", self.min_learning_rate <= self.learning_rate, "at most learning_rate")
            need("warmup_steps", self.warmup_steps <= self.steps, "at most steps")
        if problems:
            raise ConfigError(listed("training settings", problems))

    def fixed(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, as JSON has it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.FREE}


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step`, counted from 0.

    It rises linearly over the warmup and reaches its height in the step that follows it. Then "linear" and "cosine" go
    down to the floor, which the last step's successor would have; "inverse_sqrt" falls with the root of the step, not
    below the floor (https://arxiv.org/abs/1706.03762, section 5.3, with a free height).
    """
    high, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return high
    if config.schedule == "inverse_sqrt":
        return max(low, high * math.sqrt(max(warmup, 1) / max(step, 1))) if step > warmup else high
    done = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "linear":
        return low + (high - low) * (1 - done)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * done))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
