"""bench/gpu_check.py on the emulated GPU: that the program itself is right before a GPU is at hand."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import cuda_host
import pytest

from pyllm.cuda_ops import CudaOps

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def check():
    cuda_host.library()
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(ROOT / "bench"))
    import gpu_check

    yield gpu_check
    sys.path[:] = path
    for name in {name for name in sys.modules if name.partition(".")[0] in ("gpu", "gpu_check")} - modules:
        del sys.modules[name]


def test_every_step_runs_on_the_emulated_gpu(check, tmp_path, capsys):
    assert check.main([str(tmp_path), "--emulated"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and [line.split()[0] for line in lines if not line.startswith(" ")] == list(check.STEPS)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in check.STEPS}
    assert all(step["state"] == "done" and step["seconds"] > 0 for step in found.values())
    assert found["build"]["gpu"] == "Emulated GPU" and found["facts"]["nvcc"] != ""
    assert {row["name"]: row["value"] > 0 for row in found["roofs"]["rows"]} == dict.fromkeys(
        ("read", "copy", "loading of weights", "edge", "edge, programmatic"), True
    )
    assert [row["passed"] for row in found["kernels"]["rows"]] == [1] * 4
    assert "PASSED" in (tmp_path / "kernels.read_probe.log").read_text()
    assert {row["batch"] for row in found["decode"]["rows"]} == {1, 8}
    units = {row["unit"] for name in ("decode", "products", "attention") for row in found[name]["rows"]}
    assert units == {"GB/s", "TFLOP/s"}
    assert found["llama-8b"]["rows"][0]["value"] > 0


def test_a_step_that_hangs_or_fails_stops_no_other(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(check.STEPS, "facts", replace(check.STEPS["facts"], seconds=0.0001))
    monkeypatch.setattr(check, "__file__", str(tmp_path / "missing.py"))
    assert check.main([str(tmp_path), "--emulated", "--only", "facts,roofs"]) == 1
    states = [json.loads((tmp_path / f"{name}.json").read_text())["state"] for name in ("facts", "roofs")]
    assert states == ["too long", "crashed"]
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["facts", "too"],
        ["roofs", "crashed"],
    ]
    with pytest.raises(SystemExit):
        check.main([str(tmp_path), "--only", "nothing"])


def test_a_step_ends_at_its_deadline_with_all_that_it_started_and_its_figures_stay(check, tmp_path):
    script, found = tmp_path / "step.py", {"state": "crashed", "rows": [{"name": "first", "value": 1.0, "unit": "us"}]}
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "print('one test passed', flush=True)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'child').write_text(str(child.pid))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'facts.json').write_text({json.dumps(found)!r})\n"
        "time.sleep(60)\n"
    )
    run = check.Check(tmp_path, emulated=False)
    for seconds in (1, 5, 25):  # a busy machine may not have started the script by then
        told = check.run_apart([sys.executable, str(script)], run, "facts", seconds)
        if (tmp_path / "child").exists() and "rows" in told:
            break
    assert told["state"] == "too long" and told["rows"] == found["rows"] and told["seconds"] < 55
    assert told["error"].splitlines() == ["one test passed", "", f"not done after {seconds} s"]
    status, ends = Path("/proc", (tmp_path / "child").read_text(), "stat"), time.monotonic() + 20
    with suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while status.read_text().split()[2] != "Z":  # "Z": nobody has asked for its end yet
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_a_figure_that_fails_does_not_take_the_others(check, tmp_path):
    from gpu.timing import guarded, row_of

    def rows():
        yield from guarded("fine", lambda name: iter([row_of(name, "GB/s", 2.0)]))
        yield from guarded("broken", lambda name: iter([row_of(name, "GB/s", 1 / 0)]))
        yield from guarded("late", lambda name: iter([row_of(name, "GB/s", 3.0)]))

    check.run_here(check.Step(lambda check: {"rows": rows()}, 1), check.Check(tmp_path, True), "decode")
    found = json.loads((tmp_path / "decode.json").read_text())
    assert found["state"] == "failed" and [row.get("value") for row in found["rows"]] == [2.0, None, 3.0]
    lines = check.table({"decode": {**found, "seconds": 1.0}})
    assert len(lines) == 4 and any(line.endswith("ZeroDivisionError: division by zero") for line in lines)


WATCHED = """
import os, signal, time
import pytest

