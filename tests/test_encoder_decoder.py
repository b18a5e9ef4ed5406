"""Encoder-decoders: sources in the engine, beams, scores, generation defaults, plans and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle.transformer import forward
from serving import running
from test_cli import pyllm
from tokenizer_fixtures import CONTROL_PIECES, sentencepiece_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pyllm import LLM, SamplingParams
from pyllm.convert import convert
from pyllm.convert.calibration import mean_squares
from pyllm.errors import ConfigError, RequestError
from pyllm.generation_config import GenerationConfig
from pyllm.models import open_checkpoint, read_spec
from pyllm.planning import plan
from pyllm.server.limits import Limits
from pyllm.structured import StructuredOutputs

GOLDEN = Path(__file__).resolve().parent / "golden"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
NAMES = ["bart", "mbart", "mt5", "t5", "t5-gated"]


def sources(count: int, seed: int = 0, longest: int = 70) -> list[dict[str, Any]]:
    """Prompts of random ids, of lengths around that of a block among others."""
    rng = np.random.default_rng(seed)
    lengths = [1, 63, 64, 65, *rng.integers(2, longest, count)][:count]
    return [{"prompt_token_ids": rng.integers(3, 67, n).tolist()} for n in lengths]


def load(name: str | Path, **options: Any) -> LLM:
    return LLM(GOLDEN / name, skip_tokenizer_init=True, threads=2, **{"dtype": "float32", **options})


def ids(llm: LLM, prompts: list[dict[str, Any]], params: Any = GREEDY) -> list[list[int]]:
    return [list(output.token_ids) for result in llm.generate(prompts, params) for output in result.outputs]


def is_free(llm: LLM) -> bool:
    scheduler = llm.engine.scheduler
    assert scheduler.source_pool is not None
    scheduler.source_pool.check()
    return scheduler.pool.free == scheduler.pool.size and scheduler.source_pool.free == scheduler.source_pool.size


def changed(name: str, folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A golden model with another config, and a generation_config.json."""
    shutil.copytree(GOLDEN / name, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("name", ["bart", "t5-gated"])
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4"},
                                     {"kv_cache_dtype": "int8"}])  # fmt: skip
def test_together_is_as_alone_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    prompts = sources(7)
    params = SamplingParams(temperature=0.9, max_tokens=12, seed=3, ignore_eos=True, logprobs=0)

    def run(llm: LLM, prompts: list[dict[str, Any]]) -> list[Any]:
        return [(o.token_ids, o.cumulative_logprob) for r in llm.generate(prompts, params) for o in r.outputs]

    together = load(name, **options)
    found = run(together, prompts)
    alone = load(name, max_num_batched_tokens=16, max_num_seqs=1, **options)
    assert [pair for prompt in prompts for pair in run(alone, [prompt])] == found
    assert is_free(together) and is_free(alone)


def test_threads_and_graphs_change_no_bit() -> None:
    prompts = sources(5)
    reference = load("bart")
    expected = ids(reference, prompts)
    eager = load("bart")
    eager.engine.use_graphs = False
    assert ids(eager, prompts) == expected
    one = LLM(GOLDEN / "bart", skip_tokenizer_init=True, threads=1, dtype="float32")
    assert ids(one, prompts) == expected


def test_completions_of_a_request_share_its_source() -> None:
    llm = load("bart")
    [prompt] = sources(2)[1:]
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    request = llm.engine.add(None, prompt["prompt_token_ids"], params, 5)
    llm.engine.step()
    pool = llm.engine.scheduler.source_pool
    assert pool is not None and pool.size - pool.free == 1
    while not request.finished:
        llm.engine.step()
    assert len({tuple(c.output.token_ids) for c in request.completions}) > 1
    assert is_free(llm)


def test_equal_targets_of_different_sources_share_no_blocks() -> None:
    llm = load("t5")
    target = list(range(3, 67)) + list(range(3, 60))
    prompts = [{**prompt, "target_token_ids": target} for prompt in sources(3)]
    first = [ids(llm, [prompt]) for prompt in prompts]
    again = llm.generate(prompts, GREEDY)
    assert [[list(r.outputs[0].token_ids)] for r in again] == first
    assert all(r.cached_tokens > 0 for r in again)  # each found its own


