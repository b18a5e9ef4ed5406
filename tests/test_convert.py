"""`convert`: what it writes, reads back as the same numbers; what goes wrong leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_cli import COMMAND, environment, pyllm, refused
from test_weights import GPT2, weights, write

import pyllm.convert.converter as module
from pyllm.convert import convert
from pyllm.convert.calibration import mean_squares
from pyllm.errors import CheckpointError, ConfigError, NonFiniteError
from pyllm.models import open_checkpoint
from pyllm.quantization.rounding import quantize

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("convert") / "model", **SIZES)


@pytest.mark.parametrize(("quantization", "group_size"), [("int4", 32), ("int4", None), ("int8", 0), ("int8", 32)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_reads_back(
    tmp_path: Path, folder: Path, quantization: str, group_size: int | None, dtype: Any
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    tensors = {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    done = convert(source, tmp_path / "out", quantization=quantization, group_size=group_size, skip=["*.1.mlp.up_proj"])
    bits, size = (4, group_size or 64) if quantization == "int4" else (8, group_size or 0)
    assert len(done.errors) == 2 * 7 - 1
    with open_checkpoint(tmp_path / "out") as model, open_checkpoint(source) as original:
        for slot in original.tensors:
            if slot.startswith("blocks.") and original.tensors[slot].ndim == 2 and slot != "blocks.1.mlp.up.weight":
                expected, _ = quantize(original.tensors[slot], bits, size, dtype)
                np.testing.assert_array_equal(model.quantized[slot].dequantize(), expected.dequantize())
                assert model.quantized[slot].for_kernels() is not None
            else:
                np.testing.assert_array_equal(model.tensors[slot], original.tensors[slot])
    assert done.bytes_before == sum(value.nbytes for value in tensors.values())
    assert done.bytes_after < (tmp_path / "out" / "model.safetensors").stat().st_size < done.bytes_after + 8000


def test_layout_of_the_folder(tmp_path: Path, folder: Path) -> None:
    convert(folder, tmp_path / "out", quantization="int4", skip=["*.0.self_attn.o_proj"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == json.loads((folder / "config.json").read_text())
    assert quantized["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert quantized["config_groups"]["group_0"]["targets"] == ["Linear"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_packed").shape == (64, 16)
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_shape").tolist() == [64, 128]
    assert oct((tmp_path / "out").stat().st_mode) == oct(folder.stat().st_mode)


def test_every_tensor_is_aligned(tmp_path: Path, folder: Path) -> None:
    convert(folder, tmp_path / "out", quantization="int8")
    with open_checkpoint(tmp_path / "out") as model:
        assert all(view.flags.aligned for view in model.tensors.values())
        assert all(tensor.scales.flags.aligned for tensor in model.quantized.values())


def test_gpt2_names_and_orientation(tmp_path: Path) -> None:
    config = {**GPT2, "n_embd": 32}
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source", config, weights(config))
    convert(source, tmp_path / "out", quantization="int8", group_size=32, skip=["*.0.mlp.c_proj"])
    with open_checkpoint(tmp_path / "out") as model, open_checkpoint(source) as original:
        assert "blocks.0.mlp.down.weight" in model.tensors
        for slot in original.tensors:
            want = original.tensors[slot].astype(np.float32)
            got = model.quantized[slot].dequantize() if slot in model.quantized else model.tensors[slot]
            np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert names["transformer.h.1.attn.c_attn.weight_packed"].shape == (96, 8)
    assert "transformer.wte.weight" in names


def test_shards(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(folder, tmp_path / "one", quantization="int4")
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 30_000)
    convert(folder, tmp_path / "many", quantization="int4")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "many") as many:
        for slot in one.tensors:
            np.testing.assert_array_equal(one.tensors[slot], many.tensors[slot])
        for slot in one.quantized:
            np.testing.assert_array_equal(one.quantized[slot].dequantize(), many.quantized[slot].dequantize())


# Calibration


def test_mean_squares_are_those_of_the_inputs(folder: Path) -> None:
    from pyllm.llm import LLM

    ids = [3, 17, 40, 9, 21, 5]
    with open_checkpoint(folder) as checkpoint:
        means = mean_squares(checkpoint, ids)
        norm = checkpoint.tensors["blocks.0.attn_norm.weight"]
    hidden = LLM(str(folder), skip_tokenizer_init=True).forward(ids, output_hidden_states=True).hidden_states
    assert hidden is not None
    normed = norm * hidden[0] / np.sqrt((hidden[0].astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(means["blocks.0.attn.k.weight"], (normed**2).mean(0), rtol=1e-4)
    assert set(means) == {f"blocks.{i}.{name}.weight" for i in range(2) for name in
                          ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    assert means["blocks.1.mlp.down.weight"].shape == (128,)


def test_long_texts_are_read_in_windows(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        ids = [3 + i % 50 for i in range(3 * 128)]
        shares: list[float] = []
        whole = mean_squares(checkpoint, ids, progress=shares.append)
        parts = [mean_squares(checkpoint, ids[at : at + 128]) for at in range(0, len(ids), 128)]
    assert shares == [1 / 3, 2 / 3, 1]
    for slot, mean in whole.items():
        np.testing.assert_allclose(mean, np.mean([part[slot] for part in parts], axis=0), rtol=1e-5)


def test_calibration_lowers_the_weighted_error(tmp_path: Path, folder: Path) -> None:
    text = "Once upon a time there was a little girl who lived in a village. " * 20
    done = convert(folder, tmp_path / "out", quantization="int4", calibration=text)
    assert done.error.relative < done.error.relative_nearest
    convert(folder, tmp_path / "blind", quantization="int4")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "blind"))
    assert any(np.any(one[name] != two[name]) for name in one)


def test_calibration_that_overflows(tmp_path: Path) -> None:
    poisoned = tiny_model.make(tmp_path / "model", **SIZES)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = np.inf
    save_file(tensors, poisoned / "model.safetensors")
    with pytest.raises(NonFiniteError, match="no longer numbers"):
        convert(poisoned, tmp_path / "out", quantization="int4", calibration="Once upon a time")
    assert os.listdir(tmp_path) == ["model"]


# What cannot be done


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantization": "int3"}, "quantization: expected int8 or int4, got 'int3'"),
        ({"quantization": "int4", "group_size": 48}, "group_size: expected one of 32, 64, 128 for int4, got 48"),
        ({"quantization": "int4", "group_size": 0}, "expected one of 32, 64, 128 for int4, got 0"),
        ({"quantization": "int8", "group_size": -1}, "expected one of 0, 32, 64, 128 for int8, got -1"),
        ({"quantization": "int4", "calibration": " \n"}, "calibration: the text is empty"),
        ({"quantization": "int4", "skip": ["nothing*"]}, "got 'nothing\\*', which matches none"),
        ({"quantization": "int4", "skip": ["*"]}, "leaves nothing to quantize"),
    ],
)
def test_arguments_that_do_not_exist(tmp_path: Path, folder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert(folder, tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    source = tiny_model.make(tmp_path / "model", hidden_size=64, intermediate_size=96)
    with pytest.raises(ConfigError, match="groups of 64 do not divide") as caught:
        convert(source, tmp_path / "out", quantization="int4")
    assert "model.layers.1.mlp.down_proj has 96 inputs" in str(caught.value)
    convert(source, tmp_path / "out", quantization="int4", skip=["*.down_proj"])


def test_nothing_is_overwritten(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        convert(folder, tmp_path / "out", quantization="int4")
    with pytest.raises(FileNotFoundError):
        convert(folder, tmp_path / "no" / "out", quantization="int4")


def test_a_quantized_model_is_refused(tmp_path: Path, folder: Path) -> None:
    convert(folder, tmp_path / "out", quantization="int4")
    with pytest.raises(ConfigError, match="quantized already"):
        convert(tmp_path / "out", tmp_path / "again", quantization="int4")


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = tiny_model.make(tmp_path / "model", poison=name, **SIZES)
    with pytest.raises(CheckpointError, match=f"{name}: expected finite numbers"):
        convert(source, tmp_path / "out", quantization="int4")
    assert os.listdir(tmp_path) == ["model"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, interrupted])
@pytest.mark.parametrize("place", ["_copy_files", "_write_json", "_write_quantized"])
def test_what_fails_leaves_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None]
) -> None:
    monkeypatch.setattr(module, place, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        convert(folder, tmp_path / "out", quantization="int4")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="no room"):
        convert(folder, tmp_path / "out", quantization="int4")
    assert os.listdir(tmp_path) == []


# The command


def test_command(tmp_path: Path, folder: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little girl.")
    done = pyllm("convert", folder, tmp_path / "out", "--quantization", "int4", "--calibration", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert b"14 matrices as int4, relative RMS error" in done.stderr
    assert b"round to nearest" in done.stderr
    again = pyllm("convert", folder, tmp_path / "out", "--quantization", "int4")
    refused(again, 1, "already exists, and nothing is overwritten")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantization", "fp8"], "expected int8 or int4, got 'fp8'"),
        ([], "--quantization"),
        (["--quantization", "int4", "--group-size", "16"], "expected one of 32, 64, 128"),
    ],
)
def test_command_refuses(tmp_path: Path, folder: Path, arguments: list[str], said: str) -> None:
    refused(pyllm("convert", folder, tmp_path / "out", *arguments), 2, said)
    assert os.listdir(tmp_path) == []


def test_empty_calibration_text(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text").write_text("")
    arguments = ("--quantization", "int4", "--calibration", tmp_path / "text")
    refused(pyllm("convert", folder, tmp_path / "out", *arguments), 2, "the calibration text is empty")


def test_interrupted_command(tmp_path: Path) -> None:
    big = tiny_model.make(tmp_path / "model", hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    process = subprocess.Popen(
        [*COMMAND, "convert", str(big), str(tmp_path / "out"), "--quantization", "int4"],
        stderr=subprocess.PIPE, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs of a shell ignore
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert os.listdir(tmp_path) == ["model"]