def test_right(): pass
@pytest.mark.parametrize("size", [(3, 5), (7, 9)], ids=str)
def test_wrong(size): pytest.fail("relative error 0.5: [0, 1] is 2 instead of 1")
def test_other(): pytest.skip("no Hopper")
def test_hangs(): time.sleep(60)
def test_breaks(): raise RuntimeError("norm: cudaErrorIllegalAddress: an illegal memory access was encountered")
def test_behind(): pass
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.fixture
def missing(): raise KeyError("no such thing")
def test_is_not_begun(missing): pass
def test_last(): pass
"""


@pytest.fixture
def elsewhere(check, tmp_path, monkeypatch):
    """A folder of tests in the place of the package."""
    monkeypatch.setattr("gpu.watched.ROOT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def test_a_test_that_hangs_breaks_or_dies_is_named_and_the_others_run(check, elsewhere):
    from gpu.watched import collect, run_tests

    path, log = elsewhere / "test_watched.py", elsewhere / "log"
    path.write_text(WATCHED)
    ids = collect([str(path)], log)
    found = run_tests(ids, log, patience=3)
    short = {test.split("::")[1]: reason for test, reason in found.failed.items()}
    assert [test.split("::")[1] for test in found.passed] == ["test_right", "test_behind", "test_last"]
    assert len(found.skipped) == 1 and found.told() == len(ids) == 10
    assert list(short) == ["test_wrong[(3, 5)]", "test_wrong[(7, 9)]", "test_hangs", "test_breaks", "test_dies",
                           "test_is_not_begun"]  # fmt: skip
    assert short["test_hangs"] == "hangs: not done after 3 s" and "cudaErrorIllegalAddress" in short["test_breaks"]
    assert short["test_dies"] == "the process ended with status -11" and "no such thing" in short["test_is_not_begun"]
    row = check.correct.outcome_row("norm", found)
    expected = "6 of 10 failed, first test_wrong[(3, 5)]: Failed: relative error 0.5: [0, 1] is 2 instead of 1"
    assert row["error"] == expected


def test_tests_that_fail_are_run_again_without_launches_that_overlap(check, elsewhere):
    path = elsewhere / "test_watched.py"
    path.write_text("""
