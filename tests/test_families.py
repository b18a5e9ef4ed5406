"""Every family and variant against Hugging Face transformers: committed goldens, and the live library if installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pyllm import LLM, SamplingParams, plan
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


@pytest.mark.oracle
@pytest.mark.parametrize("name", goldens.variants())
def test_live(name: str, tmp_path: Path) -> None:
    check(tmp_path, goldens.build(name, tmp_path), goldens.variants()[name].ngram)


GENERATING = [name for name, variant in goldens.variants().items() if variant.architecture is None]


def prompts_of(llm: LLM, lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    """Prompts, or sources, of these lengths; with a blank where the model fills one."""
    rule, rng = llm.spec.prefix, np.random.default_rng(5)
    prompts = [rng.integers(3, 59, length).tolist() for length in lengths]
    for prompt in prompts if rule is not None and rule.start_id is not None else ():
        prompt[-2:] = [rule.mask_ids[0][0], rule.start_id]
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@pytest.mark.parametrize("name", GENERATING)
def test_every_family_keeps_the_promises(name: str) -> None:
    """Quantized or not: a sequence is the same alone, streamed, and beside others in a cache that is too small for all;
    and the memory taken is what was planned."""
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2)
    for kept in ({}, {"quantization": "int8"}, {"quantization": "int4", "kv_cache_dtype": "int8"}):
        options: dict[str, Any] = {"dtype": "float32", **kept}
        planned = plan(GOLDEN / name, **options)
        options |= {"skip_tokenizer_init": True, "threads": 2}
        llm = LLM(GOLDEN / name, **options)
        assert planned.weights == llm.model.weights.nbytes
        prompts = prompts_of(llm, (62, 60, 40, 3))
        alone = [llm.generate(prompt, params)[0].outputs for prompt in prompts]
        streamed = [[token for piece in llm.stream(p, params) for token in piece.token_ids] for p in prompts]
        assert streamed == [list(output.token_ids) for [output] in alone]
        block = (planned.cache + planned.cross) // planned.cache_blocks
        tight = LLM(GOLDEN / name, max_num_seqs=3, max_num_batched_tokens=29, kv_cache_bytes=3 * block, **options)
        assert [result.outputs for result in tight.generate(prompts, params)] == alone
        assert tight.stats.preemptions > 0 or llm.spec.encoder is not None


def oracle_of(name: str, folder: Path) -> Any:
    """A random model of a variant in `folder`, and transformers' own of it."""
    variant = goldens.variants()[name]
    model = goldens.random_model(variant, 1)
    goldens.save_model(model, folder, variant.rewrite)
    return model


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name in GENERATING if name not in ("chatglm", "glm2021")])
def test_beams_of_every_family(name: str, tmp_path: Path) -> None:
    import torch

    model = oracle_of(name, tmp_path)
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, threads=2, max_num_seqs=4)
    for prompt in prompts_of(llm, (30, 7)):
        tokens = torch.tensor([prompt["prompt_token_ids"]])
        with torch.no_grad():
            expected = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=3, num_return_sequences=3,
                max_new_tokens=12, no_repeat_ngram_size=3, eos_token_id=[2, 5, 9], pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        params = SamplingParams(
            temperature=0, num_beams=3, n=3, max_tokens=12, no_repeat_ngram_size=3, stop_token_ids=[2, 5, 9]
        )
        [result] = llm.generate(prompt, params)
        start = 1 if model.config.is_encoder_decoder else len(tokens[0])
        for output, ids, score in zip(result.outputs, expected.sequences, expected.sequences_scores, strict=True):
            assert list(output.token_ids) == ids[start : start + len(output.token_ids)].tolist()
            assert output.score == pytest.approx(float(score), abs=1e-4)


PADDED = (3, 17, 9)  # lengths of texts that transformers pads to one


def padded(texts: list[list[int]], pad: int, left: bool) -> tuple[Any, Any]:
    """Tokens and mask, int64 [texts, longest]."""
    import torch

    tokens = torch.full((len(texts), max(map(len, texts))), pad)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        place = slice(tokens.shape[1] - len(text), None) if left else slice(len(text))
        tokens[row, place], mask[row, place] = torch.tensor(text), 1
    return tokens, mask


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "left"),
    [("bert", False), ("distilbert", False), ("electra-generator", False), ("roberta", False), ("roberta", True)],
)
def test_encoders_are_those_of_a_padded_batch(name: str, left: bool, tmp_path: Path) -> None:
    """Padding is seen by nobody, and RoBERTa counts no position for it."""
    import torch

    model = oracle_of(name, tmp_path)
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, threads=2)
    texts = [prompt["prompt_token_ids"] for prompt in prompts_of(llm, PADDED)]
    tokens, mask = padded(texts, model.config.pad_token_id, left)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
    for text, row, marks in zip(texts, expected, mask, strict=True):
        close(llm.forward(text).logits, row[marks == 1].numpy())


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["bart", "bloom-normed", "gpt2", "llama", "mpt", "openai-gpt", "opt", "t5"])
def test_generation_is_that_of_a_padded_batch(name: str, tmp_path: Path) -> None:
    """Transformers pads prompts on the left, and sources on the right; positions and biases count the text alone."""
    import torch

    model = oracle_of(name, tmp_path)
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, threads=2)
    encodes = llm.spec.encoder is not None
    prompts = prompts_of(llm, PADDED)
    tokens, mask = padded([prompt["prompt_token_ids"] for prompt in prompts], 0, left=not encodes)
    with torch.no_grad():
        expected = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
    found = llm.generate(prompts, temperature=0, max_tokens=12, ignore_eos=True)
    for result, ids in zip(found, expected[:, 1 if encodes else tokens.shape[1] :].tolist(), strict=True):
        assert list(result.outputs[0].token_ids) == ids


@pytest.mark.oracle
def test_both_heads_that_bert_was_trained_with(tmp_path: Path) -> None:
    """A checkpoint holds them; the class in its config says which is read."""
    import torch

    variant = replace(goldens.variants()["bert"], architecture="BertForPreTraining")
    model = goldens.random_model(variant, 0)
    ids, types = [2, 9, 30, 3, 41, 7, 3], [0, 0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    wanted = {
        "BertForPreTraining": expected.prediction_logits[0],
        "BertForNextSentencePrediction": expected.seq_relationship_logits,
    }
    goldens.save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architecture, logits in wanted.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        found = LLM(tmp_path, skip_tokenizer_init=True, threads=2).forward(ids, token_type_ids=types).logits
        assert found is not None
        close(found, logits.numpy())


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gptj", "bart", "t5"])
def test_attention_weights(name: str) -> None:
    """Both directions, groups of heads, a window, rotated keys, and sources."""
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
