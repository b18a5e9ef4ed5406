"""Training on sources and targets: from files to runs, of encoder-decoders and of decoders that read both."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from test_cli import pyllm
from tokenizers import Tokenizer as TokenizersLibrary
from tokenizers.processors import TemplateProcessing
from training import GOLDEN

from pyllm import LLM
from pyllm.cli.live import operations_per_token
from pyllm.errors import ConfigError, DataError
from pyllm.models import read_spec
from pyllm.tokenizer import Tokenizer
from pyllm.train import RepeatedData, TrainConfig, Trainer
from pyllm.train.evaluation import evaluate
from pyllm.train.head_loss import IGNORED
from pyllm.train.run_config import settings
from pyllm.train.setup import plan_of_run, prepare
from pyllm.train.token_store import end_tokens, open_tokens
from pyllm.train.tokenizer_training import train_tokenizer

# --- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a mask, padding and sentinels; pairs in both spellings; texts."""
    folder = tmp_path_factory.mktemp("pairs")
    names = [chr(ord("A") + i) for i in range(15)]
    lines = [{"source": f"fox {name} runs.", "target": name} for name in names]
    lines += [{"prompt": f"fox {name} sleeps.", "completion": name} for name in names]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = ["A fox runs. It sleeps! " * 3] * 30
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(
        [folder / "texts.jsonl"], folder / "tokenizer", vocab_size=300, special=("<pad>", "<mask>"), sentinels=8
    )
    return folder


def run(home: Path, objective: str, **values: Any) -> Any:
    given = {"out": str(home / "run"), "steps": 1, "arch": "t5", "layers": 1, "hidden": 16, "heads": 2, "context": 32,
             "data": [str(home / "texts.jsonl")], "tokenizer": str(home / "tokenizer"), "batch_tokens": 128,
             "data_cache": str(home / "cache"), "objective": objective, **values}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    config, theirs = settings(given)
    return prepare(config, theirs.seed, None, theirs.objective), given


def test_the_tokenizer_of_a_new_model(home: Path) -> None:
    tokenizer = Tokenizer.load(home / "tokenizer")
    assert tokenizer.pad_token_id == tokenizer.id_of("<pad>") and tokenizer.mask_token_id == tokenizer.id_of("<mask>")
    assert tokenizer.around() == ([0], []) and end_tokens(tokenizer) == (1,)
    assert None not in [tokenizer.id_of(f"<extra_id_{i}>") for i in range(8)]
    with pytest.raises(ConfigError, match="sentinels: expected 0 to 1000, got 1001"):
        train_tokenizer([home / "texts.jsonl"], home / "other", vocab_size=3000, sentinels=1001)


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        ("$A", [], []),
        ("<s> $A", [0], []),
        ("$A </s>", [], [1]),
        ("<s> $A </s>", [0], [1]),
        ("$A </s> <mask>", [], [1, 3]),
        ("<mask> <s> $A", [3, 0], []),
        ("$A <mask> <s>", [], [3, 0]),
    ],
)
def test_special_tokens_around_a_text(home: Path, tmp_path: Path, template: str, before: Any, behind: Any) -> None:
    """As decoders, T5, BART, mBART, and ChatGLM in its two forms have them."""
    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    library = TokenizersLibrary.from_file(str(path))
    special = [(name, index) for index, name in enumerate(["<s>", "</s>", "<pad>", "<mask>"]) if name in template]
    library.post_processor = TemplateProcessing(single=template, special_tokens=special)
    library.save(str(path))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert tokenizer.around() == (before, behind) and end_tokens(tokenizer) == (1,)


def test_pairs_of_a_file(home: Path) -> None:
    setup, given = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], valid_share=0.2)
    tokenizer = Tokenizer.load(home / "tokenizer")
    tokens, labels, starts, source, bounds = batch = setup.train.next_batch()
    pad = tokenizer.pad_token_id
    for (first, end), (begin, stop) in list(zip(pairwise(starts), pairwise(bounds), strict=True))[:4]:
        assert tokens[first] == pad and labels[first] == 0 and labels[end - 1] == 1
        text = tokenizer.decode(source[begin:stop])
        assert text.split()[1] == tokenizer.decode(labels[first:end]) and source[begin] == 0
    assert setup.valid is not None
    assert list(map(len, setup.valid.next_batch())) == list(map(len, batch))
    plan = plan_of_run(given)
    assert (plan.shape.tokens, plan.shape.source) == (len(tokens), len(source))
    del given["data"]
    assert plan_of_run(given).shape.source == 64


