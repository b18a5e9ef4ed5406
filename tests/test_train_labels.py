"""Training classifiers: labelled texts from files, new heads on models that are there, and what comes out."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folder import WORDS, encoder_folder
from oracle import extra
from safetensors.numpy import load_file
from test_cli import pyllm, refused

from pyllm import LLM
from pyllm.errors import CheckpointError, ConfigError, DataError
from pyllm.spec import Problem
from pyllm.tokenizer import Tokenizer
from pyllm.train import TrainConfig, Trainer
from pyllm.train.evaluation import evaluate_labels
from pyllm.train.head_loss import IGNORED
from pyllm.train.labelled import LabelSet, encode_examples, read_examples
from pyllm.train.run_config import settings
from pyllm.train.setup import Setup, plan_of_run, prepare

ANIMALS, THINGS = ("cat", "dog"), ("mat", "hat")


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count)]


def named(text: str) -> str:
    """A label that can be learnt: what the text begins with."""
    first = text.split()[0]
    return "animal" if first in ANIMALS else "thing" if first in THINGS else "other"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same texts with one label, several, values, and as pairs; sorted by label, as such files often are."""
    given = sorted(texts(240), key=named)
    two = list(zip(given, texts(240, 1), strict=True))
    return {
        "label": lines(tmp_path / "label.jsonl", [{"text": t, "label": named(t)} for t in given]),
        "labels": lines(
            tmp_path / "labels.jsonl", [{"text": t, "labels": [w for w in ANIMALS if w in t.split()]} for t in given]
        ),
        "score": lines(tmp_path / "score.jsonl", [{"text": t, "score": len(t.split()) / 4} for t in given]),
        "pairs": lines(
            tmp_path / "pairs.jsonl", [{"text": a, "pair": b, "label": int(len(a) > len(b))} for a, b in two]
        ),
    }


def run(tmp_path: Path, path: Path, folder: Path, **values: Any) -> Setup:
    given = {"out": str(tmp_path / "x"), "steps": 1, "model": str(folder), "context": 24, "objective": "classify",
             "data": [str(path)], "batch_tokens": 240, **values}  # fmt: skip
    config, theirs = settings({name: value for name, value in given.items() if value is not None})
    return prepare(config, theirs.seed, None, theirs.objective)


def trainer(setup: Setup, out: Path, steps: int = 60, resume: bool = False, **options: Any) -> Trainer:
    config = TrainConfig(out, steps=steps, threads=2, objective="classify", eval_batches=setup.eval_batches or 1,
                         **{"learning_rate": 3e-3, **options})  # fmt: skip
    return Trainer(
        setup.model, setup.train, config, eval_data=setup.valid, tokenizer=setup.tokenizer, body=setup.body,
        resume=resume,
    )  # fmt: skip


def inputs(path: Path) -> list[Any]:
    return [e.text if e.pair is None else (e.text, e.pair) for e in read_examples(path)[1]]


def assert_transformers_scores(folder: Path, given: list[Any]) -> None:
    """The same scores, where transformers is at hand or must be."""
    if extra.missing():
        return
    import torch
    import transformers

    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = LLM(folder, threads=2, dtype="float32").classify(given)
    problem = model.config.problem_type
    for text, result in zip(given, found, strict=True):
        encoded = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**encoded).logits[0]
        expected = {"regression": logits, "multi_label_classification": torch.sigmoid(logits)}.get(
            problem, torch.softmax(logits, 0)
        )
        assert list(result.scores) == [model.config.id2label[i] for i in range(len(logits))]
        np.testing.assert_allclose(list(result.scores.values()), expected.numpy(), atol=2e-5)