import os
def test_races(): assert os.environ.get("PYLLM_PDL") == "off"
def test_wrong(): assert 1 + 1 == 3
def test_right(): pass
""")
    ids = [f"test_watched.py::test_{name}" for name in ("races", "wrong", "right")]
    row = check.correct.tested("norm", ids, elsewhere / "log", 10)
    assert row["passed"] == 1 and row["error"].startswith("2 of 3 failed, first test_races: ")
    assert row["error"].endswith("(with PYLLM_PDL=off 1 of 2 pass)")


def test_tests_that_cannot_be_collected_are_told(check, elsewhere):
    from gpu.watched import collect, run_tests

    path, log = elsewhere / "test_none.py", elsewhere / "log"
    path.write_text("import nothing_of_that_name")
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        collect([str(path)], log)
    found = run_tests(["test_none.py::test_gone", "test_none.py::test_too"], log, patience=3)
    [(test, reason)] = found.failed.items()
    assert test.endswith("test_gone") and reason.startswith("not run, with 1 more:") and "nothing_of_that" in reason


def test_every_launcher_has_its_tests_and_every_test_its_kernel(check):
    stub = ast.parse((ROOT / "pyllm" / "_cuda.pyi").read_text())
    launchers = {f.name for f in stub.body if isinstance(f, ast.FunctionDef) and f.args.args[-1:] and
                 f.args.args[-1].arg == "stream"}  # fmt: skip
    named = [kernel for names in check.correct.KERNELS for kernel in names.split(", ")]
    assert {*named} == {*launchers, "wgmma_attention"} and len(named) == len({*named})  # a kernel of prompt_attention
    patterns = [*check.correct.OTHERS.values(), *check.correct.KERNELS.values()]
    ids = check.correct.collect(["--emulated-gpu", "-m", "gpu", *files(check)], Path(os.devnull).parent / "null")
    for test in ids:
        assert sum(re.search(pattern, test) is not None for pattern in patterns) == 1, test
    assert all(any(re.search(pattern, test) for test in ids) for pattern in patterns)


def files(check):
    return [str(ROOT / "tests" / name) for name in check.correct.FILES]


def test_hoppers_kernels_are_left_alone_where_they_failed(check, tmp_path, monkeypatch, capsys):
    for failing, state, after in (
        ("norm", "failed", "on"),
        ("wgmma_matmul", "failed", "off"),
        ("norm", "too long", "off"),
    ):
        monkeypatch.setenv("PYLLM_WGMMA", "on")
        seen, row = [], {"name": failing, "passed": 3, "error": "wrong"}

        def run_apart(command, run, name, seconds, seen=seen, row=row, state=state):
            seen.append((name, os.environ["PYLLM_WGMMA"]))
            return {"state": state, "seconds": 1.0, "rows": [row]}

        monkeypatch.setattr(check, "run_apart", run_apart)
        assert check.main([str(tmp_path), "--only", "roofs,kernels,decode"]) == 1
        assert seen == [("roofs", "on"), ("kernels", "on"), ("decode", after)]
        assert ("PYLLM_WGMMA=off" in capsys.readouterr().out) == (after == "off")


def test_the_sanitizer_begins_with_the_tests_that_failed(check, monkeypatch):
    ran = []
    monkeypatch.setattr(check.correct, "run_aloud", lambda command: (ran.append(command), (9, "========= Invalid"))[1])
    rows = list(check.correct.sanitizer_rows("sanitizer", ["tiny"], {"norm": "tests/test_gpu_layers.py::test_norm[x]"}))
    assert [row["name"] for row in rows] == ["memcheck of norm", "memcheck of a model", "racecheck of a model"]
    assert ran[0][-1].endswith("tests/test_gpu_layers.py::test_norm[x]") and ran[2][-1] == "tiny"
    assert ran[2][:3] == ["sanitizer", "--tool", "racecheck"] and "Invalid" in rows[0]["said"]


def test_the_build_is_judged_by_a_fresh_process(check, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "missing"))
    machine = check.machine
    reason = machine.missing()  # the GPU is missing here, or pyllm itself, and the reason says what
    assert reason is None or "GPU" in reason or "NVIDIA" in reason or "pyllm" in reason
    monkeypatch.setattr(machine, "missing", lambda: "no kernels")
    done = machine.subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="built, but no kernels"):
        machine.install_missing()


@pytest.mark.parametrize(("said", "expected"), [("8.0\n8.0", "80"), ("9.0", "90a"), ("12.0", "120"), ("", None)])
def test_the_build_is_for_the_gpu_that_is_here(check, monkeypatch, said, expected):
    monkeypatch.setattr(check.machine, "nvidia_smi", lambda query: said)
    assert check.machine.architecture_here() == expected


def test_products_that_are_wrong_are_an_error(check, monkeypatch):
    from gpu.timing import device

    with device(True) as gpu:
        ops = CudaOps(gpu)
        given = {"gpu": gpu, "ops": ops, "name": "some"}
        (row,) = check.speed.product(70, 24, 64, **given)
        assert row["value"] > 0
        monkeypatch.setattr(ops, "matmul", lambda x, w, out: gpu.write(out, gpu.zeros(out.shape, out.dtype)))
        monkeypatch.setattr(check.speed, "seconds_of", lambda gpu, launch, count: launch(0) or 1.0)
        with pytest.raises(RuntimeError, match=r"rows \[0, 23, 69\] are wrong: relative error 1"):
            list(check.speed.product(70, 24, 64, **given))
        with pytest.raises(RuntimeError, match=r"columns \[0, 8, 23\], 3 rows are wrong: relative error 1"):
            list(check.speed.decoding(24, 64, (3,), 4096, **given))


def test_launches_are_timed_without_a_graph_where_none_can_be_had(check, monkeypatch, capsys):
    from gpu.timing import device, seconds_of

    launched = []
    with device(True) as gpu:
        monkeypatch.setattr(gpu, "begin_graph", lambda: 1 / 0)
        assert seconds_of(gpu, launched.append, 3, rounds=1) > 0
    assert launched[:4] == [0, 0, 1, 2] and "ZeroDivisionError" in capsys.readouterr().err


def test_the_sanitizer_sees_the_kernels_of_hopper(check, monkeypatch):
    from gpu import timing

    open_emulated, seen = timing.device, set()

    @contextmanager
    def watched(emulated):
        with open_emulated(emulated) as gpu:
            for name in ("wgmma_matmul", "prompt_attention", "skinny_matmul", "split_attention"):
                monkeypatch.setattr(gpu.kernels, name, noting(name, getattr(gpu.kernels, name)))
            yield gpu

    def noting(name, launch):
        def launched(*arguments):
            seen.add((name, arguments[-2]) if name == "prompt_attention" else name)
            launch(*arguments)

        return launched

    monkeypatch.setattr(timing, "device", watched)
    check.correct.tiny(True)
    assert seen == {"wgmma_matmul", ("prompt_attention", True), "skinny_matmul", "split_attention"}


def test_all_steps_together_keep_to_eight_minutes(check, tmp_path, monkeypatch, capsys):
    """Each is given what is left: here the first takes nearly all."""
    assert check.LIMIT < 480
    clock, given = [0.0], {}

    def run_apart(command, run, name, seconds):
        given[name] = seconds
        clock[0] += 460 if name == "roofs" else 5
        return {"state": "done", "seconds": 1.0}

    monkeypatch.setattr(check, "run_apart", run_apart)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    check.main([str(tmp_path), "--only", "roofs,decode,products,attention"])
    assert given == {"roofs": check.STEPS["roofs"].seconds, "decode": 10, "products": 5, "attention": 0}


def test_the_table_of_a_whole_run_has_at_most_40_lines(check):
    figures = [{"name": f"kernel {i // 3}", "unit": "GB/s", "value": 2000.0, "batch": i % 3} for i in range(30)]
    results = {name: {"state": "done", "seconds": 1.0, "rows": figures} for name in check.STEPS}
    results["roofs"] = {"state": "done", "seconds": 1.0, "rows": [{"name": "read", "value": 4000.0, "unit": "GB/s"}]}
    lines = check.table(results)
    assert len(lines) == 40 and lines[-1].endswith("in the JSON files")
    assert any("x0 2000 GB/s (50%), x1" in line for line in lines)


def test_tests_that_passed_share_their_lines_and_one_that_failed_has_its_own(check):
    rows = [{"name": f"kernel_{i}", "passed": i, "skipped": 0} for i in range(30)]
    failed = {"name": "wgmma_matmul", "passed": 3, "error": "1 of 4 failed, first test_matmul[(7, 9)]: wrong"}
    found = {"state": "failed", "seconds": 1.0, "rows": [*rows, failed], "error": "said below"}
    lines = check.table({"kernels": found})
    assert lines[1].split() == ["wgmma_matmul", *failed["error"].split()] and len(lines) < 8
    assert "kernel_0 skipped, kernel_1 1," in lines[2] and all(len(line) <= 160 for line in lines[2:])
