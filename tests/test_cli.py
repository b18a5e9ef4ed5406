"""The command line from outside: exit codes, what goes to stdout and what to stderr, and every kind of bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from pyllm import LLM

COMMAND = [sys.executable, "-m", "pyllm"]
CLOSING = re.compile(
    r"^prompt: \d+ tokens, \S+ tok/s \| generation: \d+ tokens, \S+ tok/s( \([^)]*\))? \| "
    r"(drafts: \d+ of \d+ accepted \(\d+%\), \S+ tokens a step \| )?"
    r"peak memory \d+\.\d\d GB \| seed \d+$",
    re.MULTILINE,
)


def environment(**more: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYLLM_")}
    return {**keep, "HF_HUB_OFFLINE": "1", "PYLLM_THREADS": "2", **more}


def pyllm(*args: object, stdin: bytes | None = None, env: dict[str, str] | None = None, **more: Any) -> Any:
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output="stdout" not in more,
        env=environment(**(env or {})),
        timeout=60,
        **more,
    )


def refused(result: Any, code: int, *fragments: str) -> None:
    """One paragraph on stderr that says what is wrong, nothing on stdout, the right exit code."""
    error = result.stderr.decode()
    assert result.returncode == code, error
    assert result.stdout in (b"", None)
    assert "Traceback" not in error
    assert error.startswith("pyllm: error: "), error
    assert "\n\n" not in error.strip()
    for fragment in fragments:
        assert fragment in error, error


# What works


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "Once upon", "--max-tokens", 8, "--temp", 0, "--ignore-eos")
    first, second = pyllm(*args), pyllm(*args)
    assert first.returncode == 0, first.stderr
    assert first.stdout and first.stdout.endswith(b"\n")
    assert first.stdout == second.stdout
    assert CLOSING.search(first.stderr.decode()), first.stderr
    assert b"\x1b" not in first.stderr + first.stdout
    assert b"generation: 8 tokens" in first.stderr


def test_beam_search_writes_the_best_beam(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "Once upon", "-n", 12, "--num-beams", 3, "--length-penalty", 0.5)
    result = pyllm(*args, "--no-repeat-ngram-size", 2)
    assert result.returncode == 0, result.stderr
    assert CLOSING.search(result.stderr.decode()), result.stderr
    as_json = json.loads(pyllm(*args, "--no-repeat-ngram-size", 2, "--json").stdout)
    assert result.stdout.decode() == as_json["text"] + "\n"
    pairs = list(zip(as_json["token_ids"], as_json["token_ids"][1:], strict=False))
    assert len(set(pairs)) == len(pairs)
    refused(pyllm(*args, "--temp", 1), 2, "temperature: expected 0 where num_beams is 3")
    several = pyllm(
        *args, "--num-return-sequences", 2, "--early-stopping", "true", "--forced-eos-token-id", 5, "--json"
    )
    [output] = LLM(tiny_folder, threads=1).generate("Once upon", num_beams=3, n=2, length_penalty=0.5, max_tokens=12,
                                                    early_stopping=True, forced_eos_token_id=5)  # fmt: skip
    outputs = json.loads(several.stdout)["outputs"]
    assert [each["token_ids"] for each in outputs] == [each.token_ids for each in output.outputs]
    assert outputs[0]["score"] > outputs[1]["score"]


def test_several_completions(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "Once upon", "-n", 8, "--seed", 1, "--num-return-sequences", 2)
    texts = [each["text"] for each in json.loads(pyllm(*args, "--json").stdout)["outputs"]]
    assert len(set(texts)) == 2
    assert pyllm(*args).stdout.decode() == "\n\n".join(texts) + "\n"
    refused(pyllm(*args, "--temp", 0), 2, "expected 1 where temperature is 0")


def test_speculative_decoding_writes_the_same_text_and_says_how_much_was_accepted(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "the dog the dog the dog the", "-n", 30, "--seed", 1, "--ignore-eos")
    plain = pyllm(*args)
    for options in (("--speculative", "ngram"), ("--draft-model", tiny_folder, "--num-speculative-tokens", 3)):
        result = pyllm(*args, *options)
        assert result.stdout == plain.stdout, result.stderr
        closing = CLOSING.search(result.stderr.decode())
        assert closing, result.stderr
    assert " accepted (100%), 3.6 tokens a step | " in closing[0]
    assert "drafts" not in plain.stderr.decode()
    stats = json.loads(pyllm(*args, *options, "--json").stdout)["stats"]
    assert stats["accepted_tokens"] == stats["drafted_tokens"] > 0
    line = pyllm("plan", "-m", tiny_folder, "--draft-model", tiny_folder).stdout.decode()
    assert "draft " in line and "model as float32" in line


def test_prompts_come_from_argument_option_stdin_and_file_alike(tiny_folder: Path, tmp_path: Path):
    text = "Grüße, 你好 🙂"
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    common = ("generate", "-m", tiny_folder, "-n", 4, "--temperature", 0, "--json", "--quiet", "--ignore-eos")
    results = [
        pyllm(*common, text),
        pyllm(*common, "--prompt", text),
        pyllm(*common, "-", stdin=text.encode()),
        pyllm(*common, "--file", file),
    ]
    answers = [json.loads(r.stdout) for r in results]
    assert all(r.stderr == b"" for r in results)
    assert len({tuple(a["token_ids"]) for a in answers}) == 1
    assert answers[0]["finish_reason"] == "length"
    assert len(answers[0]["token_ids"]) == 4


def test_the_printed_seed_gives_the_same_text_again(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "Once", "-n", 6, "--ignore-eos")
    first = pyllm(*args)
    seed = re.search(rb"seed (\d+)", first.stderr)
    assert seed is not None
    assert pyllm(*args, "--seed", seed[1].decode()).stdout == first.stdout


def test_flag_beats_environment_variable(tiny_folder: Path):
    env = {"PYLLM_MODEL": str(tiny_folder), "PYLLM_MAX_TOKENS": "3", "PYLLM_TEMPERATURE": "0"}
    common = ("generate", "Once", "--json", "--ignore-eos")
    assert len(json.loads(pyllm(*common, env=env).stdout)["token_ids"]) == 3
    assert len(json.loads(pyllm(*common, "-n", 5, env=env).stdout)["token_ids"]) == 5


def test_verbose_prints_effective_sampling_values(tiny_folder: Path):
    result = pyllm("generate", "-m", tiny_folder, "Once", "-n", 1, "--top-p", "0.5", "--verbose")
    assert b"top_p=0.5" in result.stderr
    assert b"temperature=1.0" in result.stderr


@pytest.mark.parametrize("command", ["score", "perplexity"])
def test_scoring_takes_device_and_cache_dtype_and_says_what_it_uses(tiny_folder: Path, tmp_path: Path, command: str):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    given = text if command == "perplexity" else "Once upon a time"
    result = pyllm(command, "-m", tiny_folder, given, "--device", "cpu", "--kv-cache-dtype", "bfloat16", "--verbose")
    assert result.returncode == 0, result.stderr
    assert b"cache bfloat16" in result.stderr and b"kernels: " in result.stderr


def test_chat_template_is_applied_unless_told_not_to(tiny_chat_folder: Path):
    common = ("generate", "-m", tiny_chat_folder, "Once", "-n", 1, "--temp", 0, "--json")
    templated = json.loads(pyllm(*common).stdout)
    plain = json.loads(pyllm(*common, "--ignore-chat-template").stdout)
    assert templated["prompt_tokens"] > plain["prompt_tokens"]


def test_score_and_perplexity_agree(tiny_folder: Path, tmp_path: Path):
    text = "Once upon a time there was a fox."
    scored = json.loads(pyllm("score", "-m", tiny_folder, text, "--json").stdout)
    assert scored["total"] == pytest.approx(sum(t["logprob"] for t in scored["tokens"]))
    file = tmp_path / "text.txt"
    file.write_text(text)
    result = json.loads(pyllm("perplexity", "-m", tiny_folder, file, "--json").stdout)
    assert result["nll"] == pytest.approx(-scored["total"], rel=1e-5)
    assert result["tokens"] == len(scored["tokens"])
    part = json.loads(pyllm("score", "-m", tiny_folder, " a time", "--prompt", "Once upon", "--json").stdout)
    assert "".join(t["token"] for t in part["tokens"]) == " a time"


def test_info_plan_and_version():
    info = json.loads(pyllm("info", "--json").stdout)
    assert info["isa"] in info["isas_available"]
    assert pyllm("--version").stdout.decode().strip() == f"pyllm {info['version']}"
    assert b"instruction set" in pyllm("info").stdout
    assert pyllm().returncode == 0


def test_plan_reads_headers_only(tiny_folder: Path):
    plan = json.loads(pyllm("plan", "-m", tiny_folder, "--json").stdout)
    assert plan["fits"] is True
    assert plan["total"] == plan["weights"] + plan["cache"] + plan["workspace"]
    assert b"it fits" in pyllm("plan", "-m", tiny_folder).stdout
    smaller = json.loads(pyllm("plan", "-m", tiny_folder, "--quantization", "int4", "--json").stdout)
    assert smaller["weights"] < plan["weights"]
    assert smaller["dtype"] == "int4 (embedding and head int8)"


def test_weights_that_are_skipped_are_not_rounded(tiny_folder: Path):
    options = ("--quantization", "int4", "--quantization-skip", "embed.*", "--quantization-skip", "blocks.0.*")
    plan, rounded = (
        json.loads(pyllm("plan", "-m", tiny_folder, *given, "--json").stdout) for given in (options, options[:2])
    )
    assert "embed.*, blocks.0.* float32" in plan["dtype"] and plan["weights"] > rounded["weights"]
    args = ("generate", "-m", tiny_folder, "Once", "-n", 4, "--temp", 0)
    plain = pyllm(*args)
    assert pyllm(*args, "--quantization", "int8", "--quantization-skip", "*").stdout == plain.stdout != b""
    refused(pyllm(*args, *options[:3], "nothing.*"), 2, "quantization_skip", "nothing.*", "matches none")


def test_bench_reports_fractions(tiny_folder: Path):
    result = pyllm("bench", "-m", tiny_folder, "--prompt-tokens", 16, "-n", 4, "--repeat", 1, "--json")
    facts = json.loads(result.stdout)
    assert facts["limits"]["read_gbps"] > 0
    assert facts["model"]["decode_fraction"] > 0


# Bad input


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--temp", "nan"], ["temperature"]),
        (["--temp", "-1"], ["temperature"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-p", "nan"], ["top_p"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--max-tokens", "many"], ["--max-tokens"]),
        (["--top-k", "-5"], ["top_k"]),
        (["--threads", "0"], ["--threads"]),
        (["--ctx-size", "129"], ["max_model_len"]),
        (["--dtype", "int3"], ["dtype", "int3"]),
        (["--device", "tpu"], ["device", "cpu", "tpu"]),
        (["--speculative", "magic"], ["speculative", "'ngram'", "'magic'"]),
        (["--num-speculative-tokens", "3"], ["num_speculative_tokens", "draft_model"]),
        (["--temperatur", "1"], ["--temperature"]),
        (["--file", "also"], ["--file"]),
        (["another"], ["another"]),
    ],
)
def test_wrong_parameters_are_usage_errors(tiny_folder: Path, arguments: list[str], fragments: list[str]):
    refused(pyllm("generate", "-m", tiny_folder, "Once", *arguments), 2, *fragments)


def test_unknown_command_names_the_nearest():
    refused(pyllm("genrate"), 2, "generate")


def test_missing_model_and_prompt_are_usage_errors(tiny_folder: Path):
    refused(pyllm("score", "Once"), 2, "--model")
    refused(pyllm("generate", "-m", tiny_folder), 2, "--file")


def test_impossible_isa_and_thread_count_in_the_environment(tiny_folder: Path):
    refused(pyllm("generate", "-m", tiny_folder, "Once", env={"PYLLM_ISA": "mmx"}), 2, "PYLLM_ISA", "baseline")
    refused(pyllm("generate", "-m", tiny_folder, "Once", env={"PYLLM_THREADS": "no"}), 2, "PYLLM_THREADS")


def broken(source: Path, target: Path, **files: bytes | None) -> Path:
    """A copy of a model folder with files replaced (or removed, None); names with __ for dots."""
    shutil.copytree(source, target)
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return target


def test_broken_model_folders_are_explained(tiny_folder: Path, tmp_path: Path):
    def run(folder: Path) -> Any:
        return pyllm("generate", "-m", folder, "Once", "-n", 1)

    refused(run(tmp_path / "absent"), 1, "absent")
    refused(run(broken(tiny_folder, tmp_path / "a", config__json=None)), 1, "config.json")
    refused(run(broken(tiny_folder, tmp_path / "b", config__json=b"{not json")), 1, "config.json", "JSON")
    refused(run(broken(tiny_folder, tmp_path / "c", config__json=b'{"model_type": "lama"}')), 1, "model_type", "llama")
    refused(run(broken(tiny_folder, tmp_path / "d", model__safetensors=None)), 1, "safetensors")
    refused(run(broken(tiny_folder, tmp_path / "e", model__safetensors=b"\xff" * 64)), 1, "model.safetensors")
    refused(run(broken(tiny_folder, tmp_path / "f", tokenizer__json=None)), 1, "tokenizer")
    refused(run(tiny_folder / "config.json"), 1, "folder")
    refused(pyllm("generate", "-m", "some-owner/some-model", "Once", "--offline"), 1, "some-owner/some-model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_model_is_explained(tiny_folder: Path, tmp_path: Path):
    folder = broken(tiny_folder, tmp_path / "locked")
    (folder / "model.safetensors").chmod(0)
    refused(pyllm("generate", "-m", folder, "Once"), 1, "model.safetensors")


def test_a_cache_beyond_memory_is_refused_before_it_is_taken(tmp_path: Path):
    folder = tiny_model.make(tmp_path / "long", max_position_embeddings=(1 << 31) - 1)
    refused(pyllm("generate", "-m", folder, "Once", "-n", 1, "--ctx-size", (1 << 31) - 1), 1, "memory", "--ctx-size")


def test_prompts_that_cannot_be_run(tiny_folder: Path):
    refused(pyllm("generate", "-m", tiny_folder, "word " * 500), 1, "context of 128")
    refused(pyllm("generate", "-m", tiny_folder, "-", stdin=b"good \xff bad"), 1, "stdin", "UTF-8", "byte 5")
    refused(pyllm("generate", "-m", tiny_folder, b"\xfe".decode(errors="surrogateescape")), 1, "UTF-8", "byte 0")
    refused(pyllm("generate", "-m", tiny_folder, "--file", "/no/such/file"), 1, "/no/such/file")
    refused(pyllm("perplexity", "-m", tiny_folder, "/"), 1, "directory")


@pytest.mark.parametrize("command", ["generate", "score"])
def test_empty_texts_are_usage_errors(tiny_folder: Path, tiny_bos_folder: Path, tmp_path: Path, command: str):
    what = "prompt" if command == "generate" else "text"
    for folder in (tiny_folder, tiny_bos_folder):
        refused(pyllm(command, "-m", folder, ""), 2, "empty", f"give a {what}")
    refused(pyllm(command, "-m", tiny_folder, "-", stdin=b""), 2, "empty", "stdin")
    (tmp_path / "empty.txt").touch()
    refused(pyllm(command, "-m", tiny_folder, "--file", tmp_path / "empty.txt"), 2, "empty.txt")


def test_full_disk_and_closed_stdout(tiny_folder: Path):
    args = ("generate", "-m", tiny_folder, "Once", "-n", 4, "--ignore-eos", "--quiet")
    with open("/dev/full", "wb") as full:
        refused(pyllm(*args, stdout=full, stderr=subprocess.PIPE), 1, "No space left")
        refused(pyllm("info", stdout=full, stderr=subprocess.PIPE), 1, "No space left")
    command = " ".join([*COMMAND, *map(str, args)])
    closed = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, env=environment(), timeout=60)
    refused(closed, 1, "closed")


def test_a_reader_that_leaves_ends_it_quietly(tiny_folder: Path):
    command = " ".join([*COMMAND, "generate", "-m", str(tiny_folder), "Once", "-n", "100", "--ignore-eos", "--quiet"])
    result = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, env=environment(), timeout=60)
    assert result.stderr == b""


# Ctrl-C


@contextmanager
def started(*args: object, stdin: int = subprocess.DEVNULL, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running pyllm, which does not outlive the test."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**variables),
        preexec_fn=interruptible,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def interruptible() -> None:
    """Undo that a background job's children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("delay", [0.25, 0.5, 0.8])