def test_put_back_and_computed_again_to_the_same_bits() -> None:
    prompts = sources(6, longest=40)
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    expected = ids(load("bart"), prompts, params)
    block = plan(GOLDEN / "bart", dtype="float32")
    small = load("bart", kv_cache_bytes=5 * (block.cache + block.cross) // block.cache_blocks)
    assert ids(small, prompts, params) == expected
    assert small.stats.preemptions > 0
    assert is_free(small)


def test_an_aborted_stream_leaves_nothing() -> None:
    llm = load("t5")
    stream = llm.stream(sources(1)[0], GREEDY)
    pieces = [next(stream).token_ids for _ in range(3)]
    stream.close()
    assert is_free(llm)
    assert [token for piece in pieces for token in piece] == ids(llm, sources(1))[0][:3]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_scores_are_those_of_the_oracle(name: str) -> None:
    source, target = sources(2)[1]["prompt_token_ids"], [5, 9, 2, 40, 41, 66]
    [score] = load(name).score([{"prompt_token_ids": source, "target_token_ids": target}])
    with open_checkpoint(GOLDEN / name) as model:
        start = model.spec.decoder_start_token_id
        logits, _ = forward(model.spec, model.tensors, np.array([start, *target]), source=np.array(source))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert score.token_ids == target
    assert np.allclose(score.logprobs, logprobs[np.arange(len(target)), target], atol=2e-5)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bart", {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 20, "no_repeat_ngram_size": 3}),
    ("mbart", {"num_beams": 3, "max_new_tokens": 12, "forced_bos_token_id": 7, "forced_eos_token_id": 2,
               "length_penalty": 2.0, "early_stopping": True}),
    ("t5", {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 16, "no_repeat_ngram_size": 2}),
    ("t5-gated", {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 18, "repetition_penalty": 1.4,
                  "min_new_tokens": 4}),
]  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "options"), CASES)
def test_beams_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        GOLDEN / name, attn_implementation="eager", dtype=torch.float32
    ).train(False)
    llm = load(name, max_num_seqs=8)
    ends = [1, 2, 5, 9]
    for seed in range(3):
        [prompt] = sources(5, seed)[4:]
        tokens = torch.tensor([prompt["prompt_token_ids"]])
        with torch.no_grad():
            expected = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        renamed = {"num_return_sequences": "n", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
        params = SamplingParams(
            temperature=0, stop_token_ids=ends, ignore_eos=False, **{renamed.get(k, k): v for k, v in options.items()}
        )
        [result] = llm.generate(prompt, params)
        found = [list(output.token_ids) for output in result.outputs]
        wanted = [row[1:].tolist() for row in expected.sequences]
        assert found == [row[: len(one)] for row, one in zip(wanted, found, strict=True)]
        assert [o.score for o in result.outputs] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
    assert is_free(llm)


def test_the_folder_says_how_to_generate(tmp_path: Path) -> None:
    said = {"forced_bos_token_id": 11, "forced_eos_token_id": 2, "num_beams": 3, "no_repeat_ngram_size": 2,
            "max_length": 13, "length_penalty": 2.0, "decoder_start_token_id": 6}  # fmt: skip
    llm = load(changed("bart", tmp_path / "model", said))
    [result] = llm.generate(sources(1))
    output = result.outputs[0]
    assert output.token_ids[0] == 11
    assert len(output.token_ids) <= 12 and output.token_ids[-1] == 2
    assert output.score is not None
    assert llm.engine.rules.decoder_ids() == [6]
    [plain] = llm.generate(sources(1), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert plain.outputs[0].token_ids[0] == 11  # what the model says, where nothing else is asked for


def test_what_the_folder_says_is_replaced_value_by_value(tmp_path: Path) -> None:
    said = {"num_beams": 3, "max_length": 13, "min_length": 8, "length_penalty": 2.0, "no_repeat_ngram_size": 2}
    config = GenerationConfig.read(changed("bart", tmp_path / "model", said), 67)
    plain = SamplingParams(temperature=0, max_tokens=12, min_tokens=7, num_beams=3, length_penalty=2.0,
                           no_repeat_ngram_size=2)  # fmt: skip
    assert config.params() == plain
    assert config.params({"length_penalty": 1.5}) == replace(plain, length_penalty=1.5)
    assert config.params({"max_tokens": 5}) == replace(plain, max_tokens=5, min_tokens=5)
    assert config.params({"num_beams": 1}) == replace(plain, num_beams=1, length_penalty=1.0)
    grammar = StructuredOutputs(choice=["a"])
    assert config.params({"structured_outputs": grammar}).num_beams == 1
    with pytest.raises(ValueError, match=r"temperature: expected 0 where num_beams is 3.*folder says num_beams=3"):
        config.params({"temperature": 1})
    assert GenerationConfig().params() == SamplingParams(temperature=0)


def test_a_stream_follows_the_folder_too(tmp_path: Path) -> None:
    llm = load(changed("bart", tmp_path / "greedy", {"max_length": 9, "no_repeat_ngram_size": 2}))
    [result] = llm.generate(sources(1))
    streamed = [token for piece in llm.stream(sources(1)[0]) for token in piece.token_ids]
    assert streamed == list(result.outputs[0].token_ids) and len(streamed) <= 8
    with pytest.raises(ValueError, match="got 2, as the model's folder says"):
        load(changed("bart", tmp_path / "beams", {"num_beams": 2})).stream(sources(1)[0])


def test_what_a_folder_asks_for_in_vain(tmp_path: Path) -> None:
    """It is refused where it would be followed, and only there."""
    folder = changed("bart", tmp_path / "a", {"bad_words_ids": [[3]], "do_sample": True, "num_beam_groups": 1})
    llm = load(folder)
    with pytest.raises(ConfigError, match="expected none of do_sample, bad_words_ids, found"):
        llm.generate(sources(1))
    assert ids(llm, sources(1))
    llm = load(changed("bart", tmp_path / "b", {"min_length": 200}))
    with pytest.raises(ConfigError, match="min_tokens: expected at most max_tokens"):
        llm.generate(sources(1))
    assert ids(llm, sources(1))
    assert ids(load(changed("llama", tmp_path / "c", {"min_length": 200, "bad_words_ids": [[3]]})), sources(1))


def test_a_plan_names_the_cache_of_sources() -> None:
    found = plan(GOLDEN / "bart", dtype="float32", max_model_len=64, max_num_seqs=4)
    assert found.max_source == 64
    assert found.cross > 0
    assert found.total == found.weights + found.cache + found.cross + found.workspace
    llm = load("bart", max_model_len=64, max_num_seqs=4)
    cross = llm._runner.cross
    assert cross is not None and sum(layer.nbytes for layer in cross.layers) == found.cross
    assert plan(GOLDEN / "llama").cross == 0


def test_errors(tmp_path: Path) -> None:
    llm = load("bart", max_model_len=40)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate({"prompt_token_ids": []})
    with pytest.raises(RequestError, match="source has 41 tokens, more than the 40"):
        llm.generate({"prompt_token_ids": [5] * 41})
    with pytest.raises(RequestError, match="decoder token 1"):
        llm.generate({"prompt_token_ids": [5], "target_token_ids": [67]})
    with pytest.raises(RequestError, match="decoder's text has 41 tokens"):
        llm.generate({"prompt_token_ids": [5], "target_token_ids": [6] * 40})
    with pytest.raises(RequestError, match="expected tokens for the encoder"):
        llm.forward([2, 5])
    with pytest.raises(RequestError, match="pairs"):
        llm.score([{"prompt_token_ids": [5, 6]}])
    with pytest.raises(RequestError, match="perplexity"):
        llm.perplexity([5, 6])
    with pytest.raises(RequestError, match="embed"):
        llm.embed([{"prompt_token_ids": [5]}], pooling="mean")
    with pytest.raises(RequestError, match="prompt_logprobs"):
        llm.generate({"prompt_token_ids": [5]}, SamplingParams(prompt_logprobs=0))
    with pytest.raises(RequestError, match="no encoder"):
        load("llama").generate({"prompt_token_ids": [5], "target_token_ids": [6]})
    unsaid = load(changed("mbart", tmp_path / "unsaid", decoder_start_token_id=None))
    with pytest.raises(RequestError, match="decoder_start_token_id"):
        unsaid.generate({"prompt_token_ids": [5]})
    with pytest.raises(ConfigError, match="forced_bos_token_id"):
        load(changed("bart", tmp_path / "wrong", {"forced_bos_token_id": 67}))


def test_both_stacks_read_one_table_under_any_of_its_names(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    expected = ids(load("t5"), sources(2))
    for aliases in (["encoder.embed_tokens.weight"], ["shared.weight", "decoder.embed_tokens.weight"]):
        folder = changed("t5", tmp_path / aliases[0])
        tensors = load_file(folder / "model.safetensors")
        table = tensors.pop("shared.weight")
        save_file({**tensors, **{name: table.copy() for name in aliases}}, folder / "model.safetensors")
        assert ids(load(folder), sources(2)) == expected


def test_matrices_of_both_stacks_are_converted(tmp_path: Path) -> None:
    convert(GOLDEN / "t5", tmp_path / "int8", quantization="int8")
    with open_checkpoint(tmp_path / "int8") as checkpoint:
        matrices = [slot for slot, shape in checkpoint.spec.slots().items() if "blocks" in slot and len(shape) == 2]
        assert sorted(checkpoint.quantized) == sorted(matrices)
        assert any(slot.startswith("encoder.") for slot in matrices)
    assert len(ids(load(tmp_path / "int8", dtype="auto"), sources(1))[0]) == GREEDY.max_tokens
    with pytest.raises(RequestError, match="calibration"):
        mean_squares(open_checkpoint(GOLDEN / "t5"), [5, 6])


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"draft_model: expected none, for this t5 model has an encoder"):
        load("t5", draft_model=GOLDEN / "t5")
    for name, found in (("t5", "one with an encoder"), ("bert", "an encoder")):
        with pytest.raises(ConfigError, match=f"predicts tokens, got {found}"):
            load("llama", draft_model=GOLDEN / name)
    for name, more in (("t5", {"source_token_ids": [5]}), ("bert", {})):
        with pytest.raises(ValueError, match="prefix: expected False"):
            load(name, prefix=True)
        with pytest.raises(RequestError, match="prefix: expected None, got 1"):
            load(name).forward([5, 6], prefix=1, **more)


def test_ngrams_guess_and_change_nothing() -> None:
    prompts = sources(4)
    llm = load("t5", speculative="ngram")
    assert ids(llm, prompts) == ids(load("t5"), prompts)
    assert llm.stats.drafted_tokens > 0


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 with a tokenizer whose words are w0, w1, ..."""
    folder = changed("t5", tmp_path_factory.mktemp("worded") / "t5")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(67)}, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "w0", "eos_token": "w1", "unk_token": "w2"}))
    return folder


def test_text_in_text_out(worded: Path, tmp_path: Path) -> None:
    llm = LLM(worded, threads=2, dtype="float32")
    [expected] = llm.generate("w5 w9 w33", GREEDY)
    assert expected.outputs[0].token_ids == ids(load("t5"), [{"prompt_token_ids": [5, 9, 33]}])[0]
    text = expected.outputs[0].text
    assert text.split()[0] == f"w{expected.outputs[0].token_ids[0]}"
    assert "".join(piece.text for piece in llm.stream("w5 w9 w33", GREEDY)) == text
    options = ("-m", worded, "--temperature", 0, "--max-tokens", 24, "--ignore-eos", "--quiet")
    result = pyllm("generate", "w5 w9 w33", *options)
    assert result.returncode == 0, result.stderr
    assert text in result.stdout.decode()
    (worded / "generation_config.json").write_text(json.dumps({"max_length": 25, "num_beams": 3, "eos_token_id": 66}))
    result = pyllm("generate", "w5 w9 w33", "-m", worded, "--num-beams", 1, "--ignore-eos", "--json", "--quiet")
    (worded / "generation_config.json").unlink()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"] == text
    scored = pyllm("score", "w7 w8", "--prompt", "w5 w9", "-m", worded, "--json", "--quiet")
    assert scored.returncode == 0, scored.stderr
    [score] = llm.score([("w5 w9", "w7 w8")])
    assert [token["logprob"] for token in json.loads(scored.stdout)["tokens"]] == pytest.approx(score.logprobs)
    body = {"prompt": "w5 w9 w33", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    batch = pyllm("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-m", worded)
    assert batch.returncode == 0, batch.stderr
    answer = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("kind", ["mbart", "mbart50"])
def test_a_language_is_translated_into_another(kind: str, tmp_path: Path) -> None:
    """By marks: mBART's stands behind the source, and begins the decoder's text; mBART-50's before the source, and is
    the first token of the output."""
    behind, folder = kind == "mbart", changed("mbart", tmp_path / "mbart", vocab_size=67)
    words = [("\u2581", -2.0, 1), *((f"\u2581{word}", -1.0, 1) for word in ("a", "b", "c", "d"))]
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model([*CONTROL_PIECES, *words], 1))
    if not behind:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MBart50Tokenizer"}))
    llm = LLM(folder, threads=2, dtype="float32")
    assert llm.tokenizer is not None
    german, romanian = (llm.tokenizer.language_id(name) for name in ("de_DE", "ro_RO"))
    prompt = {"prompt": "a c b", "source_language": "de_DE", "target_language": "ro_RO"}
    [found] = llm.generate(prompt, GREEDY)
    source = [5, 7, 6, 2, german] if behind else [german, 5, 7, 6, 2]
    assert found.prompt_token_ids == source
    given = {"prompt_token_ids": source}
    if behind:
        (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": romanian}))
        [expected] = LLM(folder, threads=2, dtype="float32").generate(given, GREEDY)
        (folder / "generation_config.json").unlink()
    else:
        [expected] = llm.generate(given, replace(GREEDY, forced_bos_token_id=romanian))
        assert found.outputs[0].token_ids[0] == romanian
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert "".join(piece.text for piece in llm.stream(prompt, GREEDY)) == found.outputs[0].text
    options = ("--from", "de_DE", "--to", "ro_RO", "-m", folder, "--temperature", 0, "--max-tokens", 24, "--ignore-eos")
    written = pyllm("generate", "a c b", *options, "--json", "--quiet")
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["text"] == found.outputs[0].text
    with pytest.raises(RequestError, match="source_language: expected none beside token ids"):
        llm.generate({**given, "source_language": "de_DE"})
    with pytest.raises(RequestError, match="target_language: expected none, for the model has no encoder"):
        load("gpt2").generate({"prompt_token_ids": [3], "target_language": "ro_RO"})


def test_completions_of_the_server_follow_the_folder(worded: Path, tmp_path: Path) -> None:
    """Value by value, and without beams where they cannot do what is asked for."""
    folder = shutil.copytree(worded, tmp_path / "t5")
    said = {"num_beams": 3, "max_length": 25, "no_repeat_ngram_size": 2, "length_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps(said))
    llm = LLM(folder, threads=2, dtype="float32")
    prompt = "w5 w9 w33"

    def expected(**given: Any) -> str:
        return llm.generate(prompt, llm.engine.defaults.params(given))[0].outputs[0].text

    with running(llm, Limits(max_tokens=20)) as server:

        def text(**fields: Any) -> str:
            return str(server.post("/v1/completions", prompt=prompt, **fields)["choices"][0]["text"])

        assert text(max_tokens=12) == expected(max_tokens=12) != expected(max_tokens=12, num_beams=1)
        assert text() == expected(max_tokens=20)
        assert text(stop="w99") == expected(max_tokens=20, num_beams=1)
        assert text(temperature=0.5, seed=3) == expected(max_tokens=20, num_beams=1, temperature=0.5, seed=3)
        three = server.post("/v1/completions", prompt=prompt, n=3, max_tokens=12)["choices"]
        beams = llm.generate(prompt, llm.engine.defaults.params({"max_tokens": 12, "n": 3}))[0].outputs
        assert [choice["text"] for choice in three] == [output.text for output in beams]
        body = {"prompt": prompt, "stream": True, "max_tokens": 12}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            pieces = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert "".join(p["choices"][0]["text"] for p in pieces if p["choices"]) == expected(max_tokens=12, num_beams=1)
        assert "num_beams = 3" in server.refusal("/v1/completions", 400, prompt=prompt, n=4)["message"]


def test_head_of_t5() -> None:
    assert read_spec(GOLDEN / "t5").head.scale == pytest.approx(20**-0.5)
    assert read_spec(GOLDEN / "t5-gated").head.scale == 1
    assert read_spec(GOLDEN / "mt5").head.scale == 1
