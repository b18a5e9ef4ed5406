"""First weights of a model, as its family was published."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.errors import ConfigError, shown
from pyllm.spec import ModelSpec, is_matrix
from pyllm.train.parameters import Parameters

# Families whose projections into the residual stream begin smaller, by the root of their number: GPT-2 (Radford et al.
# 2019, section 2.3).
SCALED_RESIDUALS = {"gpt2"}
# Families whose matrices begin with a variance of 1 / inputs, and queries with one smaller by the size of a head, as
# their attention scores are not scaled: T5 (Raffel et al. 2020; its code is built on Mesh TensorFlow).
BY_INPUTS = {"t5", "mt5"}
DEVIATION = 0.02


def initialise(parameters: Parameters, config: Mapping[str, Any], seed: int) -> None:
    """Draw matrices and embeddings from N(0, initializer_range), or by their inputs; norms are 1, biases 0."""
    spec: ModelSpec = parameters.spec
    by_inputs = spec.family in BY_INPUTS
    names = ("initializer_factor",) if by_inputs else ("initializer_range", "init_std")
    name = next((name for name in names if name in config), names[0])
    deviation = config.get(name, 1.0 if by_inputs else DEVIATION)
    if isinstance(deviation, bool) or not isinstance(deviation, (int, float)) or not 0 < deviation < 10:
        raise ConfigError(f"config.json: {name}: expected a number above 0, found {shown(deviation)}")
    residual = deviation / (2 * len(spec.blocks)) ** 0.5 if spec.family in SCALED_RESIDUALS else deviation
    generator = np.random.Generator(np.random.PCG64(seed))
    largest = max(prod(shape) for shape in spec.slots().values())
    memory = _cpu.allocate(4 * largest).view(np.float32)  # goes back to the system as a whole

    def values(slot: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if not is_matrix(slot, shape):
            return np.full(shape, 0 if slot.endswith(".bias") else 1, np.float32)
        drawn: NDArray[np.float32] = memory[: prod(shape)].reshape(shape)
        generator.standard_normal(shape, np.float32, out=drawn)
        if by_inputs:
            drawn *= np.float32(deviation * _by_inputs(spec, slot, shape))
        else:
            drawn *= np.float32(residual if slot.endswith((".attn.o.weight", ".mlp.down.weight")) else deviation)
        return drawn

    parameters.fill(values)


def _by_inputs(spec: ModelSpec, slot: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a matrix [out, in] and of tables, whose rows are looked up or added to scores."""
    if slot == "embed.weight":
        return 1.0
    inputs = spec.hidden if slot.endswith("relative_bias.weight") else shape[1]
    head = spec.blocks[0].attention.head_dim if slot.endswith((".attn.q.weight", ".cross.q.weight")) else 1
    return float((inputs * head) ** -0.5)
