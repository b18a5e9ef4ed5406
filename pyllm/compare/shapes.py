"""Folders of random weights in the shapes of published models, to measure speed on.

    >>> from pyllm.compare import shapes
    >>> shapes.make("llama-1b", Path("llama-1b"), "bfloat16")

The values are small normals, pieced together from one block of them at random offsets, so that no two tensors are
alike (some engines keep equal ones once): kernels take as long for them as for trained weights.
There is no tokenizer: load such a folder with ``skip_tokenizer_init=True``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pyllm.models import family_of
from pyllm.models.family import Family
from pyllm.spec import ModelSpec

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
STORIES_42M = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
STORIES_260K = STORIES_42M | {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
SHAPES = {
    "gpt2": GPT2,
    "llama-1b": LLAMA_1B,
    "stories-42m": STORIES_42M,
    "stories-260k": STORIES_260K,
    "tinyllama": TINYLLAMA,
}
DTYPES = {"float32": (np.float32, "F32"), "float16": (np.float16, "F16"), "bfloat16": (ml_dtypes.bfloat16, "BF16")}
BLOCK = 1 << 20
NORMS = (
    "norm.weight", "layernorm.weight", "layernorm_embedding.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight",
)  # fmt: skip


def make(name: str, folder: Path, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the model called `name` (see SHAPES) into `folder`, unless it is there already; returns the folder."""
    return write(SHAPES[name], folder, dtype, seed)


def write(config: Mapping[str, Any], folder: Path, dtype: str, seed: int = 0) -> Path:
    """Write a model of this config into `folder`, as :func:`make` does."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "torch_dtype": dtype}
    family = family_of(config)
    kind, code = DTYPES[dtype]
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(BLOCK) * 0.02).astype(kind)
    shapes = stored_shapes(family, family.read(config))
    header, end = {}, 0
    for tensor, shape in shapes.items():
        size = int(np.prod(shape)) * block.itemsize
        header[tensor] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, shape in shapes.items():
            left = int(np.prod(shape))
            if tensor.endswith(NORMS):
                file.write(np.ones(left, kind).tobytes())
                continue
            while left:
                count, start = min(left, BLOCK // 2), rng.integers(BLOCK // 2)
                file.write(block[start : start + count].tobytes())
                left -= count
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def stored_shapes(family: Family, spec: ModelSpec) -> dict[str, list[int]]:
    """Tensor names and shapes as a checkpoint of this family stores them."""
    return {row.name: list(row.stored_shape(spec)) for row in family.names.expand(spec)}
