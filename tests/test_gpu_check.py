"""bench/gpu_check.py on the emulated GPU: that the program itself is right before a GPU is at hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import cuda_host
import pytest

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
    assert "passed" in found["tests"]["summary"][0]
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


def test_all_steps_together_keep_to_eight_minutes(check):
    assert sum(step.seconds for step in check.STEPS.values()) <= 480


def test_the_table_of_a_whole_run_has_at_most_40_lines(check):
    rows = [check.row_of(f"kernel {i // 3}", "GB/s", 2000.0, batch=i % 3) for i in range(30)]
    results = {name: {"state": "done", "seconds": 1.0, "rows": rows} for name in check.STEPS}
    results["roofs"] = {"state": "done", "seconds": 1.0, "read GB/s": 4000.0}
    lines = check.table(results)
    assert len(lines) == 40 and lines[-1].endswith("in the JSON files")
    assert any("x0 2000 GB/s (50%), x1" in line for line in lines)