def test_a_plan_knows_a_head_of_its_own_that_config_does_not_name(home: Path, tmp_path: Path) -> None:
    """T5 v1.1 as older versions wrote it: the file holds a head, config.json says nothing of one."""
    setup, given = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], tie=False, valid_share=0)
    model = Trainer(
        setup.model, setup.train, TrainConfig(tmp_path / "new", steps=1, threads=1), tokenizer=setup.tokenizer
    )
    folder = model.run().folder
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    for data in ({}, {"data": [str(home / "pairs.jsonl")]}):
        values = {name: given[name] for name in ("context", "batch_tokens", "data_cache", "objective")}
        planned = plan_of_run({**values, **data, "model": str(folder)})
        assert planned.weights == model.plan.weights and not planned.spec.head.tied


@pytest.mark.parametrize("objective", ["spans", "denoise", "ul2"])
def test_texts_of_a_file_become_no_longer_than_the_context(home: Path, objective: str) -> None:
    for packing in ("documents", "plain"):
        setup, given = run(home, objective, arch="bart", packing=packing, valid_share=0)
        batch = setup.train.next_batch()
        assert max(np.diff(batch[2]).max(), np.diff(batch[4]).max()) <= 32
        assert 0.2 < (batch[1] != IGNORED).mean() <= 1
        assert plan_of_run(given).shape.all_tokens == len(batch[0]) + len(batch[3])
        if packing == "plain":
            del given["data"]
            assert plan_of_run(given).shape.all_tokens == pytest.approx(len(batch[0]) + len(batch[3]), rel=0.1)


def test_sentences_of_scripts_without_spaces(tmp_path: Path) -> None:
    """A byte-level vocabulary has their ends, with or without what closes a quotation, under names of bytes."""
    texts = ["狐狸跑。猫睡觉。", "狗叫。」鸟飞。", 'A fox runs."It sleeps'] * 20
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([path], tmp_path / "tokenizer", vocab_size=320, special=("<pad>", "<mask>"))
    values = {"arch": "bart", "data": [str(path)], "data_cache": str(tmp_path / "cache"), "mask_share": 0.1}
    setup, _ = run(tmp_path, "denoise", valid_share=0, **values)
    tokenizer, swapped = Tokenizer.load(tmp_path / "tokenizer"), set()
    for end in ("。", "。」", '."'):
        assert len(tokenizer.encode(end, add_special_tokens=False)) == 1
    for _ in range(20):
        _, _, _, source, bounds = setup.train.next_batch()
        for begin, stop in pairwise(bounds.tolist()):
            text = tokenizer.decode(source[begin:stop])
            for first, second in ("狐猫", "狗鸟", ("fox", "It")):
                if -1 < text.find(second) < text.find(first):
                    swapped.add(first)
    assert swapped == {"狐", "狗", "fox"}


