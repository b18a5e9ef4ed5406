"""The layering rules of the source tree, as data and as checks over source text: who may import or include whom.

Every check takes sources as ``{path relative to the root: text}`` and gives a list of violations, so that the tests
can show each one failing on a made-up source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

Sources = Mapping[str, str]

# Python modules from the bottom up. A module imports from its own row or rows above it in this list, never from rows
# below.
PYTHON_LAYERS: list[set[str]] = [
    {"_cpu", "_cuda", "errors", ""},
    {"isa", "system", "interrupts"},
    {"position_bias", "prefix", "rope"},
    {"detokenizer", "sentencepiece", "wordpiece", "tokenizer_backend"},
    {"tokenizer_library", "tokenizer_pieces"},
    {"spec", "sampling", "structured", "chat_template", "tokenizer"},
    {"tensor", "device"},
    {"ops", "ops_training", "cuda_limits", "cuda_memory", "cuda_ops", "cuda_weights", "tape", "limits", "batch"},
    {
        "default_model",
        "folder",
        "generation_config",
        "safetensors_file",
        "safetensors_writer",
        "quantization",
        "weight_names",
        "weights",
        "cache",
        "pooling",
    },
    {"models", "packed", "model"},
    {"prompts"},
    {"engine"},
    {"reading"},
    {"encoding"},
    {"planning"},
    {"llm", "convert"},
    {"train"},
    {"compare"},
    {"server"},
    {"cli", "__main__"},
]

# Third-party packages that only these modules may import; numpy, ml_dtypes and the standard library are free to all.
PYTHON_OWNERS: dict[str, set[str]] = {
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"folder"},
    "jinja2": {"chat_template"},
    "tokenizers": {"tokenizer_library", "detokenizer", "sentencepiece", "wordpiece", "train", "compare"},
    "safetensors": {"safetensors_file", "weights", "compare"},
    "llguidance": {"structured"},
    "cuda": {"device"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "pydantic": {"server"},
    "prometheus_client": {"server"},
    "torch": {"compare"},
    "transformers": {"compare"},
    "llama_cpp": {"compare"},
    "gguf": {"compare"},
    "ctranslate2": {"compare"},
    "matplotlib": {"compare", "train"},
    "yaml": {"train"},
    "tensorboard": {"train"},
    "wandb": {"train"},
    "numpy": {"*"},
    "ml_dtypes": {"*"},
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile"}
PRINTERS = {"cli", "__main__"}  # the only place that prints or ends the process
MODELS_MAY_IMPORT = {
    "errors",
    "folder",
    "models",
    "position_bias",
    "prefix",
    "quantization",
    "rope",
    "spec",
    "weight_names",
    "weights",
}

CPU_HEADERS = ("cpu/cores.h", "cpu/kernels.h", "cpu/dispatch.h", "cpu/graph.h", "cpu/memory.h", "cpu/parallel.h")
CPU_SIZES = (
    "cpu/attention_workspace.h",
    "cpu/kernels/matmul_plan.h",
    "cpu/kernels/norm_plan.h",
)  # sizes that a kernel and its caller must agree on

# C++ folders and what each may include from the project.
CPP_LAYERS: list[tuple[str, tuple[str, ...]]] = [  # first match counts
    ("core/", ("core/",)),
    ("cpu/simd/", ("core/", "cpu/simd/")),
    (
        "cpu/kernels/",
        ("core/", "cpu/simd/", "cpu/kernels/", "cpu/cores.h", "cpu/kernels.h", "cpu/parallel.h", *CPU_SIZES),
    ),
    ("cpu/", ("core/", *CPU_HEADERS, *CPU_SIZES)),
    ("cuda/", ("core/", "cuda/")),
    ("bindings/", ("core/", "bindings/", "cuda/", *CPU_HEADERS)),
]
INTRINSICS = re.compile(r"\b_mm\d*_\w+|\b__m(?:128|256|512)\w*|[a-z]mmintrin\.h|\barm_neon\.h")
PYBIND = re.compile(r"\bpybind11\b|\bpy::")
THREADS = re.compile(r"\bstd::(?:j?thread|async)\b|\bpthread_create\b|#\s*pragma\s+omp|<omp\.h>")


def python_violations(sources: Sources) -> list[str]:
    """Violations in pyllm/**/*.py(i)."""
    return [f"{path}: {what}" for path, text in sorted(sources.items()) for what in _python_file(path, text)]


def cpp_violations(sources: Sources) -> list[str]:
    """Violations in csrc/**; paths are relative to csrc."""
    return [f"{path}: {what}" for path, text in sorted(sources.items()) for what in _cpp_file(path, text)]


def _python_file(path: str, text: str) -> Iterator[str]:
    module = _module(path)
    own = _rank(module) if module else len(PYTHON_LAYERS)  # pyllm/__init__.py may name everything
    if own is None:
        yield f"module {module} has no place in PYTHON_LAYERS (tests/layering.py): give it one"
        return
    tree = ast.parse(text)
    for node, name in _imports(tree, path):
        if name.split(".")[0] == "pyllm":
            other = name.split(".")[1] if "." in name else ""
            rank = _rank(other)
            if rank is None:
                yield f"line {node.lineno}: imports pyllm.{other}, which has no place in PYTHON_LAYERS"
            elif rank > own:
                yield f"line {node.lineno}: imports upward: {module} may not know {other}"
            elif module == "models" and other not in MODELS_MAY_IMPORT:
                yield f"line {node.lineno}: models import {', '.join(sorted(MODELS_MAY_IMPORT))} only, not {other}"
            continue
        top = name.split(".")[0]
        if top in FORBIDDEN_IMPORTS:
            yield f"line {node.lineno}: nothing may import {top}"
        owners = PYTHON_OWNERS.get(top, {"*"})
        if "*" not in owners and module not in owners:
            yield f"line {node.lineno}: only {', '.join(sorted(owners))} may import {top}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: nothing may call {called}()"
        if called in {"print", "exit", "quit", "sys.exit", "os._exit", "os.abort"} and module not in PRINTERS:
            yield f"line {node.lineno}: only {', '.join(sorted(PRINTERS))} may call {called}()"
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
            yield f"line {node.lineno}: allow_pickle must be False"


def _imports(tree: ast.Module, path: str) -> Iterator[tuple[ast.stmt, str]]:
    package = path.removesuffix("/__init__.py").removesuffix(".py").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base == "pyllm":
                for alias in node.names:
                    yield node, base if alias.name.startswith("__") else f"pyllm.{alias.name}"
            else:
                yield node, base


def _module(path: str) -> str:
    """Name in PYTHON_LAYERS: the module or package directly under pyllm."""
    first = path.removeprefix("pyllm/").split("/")[0]
    first = first.removesuffix(".pyi").removesuffix(".py")
    return "" if first == "__init__" else first


def _rank(module: str) -> int | None:
    return next((i for i, names in enumerate(PYTHON_LAYERS) if module in names), None)


def _cpp_file(path: str, text: str) -> Iterator[str]:
    allowed = next((may for folder, may in CPP_LAYERS if path.startswith(folder)), None)
    if allowed is None:
        yield "lies outside the folders of CPP_LAYERS (tests/layering.py)"
        return
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        if not name.startswith(allowed):
            yield f"may not include {name}"
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    used = set(INTRINSICS.findall(code))
    if path == "cpu/parallel.cc":
        used = {name for name in used if name != "_mm_pause" and not name.endswith("mmintrin.h")}
    if used and not path.startswith("cpu/simd/") and not path.startswith("cuda/"):
        yield f"intrinsics stand in cpu/simd/ only: {', '.join(sorted(used))}"
    if PYBIND.search(code) and not path.startswith("bindings/"):
        yield "pybind11 stands in bindings/ only"
    if THREADS.search(code) and not path.startswith("cpu/parallel."):
        yield "threads stand in cpu/parallel only"
