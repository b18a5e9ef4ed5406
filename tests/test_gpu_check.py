"""bench/gpu_check.py on the emulated GPU: that the program itself is right before a GPU is at hand."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import cuda_host
import ml_dtypes
import pytest

from pyllm.cuda_ops import CudaOps

PATH = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def check():
    cuda_host.library()
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def test_every_step_runs_on_the_emulated_gpu(check, tmp_path, capsys):
    assert check.main([str(tmp_path), "--emulated"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and [line.split()[0] for line in lines if not line.startswith(" ")] == list(check.STEPS)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in check.STEPS}
    assert all(step["state"] == "done" and step["seconds"] > 0 for step in found.values())
    assert found["facts"]["gpu"] == "Emulated GPU" and found["roofs"]["read GB/s"] > 0
    assert "passed" in found["tests"]["summary"][0] and "PASSED" in (tmp_path / "tests.log").read_text()
    assert {row["batch"] for row in found["kernels"]["rows"] if "batch" in row} == {1, 8}
    assert {row["unit"] for row in found["kernels"]["rows"]} == {"GB/s", "TFLOP/s"}
    assert found["llama-8b"]["rows"][0]["value"] > 0


def test_a_step_that_hangs_or_fails_stops_no_other(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(check.STEPS, "facts", replace(check.STEPS["facts"], seconds=0.001))
    monkeypatch.setattr(check, "PATIENCE", 1)
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


def test_a_step_ends_at_its_deadline_with_all_that_it_started_and_its_figures_stay(check, tmp_path, monkeypatch):
    script, found = tmp_path / "step.py", {"state": "crashed", "rows": [check.row_of("first", "GB/s", 1.0)]}
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "print('one test passed', flush=True)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid))\n"
        f"pathlib.Path(sys.argv[1], 'facts.json').write_text({json.dumps(found)!r})\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(check, "__file__", str(script))
    for seconds in (1, 5, 25):  # a busy machine may not have started the script by then
        monkeypatch.setitem(check.STEPS, "facts", replace(check.STEPS["facts"], seconds=seconds))
        told = check.run(tmp_path, "facts", emulated=False)
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
    def rows():
        yield from check.guarded("fine", lambda name: iter([check.row_of(name, "GB/s", 2.0)]))
        yield from check.guarded("broken", lambda name: iter([check.row_of(name, "GB/s", 1 / 0)]))
        yield from check.guarded("late", lambda name: iter([check.row_of(name, "GB/s", 3.0)]))

    check.run_here(tmp_path / "kernels.json", check.Step(lambda emulated: {"rows": rows()}, 1), True)
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["state"] == "failed" and [row.get("value") for row in found["rows"]] == [2.0, None, 3.0]
    lines = check.table({"kernels": {**found, "seconds": 1.0}})
    assert lines[0].endswith("ZeroDivisionError: division by zero") and len(lines) == 4


def test_the_build_is_judged_by_a_fresh_process(check, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "missing"))
    reason = check.missing()  # the GPU is missing here, or pyllm itself, and the reason says what
    assert reason is None or "GPU" in reason or "NVIDIA" in reason or "pyllm" in reason
    monkeypatch.setattr(check, "missing", lambda: "no kernels")
    done = check.subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="built, but no kernels"):
        check.build(emulated=False)


@pytest.mark.parametrize(("said", "expected"), [("8.0\n8.0", "80"), ("9.0", "90a"), ("12.0", "120"), ("", None)])
def test_the_build_is_for_the_gpu_that_is_here(check, monkeypatch, said, expected):
    monkeypatch.setattr(check, "nvidia_smi", lambda query: said)
    assert check.architecture_here() == expected


def test_products_that_are_wrong_are_an_error(check, monkeypatch):
    with check.device(True) as gpu:
        ops = CudaOps(gpu)
        (row,) = check.product(gpu, ops, 70, 24, 64, "right")
        assert row["value"] > 0
        zeros = gpu.zeros((70, 24), ml_dtypes.bfloat16)
        monkeypatch.setattr(ops, "matmul", lambda x, w, out: gpu.write(out, zeros))
        with pytest.raises(RuntimeError, match=r"rows \[0, 23, 69\] are wrong: relative error 1"):
            list(check.product(gpu, ops, 70, 24, 64, "wrong"))


def test_the_sanitizer_sees_the_kernels_of_hopper(check, monkeypatch):
    open_emulated, seen = check.device, set()

    @contextmanager
    def watched(emulated):
        with open_emulated(emulated) as gpu:
            for name in ("wgmma_matmul", "wgmma_attention", "skinny_matmul", "split_attention"):
                launch = getattr(gpu.kernels, name)
                watch = partial(lambda name, launch, *arguments: seen.add(name) or launch(*arguments), name, launch)
                monkeypatch.setattr(gpu.kernels, name, watch)
            yield gpu

    monkeypatch.setattr(check, "device", watched)
    check.tiny(True)
    assert seen == {"wgmma_matmul", "wgmma_attention", "skinny_matmul", "split_attention"}


def test_all_steps_together_keep_to_eight_minutes(check):
    assert sum(step.seconds for step in check.STEPS.values()) <= 480


def test_the_table_of_a_whole_run_has_at_most_40_lines(check):
    rows = [check.row_of(f"kernel {i // 3}", "GB/s", 2000.0, batch=i % 3) for i in range(30)]
    results = {name: {"state": "done", "seconds": 1.0, "rows": rows} for name in check.STEPS}
    results["roofs"] = {"state": "done", "seconds": 1.0, "read GB/s": 4000.0}
    lines = check.table(results)
    assert len(lines) == 40 and lines[-1].endswith("in the JSON files")
    assert any("x0 2000 GB/s (50%), x1" in line for line in lines)
