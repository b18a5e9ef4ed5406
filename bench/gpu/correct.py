"""Steps: each kernel against float64 in processes of its own, whole models, and compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeAlias

from gpu.process import ROOT, Check, Row, python, run_aloud
from gpu.watched import AT_ONCE, HUNG, NOT_RUN, Outcomes, collect, run_tests

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
# The others take the emulated GPU too long, or libraries that may be missing.
EMULATED = ("memory goes there and back", "read_probe", "empty_probe", "axpby")
SHARES = 0.7, 0.85  # of a step's seconds after which its tests, and those that are run again, have ended
SANITIZED_SECONDS = 20.0  # of a program under compute-sanitizer
AGAIN = 3  # tests that failed are run again, at most, with other settings
TEST_SECONDS, MODEL_SECONDS = 10.0, 30.0  # that a test of a kernel, or of a whole model, may take
GPU = ["-m", "gpu"]


Group: TypeAlias = tuple[list[str], Path]  # ids of tests, and where pytest's words of them go


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
    yield from tested(check, {name: (each, log_of(check, name)) for name, each in tests.items()}, TEST_SECONDS)


def models(check: Check) -> Row:
    """Whole models against the CPU and transformers, and that equal runs give equal bits."""
    if check.emulated:
        return {"skipped": "tests of the suite run them on the emulated GPU"}
    ids = collect([*GPU, str(ROOT / "tests" / "test_gpu_models.py")], check.out / "models.tests.log")
    parts = {f"models, part {i}": (ids[i::AT_ONCE], check.out / f"models.{i}.log") for i in range(AT_ONCE)}
    return {"rows": tested(check, parts, MODEL_SECONDS)}


def tested(check: Check, groups: dict[str, Group], patience: float) -> Iterator[Row]:
    """What became of groups of tests as they come; then of the first of each that failed, with no kernel starting
    before the one before it has ended. All is told before the step's deadline."""
    arguments = ["--emulated-gpu"] if check.emulated else []
    first, second = (time.monotonic() + share * check.seconds for share in SHARES)
    failed = {}
    for _, log in groups.values():
        log.write_text("")
    for row in tested_once(groups, patience, first, arguments, {}):
        if tests := again(row):
            failed[f"{row['name']} with PYLLM_PDL=off"] = tests, groups[row["name"]][1]
        yield row
    yield from tested_once(failed, patience, second, arguments, {"PYLLM_PDL": "off"})


def tested_once(
    groups: dict[str, Group], patience: float, ends: float, arguments: list[str], settings: dict[str, str]
) -> Iterator[Row]:
    """What became of groups of tests, some beside each other, as they come."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            pool.submit(run_tests, tests, log, patience, ends, arguments, settings): name
            for name, (tests, log) in groups.items()
        }
        for future in as_completed(futures):
            yield outcome_row(futures[future], future.result())


def again(row: Row) -> list[str]:
    """Tests that failed and are worth another run: a few, of which one may hang."""
    failed = {test: reason for test, reason in row["failed"].items() if not reason.startswith(NOT_RUN)}
    hung = [test for test, reason in failed.items() if reason.startswith(HUNG)]
    return [test for test in failed if test not in hung[1:]][:AGAIN]


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
    """compute-sanitizer over a tiny model, and over the first test of each kernel that failed."""
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
    """The first test of each kernel that failed and was done."""
    first: dict[str, str] = {}
    for row in found.get("rows", []):
        done = [test for test, reason in row.get("failed", {}).items() if not reason.startswith((HUNG, NOT_RUN))]
        if done:
            first[row["name"]] = done[0]
    return first


def sanitizer_rows(program: str, tiny: list[str], failed: dict[str, str]) -> Iterator[Row]:
    """A row for each run of a tool."""
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    runs = [("memcheck", name, [*pytest, "--rootdir", str(ROOT), str(ROOT / test)]) for name, test in failed.items()]
    model = [("memcheck", "a model", tiny), ("racecheck", "a model", tiny)]
    for tool, name, command in [*runs[:1], *model, *runs[1:]]:
        settings = {} if command is tiny else {"PYLLM_WGMMA": "on"}  # also where it is off since they failed
        sanitized = [program, "--tool", tool, "--error-exitcode", "9", *command]
        status, said = run_aloud(sanitized, SANITIZED_SECONDS, **settings)
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
