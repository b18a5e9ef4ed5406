"""What a run begins with: the spec of its model, and weights that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyllm.errors import CheckpointError
from pyllm.folder import read_config
from pyllm.models import family_of, open_checkpoint
from pyllm.spec import HeadKind, ModelSpec
from pyllm.train.parameters import Parameters, load_values


def spec_to_train(config: Mapping[str, Any], folder: Path | None) -> ModelSpec:
    """The spec of the config.json `config`, for weights in `folder` (None: for new ones).

    A head that differs from the embedding is one of its own, even if config.json says otherwise, as that of some T5
    v1.1 does.
    """
    spec = family_of(config).read(config)
    if folder is None or not spec.head.tied or spec.head.kind is HeadKind.NONE:
        return spec
    with open_checkpoint(folder) as checkpoint:
        return spec if checkpoint.spec.head.tied else spec.untied()


def config_and_weights(model: Path | dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The content of the config.json of a model, and the folder of its weights, if there is one."""
    return (model, None) if isinstance(model, dict) else (read_config(model), model)


def load_weights(parameters: Parameters, folder: Path) -> None:
    """Give all slots the values in `folder`; raises `CheckpointError` where they are quantized."""
    with open_checkpoint(folder) as checkpoint:
        if checkpoint.quantized:
            raise CheckpointError(f"{folder}: the weights are quantized: train the model that they were made of")
        load_values(parameters, checkpoint.tensors)