def test_settings_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    pairs = [str(home / "pairs.jsonl")]
    for objective, values, message in [
        ("causal", {}, "objective: expected seq2seq, spans, denoise or ul2 for this t5 model, got 'causal'"),
        (
            "denoise",
            {"arch": "gpt2"},
            "expected causal, prefix, blanks, spans or ul2 for this gpt2 model, got 'denoise'",
        ),
        (
            "ul2",
            {"arch": "gpt2", "mask_prompt": True},
            "mask_prompt: expected no for ul2, where tokens that were taken",
        ),
        ("spans", {"arch": "gpt2", "context": 4}, "context: expected at least 5 tokens for spans, got 4"),
        ("seq2seq", {"data": pairs, "packing": "plain"}, "packing: expected documents for seq2seq"),
        ("seq2seq", {"data": pairs, "mask_prompt": True}, "mask_prompt: expected no for a model with an encoder"),
        ("seq2seq", {"data": pairs, "batch_tokens": 63}, "batch_tokens: expected at least 64"),
        ("seq2seq", {}, "expected pairs for seq2seq"),
        ("spans", {"context": 3}, "context: expected at least 4 tokens for spans, got 3"),
        ("seq2seq", {"init_std": 0.1}, "init_std: expected none, as the first weights of T5 follow from its sizes"),
        ("seq2seq", {"data": pairs, "mask_share": 0.2}, "mask_share: expected none for seq2seq"),
        ("causal", {"arch": "gpt2", "mean_span": 4.0}, "mean_span: expected none for causal"),
        ("denoise", {"mask_rule": "bernoulli"}, "mask_rule: expected none for denoise"),
        ("seq2seq", {"arch": "bart", "tie": False}, "tie: BART has one matrix"),
        ("seq2seq", {"tokenizer": None, "vocab_size": 300}, "tokenizer: expected one with an end token for t5"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            run(home, objective, valid_share=0, **values)
    train_tokenizer([home / "texts.jsonl"], tmp_path / "bare", vocab_size=270)
    bare = {"tokenizer": str(tmp_path / "bare"), "data": ["missing.jsonl"]}  # refused before any text is read
    with pytest.raises(ConfigError, match="denoise needs a tokenizer with a mask token"):
        run(home, "denoise", **bare)
    with pytest.raises(ConfigError, match="expected a tokenizer with sentinels"):
        run(home, "spans", **bare)
    mbart = {**json.loads((GOLDEN / "mbart" / "config.json").read_text()), "decoder_start_token_id": None}
    shutil.copyfile(GOLDEN / "mbart" / "model.safetensors", tmp_path / "model.safetensors")
    tiny_model.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(mbart))
    assert read_spec(tmp_path).decoder_start_token_id is None
    with pytest.raises(ConfigError, match="expected decoder_start_token_id in config"):
        run(home, "seq2seq", data=pairs, arch=None, tokenizer=None, model=str(tmp_path))


@pytest.mark.parametrize(("objective", "token"), [("spans", "<extra_id_3>"), ("denoise", "<mask>")])
def test_texts_that_hold_what_stands_for_a_span(home: Path, tmp_path: Path, objective: str, token: str) -> None:
    """They are found before the first step, wherever they are."""
    texts = ["A fox runs."] * 30 + [f"A fox {token} runs."] + ["It sleeps!"] * 3
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    index = Tokenizer.load(home / "tokenizer").id_of(token)
    expected = f"{path}: document 31 of 34 holds {token} \\(id {index}\\), which objective {objective} puts"
    with pytest.raises(DataError, match=expected):
        run(home, objective, data=[str(home / "texts.jsonl"), str(path)])
    other = "denoise" if objective == "spans" else "spans"
    run(home, other, data=[str(path)])


def test_few_pairs_are_held_out_whole(home: Path, tmp_path: Path) -> None:
    lines = [{"source": "a fox", "target": "runs"}, {"source": "a fox", "target": "sleeps"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = open_tokens(tmp_path / "two.jsonl", home / "tokenizer", home / "cache").split(0.3, whole=True)
    assert len(first.ends) == len(second.ends) == 1


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "tie", "rate"), [("t5", True, 1e-2), ("t5", False, 1e-2), ("bart", True, 1e-2)])
def test_a_new_model_fits_a_batch_and_writes_its_targets(
    home: Path, tmp_path: Path, arch: str, tie: bool, rate: float
) -> None:
    pairs = [str(home / "pairs.jsonl")]
    sizes = {"hidden": 32, "batch_tokens": 256, "init_std": 0.1 if arch == "bart" else None}
    setup, _ = run(home, "seq2seq", data=pairs, arch=arch, tie=tie, valid_share=0, **sizes)
    config = TrainConfig(
        tmp_path / "run", steps=100, learning_rate=rate, warmup_steps=5, threads=2, objective="seq2seq",
        sample_prompts=("fox C runs.",), sample_tokens=8, sample_temperature=0.0,
    )  # fmt: skip
    trainer = Trainer(setup.model, RepeatedData(setup.train, 1), config, tokenizer=setup.tokenizer)
    assert trainer.spec.head.scale == (32**-0.5 if arch == "t5" and tie else 1)
    first = trainer.step().loss
    assert first == pytest.approx(np.log(trainer.spec.vocab_size), rel=0.2)
    result = trainer.run()
    assert result.last_loss is not None and result.last_loss < 0.1
    llm = LLM(result.folder, threads=2, dtype="float32")
    _, labels, starts, source, bounds = trainer.data.next_batch()
    counted = [i for i in range(len(starts) - 1) if starts[i] < starts[i + 1] and labels[starts[i]] != IGNORED]
    sources = [source[bounds[i] : bounds[i + 1]].tolist() for i in counted]
    written = llm.generate([{"prompt_token_ids": ids} for ids in sources], temperature=0, max_tokens=12)
    assert len(counted) > 4
    for i, output in zip(counted, written, strict=True):
        assert list(output.outputs[0].token_ids) == labels[starts[i] : starts[i + 1]].tolist()
    evaluated = evaluate(llm, open_tokens(home / "pairs.jsonl", home / "tokenizer", home / "cache"))
    assert evaluated.documents == 30 and evaluated.loss < 3, "half of the pairs were in the batch"
    [sample] = trainer.sample()
    assert sample.text == llm.generate("fox C runs.", temperature=0, max_tokens=8)[0].outputs[0].text
    assert_transformers_reads(result.folder, llm, sources, [o.outputs[0].token_ids for o in written])


def test_samples_begin_as_the_folder_says(home: Path, tmp_path: Path) -> None:
    sizes = {"hidden": 32, "batch_tokens": 256, "init_std": 0.1}
    setup, _ = run(home, "seq2seq", data=[str(home / "pairs.jsonl")], arch="bart", valid_share=0, **sizes)
    config = TrainConfig(
        tmp_path / "new", steps=1, threads=1, objective="seq2seq", sample_prompts=("fox C runs.",), sample_tokens=8,
        sample_temperature=0.0,
    )  # fmt: skip
    folder = Trainer(setup.model, RepeatedData(setup.train, 1), config, tokenizer=setup.tokenizer).run().folder
    begun = {"decoder_start_token_id": 5, "forced_bos_token_id": 70}
    (folder / "generation_config.json").write_text(json.dumps(begun))
    trainer = Trainer(str(folder), RepeatedData(setup.train, 1), replace(config, out=tmp_path / "on"))
    [sample] = trainer.sample()
    [output] = LLM(folder, threads=1, dtype="float32").generate("fox C runs.", temperature=0, max_tokens=8)
    assert sample.text == output.outputs[0].text and output.outputs[0].token_ids[0] == 70


def assert_transformers_reads(folder: Path, llm: LLM, sources: list[list[int]], written: list[Any]) -> None:
    """The same logits and texts, where transformers is at hand or must be."""
    at_hand = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not at_hand and not os.environ.get("PYLLM_REQUIRE_ORACLE"):
        return
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    start = llm.spec.decoder_start_token_id
    for ids, expected in zip(sources[:3], written[:3], strict=True):
        target = [start, *expected[:-1]]
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), decoder_input_ids=torch.tensor([target])).logits[0].numpy()
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0].tolist()
        ours = llm.forward(target, source_token_ids=ids).logits
        assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())
        assert made == [start, *expected]


