"""ISA levels and thread counts: what is listed is there, what is forced is active, what cannot be had is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import pyllm
from pyllm import _cpu, isa, system
from pyllm.ops import Ops

LEVELS = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline"]


@pytest.fixture(autouse=True)
def restore_level():
    before = pyllm.active_isa()
    yield
    pyllm.set_isa(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYLLM_", "OMP_"))} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


def test_levels_are_listed_best_first():
    assert _cpu.isa_levels() == LEVELS
    available = pyllm.available_isas()
    assert available == [level for level in LEVELS if level in available]
    assert available[-1] == "baseline"


def cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return next(set(line.split()) for line in file if line.startswith("flags"))


def test_available_levels_agree_with_what_the_kernel_reports():
    flags = cpu_flags()
    avx2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    bf16 = avx512 and {"avx512_bf16", "avx512_vnni"} <= flags
    amx = bf16 and {"amx_tile", "amx_bf16"} <= flags
    expected = {"baseline": True, "avx2": avx2, "avx512": avx512, "avx512_bf16": bf16, "amx_bf16": amx}
    there = {level for level, there in expected.items() if there}
    # A sandbox may refuse the system call that a process needs to make before it uses AMX.
    assert set(pyllm.available_isas()) in (there, there - {"amx_bf16"})


@pytest.mark.parametrize("level", LEVELS)
def test_forced_level_is_active(level: str):
    if level not in pyllm.available_isas():
        with pytest.raises(ValueError, match=r"available here: .*baseline"):
            pyllm.set_isa(level)
        return
    pyllm.set_isa(level)
    assert pyllm.active_isa() == level
    # The work says so too: only levels with 512-bit vectors count their operations in steps of 16 lanes.
    lanes = {"amx_bf16": 16, "avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}[level]
    assert Ops(1).context.limits("f32", chunks=1, rounds=1) == 12 * lanes * 2


def test_unknown_level_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown ISA level avx1024: expected one of amx_bf16, avx512_bf16, avx512, avx2, baseline"
    ):
        pyllm.set_isa("avx1024")


def test_environment_forces_a_level():
    result = run_python("import pyllm; print(pyllm.active_isa())", PYLLM_ISA="baseline")
    assert (result.returncode, result.stdout.strip()) == (0, "baseline"), result.stderr


def test_impossible_environment_is_an_error():
    result = run_python("import pyllm; pyllm.active_isa()", PYLLM_ISA="mmx")
    assert result.returncode != 0
    assert "PYLLM_ISA: unknown ISA level mmx: expected one of amx_bf16" in result.stderr


@pytest.mark.parametrize("bad", ["0", "-1", "2.5", "many", "1025", "9" * 40])
def test_bad_thread_counts_are_refused(bad: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYLLM_THREADS", bad)
    with pytest.raises(ValueError, match="PYLLM_THREADS: expected an integer from 1 to 1024"):
        isa.default_threads()


def test_thread_count_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYLLM_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert isa.default_threads() == 3
    monkeypatch.delenv("PYLLM_THREADS")
    assert isa.default_threads() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert isa.default_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "dynamic")
    assert isa.default_threads() == system.available_cores()


def test_affinity_bounds_the_default():
    pin = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code = pin + "import pyllm; print(pyllm.default_threads())"
    assert run_python(code).stdout.strip() == "1"


def test_build_info_says_what_is_used():
    info = pyllm.build_info()
    assert info["isa"] == pyllm.active_isa()
    assert info["isa_levels"] == LEVELS
    assert info["version"] == pyllm.__version__


def test_import_is_light():
    code = (
        "import sys, pyllm; pyllm.active_isa; "
        "heavy = {'huggingface_hub', 'jinja2', 'tokenizers', 'typer', 'rich', 'torch', 'transformers', 'cuda'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_every_level_computes_the_same_product():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 37)).astype("float32"), rng.normal(size=(70, 37)).astype("float32")
    exact = x.astype("float64") @ w.T.astype("float64")
    for level in pyllm.available_isas():
        pyllm.set_isa(level)
        ops = Ops(2)
        np.testing.assert_allclose(ops.matmul(x, ops.pack(w)), exact, atol=1e-4)
