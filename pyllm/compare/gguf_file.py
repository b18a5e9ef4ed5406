"""A checkpoint in the Hugging Face layout as a GGUF file for llama.cpp: LLaMA and GPT-2."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  # numpy's bfloat16, which the reader gives
import numpy as np
from safetensors import safe_open

from pyllm.models import read_spec

# Names of a block's tensors: the checkpoint's -> GGUF's.
LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTER_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, path: Path, tokens: Sequence[str] | None = None) -> Path:
    """Write the model in `folder` to `path`, unless it is there; returns the path.

    `tokens` are the vocabulary, None for none: an unknown, a begin and an end token, and among the others those of
    bytes, as <0x41>.
    """
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    spec = read_spec(folder)
    [block, *_] = spec.blocks
    llama = config["model_type"] == "llama"
    writer = gguf.GGUFWriter(f"{path}.part", "llama" if llama else "gpt2")
    writer.add_vocab_size(spec.vocab_size)
    if tokens is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_vocabulary(writer, tokens)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(len(spec.blocks))
    writer.add_head_count(block.attention.heads)
    writer.add_feed_forward_length(block.mlp.hidden)
    if llama:
        writer.add_head_count_kv(block.attention.kv_heads)
        writer.add_layer_norm_rms_eps(block.norm.eps)
        writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
        writer.add_rope_dimension_count(block.attention.head_dim)
        if (factors := rope_factors(config, block.attention.head_dim)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
    else:
        writer.add_layer_norm_eps(block.norm.eps)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            tensor = file.get_tensor(name)
            if ".self_attn.q_proj." in name:
                tensor = interleaved(tensor, block.attention.heads)
            elif ".self_attn.k_proj." in name:
                tensor = interleaved(tensor, block.attention.kv_heads)
            elif not llama and tensor.ndim == 2 and ".c_" in name:
                tensor = tensor.T
            if tensor.ndim == 1:
                tensor = tensor.astype(np.float32)
            tensor = np.ascontiguousarray(tensor)
            target = gguf_name(name, LLAMA_NAMES if llama else GPT2_NAMES)
            if tensor.dtype.name == "bfloat16":
                writer.add_tensor(target, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(f"{path}.part").rename(path)
    return path


def add_vocabulary(writer: gguf.GGUFWriter, tokens: Sequence[str]) -> None:
    """A vocabulary of SentencePiece's kind whose texts are given as they are, without a begin token or a space."""
    kinds = gguf.TokenType
    special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(
        special
        + [gguf.TokenType.BYTE if t.startswith("<0x") else gguf.TokenType.NORMAL for t in tokens[len(special) :]]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def gguf_name(name: str, blocks: dict[str, str]) -> str:
    """GGUF's name of a checkpoint's tensor; `blocks` are the names within a block."""
    name = name.removeprefix("model.").removeprefix("transformer.")
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, index, *middle, last = name.split(".")
    return f"blk.{index}.{blocks['.'.join(middle)]}.{last}"


def interleaved(tensor: Any, heads: int) -> Any:
    """Rows of each head in GGUF's order: the channels of a rotated pair side by side, not half a head apart."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def rope_factors(config: dict[str, Any], head_dim: int) -> Any:
    """What each pair's rotary frequency is divided by under Llama 3's scaling, float32 [E / 2]; None without it."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_scaling: expected rope_type llama3 or none, found {scaling['rope_type']!r}")
    frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the trained context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)  # share of the frequency that is not slowed down
    return (1 / (kept + (1 - kept) / scaling["factor"])).astype(np.float32)
