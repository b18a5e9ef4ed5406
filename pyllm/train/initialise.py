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
DEVIATION = 0.02


def initialise(parameters: Parameters, config: Mapping[str, Any], seed: int) -> None:
    """Draw matrices and embeddings from N(0, initializer_range); norms are 1, biases 0."""
    deviation = config.get("initializer_range", DEVIATION)
    if isinstance(deviation, bool) or not isinstance(deviation, (int, float)) or not 0 < deviation < 10:
        raise ConfigError(f"config.json: initializer_range: expected a number above 0, found {shown(deviation)}")
    spec: ModelSpec = parameters.spec
    residual = deviation / (2 * len(spec.blocks)) ** 0.5 if spec.family in SCALED_RESIDUALS else deviation
    generator = np.random.Generator(np.random.PCG64(seed))
    largest = max(prod(shape) for shape in spec.slots().values())
    memory = _cpu.allocate(4 * largest).view(np.float32)  # goes back to the system as a whole

    def values(slot: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if not is_matrix(slot, shape):
            return np.full(shape, 0 if slot.endswith(".bias") else 1, np.float32)
        drawn: NDArray[np.float32] = memory[: prod(shape)].reshape(shape)
        generator.standard_normal(shape, np.float32, out=drawn)
        drawn *= np.float32(residual if slot.endswith((".attn.o.weight", ".mlp.down.weight")) else deviation)
        return drawn

    parameters.fill(values)
