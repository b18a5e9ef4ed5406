"""No weak symbol of one ISA level can replace another's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from symbols import LEVELS, nm, outside, shared_symbols

from pyllm import _cpu

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


@needs_nm
def test_module_symbols_of_kernels_carry_their_level():
    listing = nm(Path(_cpu.__file__))
    if not listing.strip():
        pytest.skip("the compiled module is stripped; CI checks the object files instead")
    shared = [s for s in shared_symbols(listing) if "5pyllm" in s]
    kernels = [s for s in shared if "isa_" in s or "4simd" in s]
    assert [s for s in kernels if all(outside([s], level) for level in LEVELS)] == []
    for level in LEVELS:  # each level's table is there
        assert f"{len('isa_' + level)}isa_{level}7kernels" in listing


def test_a_symbol_without_a_level_is_found():
    listing = (
        "0000000000000000 W _ZN5pyllm3cpu12parallel_forIZNS_1aE\n"
        "0000000000000010 W _ZN5pyllm15isa_avx512_bf164simd3maxE\n"
        "0000000000000020 W _ZSt4swapIfE\n"
        "0000000000000030 T _ZN5pyllm10isa_avx5126matmulE\n"
        "                 U _ZN5pyllm8isa_avx24normE\n"
    )
    shared = shared_symbols(listing)
    assert len(shared) == 3
    assert outside(shared, "avx512_bf16") == ["_ZN5pyllm3cpu12parallel_forIZNS_1aE", "_ZSt4swapIfE"]
    assert outside(["_ZN5pyllm10isa_avx5126matmulE"], "avx512") == []
    assert outside(["_ZN5pyllm10isa_avx5126matmulE"], "avx2") != []


@needs_nm
def test_a_weak_function_in_an_object_is_found(tmp_path: Path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, target = tmp_path / "a.cc", tmp_path / "a.o"
    source.write_text(
        "inline __attribute__((noinline)) int shared(int x) { return x * x; }\nint f(int x) { return shared(x); }\n"
    )
    subprocess.run([compiler, "-c", "-O2", str(source), "-o", str(target)], check=True)
    assert outside(shared_symbols(nm(target)), "baseline") == ["_Z6sharedi"]
