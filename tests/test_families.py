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
from pyllm.errors import RequestError

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


def check(folder: Path, expected: Any, ngram: int) -> None:
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, threads=2)
    prompt = expected.ids.tolist() if expected.source is None else expected.source.tolist()
    types = None if expected.types is None else expected.types.tolist()
    output = llm.forward(
        expected.ids.tolist(),
        source_token_ids=None if expected.source is None else prompt,
        output_hidden_states=True,
        token_type_ids=types,
    )
    if llm.spec.projects_to_head:
        output.hidden_states.pop()  # the last one, which transformers projects already
    assert len(output.hidden_states) == len(expected.hidden_states)
    for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(found, wanted)
    if expected.encoder_states is not None:
        for found, wanted in zip(output.encoder_hidden_states, expected.encoder_states, strict=True):
            close(found, wanted)
    close(output.logits, expected.logits)
    if llm.spec.is_encoder:
        return
    params = SamplingParams(temperature=0, max_tokens=goldens.NEW_TOKENS, ignore_eos=True, no_repeat_ngram_size=ngram)
    result = llm.generate([{"prompt_token_ids": prompt}], params)
    assert list(result[0].outputs[0].token_ids) == expected.greedy_ids.tolist()


@pytest.mark.parametrize("name", goldens.variants())
def test_golden(name: str) -> None:
    check(GOLDEN / name, goldens.read_expected(GOLDEN / name), goldens.variants()[name].ngram)


def require_oracle() -> None:
    if not os.environ.get("PYLLM_REQUIRE_ORACLE"):
        pytest.importorskip("torch", reason="the live comparison needs the oracle extra: torch")
        pytest.importorskip("transformers", reason="the live comparison needs the oracle extra: transformers")


@pytest.mark.parametrize("name", goldens.variants())
def test_live(name: str, tmp_path: Path) -> None:
    require_oracle()
    check(tmp_path, goldens.build(name, tmp_path), goldens.variants()[name].ngram)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gptj", "bart", "t5"])
def test_attention_weights(name: str) -> None:
    """Both directions, groups of heads, a window, rotated keys, and sources."""
    require_oracle()
    import torch
    import transformers

    expected = goldens.read_expected(GOLDEN / name)
    kind = "AutoModelForCausalLM" if expected.source is None else "AutoModelForSeq2SeqLM"
    model = getattr(transformers, goldens.variants()[name].architecture or kind).from_pretrained(
        GOLDEN / name, attn_implementation="eager"
    )
    ids, given, source = torch.from_numpy(expected.ids)[None], {}, None
    names = {"attentions": "attentions"}
    if expected.source is not None:
        given, source = {"decoder_input_ids": ids}, expected.source.tolist()
        ids = torch.from_numpy(expected.source)[None]
        names = {"attentions": "decoder_attentions"} | {n: n for n in ("cross_attentions", "encoder_attentions")}
    with torch.no_grad():
        theirs = model.eval()(ids, output_attentions=True, **given)
    llm = LLM(GOLDEN / name, skip_tokenizer_init=True, threads=2)
    plain = llm.forward(expected.ids.tolist(), source_token_ids=source)
    ours = llm.forward(expected.ids.tolist(), source_token_ids=source, output_attentions=True)
    assert plain.logits.tobytes() == ours.logits.tobytes()
    for name_of_ours, name_of_theirs in names.items():
        for found, wanted in zip(getattr(ours, name_of_ours), getattr(theirs, name_of_theirs), strict=True):
            close(found, wanted[0].numpy())
    assert (ours.cross_attentions is None) == (ours.encoder_attentions is None) == (source is None)
    assert ours.hidden_states is None and ours.encoder_hidden_states is None
    cut = LLM(GOLDEN / "llama", skip_tokenizer_init=True, max_num_batched_tokens=8)
    with pytest.raises(RequestError, match="expected at most 8 tokens, those of a step, got 9"):
        cut.forward(expected.ids[:9].tolist(), output_attentions=True)