@pytest.mark.oracle(partly=True)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "label"), ("electra-discriminator", "pairs"), ("distilbert", "labels"), ("bert", "score")],
)
def test_a_new_head_learns_and_is_an_ordinary_classifier(
    name: str, kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    model = encoder_folder(name, tmp_path / "model")
    setup = run(tmp_path, files[kind], model, valid_share=0.25)
    made = trainer(setup, tmp_path / "run")
    before = made.evaluate()
    result = made.run()
    after = made.evaluate()
    assert after.loss < 0.8 * before.loss
    head = made.spec.head
    assert {"label": ("animal", "other", "thing"), "labels": ("cat", "dog"), "score": ("LABEL_0",),
            "pairs": ("LABEL_0", "LABEL_1")}[kind] == head.labels  # fmt: skip
    llm = LLM(result.folder, threads=2, dtype="float32")
    held = setup.valid
    assert held is not None
    chosen = [inputs(files[kind])[i] for i in order_of_held_out(240, 60)]
    found = llm.classify(chosen)
    if kind == "label":
        right = np.mean([best.label == named(text) for best, text in zip(found, chosen, strict=True)])
        assert right == after.accuracy and after.tokens == 60 and right > 0.7
    assert (after.accuracy is None) == (kind == "score")
    part = lines(tmp_path / "held.jsonl", [json.loads(files[kind].read_text().splitlines()[i])
                                           for i in order_of_held_out(240, 60)])  # fmt: skip
    again = evaluate_labels(llm, part)
    assert (again.documents, again.accuracy) == (60, after.accuracy)
    assert again.loss == pytest.approx(after.loss, rel=1e-5)
    assert_transformers_scores(result.folder, chosen[:5])


def order_of_held_out(count: int, held: int) -> list[int]:
    return sorted(np.random.Generator(np.random.PCG64([0, count])).permutation(count)[:held].tolist())


def test_the_body_is_that_of_the_model_and_the_pooler_if_it_has_one(files: dict[str, Path], tmp_path: Path) -> None:
    """Only what the model lacks is drawn."""
    model = encoder_folder("bert-classifier", tmp_path / "model")
    source = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    setup = run(tmp_path, files["label"], model, valid_share=0)
    assert setup.body == model and isinstance(setup.model, dict)
    made = trainer(setup, tmp_path / "run", steps=1)
    np.testing.assert_array_equal(made.parameters.get("embed.weight"), source["bert.embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(
        made.parameters.get("pooled_head.transform.weight"), source["bert.pooler.dense.weight"]
    )
    drawn = made.parameters.get("pooled_head.weight")
    assert drawn.shape == (3, made.spec.hidden) and 0.01 < drawn.std() < 0.03 and drawn.std() > 0
    assert not made.parameters.get("pooled_head.bias").any()
    deeper = encoder_folder("bert", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing bert\.encoder\.layer\.2"):
        trainer(run(tmp_path, files["label"], deeper, valid_share=0), tmp_path / "other", steps=1)


def test_a_classifier_keeps_its_head_and_labels(files: dict[str, Path], tmp_path: Path) -> None:
    labels = {"0": "thing", "1": "other", "2": "animal"}
    model = encoder_folder("bert-classifier", tmp_path / "model", id2label=labels, problem_type=None)
    setup = run(tmp_path, files["label"], model, valid_share=0)
    assert (setup.model, setup.body, setup.notes) == (model, None, ())
    assert setup.spec.head.labels == ("thing", "other", "animal")
    for record, message in [
        ({"text": "a", "label": "plant"}, r"line 1: label: expected one of the 3 labels of the model \(thing, other, "),
        ({"text": "a", "label": 3}, "line 1: label: expected one of the 3 labels .* found 3"),
        ({"text": "a", "labels": ["other"]}, "expected `label` in each line for this model, .* found multi_label"),
        ({"text": "a", "score": 1}, "expected `label` in each line .* with 3 labels, found regression"),
    ]:
        with pytest.raises(DataError, match=message):
            run(tmp_path, lines(tmp_path / "bad.jsonl", [record]), model, valid_share=0)


def test_next_sentences_are_pairs_with_labels(tmp_path: Path) -> None:
    """A model with that head keeps it; with a head for tokens, it gets a new one."""
    pairs = [{"text": a, "pair": a if i % 2 else "the hat", "label": ["random", "next"][i % 2]}
             for i, a in enumerate(texts(60))]  # fmt: skip
    path = lines(tmp_path / "pairs.jsonl", pairs)
    model = encoder_folder("bert-next", tmp_path / "model")
    setup = run(tmp_path, path, model, valid_share=0)
    assert (setup.model, setup.body) == (model, None)
    made = trainer(setup, tmp_path / "run", steps=3)
    before = made.step().loss
    assert made.run().last_loss < before  # type: ignore[operator]
    [result] = LLM(tmp_path / "run" / "last", threads=2).classify([("the cat", "the hat")])
    assert set(result.scores) == {"next", "random"}
    assert evaluate_labels(LLM(model, threads=1), lines(tmp_path / "few.jsonl", pairs[:6])).documents == 6
    alone = lines(tmp_path / "alone.jsonl", [*pairs[:2], {"text": "the cat", "label": "next"}])
    with pytest.raises(DataError, match="line 3: expected `pair`, a second text that follows the first or does not"):
        run(tmp_path, alone, model, valid_share=0)
    setup = run(tmp_path, path, encoder_folder("bert-labels", tmp_path / "labels"), valid_share=0)
    assert setup.body is not None and setup.spec.head.labels == ("next", "random")
    trainer(setup, tmp_path / "other", steps=1).run()


def test_a_resumed_run_is_as_one_that_was_not_stopped(files: dict[str, Path], tmp_path: Path) -> None:
    model = encoder_folder("electra-discriminator", tmp_path / "model")

    def begun(out: str, resume: bool = False) -> Trainer:
        setup = run(tmp_path, files["pairs"], model)
        return trainer(setup, tmp_path / out, steps=6, resume=resume, dropout=0.1, accumulation=2)

    whole = begun("whole")
    whole.run()
    stopped = begun("stopped")
    for _ in range(3):
        stopped.step()
    stopped.save()
    resumed = begun("stopped", resume=True)
    resumed.run()
    np.testing.assert_array_equal(resumed.parameters.weights, whole.parameters.weights)
    assert resumed.evaluate().loss == whole.evaluate().loss
    other = lines(tmp_path / "pairs.jsonl", [json.loads(line) for line in files["pairs"].read_text().splitlines()[1:]])
    files["pairs"] = other
    with pytest.raises(DataError, match="cannot go on with other data"):
        begun("stopped", resume=True)


def test_micro_batches_hold_each_text_with_its_label(files: dict[str, Path], tmp_path: Path) -> None:
    model = encoder_folder("electra-discriminator", tmp_path / "model")
    tokenizer = Tokenizer.load(model)
    setup = run(tmp_path, files["pairs"], model, valid_share=0.1)
    expected = {}
    for example in read_examples(files["pairs"])[1]:
        pair = tokenizer.encode_pair(example.text, example.pair or "")
        expected[(*pair.ids, *pair.type_ids)] = example.label
    seen: list[tuple[int, ...]] = []
    assert setup.valid is not None and setup.eval_batches
    batches = [setup.valid.next_batch() for _ in range(setup.eval_batches + 1)]
    assert (batches[-1][1] == IGNORED).all(), "each text once"
    count = sum(int((batch[1] != IGNORED).sum()) for batch in batches)
    assert count == 24
    while len(seen) < 216:
        batches.append(setup.train.next_batch())
        tokens, labels, starts, types = batches[-1]  # type: ignore[misc]
        assert starts[-1] == 240 and (np.diff(starts) <= 24).all()
        for i in np.flatnonzero(labels != IGNORED):
            place = slice(starts[i], starts[i + 1])
            key = (*tokens[place].tolist(), *types[place].tolist())
            assert expected[key] == labels[i]
            seen.append(key)
    padding = np.mean([1 - b[2][np.count_nonzero(b[1] != IGNORED)] / 240 for b in batches[setup.eval_batches + 1 :]])
    assert padding < 0.02
    state = setup.train.state()
    following = setup.train.next_batch()
    setup.train.load_state(json.loads(json.dumps(state)))
    for one, two in zip(following, setup.train.next_batch(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    model = encoder_folder("bert", tmp_path / "model")
    tokenizer = Tokenizer.load(model)
    long = "the cat sat on the red mat and the dog ran"
    path = lines(tmp_path / "long.jsonl", [{"text": long, "label": "a"}, {"text": long, "pair": long, "label": "b"},
                                          {"text": "a hat", "label": "a"}])  # fmt: skip
    problem, examples = read_examples(path)
    labels = LabelSet.of_examples(problem, examples)
    found = encode_examples(path, examples, labels, tokenizer, model, context=8, types=True)
    parts = [found.tokens[a:b].tolist() for a, b in zip(found.begins, found.ends, strict=True)]
    whole = tokenizer.encode(long)
    assert parts == [[*whole[:7], whole[-1]], tokenizer.encode_pair(long, long, 8).ids, tokenizer.encode("a hat")]
    assert found.cut == 2 and found.targets == [0, 1, 0]
    setup = run(tmp_path, path, model, valid_share=0, context=8, batch_tokens=16)
    assert setup.notes[-1] == f"{path}: 2 texts are longer than the context of 8 tokens and are cut"
    made = trainer(setup, tmp_path / "run", steps=1).run().folder
    llm = LLM(made, threads=1, max_model_len=8)
    evaluated = evaluate_labels(llm, path)
    assert (evaluated.cut, evaluated.documents) == (2, 3)
    limited = pyllm("eval", path, "-m", made, "-c", 8)
    assert limited.returncode == 0, limited.stderr
    assert b"2 texts are longer than the context of 8 tokens and were cut" in limited.stderr
    with pytest.raises(ConfigError, match="context: expected more than the 2 special tokens of a text, got 2"):
        encode_examples(path, examples, labels, tokenizer, model, context=2, types=True)
    with pytest.raises(DataError, match="line 1: the text has no tokens"):
        run(tmp_path, lines(tmp_path / "empty.jsonl", [{"text": "", "label": 1}]), model, valid_share=0)
    with pytest.raises(DataError, match="3 texts cannot be split"):
        run(tmp_path, path, model, valid_share=0.9)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty|found none"),
        ([{"text": "a"}], "line 1: expected `text` .* found text"),
        ([{"label": "a"}], "line 1: expected `text` .* found label"),
        ([{"text": "a", "label": "b", "score": 1}], "line 1: expected `text` .* found label, score, text"),
        ([{"text": "a", "label": "b", "extra": 1}], "found extra, label, text"),
        ([{"text": "a", "label": "b"}, {"text": "a", "score": 1}], "line 2: expected `label` as in the lines before"),
        ([{"text": "a", "pair": 3, "label": "b"}], "line 1: pair: expected a string, found 3"),
        ([{"text": "a", "label": True}], "line 1: label: expected a name or a number from 0, found True"),
        ([{"text": "a", "label": -1}], "found -1"),
        ([{"text": "a", "label": 1.5}], "found 1.5"),
        ([{"text": "a", "labels": "b"}], "line 1: labels: expected a list in which none stands twice, found 'b'"),
        ([{"text": "a", "labels": ["b", "b"]}], "in which none stands twice"),
        ([{"text": "a", "score": "5"}], r"line 1: score: expected a number of at most 1e\+18, found '5'"),
        ([{"text": "a", "score": 10**400}], "line 1: score: expected a number of at most"),
        ([{"text": "a", "score": float("nan")}], "line 1: score: expected a number .* found nan"),
        ([["a", "b"]], r"line 1: expected a JSON object with `text` \(and `pair`"),
        ([{"text": "a", "label": "b"}], "expected at least two labels in the data, all lines have 'b'"),
        ([{"text": "a", "labels": []}], "labels: expected some in the data, found none in any line"),
        (
            [{"text": "a", "label": "b"}, {"text": "a", "label": 1}],
            "expected names or numbers in all lines, found both",
        ),
    ],
)
def test_labels_that_are_none(records: list[Any], message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", records)
    with pytest.raises(DataError, match=message):
        LabelSet.of_examples(*read_examples(path))


def test_settings_that_do_not_fit(files: dict[str, Path], tmp_path: Path) -> None:
    model = encoder_folder("bert", tmp_path / "model")
    decoder = Path(shutil.copytree(Path(__file__).parent / "golden" / "gpt2", tmp_path / "gpt2"))
    for values, message in [
        ({"model": str(decoder), "context": 8}, "objective: expected causal, prefix, blanks, spans or ul2 for this"),
        ({"packing": "plain"}, "packing: expected documents for classify, where each is a text with its label"),
        ({"mask_prompt": True}, "mask_prompt: expected no for classify"),
        ({"mask_share": 0.2}, "mask_share: expected none for classify"),
        ({"data": [str(tmp_path / "no.jsonl")]}, "no.jsonl: expected a .jsonl file for classify"),
        ({"data": [str(tmp_path / "model" / "vocab.txt")]}, "vocab.txt: expected a .jsonl file .* found another name"),
        ({"valid_share": 1.0}, "valid_share: expected 0 <= value < 1"),
        ({"weights": (1.0, 2.0)}, "weights: expected one for each of 1 files"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            run(tmp_path, files["label"], model, **values)
    other = encoder_folder("bert", tmp_path / "other")
    words = (other / "vocab.txt").read_text() + "".join(f"{word}s\n" for word in WORDS)
    (other / "vocab.txt").write_text(words)
    more = lines(tmp_path / "more.jsonl", [{"text": "hats cats", "label": i} for i in range(2)])
    with pytest.raises(ConfigError, match=r"more.jsonl: holds token \d+, and the model has 67"):
        run(tmp_path, more, model, tokenizer=str(other), valid_share=0)
    scored = run(tmp_path, files["score"], model)
    for name in ("label_smoothing", "z_loss"):
        with pytest.raises(
            ConfigError, match=f"{name}: expected 0, as it belongs to cross entropy, .* regression, got"
        ):
            trainer(scored, tmp_path / "smoothed", steps=1, **{name: 0.1})
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="architectures: expected the name of one class, such as BertModel"):
        run(tmp_path, files["label"], model)


def test_a_plan_is_that_of_the_run(files: dict[str, Path], tmp_path: Path) -> None:
    model = encoder_folder("bert", tmp_path / "model")
    setup = run(tmp_path, files["label"], model)
    values = {"model": str(model), "objective": "classify", "context": 24, "batch_tokens": 240}
    planned = plan_of_run({**values, "data": [str(files["label"])]})
    assert planned.weights == trainer(setup, tmp_path / "run").plan.weights
    assert planned.spec.head.labels == ("animal", "other", "thing")
    assert planned.shape.sequences == len(setup.train.next_batch()[2]) - 1
    assert plan_of_run(values).spec.head.problem is Problem.SINGLE_LABEL


def test_command_line(files: dict[str, Path], tmp_path: Path) -> None:
    model = encoder_folder("bert", tmp_path / "model")
    out = tmp_path / "run"
    command = [
        *("train", files["label"], "-m", model, "--objective", "classify", "-o", out, "--steps", 40, "--lr", "3e-3"),
        *("-c", 24, "--batch-tokens", 240, "--valid-share", 0.25, "--eval-every", 20, "--keep", 9),
    ]
    made = pyllm(*command, "--save-every", 20)
    assert made.returncode == 0, made.stderr
    said = made.stderr.decode()
    assert "a new head for single_label_classification, labels: animal, other, thing" in said
    assert "step 40: held-out loss" in said and "accuracy 0." in said and "of 60 labels" in said
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    accuracy = [record["accuracy"] for record in records if record["kind"] == "eval"]
    assert len(accuracy) == 2 and accuracy[1] > 0.6
    assert all(record["perplexity"] is None for record in records if record["kind"] == "eval")
    found = pyllm("classify", "-m", out / "last", "cat sat on the mat")
    assert json.loads(found.stdout)["label"] == "animal"
    scored = pyllm("eval", files["label"], "-m", out / "last")
    assert scored.returncode == 0 and b"accuracy 0." in scored.stdout and b"over 240 texts" in scored.stdout
    refused(pyllm("eval", files["score"], "-m", out / "last"), 1, "expected `label` in each line for this model")
    refused(pyllm("eval", files["label"], "-m", out / "last", "--mask-prompt"), 2, "--mask-prompt is for models")
    # As if the run had ended after its first checkpoint.
    cut = Path(shutil.copytree(out, tmp_path / "cut", symlinks=True))
    shutil.rmtree(cut / "step-00000040")
    for name in ("last", "best"):
        (cut / name).unlink()
        (cut / name).symlink_to("step-00000020")
    assert pyllm("train", "--resume", "--out", cut).returncode == 0
    for one, two in pairwise([load_file(folder / "last" / "model.safetensors") for folder in (out, cut)]):
        assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)
