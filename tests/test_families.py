"""Every family and variant against Hugging Face transformers: committed goldens, and the live library if installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pyllm import LLM, SamplingParams

GOLDEN = Path(__file__).resolve().parent / "golden"
TOLERANCE = 2e-5


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_goldens", GOLDEN / "make_goldens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


goldens = _load_script()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within the tolerance, absolute or relative to the largest magnitude where that exceeds 1."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(found - expected).max()) <= limit


def check(folder: Path, expected: Any) -> None:
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, threads=2)
    types = None if expected.types is None else expected.types.tolist()
    output = llm.forward(expected.ids.tolist(), output_hidden_states=True, token_type_ids=types)
    if llm.spec.projects_to_head:
        output.hidden_states.pop()  # the last one, which transformers projects already
    assert len(output.hidden_states) == len(expected.hidden_states)
    for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(found, wanted)
    close(output.logits, expected.logits)
    if llm.spec.is_encoder:
        return
    params = SamplingParams(temperature=0, max_tokens=goldens.NEW_TOKENS, ignore_eos=True)
    result = llm.generate([{"prompt_token_ids": expected.ids.tolist()}], params)
    assert list(result[0].outputs[0].token_ids) == expected.greedy_ids.tolist()


@pytest.mark.parametrize("name", goldens.variants())
def test_golden(name: str) -> None:
    check(GOLDEN / name, goldens.read_expected(GOLDEN / name))


@pytest.mark.parametrize("name", goldens.variants())
def test_live(name: str, tmp_path: Path) -> None:
    if not os.environ.get("PYLLM_REQUIRE_ORACLE"):
        pytest.importorskip("torch", reason="the live comparison needs the oracle extra: torch")
        pytest.importorskip("transformers", reason="the live comparison needs the oracle extra: transformers")
    check(tmp_path, goldens.build(name, tmp_path))
