"""The config.json of a new model, from its family and a few sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.errors import ConfigError, listed
from pyllm.tokenizer import Tokenizer

ARCHITECTURES = ("gpt2", "llama")


def new_config(
    arch: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int | None,
    ffn: int | None,
    tie: bool,
    context: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    init_std: float = 0.02,
) -> dict[str, Any]:
    """A model of `layers` blocks, `hidden` wide, with `heads` heads over `context` positions.

    `ffn` is the width inside a block; default 4 x hidden for GPT-2, 8/3 x hidden up to a multiple of 32 for LLaMA.
    `init_std` is the standard deviation of the first weights: 0.02 as both families were published; narrow models learn
    to copy words sooner from larger ones, about 1 / sqrt(hidden).
    Raises `ConfigError` for sizes that do not go together.
    """
    problems = []
    if arch not in ARCHITECTURES:
        problems.append(f"arch: expected {' or '.join(ARCHITECTURES)}, got {arch!r}")
    for name, value in {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "context": context,
        "ffn": ffn if ffn is not None else 1,
        "vocab_size": vocab_size,
    }.items():
        if not 1 <= value <= 1 << 20:
            problems.append(f"{name}: expected 1 to {1 << 20}, got {value}")
    if heads >= 1 and (hidden % heads or (arch == "llama" and hidden // heads % 2)):
        even = " an even multiple" if arch == "llama" else " a multiple"
        problems.append(f"hidden: expected{even} of the {heads} heads, got {hidden}")
    if kv_heads is not None and (arch == "gpt2" or kv_heads < 1 or heads % kv_heads):
        problems.append(f"kv_heads: expected a divisor of the {heads} heads, and arch llama, got {kv_heads}")
    if arch == "gpt2" and not tie:
        problems.append("tie: GPT-2 has one matrix for embedding and head")
    if not 0 < init_std <= 1:
        problems.append(f"init_std: expected 0 < value <= 1, got {init_std}")
    if problems:
        raise ConfigError(listed("model", problems))
    family = _gpt2 if arch == "gpt2" else _llama
    ends = tokenizer.eos_token_ids if tokenizer is not None else ()
    return {
        **family(layers, hidden, heads, kv_heads, ffn, context),
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie,
        "initializer_range": init_std,
        "bos_token_id": tokenizer.bos_token_id if tokenizer is not None else None,
        "eos_token_id": ends[0] if ends else None,
    }


def _gpt2(
    layers: int, hidden: int, heads: int, kv_heads: int | None, ffn: int | None, context: int
) -> Mapping[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": ffn,
        "n_positions": context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int | None, ffn: int | None, context: int
) -> Mapping[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if kv_heads is not None else heads,
        "intermediate_size": ffn if ffn is not None else -(-8 * hidden // 3 // 32) * 32,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
    }
