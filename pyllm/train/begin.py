"""What a run begins with: the spec of its model, and weights that are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyllm.errors import CheckpointError, ConfigError, shown
from pyllm.folder import read_config
from pyllm.models import family_of, open_checkpoint
from pyllm.models.quantization import read_quantization
from pyllm.spec import HeadKind, ModelSpec
from pyllm.train.labelled import LabelSet
from pyllm.train.parameters import Parameters, load_values
from pyllm.weights import Checkpoint, load


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
        _refuse_quantized(folder, checkpoint)
        load_values(parameters, checkpoint.tensors)


def load_body(parameters: Parameters, folder: Path) -> None:
    """Give slots the values in `folder`, whose model has another head or none: all but those of the head's matrix, and
    those of the layer before it where they are there, as BERT's pooler is."""
    config = read_config(folder)
    names, quantization = family_of(config).names, read_quantization(config)
    with load(folder, parameters.spec, names, quantization, new_head=True) as checkpoint:
        _refuse_quantized(folder, checkpoint)
        for slot, values in checkpoint.tensors.items():
            parameters.set(slot, values)


def classifier_config(config: Mapping[str, Any], labels: LabelSet) -> dict[str, Any]:
    """The config.json of an encoder's class for these labels, from that of its other class; raises `ConfigError`."""
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and len(classes) == 1 and isinstance(classes[0], str) else ""
    kept = {key: value for key, value in config.items() if key not in ("num_labels", "_num_labels")}
    changed = {
        **kept,
        "architectures": [re.sub(r"(Model|For[A-Za-z]+)$", "", name) + "ForSequenceClassification"],
        "id2label": {str(i): label for i, label in enumerate(labels.names)},
        "label2id": {label: i for i, label in enumerate(labels.names)},
        "problem_type": labels.problem.value,
    }
    if not name:
        raise ConfigError(
            "config.json: architectures: expected the name of one class, such as BertModel, from which that of the "
            f"classifier follows, found {shown(classes)}"
        )
    return changed


def _refuse_quantized(folder: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.quantized:
        raise CheckpointError(f"{folder}: the weights are quantized: train the model that they were made of")
