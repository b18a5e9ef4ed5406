"""The comparison's harness, with engines that only pretend: turns, medians, what is missing, tables, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Fast

from pyllm.cli import run as run_cli
from pyllm.compare import measure, shapes
from pyllm.compare.engine import OURS, EngineInfo, Settings, Unsupported, prompts
from pyllm.compare.measure import CELLS, Plan, groups
from pyllm.compare.report import report
from pyllm.compare.results import Cell, CellResult, Comparison, ModelResult, Turn, combined, from_json, to_json
from pyllm.compare.worker import Worker, WorkerError
from pyllm.limits import Limits
from pyllm.llm import LLM

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}
LIMITS = Limits(threads=1, isa="fake", read_gbps=2.0, f32_gflops=4.0, bf16_gflops=8.0, int8_gops=16.0)


def fake(kind: str, needs: tuple[str, ...] = ()) -> EngineInfo:
    return EngineInfo(kind.lower(), f"fake_engine:{kind}", needs, "numpy")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pretending engines write down what they are asked for."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setenv("FAKE_ENGINE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "log"


def compared(log: Path, *peers: EngineInfo, ours: EngineInfo | None = None, **plan: Any) -> Comparison:
    engines = {OURS: ours or fake("Fast"), **{peer.name: peer for peer in peers}}
    defaults = dict(models=["tiny"], dtypes=["float32"], cells=["decode"], threads=1, rounds=3)
    whole = Plan(**{**defaults, **plan}, peers=[peer.name for peer in peers], folder=log.parent / "models")
    *_, last = measure.compare(whole, lambda text: None, engines=engines, measure_limits=lambda threads: LIMITS)
    return last


# Turns


def test_engines_take_turns_after_all_are_ready(log: Path):
    compared(log, fake("Slow"), cells=["decode", "batch-2"])
    lines = [line for line in log.read_text().splitlines() if "load" not in line]
    assert lines[:2] == ["Fast start 1 x 16", "Slow start 1 x 16"]  # the first token, behind loading
    ready = ["{0} start 1 x 16", "{0} decode 4"]
    turn = ["{0} decode 1", "{0} decode 64"]

    def both(calls: list[str]) -> list[str]:
        return [call.format(name) for name in ("Fast", "Slow") for call in calls]

    one = both(ready) + 3 * both(turn)
    assert lines[2 : 2 + len(one)] == one
    assert lines[2 + len(one) :] == [line.replace("1 x 16", "2 x 16") for line in one]


def test_what_is_measured_so_far_comes_after_every_cell(log: Path):
    plan = Plan(["tiny"], ["float32"], ["load", "prefill-512", "decode"], [], 1, 1, log.parent / "models")
    engines = {OURS: fake("Fast")}
    done = [
        [result.cell.name for result in comparison.models[0].cells if result.turns]
        for comparison in measure.compare(plan, lambda text: None, engines=engines, measure_limits=lambda n: LIMITS)
    ]
    all_of_them = ["load", "prefill-512", "decode"]
    assert done == [all_of_them[:1], all_of_them[:2], all_of_them, all_of_them]  # and once more at the end


def test_every_round_of_load_is_a_fresh_process(log: Path):
    comparison = compared(log, fake("Slow"), cells=["load", "prefill-512"])
    loads = [line for line in log.read_text().splitlines() if "load" in line]
    assert loads == ["Fast load", "Slow load"] * 3
    load, prefill = comparison.models[0].cells
    assert len(load.turns) == len(prefill.turns) == 3
    assert all(turn.seconds[name] > 0 for turn in load.turns + prefill.turns for name in (OURS, "slow"))
    assert load.peak_memory[OURS] > 1_000_000


def test_steps_tokens_and_bytes_of_a_round(log: Path):
    comparison = compared(log, fake("Slow"), cells=["batch-2"], dtypes=["bfloat16"])
    [model] = comparison.models
    [result] = model.cells
    assert result.tokens == 2 * 64
    length = 16 + 1 + 4 + 3 * 65
    depth = (16 + length) // 2
    values = 2 * 2 * 2 * 16  # layers, keys and values, heads, channels
    assert result.bytes[OURS] == 64 * (1000 + 2 * depth * values * 2.0)
    size = (log.parent / "models/tiny-bfloat16/model.safetensors").stat().st_size
    blocks, vocabulary = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96), 300 * 64
    stored = blocks + 2 * vocabulary + 5 * 64
    assert model.weight_bytes["slow"] == pytest.approx(size * (blocks + vocabulary) / stored)
    assert result.rate(OURS) == pytest.approx(200)
    assert result.ratio("slow") == pytest.approx(3)


def test_first_tokens_are_compared(log: Path):
    result = compared(log, fake("Slow")).models[0].cell("decode")
    assert result is not None
    assert result.greedy[OURS] == [1, 2, 3, 4, 5]
    assert result.agreement("slow") == (5, 5)
    result.greedy["slow"] = [1, 2, 9, 4, 9]
    assert result.agreement("slow") == (3, 5)


def test_contexts_that_are_too_short_skip_a_cell(log: Path):
    comparison = compared(log, cells=["prefill-512", "decode-8192"])
    [model] = comparison.models
    assert [result.cell.name for result in model.cells] == ["prefill-512"]
    assert "context of 4096" in model.skipped["decode-8192"]
    assert "- decode-8192: " in report(comparison)


# What is missing


def test_a_missing_peer_is_said(log: Path):
    comparison = compared(log, fake("Slow", needs=("no_such_package",)))
    [model] = comparison.models
    assert model.missing == {"slow": "not installed (no_such_package): pip install 'pyllm[compare]'"}
    assert model.cells[0].engines == [OURS]
    assert "- slow: not installed (no_such_package)" in report(comparison)


def test_what_an_engine_refuses_is_missing_with_its_reason(log: Path):
    comparison = compared(log, fake("Picky"), dtypes=["float32", "int8"], cells=["decode", "batch-2"])
    float32, int8 = comparison.models
    assert int8.missing == {"picky": "knows no int8"}
    assert float32.cells[0].engines == [OURS, "picky"]
    assert float32.cells[1].missing == {"picky": "one at a time"}
    assert "- batch-2, picky: one at a time" in report(comparison)


def test_peers_are_measured_where_ours_cannot_run(log: Path):
    comparison = compared(log, fake("Slow"), ours=fake("Picky"), dtypes=["int8"])
    [result] = comparison.models[0].cells
    assert result.engines == ["slow"]
    assert result.ratio("slow") is None
    assert comparison.models[0].missing == {OURS: "knows no int8"}
    assert "3.00x" not in report(comparison)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Failing", "ArithmeticError: out of numbers"),
        ("Dying", "its process was ended by SIGKILL, as the system does where memory runs out: last words"),
    ],
)
def test_an_engine_that_fails_holds_up_nobody(log: Path, kind: str, reason: str):
    comparison = compared(log, fake(kind), fake("Slow"), cells=["decode", "batch-2"])
    for result in comparison.models[0].cells:
        assert result.missing == {kind.lower(): reason}
        assert result.engines == [OURS, "slow"]
        assert len(result.turns) == 3


def test_engines_that_do_not_fit_together_are_measured_in_groups(log: Path, monkeypatch: pytest.MonkeyPatch):
    assert groups(["a", OURS, "b", "c"], 1.0, 3.9) == [[OURS, "a", "b"], [OURS, "c"]]
    assert groups([OURS, "a", "b"], 1.0, 0.5) == [[OURS, "a"], [OURS, "b"]]
    assert groups([OURS], 1.0, 9.0) == [[OURS]]
    assert groups(["a", "b"], 1.0, 1.0) == [["a"], ["b"]]
    assert groups([], 1.0, 9.0) == []
    monkeypatch.setattr(measure, "available_memory", lambda: 0)
    [result] = compared(log, fake("Slow"), fake("Picky"), rounds=2).models[0].cells
    assert [sorted(turn.seconds) for turn in result.turns] == [["pyllm", "slow"]] * 2 + [["picky", "pyllm"]] * 2
    assert result.ratio("slow") == pytest.approx(3)
    assert result.ratio("picky") == pytest.approx(1)


@pytest.mark.parametrize("what", ["models", "dtypes", "cells", "peers"])
def test_unknown_names_are_refused(tmp_path: Path, what: str):
    names = dict(models=["gpt2"], dtypes=["int8"], cells=["decode"], peers=["torch"]) | {what: ["nonsense"]}
    with pytest.raises(ValueError, match=f"{what}: expected some of .*, got 'nonsense'"):
        Plan(**names, threads=1, rounds=1, folder=tmp_path).check()


# Workers


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_idle_engines_are_stopped_and_ended_at_the_end(log: Path):
    with Worker(fake("Fast"), 1) as worker:
        worker.load(log.parent, Settings("float32", 1))
        pid = worker._process.pid
        deadline = time.monotonic() + 10
        while state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(pid) == "T"
        worker.call("reserve", 2, 8)
        assert worker.call("start", [[1, 2], [3, 4]]).result == [1, 1]
        assert worker.call("decode", 2).result == [0.02, [[2, 3], [2, 3]]]
        assert worker.memory["peak"] >= worker.memory["anonymous"] > 0
    assert not Path(f"/proc/{pid}").exists()


def test_errors_come_back_and_the_engine_goes_on(log: Path):
    with Worker(fake("Picky"), 1) as worker:
        worker.load(log.parent, Settings("float32", 1))
        with pytest.raises(Unsupported, match="one at a time"):
            worker.call("reserve", 2, 8)
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("no_such_method")
        assert worker.call("start", [[1]]).result == [1]


def test_an_engine_that_cannot_be_imported(log: Path):
    with pytest.raises(WorkerError, match="ModuleNotFoundError"):
        Worker(EngineInfo("lost", "no_such_module:Engine", (), "numpy"), 1)


def test_engines_end_with_who_started_them_even_when_killed(log: Path):
    program = (
        "import time; from pyllm.compare.engine import EngineInfo; from pyllm.compare.worker import Worker\n"
        "worker = Worker(EngineInfo('fast', 'fake_engine:Fast', (), 'numpy'), 1)\n"
        "worker.prepare('.', 'float32'); print(worker._process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and state(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists() or state(pid) == "Z"


def test_our_engine_gives_what_generate_gives(tiny_folder: Path):
    from pyllm.compare.ours import Pyllm

    ids = prompts(3, 20, 300)
    engine = Pyllm(tiny_folder, Settings("float32", 1, sequences=3, length=40, tokens=120))
    engine.reserve(3, 40)
    first = engine.start(ids)
    more = engine.decode(2).tokens, engine.decode(5).tokens
    found = [[token, *a, *b] for token, a, b in zip(first, *more, strict=True)]
    llm = LLM(tiny_folder, threads=1, dtype="float32", max_model_len=40)
    requests = [{"prompt_token_ids": one} for one in ids]
    expected = llm.generate(requests, temperature=0, max_tokens=8, ignore_eos=True)
    assert found == [output.outputs[0].token_ids for output in expected]
    assert engine.start(ids[:1]) == first[:1]
    assert engine.cache_value_bytes >= 4


# Figures


def example() -> CellResult:
    """Ours takes 1, 2, 4 s and the other 3, 4, 6 s, while reading gets slower and slower."""
    turns = [
        Turn(Limits(2, "fake", read, 100.0, 200.0, 400.0), {OURS: ours, "other": theirs})
        for read, ours, theirs in ((40.0, 1.0, 3.0), (20.0, 2.0, 4.0), (10.0, 4.0, 6.0))
    ]
    return CellResult(Cell("decode", "decode"), 8, 10e9, {OURS: 30e9, "other": 60e9}, turns)


def test_medians_ratios_and_fractions():
    result = example()
    assert result.engines == [OURS, "other"]
    assert result.seconds(OURS) == 2.0
    assert result.rate("other") == 2.0
    assert result.ratio("other") == 2.0  # of 3, 2, 1.5
    assert result.ratio(OURS) == 1.0
    assert result.fraction(OURS, "float32") == 0.75  # each round against its own limit
    assert result.fraction("other", "float32") == 0.75  # of 0.5, 0.75, 1
    assert result.limited_by(OURS, "float32") == "bytes"
    result.operations = 800e9
    assert result.limited_by(OURS, "float32") == "operations"
    assert result.limited_by(OURS, "int4") == "operations"
    assert result.needed(result.turns[0].limits, OURS, "float32") == 8.0
    assert result.needed(result.turns[0].limits, OURS, "bfloat16") == 4.0
    assert result.needed(result.turns[0].limits, OURS, "int4") == 2.0
    del result.turns[1].seconds["other"]
    assert result.ratio("other") == 2.25  # only rounds that have both


def saved(path: Path, dtype: str = "int8") -> Path:
    model = ModelResult("tiny", dtype, versions={OURS: "pyllm 1", "other": "other 2"})
    model.weight_bytes = {OURS: 1e9, "other": 2e9}
    model.cells = [example()]
    model.cells[0].peak_memory = {OURS: 1_500_000_000, "other": 4_000_000_000}
    model.cells[0].greedy = {OURS: [1, 2], "other": [1, 3]}
    model.missing = {"torch": "not installed"}
    comparison = Comparison("a machine", 2, 3, "2026-01-01 00:00", [model])
    path.write_text(json.dumps(to_json(comparison)))
    return path


def test_saved_comparisons_come_back_as_they_were(tmp_path: Path):
    value = json.loads(saved(tmp_path / "a.json").read_text())
    assert to_json(from_json(value)) == value
    ours, other = value["figures"]
    assert ours["tokens_per_second"] == 4.0
    assert other["times_as_fast_as_it"] == 2.0
    assert other["fraction_of_limit"] == 0.75
    assert other["peak_memory_bytes"] == 4_000_000_000


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [saved(tmp_path / "a.json"), saved(tmp_path / "b.json", "int4")]
    assert run_cli(["bench", "--compare", *(word for file in files for word in ("--load", str(file)))]) == 0
    text = capsys.readouterr().out
    assert text.count("### tiny, int8") == text.count("### tiny, int4") == 1
    assert "Limits (fake): reads 20.0 GB/s, computes 400 GOP/s." in text
    rows = [[field.strip() for field in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "pyllm 1", "other 2"]
    assert rows[2:6] == [
        ["decode, tok/s", "4.00 (75%)", "2.00 (75%) 2.00x"],
        ["peak memory, one sequence, GB", "1.50 (1.50 x weights)", "4.00 (2.00 x weights)"],
        ["peak memory, all of these, GB", "1.50 (1.50 x weights)", "4.00 (2.00 x weights)"],
        ["equal tokens", "2 of 2", "1 of 2"],
    ]
    assert "- torch: not installed" in text


def test_cells_of_several_runs_come_together():
    first, again, late = (Comparison("a machine", 2, 3, began, [ModelResult("tiny", "int8")]) for began in "abc")
    first.models[0].cells = [example(), replace(example(), cell=Cell("batch-4", "decode", 4), turns=[])]
    first.models[0].cells[0].peak_memory = {OURS: 3}
    again.models[0].cells = [replace(example(), tokens=16)]
    again.models[0].versions = {OURS: "pyllm 1"}
    late.models[0].cells = [replace(example(), cell=Cell("batch-4", "decode", 4), peak_memory={OURS: 2})]
    [model] = combined([first, late]).models
    assert [(result.cell.name, len(result.turns), result.peak_memory) for result in model.cells] == [
        ("decode", 3, {OURS: 3}),
        ("batch-4", 3, {OURS: 2}),
    ]
    whole = combined([first, again, Comparison("another", 2, 3, "d", [ModelResult("tiny", "int4")])])
    assert (whole.began, [one.dtype for one in whole.models]) == ("a", ["int8", "int4"])
    decode = whole.models[0].cell("decode")
    assert decode is not None and decode.tokens == 16
    assert whole.models[0].versions == {OURS: "pyllm 1"}
    assert len(first.models[0].cells) == 2  # what came in stays as it was


def test_json_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = saved(tmp_path / "a.json")
    assert run_cli(["bench", "--compare", "--load", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


def test_the_plot(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra compare")
    file = saved(tmp_path / "a.json")
    assert run_cli(["bench", "--compare", "--load", str(file), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt3"], "--models: expected some of gpt2, llama-1b"),
        (["--dtypes", "int8,int3"], "--dtypes: expected some of float32, bfloat16, int8, int4, got 'int3'"),
        (["--cells", "decode-9"], "--cells: expected some of load"),
        (["--peers", "pyllm"], "--peers: expected some of llama.cpp, ctranslate2, torch, got 'pyllm'"),
        (["--load", "{broken}"], "--load {broken}: "),
        (["--load", "{other}"], "expected a comparison saved by"),
        (["--dtype", "int8"], "--dtype: only without --compare"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: list[str], message: str):
    import typer

    names = {"broken": str(tmp_path / "broken.json"), "other": str(tmp_path / "other.json")}
    Path(names["broken"]).write_text("{")
    Path(names["other"]).write_text("[]")
    given = [argument.format(**names) for argument in arguments]
    with pytest.raises(typer.BadParameter) as caught:
        run_cli(["bench", "--compare", *given])
    assert message.format(**names) in str(caught.value)


def test_options_of_the_comparison_need_it():
    import typer

    with pytest.raises(typer.BadParameter, match="--peers, --load: only with --compare"):
        run_cli(["bench", "--peers", "torch", "--load", "file"])


def test_made_models_have_no_two_tensors_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.numpy import load_file

    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    tensors = load_file(shapes.make("tiny", tmp_path / "model", "float32") / "model.safetensors")
    matrices = [tensor.tobytes() for name, tensor in tensors.items() if tensor.ndim == 2]
    assert len(set(matrices)) == len(matrices) > 10


def test_cells_are_named_for_what_they_are():
    assert {name: cell.name for name, cell in CELLS.items()} == {name: name for name in CELLS}
    assert all(f"-{cell.prompt}" in name for name, cell in CELLS.items() if cell.prompt > 16)
    assert Fast.weight_bytes == 1000
