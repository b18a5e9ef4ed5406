"""The tree keeps its layers: imports and includes point downward, each outside library has its owner."""

from __future__ import annotations

from pathlib import Path

import pytest
from layering import PYTHON_LAYERS, cpp_violations, python_violations

ROOT = Path(__file__).resolve().parents[1]


def read(folder: str, *suffixes: str, base: Path = ROOT) -> dict[str, str]:
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return {str(p.relative_to(base)): p.read_text() for p in files}


def test_python_imports_point_downward():
    sources = read("pyllm", ".py", ".pyi")
    assert len(sources) > 10
    assert python_violations(sources) == []


def test_includes_point_downward():
    sources = read("csrc", ".h", ".cc", ".cu", ".cuh", base=ROOT / "csrc")
    assert len(sources) > 10
    assert cpp_violations(sources) == []


def test_every_layer_names_a_module_once():
    names = [name for layer in PYTHON_LAYERS for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("pyllm/spec.py", "from pyllm.model import Model", "imports upward: spec may not know model"),
        ("pyllm/ops.py", "def f():\n    import pyllm.engine.engine", "imports upward: ops may not know engine"),
        ("pyllm/cache.py", "from pyllm import llm", "imports upward: cache may not know llm"),
        ("pyllm/engine/runner.py", "from ..cli import main", "imports upward: engine may not know cli"),
        ("pyllm/models/new.py", "from pyllm.ops import Ops", "models import"),
        ("pyllm/stray.py", "", "has no place in PYTHON_LAYERS"),
        ("pyllm/model.py", "import pyllm.stray", "has no place in PYTHON_LAYERS"),
        ("pyllm/model.py", "import cuda.bindings", "only device may import cuda"),
        ("pyllm/llm.py", "import rich.progress", "only cli may import rich"),
        ("pyllm/llm.py", "from huggingface_hub import snapshot_download", "only folder may import huggingface_hub"),
        ("pyllm/weights.py", "import pickle", "nothing may import pickle"),
        ("pyllm/weights.py", "import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle must be False"),
        ("pyllm/chat_template.py", "eval('1')", "nothing may call eval()"),
        ("pyllm/llm.py", "print('hello')", "may call print()"),
        ("pyllm/engine/engine.py", "import sys\nsys.exit(1)", "may call sys.exit()"),
        ("pyllm/tokenizer.py", "import torch", "only compare may import torch"),
    ],
)
def test_python_rules_catch_a_violation(path: str, text: str, complaint: str):
    [violation] = python_violations({path: text})
    assert complaint in violation


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("core/args.h", '#include "cpu/kernels.h"', "may not include cpu/kernels.h"),
        ("cpu/simd/avx2.h", '#include "cpu/parallel.h"', "may not include cpu/parallel.h"),
        ("cpu/kernels/norm.cc", '#include "cpu/dispatch.h"', "may not include cpu/dispatch.h"),
        ("cpu/kernels/norm.cc", '#include "bindings/arrays.h"', "may not include bindings/arrays.h"),
        ("cpu/dispatch.cc", '#include "cpu/simd/simd.h"', "may not include cpu/simd/simd.h"),
        ("cpu/dispatch.cc", '#include "cuda/matmul.h"', "may not include cuda/matmul.h"),
        ("cuda/matmul.cu", '#include "cpu/kernels.h"', "may not include cpu/kernels.h"),
        ("bindings/packed.cc", '#include "cpu/kernels/kernel.h"', "may not include cpu/kernels/kernel.h"),
        ("cpu/kernels/norm.cc", "#include <immintrin.h>", "intrinsics"),
        ("cpu/kernels/norm.cc", "auto x = _mm256_setzero_ps();", "intrinsics"),
        ("cpu/kernels/norm.cc", "__m512 x;", "intrinsics"),
        ("cpu/parallel.cc", "_mm_prefetch(p, 0);", "intrinsics"),
        ("cpu/dispatch.cc", "pybind11::dict d;", "pybind11"),
        ("cpu/kernels/norm.cc", "std::thread t(f);", "threads"),
        ("cpu/kernels/norm.cc", "#pragma omp parallel for", "threads"),
        ("other/file.cc", "", "lies outside"),
    ],
)
def test_cpp_rules_catch_a_violation(path: str, text: str, complaint: str):
    [violation] = cpp_violations({path: text})
    assert complaint in violation


def test_comments_are_not_code():
    assert cpp_violations({"core/types.h": "// as _mm256_add_ps does, without std::thread\n/* py:: */"}) == []