@pytest.mark.parametrize("objective", ["spans", "ul2"])
def test_a_decoder_learns_to_write_what_was_taken_out(home: Path, tmp_path: Path, objective: str) -> None:
    """With a bidirectional prefix, in sequences of at most the context."""
    values = {"arch": "gpt2", "context": 40, "batch_tokens": 200, "valid_share": 0.2}
    setup, given = run(home, objective, **values)
    config = TrainConfig(tmp_path / "run", steps=30, learning_rate=1e-2, threads=2, objective=objective)
    trainer = Trainer(setup.model, setup.train, config, eval_data=setup.valid, tokenizer=setup.tokenizer)
    assert trainer.spec.prefix is not None and trainer.shape.source == 0
    losses = [trainer.step().loss for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    trainer.evaluate()
    for _ in range(20):
        tokens, labels, starts, *_ = batch = setup.train.next_batch()
        assert np.diff(starts).max() <= 40
        trainer._step.fill(*batch)
        assert trainer._step.batch.prefix is not None
        for i, (first, end) in enumerate(pairwise(starts.tolist())):
            counted = np.flatnonzero(labels[first:end] != IGNORED)
            if len(counted):
                assert trainer._step.batch.prefix[i] == counted[0] + 1
    del given["data"]
    assert plan_of_run(given).shape.tokens == pytest.approx(len(tokens), rel=0.3)


@pytest.mark.parametrize(
    ("objective", "arch"), [("seq2seq", "bart"), ("spans", "t5"), ("denoise", "bart"), ("ul2", "t5")]
)
def test_a_resumed_run_is_as_one_that_was_not_stopped(home: Path, tmp_path: Path, objective: str, arch: str) -> None:
    data = {"data": [str(home / "pairs.jsonl")]} if objective == "seq2seq" else {}

    def trainer(out: str, resume: bool = False) -> Trainer:
        setup, _ = run(home, objective, arch=arch, **data)
        config = TrainConfig(tmp_path / out, steps=6, learning_rate=1e-2, dropout=0.1, accumulation=2, threads=2,
                             objective=objective, eval_batches=2)  # fmt: skip
        return Trainer(
            setup.model, setup.train, config, eval_data=setup.valid, tokenizer=setup.tokenizer, resume=resume
        )

    whole = trainer("whole")
    whole.run()
    stopped = trainer("stopped")
    for _ in range(3):
        stopped.step()
    stopped.save()
    resumed = trainer("stopped", resume=True)
    resumed.run()
    np.testing.assert_array_equal(resumed.parameters.weights, whole.parameters.weights)
    np.testing.assert_array_equal(resumed.parameters.second_moment, whole.parameters.second_moment)
    assert resumed.evaluate().loss == whole.evaluate().loss


def test_command_line(home: Path, tmp_path: Path) -> None:
    """A run, what its live line counts, its evaluation, and how it goes on where it was ended."""
    sizes = ["--arch", "t5", "--layers", 1, "--hidden", 16, "--heads", 2, "-c", 32, "--batch-tokens", 128]
    command = [
        *sizes,
        "--tokenizer",
        home / "tokenizer",
        "--objective",
        "seq2seq",
        "-o",
        tmp_path / "run",
        "--steps",
        4,
        "--keep",
        4,
    ]
    environment = {"PYLLM_CACHE": str(home / "cache")}
    made = pyllm("train", home / "pairs.jsonl", *command, "--save-every", 1, "--dropout", 0.1, env=environment)
    assert made.returncode == 0, made.stderr
    assert b"held-out loss" in made.stderr and b"% of peak" in made.stderr
    scored = pyllm("eval", home / "pairs.jsonl", "-m", tmp_path / "run" / "last", "--json", env=environment)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)[0]["documents"] == 30
    wrong = pyllm("eval", home / "texts.jsonl", "-m", tmp_path / "run" / "last", env=environment)
    assert wrong.returncode == 1 and b"expected pairs" in wrong.stderr
    cut = shutil.copytree(tmp_path / "run", tmp_path / "cut", symlinks=True)  # as a kill behind step 2 leaves it
    for step in (3, 4):
        shutil.rmtree(cut / f"step-0000000{step}")
    for name in ("last", "best"):
        (cut / name).unlink()
        (cut / name).symlink_to("step-00000002")
    on = pyllm("train", "--resume", "-o", cut, env=environment)
    assert on.returncode == 0, on.stderr
    for file in ("model.safetensors", "training_state.safetensors"):
        assert (cut / "last" / file).read_bytes() == (tmp_path / "run" / "last" / file).read_bytes()
    assert (cut / "last").resolve().name == "step-00000004"


