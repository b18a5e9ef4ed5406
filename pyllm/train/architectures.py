"""The config.json of a new model, from its family and a few sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllm.errors import ConfigError, listed
from pyllm.tokenizer import Tokenizer

ONE_MATRIX = {"gpt2": "GPT-2", "bart": "BART"}  # families whose embedding is always their head
WITH_ENCODER = ("t5", "bart")
ROTATED = ("llama",)  # channels of heads in pairs; several heads may share keys and values
BY_SIZES = ("t5",)  # first weights follow from the sizes


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int | None
    context: int
    tie: bool
    deviation: float
    bos: int | None
    eos: int | None
    pad: int | None

    def inner(self, gated: bool) -> int:
        """The width inside a block."""
        if self.ffn is not None:
            return self.ffn
        return -(-8 * self.hidden // 3 // 32) * 32 if gated else 4 * self.hidden


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
    init_std: float | None = None,
) -> dict[str, Any]:
    """A model of `layers` blocks, with an encoder as many again, `hidden` wide, with `heads` heads over `context`
    positions. T5 is v1.0 where it is tied, else v1.1, with a gate.

    `ffn` is the width inside a block; default 4 x hidden, with a gate 8/3 x hidden up to a multiple of 32. `init_std`
    is the standard deviation of the first weights: by default 0.02 as GPT-2, LLaMA and BART were published; narrow
    models learn to copy words sooner from larger ones, about 1 / sqrt(hidden). Those of T5 follow from its sizes.
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
    if heads >= 1 and (hidden % heads or (arch in ROTATED and hidden // heads % 2)):
        even = " an even multiple" if arch in ROTATED else " a multiple"
        problems.append(f"hidden: expected{even} of the {heads} heads, got {hidden}")
    if kv_heads is not None and (arch not in ROTATED or kv_heads < 1 or heads % kv_heads):
        problems.append(f"kv_heads: expected a divisor of the {heads} heads, and arch llama, got {kv_heads}")
    if arch in ONE_MATRIX and not tie:
        problems.append(f"tie: {ONE_MATRIX[arch]} has one matrix for embedding and head")
    if init_std is not None and not 0 < init_std <= 1:
        problems.append(f"init_std: expected 0 < value <= 1, got {init_std}")
    if init_std is not None and arch in BY_SIZES:
        problems.append(f"init_std: expected none, as the first weights of T5 follow from its sizes, got {init_std}")
    ends = tokenizer.eos_token_ids if tokenizer is not None else ()
    if arch in WITH_ENCODER and not ends:
        problems.append(f"tokenizer: expected one with an end token for {arch}, whose targets end with it")
    if problems:
        raise ConfigError(listed("model", problems))
    sizes = _Sizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        ffn=ffn,
        context=context,
        tie=tie,
        deviation=0.02 if init_std is None else init_std,
        bos=tokenizer.bos_token_id if tokenizer is not None else None,
        eos=ends[0] if ends else None,
        pad=tokenizer.pad_token_id if tokenizer is not None else None,
    )
    return {
        **ARCHITECTURES[arch](sizes),
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie,
        "bos_token_id": sizes.bos,
        "eos_token_id": sizes.eos,
    }


def _gpt2(sizes: _Sizes) -> Mapping[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": sizes.layers,
        "n_embd": sizes.hidden,
        "n_head": sizes.heads,
        "n_inner": sizes.ffn,
        "n_positions": sizes.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": sizes.deviation,
    }


def _llama(sizes: _Sizes) -> Mapping[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.inner(gated=True),
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": sizes.deviation,
    }


def _t5(sizes: _Sizes) -> Mapping[str, Any]:
    """The decoder begins with the padding token, or where the tokenizer has none with another."""
    start = next(token for token in (sizes.pad, sizes.bos, sizes.eos) if token is not None)
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": sizes.hidden,
        "d_kv": sizes.hidden // sizes.heads,
        "d_ff": sizes.inner(gated=not sizes.tie),
        "num_layers": sizes.layers,
        "num_decoder_layers": sizes.layers,
        "num_heads": sizes.heads,
        "n_positions": sizes.context,
        "feed_forward_proj": "relu" if sizes.tie else "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "pad_token_id": sizes.pad,
        "decoder_start_token_id": start,
    }


def _bart(sizes: _Sizes) -> Mapping[str, Any]:
    parts: dict[str, int] = {}
    for part in ("encoder", "decoder"):
        parts |= {
            f"{part}_layers": sizes.layers,
            f"{part}_attention_heads": sizes.heads,
            f"{part}_ffn_dim": sizes.inner(gated=False),
        }
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "d_model": sizes.hidden,
        **parts,
        "max_position_embeddings": sizes.context,
        "activation_function": "gelu",
        "scale_embedding": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": sizes.deviation,
        "is_encoder_decoder": True,
        "pad_token_id": sizes.pad,
        "decoder_start_token_id": sizes.eos,
        "forced_eos_token_id": sizes.eos,
    }


ARCHITECTURES = {"gpt2": _gpt2, "llama": _llama, "t5": _t5, "bart": _bart}
