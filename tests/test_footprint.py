"""What pyllm costs a process beside its work: the time of an import, and the memory of loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny_model

HEAVY = ("huggingface_hub", "jinja2", "tokenizers", "rich", "typer", "torch")
IMPORT_SECONDS = 0.15
MODEL = {  # 31 million parameters, of which half are the two tables: 62 MB packed as bfloat16
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 15000,
}


def child(code: str, *arguments: object) -> dict[str, float | list[str]]:
    """What `code` prints as JSON, run in an interpreter of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found: dict[str, float | list[str]] = json.loads(result.stdout)
    return found


def test_import_is_quick_and_brings_no_heavy_library() -> None:
    code = """
import json, sys, time
began = time.perf_counter()
import pyllm
print(json.dumps({"seconds": time.perf_counter() - began, "modules": list(sys.modules)}))
"""
    runs = [child(code) for _ in range(5)]
    assert not {*HEAVY} & {*runs[0]["modules"]}
    assert min(run["seconds"] for run in runs) <= IMPORT_SECONDS


def test_loading_takes_little_more_than_the_packed_weights(tmp_path: Path) -> None:
    """Most private memory ever resident, as weights are read, packed and first used; pages of files do not count.

    The kernel keeps the peak of the whole resident set only (VmHWM). From it goes what lies in files now (RssFile),
    which is less than at the peak, so that the difference can only be too large.
    """
    folder = tiny_model.make(tmp_path / "model", tokenizer=False, **MODEL)
    code = """
import json, sys
from pyllm import LLM
llm = LLM(sys.argv[1], dtype="bfloat16", skip_tokenizer_init=True, threads=2, max_num_seqs=1)
llm.generate({"prompt_token_ids": [5, 6, 7]}, max_tokens=4, temperature=0, ignore_eos=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
size = {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile")}
print(json.dumps({"packed": llm.model.weights.nbytes, **size}))
"""
    found = child(code, folder)
    packed = found["packed"]
    assert 55e6 < packed < 70e6
    peak = found["VmHWM"] - found["RssFile"]
    assert peak <= 1.15 * packed + 200e6, f"peak {peak / 1e6:.0f} MB beyond file pages for {packed / 1e6:.0f} MB packed"
