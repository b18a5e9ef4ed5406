"""Settings of a run and the schedules they describe."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyllm.errors import ConfigError
from pyllm.train import TrainConfig, learning_rate


def config(**values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"out": Path("run"), "steps": 100, "learning_rate": 1.0, "min_learning_rate": 0.1}
    return TrainConfig(**{**defaults, **values})


def rates(**values: Any) -> list[float]:
    settings = config(**values)
    return [learning_rate(settings, step) for step in range(settings.steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_the_rate_rises_to_its_height_and_stays_above_the_floor(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_steps=9)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(0.1 <= rate <= 1 for rate in found)
    assert all(a >= b for a, b in pairwise(found[9:]))


def test_the_schedules_are_their_formulas() -> None:
    assert rates(schedule="constant") == [1.0] * 101
    assert rates(schedule="linear") == pytest.approx([1 - 0.9 * i / 100 for i in range(101)])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert rates(schedule="cosine") == pytest.approx(cosine)
    root = rates(schedule="inverse_sqrt", warmup_steps=4, min_learning_rate=0.25)
    assert root[16] == pytest.approx(0.5)
    assert root[80] == 0.25


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config(steps=0, beta1=1.0, schedule="cubic", learning_rate=float("nan"), threads=0, dtype="float16", keep=True)
    text = str(error.value)
    for name in ("steps", "beta1", "schedule", "learning_rate", "threads", "dtype", "keep"):
        assert f"{name}: expected" in text
    with pytest.raises(ConfigError, match="min_learning_rate: expected at most learning_rate"):
        config(min_learning_rate=2.0)
    with pytest.raises(ConfigError, match="warmup_steps: expected at most steps"):
        config(warmup_steps=101)


def test_what_is_fixed_leaves_out_what_does_not_touch_the_computation() -> None:
    first, second = config(threads=1, keep=5, out=Path("a")), config(threads=2, save_every=3, out=Path("b"))
    assert first.fixed() == second.fixed()
    assert first.fixed() != config(seed=1).fixed()