def test_the_pairs_of_the_example(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "examples" / "number_names.py"
    files = [tmp_path / "numbers.jsonl", tmp_path / "unseen.jsonl"]
    subprocess.run([sys.executable, script, *files], check=True)
    trained, unseen = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(trained) == 9500
    pairs = trained + unseen
    names = {pair["source"]: pair["target"] for pair in pairs}
    assert len(names) == len(set(names.values())) == 10000
    assert names["2 0 2 6"] == "two thousand twenty-six" and names["0"] == "zero" and names["1 1"] == "eleven"


def test_operations_of_both_parts() -> None:
    """Of a model whose matrices are all there is to count, by hand."""
    spec = read_spec(GOLDEN / "t5")
    hidden, inner, heads, size, vocabulary = 20, 28, 4, 6, 67
    own = 2 * (6 * heads * size * hidden + 2 * hidden * inner + vocabulary * hidden)  # self attention, q and o of cross
    own += 4 * heads * size * 1 + 4 * heads * size  # one key each, and one of the source
    read = 2 * (2 * (4 * heads * size * hidden + 2 * hidden * inner) + 2 * heads * size * hidden) + 2 * 4 * heads * size
    assert operations_per_token(spec, 1, 0.0) == 3 * own
    assert operations_per_token(spec, 1, 1.0) == 3 * read