def test_ctrl_c_at_any_time_ends_with_130(tiny_folder: Path, tmp_path: Path, delay: float):
    text = tmp_path / "long.txt"
    text.write_text("Once upon a time there was a fox. " * 20000)
    with started("perplexity", "-m", tiny_folder, text, "--stride", 1) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    if process.returncode == -signal.SIGINT or b"<frozen" in error:
        pytest.skip("the interpreter itself was still starting")
    assert process.returncode == 130, error
    assert b"Traceback" not in error


def test_ctrl_c_keeps_the_text_so_far(tmp_path: Path):
    folder = tiny_model.make(tmp_path / "long", max_position_embeddings=1 << 20)
    with started("generate", "-m", folder, "Once", "-n", 1_000_000, "--ignore-eos", "--ctx-size", 1 << 18) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)  # the answer has begun
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert begun and len(out) > 1
    assert b"Traceback" not in error
    assert b"interrupted" in error


# Chat


def test_chat_answers_every_line_and_knows_its_commands(tiny_chat_folder: Path):
    lines = b"Hello\n\n/help\n/nonsense\nAnd now?\n/reset\nAgain\n/exit\nnever read\n"
    result = pyllm("chat", "-m", tiny_chat_folder, "-n", 4, "--temp", 0, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"\n") >= 3
    assert b"unknown command /nonsense" in result.stderr
    assert CLOSING.search(result.stderr.decode())


