"""Encoders and their tasks, against the model written out in float64: masks, labels, pairs, replaced tokens."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folder import GOLDEN, encoder_folder
from oracle.transformer import forward
from safetensors.numpy import load_file, save_file
from serving import running
from test_cli import pyllm, refused
from tokenizer_fixtures import CONTROL_PIECES, sentencepiece_model

from pyllm import LLM
from pyllm.engine.runner import HEAD_ROWS
from pyllm.errors import CheckpointError, ConfigError, NonFiniteError, RequestError, TokenizerError
from pyllm.models import open_checkpoint
from pyllm.pooling import EmbeddingRule
from pyllm.spec import Pooling
from pyllm.train.logs import read_log

RNG = np.random.default_rng(8)
TEXTS = ["the cat sat on the mat", "a dog", "the red dog ran fast and the cat sat", "hat"]


def loaded(name: str, tmp_path: Path, **changes: Any) -> LLM:
    return LLM(encoder_folder(name, tmp_path / name, **changes), threads=2, max_num_seqs=3)


def oracle(llm: LLM, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    with open_checkpoint(llm.folder) as checkpoint:
        given = None if types is None else np.array(types)
        return forward(checkpoint.spec, checkpoint.tensors, np.array(ids), types=given)[0]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def test_fill_mask(tmp_path: Path) -> None:
    llm = loaded("bert", tmp_path)
    texts = ["the [MASK] sat on the [MASK]", "a [MASK]", {"prompt_token_ids": [2, 5, 4, 3]}]
    found = llm.fill_mask(texts, top_k=3)
    assert [len(masks) for masks in found] == [2, 1, 1]
    for text, masks in zip(texts, found, strict=True):
        ids = text["prompt_token_ids"] if isinstance(text, dict) else llm.encode(text)
        places = np.flatnonzero(np.array(ids) == 4)
        expected = softmax(oracle(llm, ids)[places])
        for row, mask in zip(expected, masks, strict=True):
            best = np.argsort(-row, kind="stable")[:3]
            assert [token.token_id for token in mask] == best.tolist()
            np.testing.assert_allclose([token.probability for token in mask], row[best], atol=2e-5)
            assert llm.tokenizer is not None
            assert [token.token for token in mask] == [llm.tokenizer.token_of(int(at)) for at in best]
        assert llm.fill_mask([text], top_k=3) == [masks]  # alone as in any batch
    with pytest.raises(RequestError, match=r"expected \[MASK\] in the text, found none in 'the cat'"):
        llm.fill_mask(["the cat"])
    with pytest.raises(ValueError, match="top_k: expected 1 to the vocabulary's 67, got 0"):
        llm.fill_mask(texts, top_k=0)
    with pytest.raises(TypeError, match="expected a list of texts"):
        llm.fill_mask("a [MASK]")


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "electra-classifier"])
def test_classify(name: str, tmp_path: Path) -> None:
    names = {"0": "bad", "1": "fair", "2": "good"}
    llm = loaded(name, tmp_path, id2label=names, label2id={v: int(k) for k, v in names.items()})
    inputs = [*TEXTS, ("the cat", "sat on a mat")]
    found = llm.classify(inputs)
    for text, one in zip(inputs, found, strict=True):
        assert llm.tokenizer is not None
        pair = llm.tokenizer.encode_pair(*text) if isinstance(text, tuple) else None
        ids = llm.encode(text) if pair is None else pair.ids  # type: ignore[arg-type]
        types = pair.type_ids if pair is not None and llm.spec.embedding.types > 1 else None
        expected = softmax(oracle(llm, ids, types)[0])
        assert list(one.scores) == list(names.values())
        np.testing.assert_allclose(list(one.scores.values()), expected, atol=2e-5)
        assert (one.label, one.score) == (names[str(expected.argmax())], max(one.scores.values()))
        assert llm.classify([text]) == [one]
    assert llm.classify([]) == []
    if name == "bert-classifier":
        file = tmp_path / "given.jsonl"
        lines = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in inputs]
        file.write_text("".join(json.dumps({**line, "label": "bad"}) + "\n" for line in lines))
        written = pyllm("classify", "-m", llm.folder, "--file", file, "--dtype", "float32").stdout.splitlines()
        for line, one, answer in zip(lines, found, written, strict=True):
            assert json.loads(answer) == {**line, **asdict(one)}
        file.write_text('{"text": "a", "pair": 1}\n')
        refused(pyllm("classify", "-m", llm.folder, "--file", file), 1, "line 1: expected strings named text, and pair")


def test_next_sentences(tmp_path: Path) -> None:
    llm = loaded("bert-next", tmp_path)
    pairs = [("the cat", text) for text in TEXTS]
    assert llm.tokenizer is not None
    for pair, one in zip(pairs, llm.classify(pairs), strict=True):
        encoded = llm.tokenizer.encode_pair(*pair)
        expected = softmax(oracle(llm, encoded.ids, encoded.type_ids)[0])
        assert list(one.scores) == ["next", "random"]
        np.testing.assert_allclose(list(one.scores.values()), expected, atol=2e-5)
    with pytest.raises(RequestError, match=r"classify: expected pairs \(first, second\)"):
        llm.classify([pairs[0], "the cat"])
    with pytest.raises(RequestError, match="this one is an encoder of a class like BertForNextSentencePrediction"):
        llm.fill_mask(["a [MASK]"])
    refused(pyllm("classify", "-m", llm.folder, "the cat"), 1, "classify: expected pairs")


def test_several_labels_and_values(tmp_path: Path) -> None:
    several = loaded("bert-classifier", tmp_path, problem_type="multi_label_classification")
    values = loaded("distilbert-classifier", tmp_path, problem_type="regression")
    for llm, of in ((several, lambda x: 1 / (1 + np.exp(-x))), (values, lambda x: x)):
        for text, one in zip(TEXTS, llm.classify(TEXTS), strict=True):
            np.testing.assert_allclose(list(one.scores.values()), of(oracle(llm, llm.encode(text))[0]), atol=2e-5)


def test_score_pairs(tmp_path: Path) -> None:
    folder = encoder_folder("bert-classifier", tmp_path / "one", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    shrink(folder)
    llm = LLM(folder, threads=1)
    pairs = [("the cat", text) for text in TEXTS]
    assert llm.tokenizer is not None
    for pair, score in zip(pairs, llm.score_pairs(pairs), strict=True):
        encoded = llm.tokenizer.encode_pair(*pair)
        assert score == pytest.approx(oracle(llm, encoded.ids, encoded.type_ids)[0, 0], abs=2e-5)
    with pytest.raises(RequestError, match="expected a model with one label, this one has 3"):
        loaded("bert-classifier", tmp_path).score_pairs(pairs)


def shrink(folder: Path) -> None:
    """Keep the first label of a classifier only."""
    tensors = load_file(folder / "model.safetensors")
    for part in ("weight", "bias"):
        tensors[f"classifier.{part}"] = tensors[f"classifier.{part}"][:1].copy()
    save_file(tensors, folder / "model.safetensors")


def test_detect_replaced(tmp_path: Path) -> None:
    llm = loaded("electra-discriminator", tmp_path)
    for text, tokens in zip(TEXTS, llm.detect_replaced(TEXTS), strict=True):
        ids = llm.encode(text)
        assert [token.token_id for token in tokens] == ids
        expected = 1 / (1 + np.exp(-oracle(llm, ids)[:, 0]))
        np.testing.assert_allclose([token.probability for token in tokens], expected, atol=2e-5)


NAMES_OF_LABELS = {"0": "O", "1": "B-X", "2": "I-X"}
LABELLED = {"id2label": NAMES_OF_LABELS, "label2id": {name: int(at) for at, name in NAMES_OF_LABELS.items()}}


@pytest.mark.parametrize("name", ["bert-labels", "electra-labels"])
def test_label_tokens(name: str, tmp_path: Path) -> None:
    llm = loaded(name, tmp_path, **LABELLED)
    texts = [*TEXTS, " Cat,  the\tmat", ""]
    found = llm.label_tokens(texts)
    for text, tokens in zip(texts, found, strict=True):
        ids = llm.encode(text)
        expected = softmax(oracle(llm, ids))[1:-1]  # the special tokens are at the ends
        assert [token.token_id for token in tokens] == ids[1:-1]
        assert [token.label for token in tokens] == [NAMES_OF_LABELS[str(best)] for best in expected.argmax(-1)]
        np.testing.assert_allclose([token.score for token in tokens], expected.max(-1), atol=2e-5)
        for token in tokens:
            assert token.token is not None
            assert token.token.removeprefix("##") in ("[UNK]", text[token.start : token.end].lower())
        assert llm.label_tokens([text]) == [tokens]  # alone as in any batch
    ids = llm.encode(TEXTS[0])
    [given] = llm.label_tokens([{"prompt_token_ids": ids}])
    assert [token.token_id for token in given] == ids
    assert [token.label for token in given[1:-1]] == [token.label for token in found[0]]
    assert {(token.start, token.end) for token in given} == {(None, None)}
    with pytest.raises(RequestError, match=r"detect_replaced: .* ForPreTraining of ELECTRA .* like ForTokenClass"):
        llm.detect_replaced(TEXTS)
    with pytest.raises(TypeError, match="token ids have no characters"):
        llm.find_entities([{"prompt_token_ids": ids}])  # type: ignore[list-item]


def test_labels_without_places(tmp_path: Path) -> None:
    """A SentencePiece model does not say which characters a token stands for."""
    folder = encoder_folder("roberta-labels", tmp_path / "m", model_type="xlm-roberta", **LABELLED)
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["XLMRobertaForTokenClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    words = [("\u2581", -2.0, 1), *((f"\u2581{word}", -1.0, 1) for word in ("a", "b"))]
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model([*CONTROL_PIECES, *words], 1))
    llm = LLM(folder, threads=1)
    [tokens] = llm.label_tokens(["b a"])
    assert [(token.token_id, token.start, token.end) for token in tokens] == [(6, None, None), (5, None, None)]
    with pytest.raises(TokenizerError, match="find_entities: expected a tokenizer that says which characters"):
        llm.find_entities(["b a"])


@pytest.mark.oracle
@pytest.mark.parametrize("names", [["O", "B-X", "I-X"], ["B-X", "I-X", "I-Y"], ["N", "B-", "O"]])
def test_entities_are_those_of_transformers(names: list[str], tmp_path: Path) -> None:
    import transformers

    ids = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    folder = encoder_folder("bert-labels", tmp_path / "m", **ids)
    texts = [*TEXTS, "The Red, dog", "a b c d e f g h i j k l m n o p"]
    pipeline = transformers.pipeline(
        "token-classification",
        model=transformers.BertForTokenClassification.from_pretrained(folder),
        tokenizer=transformers.BertTokenizer.from_pretrained(folder),
        aggregation_strategy="simple",
        ignore_labels=["O"],
    )
    for text, found in zip(texts, LLM(folder, threads=1).find_entities(texts), strict=True):
        expected = [(one["entity_group"], one["start"], one["end"], one["score"]) for one in pipeline(text)]
        assert [(one.label, one.start, one.end) for one in found] == [one[:3] for one in expected]
        np.testing.assert_allclose([one.score for one in found], [one[3] for one in expected], atol=2e-5)
        assert [one.text for one in found] == [text[one.start : one.end] for one in found]


def test_many_rows_go_through_the_head_a_few_at_a_time(tmp_path: Path) -> None:
    llm = loaded("bert", tmp_path)
    texts = ["[MASK] " * count for count in (1, 40, 31, 2, 20)]  # 94 rows, in pieces of HEAD_ROWS
    seen, head = [], llm.model.head

    def watched(ops: Any, x: Any, out: Any = None) -> Any:
        seen.append(len(x))
        return head(ops, x, out=out)

    llm.model.head = watched  # type: ignore[method-assign]
    found = llm.fill_mask(texts, top_k=2)
    assert [rows for rows in seen if rows] == [HEAD_ROWS, 94 - HEAD_ROWS]
    assert found == [llm.fill_mask([text], top_k=2)[0] for text in texts]
    assert llm.fill_mask([]) == []


def test_heads_that_give_no_numbers(tmp_path: Path) -> None:
    tasks: list[tuple[str, str, Any]] = [
        ("bert", "cls.predictions.bias", lambda llm: llm.fill_mask(["a [MASK]"])),
        ("bert-classifier", "classifier.bias", lambda llm: llm.classify(["a"])),
        (
            "electra-discriminator",
            "discriminator_predictions.dense_prediction.bias",
            lambda llm: llm.detect_replaced(["a"]),
        ),
    ]
    for name, bias, task in tasks:
        folder = encoder_folder(name, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        tensors[bias] = np.full_like(tensors[bias], np.nan)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(NonFiniteError, match="head gives values that are not finite"):
            task(LLM(folder, threads=1))


def test_embeddings_of_an_encoder(tmp_path: Path) -> None:
    """Every pooling, alone and among many, whatever a step holds: the same bits; and nothing stays in the cache."""
    folder = encoder_folder("roberta", tmp_path / "m")
    wide, narrow = (LLM(folder, threads=2, max_num_seqs=seqs, max_num_batched_tokens=tokens)
                    for seqs, tokens in ((64, 512), (2, 1)))  # fmt: skip
    prompts = [{"prompt_token_ids": RNG.integers(3, 60, size).tolist()} for size in (46, 1, 7, 30, 2, 46, 13)]
    for kind in ("cls", "mean", "max", "last"):
        vectors = wide.embed(prompts, pooling=kind)
        assert narrow.embed(prompts, pooling=kind).tobytes() == vectors.tobytes()
        states = wide.forward(prompts[3]["prompt_token_ids"], output_hidden_states=True).hidden_states
        assert states is not None
        last = states[-1].astype(np.float64)
        expected = {"cls": last[0], "mean": last.mean(0), "max": last.max(0), "last": last[-1]}[kind]
        np.testing.assert_allclose(vectors[3], expected, atol=1e-6)
    assert wide.engine.scheduler.pool.free == wide.engine.scheduler.pool.size
    assert wide.plan.cache < 3 * (512 + 64 * 64) * 2 * 32 * 4, "one step's keys and values of one layer"
    with pytest.raises(RequestError, match="47 tokens, more than the context of 46"):
        wide.embed([{"prompt_token_ids": [5] * 47}], pooling="cls")


def test_an_encoder_generates_nothing(tmp_path: Path) -> None:
    llm = loaded("bert", tmp_path)
    for call in (
        lambda: llm.generate("the cat"),
        lambda: next(iter(llm.stream("the cat"))),
        lambda: llm.score(["the cat"]),
        lambda: llm.perplexity("the cat sat"),
    ):
        with pytest.raises(RequestError, match="this model is an encoder, which generates nothing"):
            call()
    for options, message in (
        ({"speculative": "ngram"}, "got an encoder"),
        ({"kv_cache_bytes": 1 << 20}, "expected None for an encoder"),
        ({"max_model_len": 49}, "expected 1 to the model's context of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(llm.folder, **options)  # type: ignore[arg-type]


def test_heads_that_are_missing(tmp_path: Path) -> None:
    bare = loaded("bert-classifier", tmp_path, architectures=["BertForSequenceClassification"])
    with pytest.raises(RequestError, match=r"fill_mask: .* like ForMaskedLM .* an encoder of a class like ForSeq"):
        bare.fill_mask(["a [MASK]"])
    decoder = LLM(GOLDEN / "gpt2", skip_tokenizer_init=True)
    with pytest.raises(RequestError, match=r"classify: .* ForSequenceClassification .* this one is a decoder"):
        decoder.classify([{"prompt_token_ids": [3]}])
    with pytest.raises(RequestError, match=r"detect_replaced: .* this one is a decoder"):
        decoder.detect_replaced([{"prompt_token_ids": [3]}])
    with pytest.raises(RequestError, match=r"token types: expected one in \[0, 1\) for each of the 2 tokens"):
        decoder.forward([3, 4], token_type_ids=[0, 1])
    with pytest.raises(ConfigError, match=r"architectures = .*: expected one of BertModel, BertForMaskedLM"):
        loaded("bert", tmp_path, architectures=["BertForQuestionAnswering"])


def test_a_model_without_a_head(tmp_path: Path) -> None:
    """sentence-transformers writes the base model with its pooler, which is not used."""
    folder = encoder_folder("bert-classifier", tmp_path / "base", architectures=["BertModel"])
    tensors = load_file(folder / "model.safetensors")
    kept = {name.removeprefix("bert."): value for name, value in tensors.items() if "classifier" not in name}
    save_file(kept, folder / "model.safetensors")
    llm = LLM(folder, threads=1)
    assert llm.forward([2, 5, 3]).logits is None
    assert llm.embed(TEXTS, pooling="cls").shape == (4, 32)
    with pytest.raises(RequestError, match=r"fill_mask: .* this one is an encoder without a head"):
        llm.fill_mask(["a [MASK]"])
    with pytest.raises(ValueError, match=r"no modules\.json"):
        llm.embed(TEXTS)


def test_older_files(tmp_path: Path) -> None:
    """BERT as it was first published: gamma and beta, heads that are not asked for, second names of tied weights."""
    folder = encoder_folder("bert", tmp_path / "old", architectures=["BertForPreTraining"])
    expected = LLM(folder, threads=1).forward([2, 5, 3]).logits
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    older |= {
        "bert.embeddings.position_ids": np.arange(48)[None],
        "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
        "bert.pooler.dense.bias": np.ones(32, np.float32),
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].copy(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    save_file(older, folder / "model.safetensors")
    llm = LLM(folder, threads=1)
    assert llm.spec.head.tied
    found = llm.forward([2, 5, 3]).logits
    assert found is not None and expected is not None and found.tobytes() == expected.tobytes()
    save_file({**older, "cls.predictions.other": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.other.* is not a weight of a bert model"):
        LLM(folder)


def test_xlm_roberta_is_roberta(tmp_path: Path) -> None:
    plain = loaded("roberta", tmp_path)
    other = encoder_folder("roberta", tmp_path / "x", model_type="xlm-roberta", architectures=["XLMRobertaForMaskedLM"])
    one, two = (llm.forward([2, 5, 9, 3]).logits for llm in (plain, LLM(other, threads=2)))
    assert one is not None and two is not None and one.tobytes() == two.tobytes()


def test_command_line(tmp_path: Path) -> None:
    filler = encoder_folder("distilbert", tmp_path / "filler")
    [line] = pyllm("fill-mask", "-m", filler, "the [MASK] sat", "-k", "2").stdout.splitlines()
    [expected] = LLM(filler).fill_mask(["the [MASK] sat"], top_k=2)
    shown = json.loads(line)
    assert shown["text"] == "the [MASK] sat"
    assert [[token["token_id"] for token in mask] for mask in shown["masks"]] == [
        [token.token_id for token in mask] for mask in expected
    ]
    classifier = encoder_folder("bert-classifier", tmp_path / "classifier")
    lines = pyllm("classify", "-m", classifier, *TEXTS, "--pair", "a dog").stdout.splitlines()
    found = LLM(classifier).classify([(text, "a dog") for text in TEXTS])
    assert [json.loads(line)["label"] for line in lines] == [one.label for one in found]
    labeller = encoder_folder("roberta-labels", tmp_path / "labeller", **LABELLED)
    for options, task in (((), "label_tokens"), (("--entities",), "find_entities")):
        lines = pyllm("label-tokens", "-m", labeller, *TEXTS, *options).stdout.splitlines()
        expected = [[asdict(part) for part in parts] for parts in getattr(LLM(labeller), task)(TEXTS)]
        assert [json.loads(line)["entities" if options else "tokens"] for line in lines] == expected
    refused(pyllm("score-pairs", "-m", classifier, "the cat", *TEXTS), 1, "expected a model with one label")
    refused(pyllm("detect-replaced", "-m", filler, "the cat"), 1, "detect_replaced: expected a model")
    refused(pyllm("generate", "-m", filler, "the cat"), 1, "this model is an encoder")


def test_served(tmp_path: Path) -> None:
    llm = loaded("distilbert", tmp_path)
    with running(llm) as server:
        server.service.embedding = EmbeddingRule(Pooling.MEAN, normalize=True)
        answer = server.post("/v1/embeddings", input=TEXTS)
        found = np.array([one["embedding"] for one in answer["data"]], np.float32)
        np.testing.assert_array_equal(found, llm.embed(TEXTS, pooling="mean", normalize=True))
        assert "this model is an encoder" in server.refusal("/v1/completions", 400, prompt="the cat")["message"]
        server.assert_idle()


def test_goes_on_training_on_masked_tokens(tmp_path: Path) -> None:
    folder = encoder_folder("bert", tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = [f"the {' '.join(rng.permutation(['red', 'dog', 'ran', 'fast']))} on the mat" for _ in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    options = (
        "--steps",
        "250",
        "--lr",
        "1e-2",
        "--context",
        "24",
        "--batch-tokens",
        "192",
        "--threads",
        "2",
        "--quiet",
    )
    files = (tmp_path / "texts.jsonl", "--out", tmp_path / "run", "--data-cache", tmp_path / "cache")
    trained = pyllm("train", "-m", folder, *files, *options, "--mask-share", "0.3", "--objective", "mlm")
    assert trained.returncode == 0, trained.stderr
    losses = [record["loss"] for record in read_log(tmp_path / "run") if record["kind"] == "step"]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    llm = LLM(tmp_path / "run" / "last", threads=1)
    [[mask]] = llm.fill_mask(["the red dog ran fast [MASK] the mat"], top_k=1)
    assert mask[0].token == "on"
    refused(pyllm("train", "-m", folder, *files[:1], "--out", tmp_path / "no", *options), 1,
            "objective: expected mlm or classify for this bert model")  # fmt: skip
    classifier = encoder_folder("bert-classifier", tmp_path / "classifier")
    refused(pyllm("train", "-m", classifier, *files[:1], "--out", tmp_path / "no", *options, "--objective", "mlm"), 1,
            "objective: expected classify for this bert model")  # fmt: skip
