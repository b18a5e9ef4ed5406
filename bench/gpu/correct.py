"""Steps: each kernel against float64 in processes of its own, whole models, and compute-sanitizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.process import ROOT, Check, Row, python, run_aloud
from gpu.watched import AT_ONCE, Outcomes, collect, run_tests

# The tests of each kernel, or of those that are tested together: what their ids contain. The first are the smallest.
KERNELS = {
    "read_probe": "probe_reads",
    "empty_probe": "empty_probe",
    "advance": "test_advance",
    "activation": "test_activation",
    "axpby": "test_axpby",
    "gather_columns": "test_gather_columns",
    "embedding": "test_embedding",
    "norm": "test_norm",
    "rope_angles, rope, kv_write": "test_rope_and_kv_write",
    "qkv_write": "test_qkv_write",
    "sample, logprobs": "test_sample_and_logprobs",
    "plain_matmul": r"test_matmul.*\[plain",
    "plain_attention": r"test_attention.*\[plain",
    "skinny_matmul": r"test_matmul.*\[skinny|test_skinny_matmul",
    "skinny_qkv": "test_skinny_qkv",
    "skinny_argmax": "test_skinny_argmax",
    "split_attention": r"test_attention.*\[split",
    "split_matmul": r"test_matmul.*\[split",
    "mma_matmul": r"test_matmul.*\[mma",
    "prompt_attention": r"test_attention.*\[prompt",
    "wgmma_matmul": r"test_matmul.*\[wgmma",
    "wgmma_attention": r"test_attention.*\[wgmma",
}
OTHERS = {
    "memory goes there and back": "memory_goes",
    "arrays of other libraries": "test_exchange",
    "tiles of wgmma_matmul": "wgmma_tiles",
}
HOPPERS = ("wgmma_matmul", "wgmma_attention")
FILES = ("test_gpu.py", "test_gpu_layers.py", "test_gpu_decode.py", "test_gpu_exchange.py")
EMULATED = (*list(OTHERS)[:2], "read_probe", "axpby")  # the others take the emulated GPU too long
AGAIN = 3  # tests that failed are run again, at most, with other settings
TEST_SECONDS, MODEL_SECONDS = 10.0, 30.0  # that a test of a kernel, or of a whole model, may take
GPU = ["-m", "gpu"]


def kernels(check: Check) -> Row:
    """Every kernel through its binding, against float64."""
    return {"rows": kernel_rows(check)}


def kernel_rows(check: Check) -> Iterator[Row]:
    """What became of the tests of each kernel."""
    arguments = ["--emulated-gpu"] if check.emulated else []
    ids = collect([*arguments, *GPU, *(str(ROOT / "tests" / name) for name in FILES)], check.out / "kernels.tests.log")
    patterns = OTHERS | KERNELS
    tests = {name: [test for test in ids if re.search(pattern, test)] for name, pattern in patterns.items()}
    if check.emulated:
        tests = {name: tests[name][:1] for name in EMULATED}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            name: pool.submit(tested, name, tests[name], log_of(check, name), TEST_SECONDS, arguments) for name in tests
        }
        for future in futures.values():
            yield future.result()


def models(check: Check) -> Row:
    """Whole models against the CPU and transformers, and that equal runs give equal bits."""
    if check.emulated:
        return {"skipped": "tests of the suite run them on the emulated GPU"}
    ids = collect([*GPU, str(ROOT / "tests" / "test_gpu_models.py")], check.out / "models.tests.log")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        logs = [check.out / f"models.{i}.log" for i in range(AT_ONCE)]
        parts = range(AT_ONCE)
        rows = pool.map(lambda i: tested(f"models, part {i}", ids[i::AT_ONCE], logs[i], MODEL_SECONDS), parts)
        return {"rows": list(rows)}


def tested(name: str, tests: Sequence[str], log: Path, patience: float, arguments: Sequence[str] = ()) -> Row:
    """What became of tests, and of the first that failed where no kernel starts before the one before it has ended."""
    found = run_tests(tests, log, patience, arguments)
    row = outcome_row(name, found)
    if found.failed:
        again = run_tests([*found.failed][:AGAIN], log, patience, arguments, {"PYLLM_PDL": "off"})
        row["error"] += f" (with PYLLM_PDL=off {len(again.passed)} of {again.told()} pass)"
    return row


def log_of(check: Check, name: str) -> Path:
    """Where pytest's words of the tests of a kernel go."""
    return check.out / f"kernels.{re.sub(r'[^a-z_]+', '-', name)}.log"


