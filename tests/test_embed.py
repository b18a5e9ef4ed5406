"""Embeddings: pooled hidden states, alone and in batches, from Python, the command line and the server."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import Running, running
from test_cli import pyllm, refused

from pyllm import LLM
from pyllm.errors import ConfigError, NonFiniteError, RequestError
from pyllm.pooling import EmbeddingRule, Pool, embedding_rule
from pyllm.spec import Pooling

STORIES = Path(__file__).parents[1] / "pyllm" / "data" / "stories"
GOLDEN = Path(__file__).parent / "golden" / "qwen3"
KINDS = [kind.value for kind in Pooling]
RNG = np.random.default_rng(5)
PROMPTS: list[dict[str, Any]] = [
    {"prompt_token_ids": RNG.integers(3, 60, size).tolist()} for size in (1, 2, 40, 7, 23, 5, 64, 1, 12)
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(GOLDEN, skip_tokenizer_init=True, max_num_batched_tokens=16, max_num_seqs=4, threads=2)


def pooled(states: np.ndarray, kind: str) -> np.ndarray:
    states = states.astype(np.float64)
    return {"last": states[-1], "cls": states[0], "mean": states.mean(0), "max": states.max(0)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_pools_the_hidden_states(llm: LLM, kind: str) -> None:
    vectors = llm.embed(PROMPTS, pooling=kind)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(PROMPTS), llm.spec.hidden)
    for vector, prompt in zip(vectors, PROMPTS, strict=True):
        states = llm.forward(prompt["prompt_token_ids"], output_hidden_states=True).hidden_states
        assert states is not None
        np.testing.assert_allclose(vector, pooled(states[-1], kind), rtol=1e-6, atol=1e-7)
        [alone] = llm.embed([prompt], pooling=kind)
        assert alone.tobytes() == vector.tobytes()  # whatever runs beside it
    long = LLM(GOLDEN, skip_tokenizer_init=True, max_num_batched_tokens=256, threads=1)
    assert long.embed(PROMPTS, pooling=kind).tobytes() == vectors.tobytes()  # however it is cut
    assert llm.engine.scheduler.pool.free == llm.engine.scheduler.pool.size


def test_normalizes(llm: LLM) -> None:
    plain = llm.embed(PROMPTS, pooling="mean")
    unit = llm.embed(PROMPTS, pooling="mean", normalize=True)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-6)


def test_mixes_with_generation_and_prefixes(llm: LLM) -> None:
    """A prompt whose beginning is cached already is embedded whole."""
    ids = PROMPTS[6]["prompt_token_ids"] + PROMPTS[2]["prompt_token_ids"]
    [fresh] = llm.embed([{"prompt_token_ids": ids}], pooling="mean")
    llm.generate({"prompt_token_ids": ids}, max_tokens=2, temperature=0, detokenize=False)
    [again] = llm.embed([{"prompt_token_ids": ids}], pooling="mean")
    assert again.tobytes() == fresh.tobytes()


def test_tokens_that_come_again_count_once() -> None:
    states = RNG.standard_normal((9, 4)).astype(np.float32)
    for kind in Pooling:
        whole, pieces = Pool(kind), Pool(kind)
        whole.add(states, 0)
        for start, end in ((0, 3), (0, 5), (2, 5), (5, 9)):
            pieces.add(states[start:end], start)
        assert whole.vector().tobytes() == pieces.vector().tobytes()


def folder_with(path: Path, modules: list[dict[str, Any]], pooling: dict[str, Any], limit: int | None = None) -> Path:
    shutil.copytree(GOLDEN, path)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if limit is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    return path


def module(kind: str, path: str = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


MODULES = [module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]
LAST = {"word_embedding_dimension": 8, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}


def test_the_folder_says_how(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", MODULES, LAST, limit=50)
    assert embedding_rule(folder) == EmbeddingRule(Pooling.LAST, True, 50)
    assert embedding_rule(folder, "mean", False) == EmbeddingRule(Pooling.MEAN, False, 50)
    llm = LLM(folder, skip_tokenizer_init=True, threads=1)
    short = PROMPTS[:3]
    np.testing.assert_array_equal(llm.embed(short), llm.embed(short, pooling="last", normalize=True))
    with pytest.raises(RequestError, match=r"64 tokens.*at most 50"):
        llm.embed(PROMPTS)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([module("Transformer")], LAST, "expected a module of type Pooling"),
        ([*MODULES, module("Dense", "3_Dense")], LAST, "found Dense"),
        ([module("Pooling", "../1_Pooling")], LAST, "expected the name of a folder"),
        (MODULES, {"pooling_mode_mean_sqrt_len_tokens": True}, "found pooling_mode_mean_sqrt_len_tokens"),
        (MODULES, {**LAST, "pooling_mode_mean_tokens": True}, "found pooling_mode_lasttoken, pooling_mode_mean_tokens"),
        (MODULES, {}, "found none"),
        (MODULES, {**LAST, "include_prompt": False}, "include_prompt"),
        (["Pooling"], LAST, "expected a list of objects"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, modules: list[Any], pooling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embedding_rule(folder_with(tmp_path / "m", modules, pooling))


def test_refusals(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"no modules\.json"):
        llm.embed(PROMPTS)
    with pytest.raises(ValueError, match="expected last, cls, mean, max"):
        llm.embed(PROMPTS, pooling="sum")
    with pytest.raises(TypeError, match="expected a list of texts"):
        llm.embed("text", pooling="mean")
    with pytest.raises(RequestError, match="empty"):
        llm.embed([{"prompt_token_ids": []}], pooling="mean")
    assert llm.embed([], pooling="mean").shape == (0, llm.spec.hidden)


def test_states_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(GOLDEN, skip_tokenizer_init=True, threads=1)
    llm.model.weights.final_norm.weight[3] = np.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        llm.embed(PROMPTS[:2], pooling="max")
    assert llm.engine.idle


def test_command_line(tmp_path: Path) -> None:
    texts, how = ["Once upon a time", "the end"], ("--pooling", "mean", "--normalize")
    shown = pyllm("embed", "-m", STORIES, *texts, *how)
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    written = pyllm("embed", "-m", STORIES, "-f", tmp_path / "texts.txt", "-o", tmp_path / "x.npy", *how)
    assert written.returncode == 0 and not written.stdout
    expected = np.array([line["embedding"] for line in lines], np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), expected)
    refused(pyllm("embed", "-m", STORIES, "text"), 2, "no modules.json")
    refused(pyllm("embed", "-m", STORIES, "text", "-o", tmp_path / "x.txt", *how), 2, ".npy")
    refused(pyllm("embed", "-m", STORIES, "-", *how, stdin=b"\n \n"), 2, "no text")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LLM(STORIES, threads=2, max_num_seqs=4)) as made:
        made.service.embedding = EmbeddingRule(Pooling.MEAN, normalize=True)
        yield made


def test_openai_client(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    texts = ["Once upon a time", "the end", "a dog"]
    expected = server.llm.embed(texts, pooling="mean", normalize=True)
    answer = client.embeddings.create(model="tiny", input=texts)  # base64 underneath
    np.testing.assert_array_equal(np.array([one.embedding for one in answer.data], np.float32), expected)
    assert [one.index for one in answer.data] == [0, 1, 2]
    ids = [server.llm.encode(text) for text in texts]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    by_ids = client.embeddings.create(model="tiny", input=ids, encoding_format="float")
    np.testing.assert_array_equal(np.array([one.embedding for one in by_ids.data], np.float32), expected)
    [one] = server.post("/v1/embeddings", input=texts[0], encoding_format="base64")["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one["embedding"]), "<f4"), expected[0])
    server.assert_idle()


def test_server_refusals(server: Running) -> None:
    assert server.refusal("/v1/embeddings", 400, input=[])["param"] == "input"
    assert server.refusal("/v1/embeddings", 400, input="a", dimensions=7)["param"] == "dimensions"
    assert server.refusal("/v1/embeddings", 400, input="a", encoding_format="hex")["param"] == "encoding_format"
    assert server.refusal("/v1/embeddings", 400, input=[[99999999]])["param"] == "input"
    assert server.refusal("/v1/embeddings", 404, input="a", model="other")["code"] == "model_not_found"
    rule, server.service.embedding = server.service.embedding, None
    try:
        assert "--pooling" in server.refusal("/v1/embeddings", 400, input="a")["message"]
    finally:
        server.service.embedding = rule
