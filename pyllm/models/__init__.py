"""The families that pyllm knows, by the `model_type` of their config.json. To add one, write its file and list it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError, shown
from pyllm.models.bart import BART, MBART
from pyllm.models.bert import BERT
from pyllm.models.bloom import BLOOM
from pyllm.models.chatglm import CHATGLM
from pyllm.models.chatglm2 import CHATGLM2
from pyllm.models.cohere import COHERE
from pyllm.models.distilbert import DISTILBERT
from pyllm.models.electra import ELECTRA
from pyllm.models.family import Family
from pyllm.models.gemma2 import GEMMA2
from pyllm.models.gemma3 import GEMMA3_TEXT
from pyllm.models.glm import GLM
from pyllm.models.glm4 import GLM4
from pyllm.models.glm2021 import GLM2021
from pyllm.models.gpt2 import GPT2
from pyllm.models.gpt_neox import GPT_NEOX
from pyllm.models.gptj import GPTJ
from pyllm.models.llama import LLAMA
from pyllm.models.mistral import MISTRAL
from pyllm.models.mpt import MPT
from pyllm.models.openai_gpt import OPENAI_GPT
from pyllm.models.opt import OPT
from pyllm.models.phi3 import PHI3
from pyllm.models.quantization import KEY, read_quantization
from pyllm.models.qwen2 import QWEN2
from pyllm.models.qwen3 import QWEN3
from pyllm.models.roberta import ROBERTA, XLM_ROBERTA
from pyllm.models.t5 import MT5, T5
from pyllm.spec import ModelSpec
from pyllm.weights import Checkpoint, load, read_config

__all__ = ["FAMILIES", "Family", "family_of", "open_checkpoint", "read_spec"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        BART,
        BERT,
        BLOOM,
        DISTILBERT,
        ELECTRA,
        CHATGLM2,
        COHERE,
        GEMMA2,
        GEMMA3_TEXT,
        GLM,
        GLM4,
        GPT2,
        GPT_NEOX,
        GPTJ,
        LLAMA,
        MBART,
        MISTRAL,
        MPT,
        MT5,
        OPENAI_GPT,
        OPT,
        PHI3,
        QWEN2,
        QWEN3,
        ROBERTA,
        T5,
        XLM_ROBERTA,
    )
}
NAMESAKES = (CHATGLM, GLM2021)  # of others in FAMILIES


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config names; raises `ConfigError` for one that is not supported."""
    name = config.get("model_type")
    for family in NAMESAKES:
        if name == family.model_type and config.get(family.key or "") is not None:
            return family
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = get_close_matches(name, FAMILIES, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"config.json: model_type: expected one of {', '.join(FAMILIES)}, found {shown(name)}{hint}")


def read_spec(folder: Path) -> ModelSpec:
    """What the config.json in `folder` describes; raises `ConfigError`. No weights are opened."""
    config = read_config(folder)
    return family_of(config).read(_unquantized(config))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Config and weights of `folder`, checked against each other; raises `ConfigError` or `CheckpointError`."""
    config = read_config(folder)
    family = family_of(config)
    return load(folder, family.read(_unquantized(config)), family.names, read_quantization(config))


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model that was quantized: what families read."""
    return {name: value for name, value in config.items() if name != KEY}