def test_chat_needs_a_template_and_utf8(tiny_folder: Path, tiny_chat_folder: Path):
    refused(pyllm("chat", "-m", tiny_folder, stdin=b"Hello\n"), 1, "--chat-template")
    result = pyllm("chat", "-m", tiny_chat_folder, "--quiet", stdin=b"\xff\n")
    refused(result, 1, "UTF-8")


def test_chat_says_when_a_conversation_is_too_long(tiny_chat_folder: Path):
    result = pyllm("chat", "-m", tiny_chat_folder, "-n", 2, "--quiet", stdin=b"word " * 300 + b"\nHello\n")
    assert result.returncode == 1
    assert b"context of 128" in result.stderr
    assert result.stdout.count(b"\n") >= 1  # the second line was answered


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path: Path):
    folder = tiny_model.make(tmp_path / "long", chat=True, max_position_embeddings=1 << 20, eos_token_id=[])
    controller, terminal = pty.openpty()
    options = ("-n", 1_000_000, "--ctx-size", 1 << 18)
    with started("chat", "-m", folder, *options, stdin=terminal, TERM="dumb") as process:
        os.close(terminal)
        assert process.stdout is not None
        os.write(controller, b"Hello\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        os.write(controller, b"/exit\n")
        _, error = process.communicate(timeout=30)
        os.close(controller)
    assert process.returncode == 0, error
    assert b"(stopped)" in error
