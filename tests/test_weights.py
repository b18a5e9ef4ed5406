"""The checkpoint loader: name variants, ties, shards, and files that are wrong or hostile."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pyllm.errors import CheckpointError, ConfigError, ModelNotFoundError
from pyllm.models import FAMILIES, open_checkpoint
from pyllm.safetensors_file import SafetensorsFile
from pyllm.weights import INDEX_FILE, SINGLE_FILE, read_config, resolve

GPT1 = {"model_type": "openai-gpt", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 6}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 6}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 16,
}
Tensors = dict[str, np.ndarray]


def weights(config: dict[str, Any], tied: bool | None = None, dtype: Any = np.float32) -> Tensors:
    """Random weights of a config under their checkpoint names, without the base prefix."""
    family = FAMILIES[config["model_type"]]
    spec = family.read(config if tied is None else {**config, "tie_word_embeddings": tied})
    slots, random = spec.slots(), np.random.default_rng(7)
    tensors = {}
    for row in family.names.expand(spec):
        value = np.concatenate([random.standard_normal(slots[slot]) for slot in row.slots]).astype(dtype)
        tensors[family.names.base_name(row.name)] = np.ascontiguousarray(row.oriented(value))
    return tensors


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {name if name.startswith("lm_head") else prefix + name: value for name, value in tensors.items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


# Names, dtypes, views


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_gpt2_views(tmp_path: Path, dtype: Any) -> None:
    tensors = weights(GPT2, dtype=dtype)
    with open_checkpoint(write(tmp_path, GPT2, tensors)) as model:
        assert {slot: view.shape for slot, view in model.tensors.items()} == model.spec.slots()
        assert all(view.dtype == dtype and not view.flags.writeable for view in model.tensors.values())
        fused = tensors["h.1.attn.c_attn.weight"]
        for part, name in enumerate("qkv"):
            np.testing.assert_array_equal(
                model.tensors[f"blocks.1.attn.{name}.weight"], fused[:, 8 * part : 8 * part + 8].T
            )
            np.testing.assert_array_equal(
                model.tensors[f"blocks.1.attn.{name}.bias"], tensors["h.1.attn.c_attn.bias"][8 * part : 8 * part + 8]
            )
        np.testing.assert_array_equal(model.tensors["blocks.0.mlp.up.weight"], tensors["h.0.mlp.c_fc.weight"].T)
        np.testing.assert_array_equal(model.tensors["blocks.0.mlp.down.weight"], tensors["h.0.mlp.c_proj.weight"].T)
        np.testing.assert_array_equal(model.tensors["positions.weight"], tensors["wpe.weight"])


@pytest.mark.parametrize(("config", "prefix"), [(GPT2, "transformer."), (GPT1, "transformer."), (LLAMA, "model.")])
def test_with_and_without_base_prefix(tmp_path: Path, config: dict[str, Any], prefix: str) -> None:
    tensors = weights(config)
    for folder, names in (("bare", tensors), ("prefixed", prefixed(tensors, prefix))):
        (tmp_path / folder).mkdir()
        with open_checkpoint(write(tmp_path / folder, config, names)) as model:
            np.testing.assert_array_equal(model.tensors["embed.weight"], next(iter(tensors.values())))


def test_both_spellings_of_one_weight(tmp_path: Path) -> None:
    tensors = weights(LLAMA)
    message = refusal(write(tmp_path, LLAMA, {**tensors, "model.norm.weight": tensors["norm.weight"]}))
    assert "two names of one weight" in message


def test_legacy_and_ignored_names(tmp_path: Path) -> None:
    tensors = weights(GPT2)
    tensors["ln_f.gamma"], tensors["ln_f.beta"] = tensors.pop("ln_f.weight"), tensors.pop("ln_f.bias")
    tensors["h.0.attn.bias"] = np.ones((1, 1, 6, 6), np.uint8)
    tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    with open_checkpoint(write(tmp_path, GPT2, tensors)) as model:
        np.testing.assert_array_equal(model.tensors["final_norm.weight"], tensors["ln_f.gamma"])
    llama = {**weights(LLAMA), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    open_checkpoint(write(tmp_path, LLAMA, llama)).close()


def test_unaligned_data(tmp_path: Path) -> None:
    tensors = weights(LLAMA, dtype=ml_dtypes.bfloat16)
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 2)  # an odd length puts every tensor on an odd address
    data = b"".join(value.tobytes() for value in tensors.values())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    with open_checkpoint(tmp_path) as model:
        view = model.tensors["blocks.1.mlp.up.weight"]
        assert not view.flags.aligned
        np.testing.assert_array_equal(view, tensors["layers.1.mlp.up_proj.weight"])


def test_release_and_close_leave_views_readable(tmp_path: Path) -> None:
    tensors = weights(LLAMA)
    model = open_checkpoint(write(tmp_path, LLAMA, tensors))
    view = model.tensors["embed.weight"]
    for slot in model.tensors:
        model.release(slot)
    model.close()
    np.testing.assert_array_equal(view, tensors["embed_tokens.weight"])


# Tied embeddings


def test_tied_under_either_name(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = weights(config)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        renamed = {name if key == "embed_tokens.weight" else key: value for key, value in tensors.items()}
        with open_checkpoint(write(tmp_path, config, renamed)) as model:
            assert model.spec.head.tied
            assert "head.weight" not in model.tensors
            np.testing.assert_array_equal(model.tensors["embed.weight"], tensors["embed_tokens.weight"])


def test_tied_under_both_names(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = weights(config)
    tensors["embed_tokens.weight"][3, 3] = np.nan
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()
    with open_checkpoint(write(tmp_path, config, tensors)) as model:
        assert model.spec.head.tied
    tensors["lm_head.weight"][10, 7] += 1
    with open_checkpoint(write(tmp_path, config, tensors)) as model:
        assert not model.spec.head.tied
        np.testing.assert_array_equal(model.tensors["head.weight"], tensors["lm_head.weight"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    assert "lm_head.weight': expected shape [11, 8], found [10, 8]" in refusal(write(tmp_path, config, tensors))


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_tokens.weight"])
def test_untied_needs_both(tmp_path: Path, name: str) -> None:
    tensors = weights(LLAMA)
    del tensors[name]
    assert f"{name}, expected shape [11, 8]" in refusal(write(tmp_path, LLAMA, tensors))


# Weights that do not fit


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    tensors = weights(LLAMA)
    del tensors["norm.weight"]
    tensors["layers.0.mlp.up_proj.weight"] = np.ones((12, 9), np.float32)
    tensors["layers.1.mlp.up_proj.weight"] = np.ones((12, 8), np.int64)
    tensors["layers.2.mlp.up_proj.weight"] = np.ones((12, 8), np.float32)
    tensors["layers.0.mlp.up_proj.bias"] = np.ones(12, np.float32)
    message = refusal(write(tmp_path, LLAMA, prefixed(tensors, "model.")))
    assert "5 problems" in message
    assert "missing model.norm.weight, expected shape [8]" in message
    assert "model.safetensors: 'model.layers.0.mlp.up_proj.weight': expected shape [12, 8], found [12, 9]" in message
    assert "'model.layers.1.mlp.up_proj.weight': expected dtype F32, F16, BF16, found I64" in message
    assert "'model.layers.2.mlp.up_proj.weight' is not a weight of a llama model" in message
    assert "'model.layers.0.mlp.up_proj.bias' is not a weight of a llama model" in message


def test_a_model_of_another_family(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, LLAMA, weights(GPT2)))
    assert "problems" in message
    assert len(message) < 10_000


def test_conv1d_shapes_are_named_as_stored(tmp_path: Path) -> None:
    tensors = weights(GPT2)
    tensors["h.0.attn.c_attn.weight"] = np.ascontiguousarray(tensors["h.0.attn.c_attn.weight"].T)
    assert "expected shape [8, 24], found [24, 8]" in refusal(write(tmp_path, GPT2, tensors))


# Malformed safetensors files


def entry(start: Any, stop: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
MALFORMED: dict[str, bytes] = {
    "empty file": b"",
    "shorter than the length field": b"abcd",
    "only the length field": packed(b""),
    "length beyond the file": packed({"a": entry(0, 4)}, bytes(4), length=10_000),
    "length above the cap": packed({"a": entry(0, 4)}, bytes(4), length=100_000_001),
    "length of 2^63": packed({}, length=2**63),
    "length of 2^64 - 1": packed({}, length=2**64 - 1),
    "length cuts the header": packed({"a": entry(0, 4)}, bytes(4), length=10),
    "not JSON": packed(b"{]"),
    "not an object": packed([1, 2]),
    "a number": packed(b"7"),
    "not UTF-8": packed(b'{"\xff\xfe":' + GOOD + b"}", bytes(4)),
    "UTF-16": packed('{"a":1}'.encode("utf-16")),
    "lone surrogate": packed(b'{"a\\ud800":' + GOOD + b"}", bytes(4)),
    "text after the object": packed(b'{"a":' + GOOD + b"}xx", bytes(4)),
    "nesting bomb": packed(b'{"a":' + b"[" * 100_000),
    "nesting bomb in an unknown field": packed(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}}", bytes(4)
    ),
    "nesting bomb in the metadata": packed(b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "metadata that is not text": packed({"__metadata__": {"a": 1}}),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "one name twice, same place": packed(b'{"a":' + GOOD + b',"a":' + GOOD + b"}", bytes(4)),
    "one name twice, two places": packed(
        b'{"a":' + GOOD + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)
    ),
    "one name twice, once escaped": packed(b'{"a":' + GOOD + b',"\\u0061":' + GOOD + b"}", bytes(4)),
    "one field twice": packed(b'{"a":{"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "unknown field": packed({"a": {**entry(0, 4), "strides": [1]}}, bytes(4)),
    "missing field": packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry is a list": packed({"a": [0, 4]}, bytes(4)),
    "overlap": packed({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "alias": packed({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "gap": packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "gap at the start": packed({"a": entry(4, 8)}, bytes(8)),
    "bytes after the last tensor": packed({"a": entry(0, 4)}, bytes(8)),
    "truncated data": packed({"a": entry(0, 4)}, bytes(3)),
    "no data at all": packed({"a": entry(0, 4)}),
    "offsets reversed": packed({"a": entry(4, 0)}, bytes(4)),
    "negative offset": packed({"a": entry(-4, 0)}, bytes(4)),
    "offset beyond 64 bits": packed({"a": entry(2**64, 2**64 + 4)}, bytes(4)),
    "offset of 2^64 - 4": packed({"a": entry(2**64 - 4, 2**64)}, bytes(4)),
    "fractional offset": packed({"a": entry(0.0, 4.0)}, bytes(4)),
    "one offset": packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, bytes(4)),
    "negative size": packed({"a": entry(0, 4, [-1])}, bytes(4)),
    "two negative sizes": packed({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "fractional size": packed({"a": entry(0, 4, [1.0])}, bytes(4)),
    "sizes that wrap to 0": packed({"a": entry(0, 0, [2**32, 2**32])}),
    "sizes that wrap to 4 bytes": packed({"a": entry(0, 4, [2**63, 2, 1])}, bytes(4)),
    "size beyond 64 bits": packed({"a": entry(0, 4, [2**70])}, bytes(4)),
    "shape and bytes disagree": packed({"a": entry(0, 4, [2])}, bytes(4)),
    "shape is text": packed({"a": entry(0, 4, "1")}, bytes(4)),
    "shape is null": packed({"a": entry(0, 4, None)}, bytes(4)),
    "unknown dtype": packed({"a": entry(0, 4, dtype="F33")}, bytes(4)),
    "dtype is a number": packed({"a": entry(0, 4, dtype=32)}, bytes(4)),
    "a pickle": b"\x80\x04\x95" + bytes(60),
    "a zip archive": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / SINGLE_FILE
    path.write_bytes(MALFORMED[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a valid safetensors file"):
        SafetensorsFile(path)


def test_valid_oddities(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    path.write_bytes(packed({"empty": entry(0, 0, [0, 5]), "scalar": entry(0, 4, []), "__metadata__": {}}, bytes(4)))
    file = SafetensorsFile(path)
    assert file.view("empty").shape == (0, 5)
    assert file.view("scalar").shape == ()
    file.release("empty")
    file.close()


SAMPLE = packed({"a": entry(0, 8, [2]), "b": entry(8, 12, [2, 1], "BF16")}, bytes(range(12)))


def try_bytes(path: Path, data: bytes) -> None:
    """Either refused, or every tensor can be read to its last byte."""
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, place in file.entries.items():
        if place.dtype in ("F32", "F16", "BF16"):
            assert len(file.view(name).tobytes()) == place.stop - place.start
    file.close()


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    try_bytes(tmp_path / SINGLE_FILE, bytes(data))


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path: Path, data: bytes, framed: bool) -> None:
    try_bytes(tmp_path / SINGLE_FILE, packed(data) if framed else data)


def test_every_truncation(tmp_path: Path) -> None:
    for length in range(len(SAMPLE)):
        (tmp_path / SINGLE_FILE).write_bytes(SAMPLE[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / SINGLE_FILE)


def test_file_that_shrinks_while_it_is_mapped(tmp_path: Path) -> None:
    model = open_checkpoint(write(tmp_path, LLAMA, weights(LLAMA)))
    os.truncate(tmp_path / SINGLE_FILE, 100)
    with pytest.raises(CheckpointError, match="became shorter"):
        model.tensors["embed.weight"]


# Shards


def write_shards(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensors]], None] | None = None) -> Path:
    tensors = prefixed(weights(LLAMA), "model.")
    names = list(tensors)
    parts = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[::2]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[1::2]},
    }
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    if change is not None:
        change(index, parts)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for shard, part in parts.items():
        save_file(part, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_shards(tmp_path: Path) -> None:
    with open_checkpoint(write_shards(tmp_path)) as model:
        for slot, view in model.tensors.items():
            assert view.shape == model.spec.slots()[slot]


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", "a\\b.safetensors"),
        *("C:evil.safetensors", "model.bin", "new\nline.safetensors"),
    ],
)
def test_shard_names_with_a_path(tmp_path: Path, name: str) -> None:
    def change(index: dict[str, Any], parts: dict[str, Tensors]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    assert "expected a plain name" in refusal(write_shards(tmp_path, change))


def test_shard_that_links_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = write_shards(tmp_path / "model")
    (folder / SHARDS[0]).rename(tmp_path / "outside")
    (folder / SHARDS[0]).symlink_to(tmp_path / "outside")
    assert "a link that leads out of the folder" in refusal(folder)


def test_download_cache_with_links_to_its_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--owner--name" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_shards(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    open_checkpoint(folder).close()


def test_download_cache_with_shared_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--owner--name" / "blobs"
    shared = tmp_path / "blobs" / "ab"
    for path in (folder, blobs, shared):
        path.mkdir(parents=True)
    write_shards(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(shared / str(number))
        (blobs / str(number)).symlink_to(Path("..") / ".." / "blobs" / "ab" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    open_checkpoint(folder).close()


def test_shard_that_links_to_itself(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(SHARDS[0])
    assert SHARDS[0] in refusal(folder)


def test_wrong_shards_are_reported_together(tmp_path: Path) -> None:
    def change(index: dict[str, Any], parts: dict[str, Tensors]) -> None:
        first, second = parts.values()
        second["extra"] = np.ones(1, np.float32)  # not in the index
        first["model.twice"] = second["model.twice"] = np.ones(1, np.float32)  # in both files
        index["weight_map"]["model.twice"] = SHARDS[0]
        index["weight_map"]["model.absent"] = SHARDS[0]  # not in the file
        index["weight_map"]["model.gone"] = "model-00003-of-00002.safetensors"  # no such file

    message = refusal(write_shards(tmp_path, change))
    assert "4 problems" in message
    assert f"{SHARDS[1]}: 'extra' is not listed" in message
    assert f"{SHARDS[1]}: 'model.twice' is also in another shard" in message
    assert f"{SHARDS[0]}: 'model.absent' is listed in {INDEX_FILE} but not in the file" in message
    assert "model-00003-of-00002.safetensors: cannot be read" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "\xff",
        '{"weight_map": {',
    ],
)
def test_malformed_index(tmp_path: Path, text: str) -> None:
    folder = write_shards(tmp_path)
    (folder / INDEX_FILE).write_bytes(text.encode("latin-1"))
    assert INDEX_FILE in refusal(folder)


def test_index_with_one_tensor_twice(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    text = (folder / INDEX_FILE).read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x",')
    (folder / INDEX_FILE).write_text(text)
    assert "occurs twice" in refusal(folder)


# Folders and configs


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert "found neither" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only pytorch_model.bin; export the model as safetensors" in refusal(tmp_path)


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    os.mkfifo(tmp_path / SINGLE_FILE)
    assert "expected a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b" " * 10_000_001, "at most"),
    ],
)
def test_malformed_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "gpt2"}')
    assert read_config(tmp_path) == {"model_type": "gpt2"}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_config(tmp_path / "absent")


def test_resolve_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path
    with pytest.raises(ModelNotFoundError, match="no revisions"):
        resolve(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    "name", ["", "/no/such/folder", "./absent", "a/b/c", "a b", "nul\0", "x" * 5000, "../x", "\ud800"]
)
def test_resolve_refuses_what_is_no_name(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(name, offline=True)


def test_resolve_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve(str(tmp_path / "model.gguf"))


def test_resolve_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="owner/absent: not in the local cache, and working offline"):
        resolve("owner/absent", offline=True)


def test_resolve_finds_a_cached_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(commit)
    write(folder, LLAMA, weights(LLAMA))
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *args, **options: download(*args, cache_dir=tmp_path, **options)
    )
    assert resolve("owner/name", offline=True).resolve() == folder.resolve()
