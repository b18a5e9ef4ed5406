"""`pyllm train` and what belongs to it, from outside: settings, logs, interruption, tokenizers, plots, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from oracle import extra
from safetensors.numpy import load_file
from test_cli import COMMAND, environment, refused
from test_cli import pyllm as run_pyllm

from pyllm import LLM
from pyllm.cli.live import operations_per_token
from pyllm.errors import ConfigError, DataError
from pyllm.models import family_of
from pyllm.tokenizer import Tokenizer
from pyllm.train.architectures import new_config
from pyllm.train.evaluation import evaluate
from pyllm.train.logs import COLUMNS, CSV, RunLog, read_log, replace_text
from pyllm.train.plot import plot_run
from pyllm.train.report import EvalReport, StepReport
from pyllm.train.run_config import as_json, read_yaml, settings
from pyllm.train.setup import plan_of_run
from pyllm.train.token_files import read_bin, write_bin
from pyllm.train.token_store import open_tokens

SENTENCES = [
    "Once upon a time there was a little fox named Pip.",
    "Mia had a red kite, and the wind took it away.",
    "The old owl gave the kite back, and all were happy.",
]
SMALL = [
    "--arch",
    "llama",
    "--layers",
    "1",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--context",
    "32",
    "--batch-tokens",
    "64",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a tokenizer and a model."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(SENTENCES, 3)) for _ in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "a.txt").write_text("\n\n".join(texts))
    made = pyllm(folder, "train-tokenizer", "a.jsonl", "--out", "tokenizer", "--vocab-size", 320)
    assert made.returncode == 0, made.stderr
    assert b"tokens" in made.stderr
    tiny_model.make(folder / "model", chat=True)
    return folder


def pyllm(folder: Path, *args: object, **env: str) -> Any:
    return run_pyllm(*args, env={"PYLLM_CACHE": str(folder / "cache"), **env}, cwd=folder)


def trained(folder: Path, *args: object) -> Any:
    result = pyllm(folder, "train", *args)
    assert result.returncode == 0, result.stderr.decode()
    return result


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# --- what works ----------------------------------------------------------------------------------------------------


def test_a_new_model_learns_and_is_an_ordinary_folder(home: Path) -> None:
    result = trained(
        home, "a.jsonl", "--tokenizer", "tokenizer", "--out", "learn", *SMALL, "--steps", 30, "--lr", "1e-2",
        "--eval-every", 10, "--sample-every", 15, "--sample-prompt", "Once", "--sample-tokens", 5, "--seed", 3,
    )  # fmt: skip
    assert result.stdout.decode().startswith(str((home / "learn").resolve()))
    said = result.stderr.decode()
    for part in ("million parameters", "step 1/30 | loss", "% of peak", "held-out loss", "(best)", "step 15: Once|"):
        assert part in said, said
    records = read_log(home / "learn")
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(np.log(320), rel=0.1)
    assert losses[-1] < 0.6 * losses[0]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 30]
    rows = (home / "learn" / CSV).read_text().splitlines()
    assert rows[0] == ",".join(COLUMNS)
    assert len(rows) == 1 + 30 + 3
    llm = LLM(home / "learn" / "last")
    assert llm.generate(["Once upon a"], max_tokens=4)[0].outputs[0].text
    assert llm.spec.head.tied
    kept = json.loads((home / "learn" / "run.json").read_text())
    assert kept["learning_rate"] == 0.01 and kept["data"] == ["a.jsonl"]


def test_yaml_and_flags(home: Path) -> None:
    (home / "run.yaml").write_text(
        "data: [a.jsonl, a.txt]\nweights: [3, 1]\ntokenizer: tokenizer\nout: mixed\narch: gpt2\nlayers: 1\nhidden: 16\n"
        "heads: 2\ncontext: 16\nbatch_tokens: 64\nsteps: 2\nlearning_rate: 1e-3\nmin_learning_rate: 1e-4\n"
        "valid: a.jsonl\npacking: plain\n"
    )
    result = trained(home, "--config", "run.yaml", "--steps", 3, "--json")
    assert "the weights sum to 4 and were normalised: a.jsonl 0.75, a.txt 0.25" in result.stderr.decode()
    told = json.loads(result.stdout)
    assert told["step"] == 3 and told["finished"] is True
    assert json.loads((home / "mixed" / "last" / "config.json").read_text())["model_type"] == "gpt2"


def test_going_on_with_a_model_and_answers_only(home: Path) -> None:
    records = [{"prompt": "Who? ", "completion": text} for text in SENTENCES * 10]
    (home / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trained(home, "qa.jsonl", "-m", "model", "-o", "on", "--steps", 2, "--mask-prompt", "--context", 64)
    [first, *_] = read_log(home / "on")
    assert 0 < first["counted_tokens"] < 0.95 * first["tokens"]
    assert not same(home / "on" / "last", home / "model")
    assert (home / "on" / "last" / "tokenizer.json").is_file()


def test_interrupted_and_resumed_is_uninterrupted(home: Path) -> None:
    args = ["a.jsonl", "--tokenizer", "tokenizer", *SMALL, "--steps", "400", "--valid-share", "0", "--lr", "1e-3"]
    trained(home, *args, "--out", "whole")
    process = subprocess.Popen(
        [*COMMAND, "train", *args, "--out", "cut", "--save-every", "40"],
        cwd=home,
        env=environment(PYLLM_CACHE=str(home / "cache")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (home / "cut" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"go on with: pyllm train --resume --out cut" in err
    at = json.loads((home / "cut" / "last" / "training_state.json").read_text())["step"]
    assert 40 <= at < 400
    trained(home, "--resume", "--out", "cut")
    assert same(home / "whole" / "last", home / "cut" / "last")
    steps = [r["step"] for r in read_log(home / "cut") if r["kind"] == "step"]
    assert steps == list(range(1, 401)), "the log goes on where the checkpoint was"
    losses = [[r["loss"] for r in read_log(home / name) if r["kind"] == "step"] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_a_batch_is_overfitted(home: Path) -> None:
    trained(
        home, "a.jsonl", "--tokenizer", "tokenizer", "--out", "over", *SMALL, "--overfit-batch", 1, "--steps", 60,
        "--lr", "3e-2", "--valid-share", 0,
    )  # fmt: skip
    losses = [r["loss"] for r in read_log(home / "over") if r["kind"] == "step"]
    assert losses[-1] < 0.2 * losses[0]


def test_gradients_are_checked(home: Path) -> None:
    result = trained(home, "a.jsonl", "--tokenizer", "tokenizer", "--out", "no", *SMALL, "--steps", 1, "--check-grads")
    assert "they agree" in result.stderr.decode()
    assert "blocks.0.attn.q.weight" in result.stdout.decode()
    assert not (home / "no").exists()


@pytest.mark.oracle(partly=True)
def test_a_tokenizer_of_ones_own(home: Path) -> None:
    tokenizer = Tokenizer.load(home / "tokenizer")
    text = "Once upon a time, Grüße 你好 🙂\n\n  fox"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode("Once upon a time there was a little fox")) < 25
    if extra.missing():
        return
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(home / "tokenizer")
    assert theirs.encode(text) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_token_files_are_written_and_trained_on(home: Path) -> None:
    for layout in ("llm.c", "nanogpt"):
        made = pyllm(home, "tokenize", "a.jsonl", f"{layout}.bin", "--tokenizer", "tokenizer", "--layout", layout)
        assert made.returncode == 0, made.stderr
    tokens = read_bin(home / "llm.c.bin")
    assert np.array_equal(tokens, read_bin(home / "nanogpt.bin"))
    assert (tokens == 1).sum() == 60
    refused(pyllm(home, "tokenize", "a.jsonl", "nanogpt.bin", "--tokenizer", "tokenizer"), 1, "already exists")
    before = (home / "a.txt").read_bytes()
    refused(pyllm(home, "tokenize", "a.txt", "a.txt", "--tokenizer", "tokenizer"), 2, "ends in .bin")
    assert (home / "a.txt").read_bytes() == before
    trained(home, "nanogpt.bin", "--out", "bin", *SMALL, "--vocab-size", 320, "--packing", "plain", "--steps", 2)


def test_eval_is_the_loss_of_training(home: Path) -> None:
    result = pyllm(home, "eval", "-m", "model", "a.jsonl", "--limit", 5, "--json")
    assert result.returncode == 0, result.stderr
    [found] = json.loads(result.stdout)
    llm = LLM(home / "model")
    lines = [json.loads(line)["text"] for line in (home / "a.jsonl").read_text().splitlines()[:5]]
    scores = llm.score([{"prompt_token_ids": [*llm.encode(text), 1]} for text in lines])
    values = [value for score in scores for value in score.logprobs]
    assert found["tokens"] == len(values)
    assert found["loss"] == pytest.approx(-np.mean(values), rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_eval_of_answers_needs_prompts(home: Path) -> None:
    llm, store = LLM(home / "model"), open_tokens(home / "a.jsonl", home / "model", home / "cache")
    with pytest.raises(ConfigError, match=r"a\.jsonl holds no prompts"):
        evaluate(llm, store, mask_prompt=True, limit=1)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        evaluate(llm, replace(store, maskable=False), mask_prompt=True, limit=1)
    answers = np.zeros(len(store.tokens), np.uint8)
    answers[: int(store.ends[0]) : 2] = 1
    found = evaluate(llm, replace(store, answers=answers), mask_prompt=True, limit=1)
    assert found.tokens == answers[1 : int(store.ends[0])].sum()


def test_a_plot(home: Path) -> None:
    pytest.importorskip("matplotlib")
    trained(home, "a.jsonl", "--tokenizer", "tokenizer", "--out", "drawn", *SMALL, "--steps", 3)
    assert pyllm(home, "plot", "drawn").returncode == 0
    assert (home / "drawn" / "loss.png").read_bytes().startswith(b"\x89PNG")
    refused(pyllm(home, "plot", "drawn", "--out", "x.doc"), 1, "x.doc")
    refused(pyllm(home, "plot", "model"), 1, "expected the folder of a training run")


def test_a_plan_of_training(home: Path) -> None:
    result = pyllm(home, "plan", "--train", "-m", "model", "--batch-tokens", 256, "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["optimizer"] == 2 * plan["gradients"]
    assert plan["total"] == sum(
        plan[n] for n in ("weights", "gradients", "optimizer", "activations", "cache", "scratch")
    )
    (home / "plan.yaml").write_text("arch: llama\nlayers: 2\nhidden: 64\nheads: 2\nvocab_size: 300\ncontext: 32\n")
    text = pyllm(home, "plan", "--train", "--config", "plan.yaml")
    assert text.returncode == 0, text.stderr
    assert b"optimizer" in text.stdout and b"it fits" in text.stdout
    refused(pyllm(home, "plan", "-m", "model", "--batch-tokens", 256), 2, "only with --train")
    refused(pyllm(home, "plan", "--train", "-m", "model", "--quantization", "int8"), 2, "only without --train")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "fragments"),
    [
        (["--steps", 1], 1, ["data: is needed", "out: is needed", "model or arch"]),
        (["a.jsonl", "--out", "x", "--steps", 1, "--arch", "llama", "-m", "model"], 1, ["give one"]),
        (["a.jsonl", "--out", "x", *SMALL, "--steps", 1], 1, ["needs the folder of a tokenizer"]),
        (["a.jsonl", "--out", "x", "-m", "model", "--context", 4096, "--steps", 1], 1, ["at most the model's 128"]),
        (["no.txt", "--out", "x", "-m", "model", "--steps", 1], 1, ["no.txt: no such file"]),
        (["empty.txt", "--out", "x", "-m", "model", "--steps", 1], 1, ["empty.txt: the file is empty"]),
        (["model/model.safetensors", "--out", "x", "-m", "model", "--steps", 1], 1, ["expected a file named .txt"]),
        (["wide.bin", "--out", "x", "-m", "model", "--steps", 1], 1, ["holds token 60000"]),
        (["a.jsonl", "--out", "x", "-m", "model", "--steps", 1, "--mask-prompt"], 1, ["no file holds prompts"]),
        (["a.jsonl", "--out", "x", "-m", "model", "--steps", 1, "--weights", "1,2"], 1, ["one for each of 1 files"]),
        (["a.jsonl", "--out", "x", "-m", "model", "--steps", 1, "--weights", "a"], 1, ["weights: expected a number"]),
        (
            ["a.jsonl", "--out", "x", "-m", "model", "--steps", 1, "--schedule", "up"],
            1,
            ["schedule: expected constant"],
        ),
        (["a.jsonl", "--out", "x", *SMALL, "--tokenizer", "no", "--steps", 1], 1, ["found no folder no"]),
        (["--resume"], 2, ["--resume needs the folder"]),
        (["--resume", "--out", "nothing"], 1, ["no run to resume"]),
        (["--config", "bad.yaml"], 1, ["bad.yaml: not valid YAML"]),
        (
            ["--config", "odd.yaml"],
            1,
            ["learning_rat: unknown; did you mean learning_rate?", "steps: expected an integer"],
        ),
        (["--config", "list.yaml"], 1, ["expected names and values"]),
    ],
)
def test_impossible_runs(home: Path, args: list[object], code: int, fragments: list[str]) -> None:
    (home / "empty.txt").write_text("")
    write_bin(home / "wide.bin", np.array([1, 60000, 2], np.uint16))
    (home / "bad.yaml").write_text("a: [1\n")
    (home / "odd.yaml").write_text("learning_rat: 1\nsteps: many\ndata: a.jsonl\nout: x\nmodel: model\n")
    (home / "list.yaml").write_text("- 1\n")
    result = pyllm(home, "train", *args)
    error = result.stderr.decode()
    assert result.returncode == code, error
    assert "Traceback" not in error
    assert error.startswith("pyllm: error: "), error
    for fragment in fragments:
        assert fragment in error, error
    assert not (home / "x").exists()


def test_a_run_is_not_overwritten_nor_resumed_otherwise(home: Path) -> None:
    args = ["a.jsonl", "--tokenizer", "tokenizer", "--out", "kept", *SMALL, "--steps", 2]
    trained(home, *args)
    refused(pyllm(home, "train", *args), 1, "kept: holds a run already")
    refused(
        pyllm(home, "train", "--resume", "--out", "kept", "--lr", 1),
        1,
        "learning_rate: the run has 0.0006, now it is 1.0",
    )
    refused(pyllm(home, "train", "--resume", "--out", "kept", "a.txt"), 1, "cannot go on with other data")


def test_trackers_that_are_missing_are_named(home: Path) -> None:
    (home / "blocked").mkdir(exist_ok=True)
    for name in ("tensorboard", "wandb"):
        (home / "blocked" / f"{name}.py").write_text("raise ImportError('not here')")
    paths = os.pathsep.join([str(home / "blocked"), *filter(None, [os.environ.get("PYTHONPATH")])])
    args = ["a.jsonl", "--tokenizer", "tokenizer", "--out", "untracked", *SMALL, "--steps", 1]
    for flags, package in ((["--tensorboard"], "tensorboard"), (["--wandb", "project"], "wandb")):
        result = pyllm(home, "train", *args, *flags, PYTHONPATH=paths)
        assert result.returncode == 1
        assert f"{package} is not installed: pip install 'pyllm[{package}]'" in result.stderr.decode()


def test_wandb_gets_the_folder_of_the_run(home: Path) -> None:
    """A stand-in for the package, which is told `--out .`."""
    (home / "stand-in").mkdir()
    (home / "stand-in" / "wandb.py").write_text(
        "import os\n\nclass Run:\n    def log(self, *_, **__): pass\n\ndef init(name, dir, **_):\n"
        "    assert os.path.isdir(dir)\n    print('told', name)\n    return Run()\n"
    )
    (home / "tracked").mkdir()
    paths = os.pathsep.join([str(home / "stand-in"), *filter(None, [os.environ.get("PYTHONPATH")])])
    args = ["../a.jsonl", "--tokenizer", "../tokenizer", *SMALL, "--steps", 1, "--wandb", "project"]
    for out, name in ((".", "tracked"), ("below", "below")):
        result = run_pyllm(
            "train", *args, "--out", out, env={"PYLLM_CACHE": str(home / "cache"), "PYTHONPATH": paths},
            cwd=home / "tracked",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert f"told {name}\n" in result.stdout.decode()


def test_tokenizers_that_cannot_be(home: Path, tmp_path: Path) -> None:
    made = ["train-tokenizer", "a.txt", "--out", tmp_path / "t"]
    refused(pyllm(home, *made, "--vocab-size", 100), 1, "at least 258")
    refused(pyllm(home, *made, "--special", "<s>"), 1, "different names")
    refused(pyllm(home, "train-tokenizer", "a.txt", "--out", "model"), 1, "already exists")
    refused(
        pyllm(home, "train-tokenizer", "llm.c.bin", "--out", tmp_path / "t"), 1, "expected a file named .txt or .jsonl"
    )


# --- parts ---------------------------------------------------------------------------------------------------------


def test_settings_survive_their_own_json(tmp_path: Path) -> None:
    values = {"data": "a.txt", "out": "x", "arch": "llama", "steps": 5, "weights": [1, 2.5], "sample_prompts": "Once"}
    made = settings(values)
    assert made[0].data == ("a.txt",) and made[0].weights == (1.0, 2.5)
    assert made[1].out == Path("x") and made[1].sample_prompts == ("Once",)
    path = tmp_path / "run.json"
    path.write_text(as_json(*made))
    assert settings(read_yaml(path)) == made


def test_the_examples_are_settings_of_runs_beside_each_other() -> None:
    examples = Path(__file__).resolve().parents[1] / "examples"
    runs = [settings(read_yaml(path))[1].out for path in sorted(examples.glob("*.yaml"))]
    assert len(set(runs)) == len(runs) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", True, "steps: expected an integer, found True"),
        ("steps", 1.5, "steps: expected an integer"),
        ("learning_rate", "fast", "learning_rate: expected a number"),
        ("tie", 1, "tie: expected true or false"),
        ("data", [1], "data: expected text"),
        ("FREE", ["out"], "FREE: unknown"),
        ("n_layers", 3, "did you mean layers?"),
    ],
)
def test_values_of_a_wrong_kind(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        settings({"data": "a.txt", "out": "x", "arch": "llama", "steps": 5, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "bert"}, "expected gpt2 or llama"),
        ({"heads": 3}, "multiple of the 3 heads"),
        ({"heads": 32}, "an even multiple"),
        ({"kv_heads": 3}, "a divisor of the 4 heads"),
        ({"arch": "gpt2", "kv_heads": 2}, "a divisor"),
        ({"arch": "gpt2", "tie": False}, "one matrix"),
        ({"layers": 0}, "layers: expected 1 to"),
        ({"ffn": 0}, "ffn: expected 1 to"),
        ({"vocab_size": 0}, "vocab_size: expected 1 to"),
        ({"context": 0}, "context: expected 1 to"),
    ],
)
def test_sizes_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {
        "arch": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": None, "ffn": None, "tie": True,
        "context": 64, "vocab_size": 100, "tokenizer": None,
    }  # fmt: skip
    for arch in ("gpt2", "llama"):
        config = new_config(**{**sizes, "arch": arch})
        spec = family_of(config).read(config)
        assert (len(spec.blocks), spec.hidden, spec.max_positions, spec.vocab_size) == (2, 32, 64, 100)
    with pytest.raises(ConfigError, match=message):
        new_config(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context: expected"),
        ({"vocab_size": 0}, "vocab_size: expected"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least the context of 256, got 0"),
        ({"ffn": 0}, "ffn: expected"),
        ({"model": True, "context": 0}, "context: expected at least 1"),
    ],
)
def test_zero_is_not_the_default(home: Path, changes: dict[str, Any], message: str) -> None:
    base = {"model": str(home / "model")} if "model" in changes else {"arch": "llama", "vocab_size": 100}
    with pytest.raises(ConfigError, match=message):
        plan_of_run({**base, **{name: value for name, value in changes.items() if name != "model"}})


def test_a_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def cut() -> Iterator[str]:
        yield "new"
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.json"
    replace_text(path, ["old", "\n"])
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, cut())
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_operations_of_a_token_count_the_head_for_each() -> None:
    sizes: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": None, "ffn": None, "tie": True}
    config = new_config("gpt2", **sizes, context=64, vocab_size=100, tokenizer=None)
    spec = family_of(config).read(config)
    products = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 100 * 32
    keys = (64 + 1) / 2  # that a query sees, on average
    assert operations_per_token(spec, 64) == 3 * (2 * products + 2 * 2 * 2 * 32 * keys)


def test_a_plot_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path)
    log.started(0, 10, 1)
    for step in range(1, 4):
        log.stepped(StepReport(step, 1.0 / step, 1e-3, 0.5, 64, 60, 0.1))
        log.evaluated(EvalReport(step, float("nan" if step == 2 else "inf"), 7.4, 60, True, 0.1))
    plot_run(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="odd"):
        plot_run(tmp_path, tmp_path / "loss.odd")


def test_a_log_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.started(0, 10, 1)
    for step in range(1, 6):
        log.stepped(StepReport(step, 1.0 / step, 1e-3, 0.5, 64, 60, 0.1))
        log.evaluated(EvalReport(step, 2.0, 7.4, 60, True, 0.1))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')  # killed while it wrote
    RunLog(tmp_path).started(3, 10, 1)
    assert [r["step"] for r in read_log(tmp_path)] == [1, 1, 2, 2, 3, 3]
    assert len((tmp_path / CSV).read_text().splitlines()) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [CSV, "log.jsonl"]
    (tmp_path / "log.jsonl").write_text('{"kind": 1\n{}\n')
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        read_log(tmp_path)