def outcome_row(name: str, found: Outcomes) -> Row:
    """What became of the tests of a kernel, as the JSON file holds it: the first that failed, and its reason."""
    row: Row = {"name": name, "passed": len(found.passed), "skipped": len(found.skipped), "failed": found.failed}
    if not found.failed:
        return row
    test, reason = next(iter(found.failed.items()))
    first = next((line for line in reason.splitlines() if line.strip()), "no reason was given")
    told = f"{len(found.failed)} of {found.told()} failed, first {test.split('::')[-1]}: {first}"
    return row | {"error": told}


def hopper_failed(found: Row) -> list[str]:
    """Kernels of Hopper alone whose tests failed in the step of kernels, or were not reached before it was ended."""
    rows = {row["name"]: row for row in found.get("rows", [])}
    ended = found["state"] not in ("done", "failed")
    return [name for name in HOPPERS if (name not in rows and ended) or "error" in rows.get(name, {})]


def sanitizer(check: Check) -> Row:
    """compute-sanitizer: over the first test of each kernel that failed, then over a tiny model."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    check_itself = str(ROOT / "bench" / "gpu_check.py")
    tiny = python(check_itself, "-", "--tiny")
    if check.emulated:
        run_clean([*tiny, "--emulated"])
        return {"skipped": "nothing to find on the emulated GPU"}
    if not Path(program).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    return {"rows": sanitizer_rows(program, tiny, failed_tests(check.found("kernels")))}


def failed_tests(found: Row) -> dict[str, str]:
    """The first test that failed of each kernel."""
    return {row["name"]: next(iter(row["failed"])) for row in found.get("rows", []) if row.get("failed")}


def sanitizer_rows(program: str, tiny: Sequence[str], failed: dict[str, str]) -> Iterator[Row]:
    """A row for each run of a tool."""
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    runs = [("memcheck", name, [*pytest, "--rootdir", str(ROOT), str(ROOT / test)]) for name, test in failed.items()]
    for tool, name, command in [*runs, ("memcheck", "a model", tiny), ("racecheck", "a model", tiny)]:
        status, said = run_aloud([program, "--tool", tool, "--error-exitcode", "9", *command])
        row: Row = {"name": f"{tool} of {name}", "passed": 1, "skipped": 0}
        if status:
            told = [line for line in said.splitlines() if line.startswith("=========") and line.strip("= ")]
            row |= {"error": " ".join(line.strip("= ") for line in told[1:5]) or said[-500:], "said": said[-6000:]}
        yield row


def run_clean(command: Sequence[str]) -> None:
    """A program that has to end with status 0."""
    status, said = run_aloud(list(command))
    if status:
        raise RuntimeError(said[-4000:])


def tiny(emulated: bool) -> None:
    """A tiny model, a short prompt and one of several tiles, and decoding."""
    import tempfile

    import tiny_model

    from gpu.timing import device
    from pyllm import LLM

    with tempfile.TemporaryDirectory() as folder, device(emulated):
        sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
        model = tiny_model.make(Path(folder) / "model", **sizes)
        llm = LLM(model, device="cuda", dtype="bfloat16", max_num_seqs=2)
        prompts = ["Once upon a time", {"prompt_token_ids": [3 + i % 200 for i in range(300)]}]
        llm.generate(prompts, max_tokens=4, temperature=0)
