"""Tiny models of every family and variant, with what Hugging Face transformers computes for them.

    python tests/golden/make_goldens.py            # rewrite all golden folders beside this script
    python tests/golden/make_goldens.py llama      # only the named ones

Every parameter is random, norm weights and biases included: with transformers' own initialisation (unit norms, zero
biases) many loading errors would not show. A golden folder holds config.json, model.safetensors (float32) and
expected.npz. Needs the `oracle` extra; reading the goldens needs only numpy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # of the models that are written out for tests
NEW_TOKENS = 64
DISTINCT_IDS = 10  # at least so many in a greedy continuation: a model that repeats itself tests little
SMALLEST_GAP = 2e-3  # between the best two logits of a greedy step; float32 noise is about a thousandth of it

Rewrite = Callable[[dict[str, Any], dict[str, np.ndarray]], tuple[dict[str, Any], dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Variant:
    """A tiny model: its transformers config, and the prompt length and seed to run it with."""

    config: dict[str, Any]
    prompt: int = 32
    seed: int = 0
    untied: bool = False  # give it a head of its own, which the config class of T5 cannot say
    ngram: int = 0  # no sequence of so many ids stands twice in the greedy continuation; 0: whatever comes
    architecture: str | None = None  # transformers' class; None: the family's causal language model
    rewrite: Rewrite | None = None  # to config and tensors as another layout has them
    gain: float = 1.0  # of matrices and norms within blocks: a model that holds to its last token tests little


@dataclass(frozen=True)
class Expected:
    """What transformers computes, all float32 or int64: T prompt tokens, D hidden, V vocabulary, L layers."""

    ids: np.ndarray  # [T]
    logits: np.ndarray  # [T, V], or what else the model's head gives: [T, N], or of a classifier [1, N]
    hidden_states: np.ndarray  # [L + 1, T, D]: embeddings, after each block, and the last after the final norm
    greedy_ids: np.ndarray  # [NEW_TOKENS], of an encoder [0]
    types: np.ndarray | None = None  # [T], of models with token types
    source: np.ndarray | None = None  # [S] ids of what an encoder reads; `ids` are then the decoder's
    encoder_states: np.ndarray | None = None  # [L + 1, S, D]: as hidden_states, of the encoder


def variants() -> dict[str, Variant]:
    """All variants by name."""
    # The norms' eps is large here, so that a wrong one shows.
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_positions": 100,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "layer_norm_epsilon": 2e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    base = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 3e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    llama = {**base, "model_type": "llama"}
    neox = {
        **{key: value for key, value in base.items() if key not in ("rms_norm_eps", "num_key_value_heads")},
        "model_type": "gpt_neox",
        "layer_norm_eps": 3e-3,
    }
    opt = {
        "model_type": "opt",
        "vocab_size": 67,
        "hidden_size": 32,
        "ffn_dim": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }

    bart = {
        "model_type": "bart",
        "vocab_size": 67,
        "d_model": 20,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 28,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 80,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }

    t5 = {
        "model_type": "t5",
        "vocab_size": 67,
        "d_model": 20,
        "d_kv": 6,
        "d_ff": 28,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 3e-3,
        "decoder_start_token_id": 0,
    }
    bert = {
        **{key: value for key, value in base.items() if key not in ("rms_norm_eps", "num_key_value_heads")},
        "model_type": "bert",
        "layer_norm_eps": 3e-3,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 48,
    }
    distilbert = {
        "model_type": "distilbert",
        "vocab_size": 67,
        "dim": 32,
        "hidden_dim": 44,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 48,
    }
    roberta = {**bert, "model_type": "roberta", "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
    electra = {**bert, "model_type": "electra", "embedding_size": 20}
    three = {"num_labels": 3}
    labels = {**three, "num_hidden_layers": 1}

    def rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}

    glm = {
        **base,
        "model_type": "glm",
        "head_dim": 12,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        **rope("default", theta=500.0, partial_rotary_factor=0.5),
    }
    blanks = {
        "vocab_size": 67,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "layernorm_epsilon": 2e-3,
        "mask_token_id": 60,
        "gmask_token_id": 61,
    }
    chatglm = {
        **blanks,
        "model_type": "chatglm",
        "bos_token_id": 62,
        "eos_token_id": 63,
        "inner_hidden_size": 44,
        "max_sequence_length": 128,
        "position_encoding_2d": True,
    }
    glm2021 = {
        **blanks,
        "model_type": "glm",
        "block_position_encoding": True,
        "eos_token_id": 63,
        "max_sequence_length": 128,
        "sop_token_id": 62,
        "smask_token_id": 64,
    }
    short, long = [1.0, 1.1, 1.25, 1.5], [1.0, 2.0, 3.5, 6.0]
    cohere = {
        **{key: value for key, value in base.items() if key not in ("rms_norm_eps", "tie_word_embeddings")},
        "model_type": "cohere",
        "layer_norm_eps": 2e-3,
        "pad_token_id": 0,
    }
    gemma = {
        **base,
        "head_dim": 10,
        "query_pre_attn_scalar": 6,
        "sliding_window": 9,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    bloom = {
        "model_type": "bloom",
        "vocab_size": 67,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "layer_norm_epsilon": 2e-3,
    }
    mpt = {
        "model_type": "mpt",
        "vocab_size": 67,
        "d_model": 30,
        "n_layers": 2,
        "n_heads": 5,
        "max_seq_len": 128,
        "layer_norm_epsilon": 2e-3,
        "attn_config": {"softmax_scale": 0.5},
    }
    return {
        "bert": Variant(bert, architecture="BertForMaskedLM"),
        "bert-classifier": Variant({**bert, **three}, architecture="BertForSequenceClassification"),
        "bert-labels": Variant({**bert, **labels}, architecture="BertForTokenClassification"),
        "bert-next": Variant({**bert, "num_hidden_layers": 1}, architecture="BertForNextSentencePrediction"),
        "bloom": Variant(bloom, gain=1.5),
        "bloom-normed": Variant(
            {**bloom, "hidden_size": 30, "n_head": 6, "apply_residual_connection_post_layernorm": True}, gain=1.5
        ),
        "chatglm": Variant(chatglm),
        "distilbert": Variant(distilbert, architecture="DistilBertForMaskedLM"),
        "distilbert-classifier": Variant({**distilbert, **three}, architecture="DistilBertForSequenceClassification"),
        "distilbert-labels": Variant(
            {**distilbert, **three, "n_layers": 1}, architecture="DistilBertForTokenClassification"
        ),
        "electra-classifier": Variant({**electra, **three}, architecture="ElectraForSequenceClassification"),
        "electra-discriminator": Variant({**electra, "hidden_act": "relu"}, architecture="ElectraForPreTraining"),
        "electra-generator": Variant({**electra, "hidden_act": "silu"}, architecture="ElectraForMaskedLM"),
        "electra-labels": Variant({**electra, **labels}, architecture="ElectraForTokenClassification"),
        "chatglm2": Variant(glm, rewrite=_as_chatglm2),
        "cohere": Variant({**cohere, "num_key_value_heads": 1, "logit_scale": 0.5}),
        "cohere-normed": Variant({**cohere, "use_qk_norm": True, "attention_bias": True, "logit_scale": 2.0}),
        "gemma2": Variant(
            {**gemma, "model_type": "gemma2", "attn_logit_softcapping": 4.0, "tie_word_embeddings": False}
        ),
        "gemma3": Variant(
            {
                **gemma,
                "model_type": "gemma3_text",
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
            },
            gain=2.0,
        ),
        "glm": Variant({**glm, "tie_word_embeddings": True}),
        "glm2021": Variant(glm2021),
        "glm4": Variant({**glm, "model_type": "glm4", "attention_bias": False}),
        "bart": Variant(bart, ngram=2, prompt=20),
        "mbart": Variant(
            {**bart, "model_type": "mbart", "scale_embedding": True, "decoder_start_token_id": 5}, ngram=2, prompt=20
        ),
        "mt5": Variant({**t5, "model_type": "mt5", "feed_forward_proj": "gated-gelu"}, ngram=2, prompt=20, untied=True),
        "t5": Variant(t5, ngram=2, prompt=20),
        "t5-gated": Variant(
            {**t5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, ngram=2, prompt=20, untied=True
        ),
        "gpt2": Variant(gpt2),
        "gpt2-scaled-relu": Variant(
            {**gpt2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_inner": 52}
        ),
        "gpt_neox": Variant({**neox, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        "gpt_neox-serial": Variant({**neox, "use_parallel_residual": False, "hidden_act": "gelu_fast"}),
        "gptj": Variant({**gpt2, "model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False}),
        "llama": Variant({**llama, "hidden_size": 64, "num_attention_heads": 8}),
        "llama-tied-biased": Variant(
            {**llama, "tie_word_embeddings": True, "head_dim": 10, "attention_bias": True, "mlp_bias": True}
        ),
        "llama-linear": Variant({**llama, **rope("linear", factor=2.5)}),
        "llama-dynamic": Variant({**llama, **rope("dynamic", factor=4.0), "max_position_embeddings": 40}, prompt=24),
        "llama-dynamic-prompt": Variant({**llama, **rope("dynamic", factor=6.0), "max_position_embeddings": 20}),
        "llama-llama3": Variant(
            {
                **llama,
                **rope(
                    "llama3",
                    theta=500.0,
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=64,
                ),
            }
        ),
        "llama-yarn": Variant(
            {**llama, **rope("yarn", theta=100.0, factor=4.0, original_max_position_embeddings=32, beta_fast=8.0)}
        ),
        "llama-longrope": Variant(
            {
                **llama,
                **rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=40),
            },
            prompt=24,
        ),
        "mistral": Variant({**base, "model_type": "mistral", "sliding_window": 9}),
        "phi3": Variant(
            {
                **base,
                "model_type": "phi3",
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "sliding_window": 20,
                "pad_token_id": 0,
                **rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=0.5),
                "original_max_position_embeddings": 20,
            }
        ),
        "mpt": Variant(mpt),
        "mpt-clipped": Variant({**mpt, "n_layers": 1, "attn_config": {"clip_qkv": 0.75}}, gain=1.5),
        "openai-gpt": Variant({**gpt2, "model_type": "openai-gpt"}, gain=1.5),
        "opt": Variant(opt),
        "opt-post": Variant({**opt, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
        "qwen2": Variant({**base, "model_type": "qwen2"}),
        "qwen2-window": Variant(
            {
                **base,
                "model_type": "qwen2",
                "num_hidden_layers": 3,
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 1,
            }
        ),
        "qwen3": Variant({**base, "model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True}),
        "roberta": Variant(roberta, architecture="RobertaForMaskedLM"),
        "roberta-classifier": Variant({**roberta, **three}, architecture="RobertaForSequenceClassification"),
        "roberta-labels": Variant({**roberta, **labels}, architecture="RobertaForTokenClassification"),
    }


def build(name: str, folder: Path) -> Expected:
    """Write the variant's model folder and return what transformers computes for it."""
    variant = variants()[name]
    for seed in range(variant.seed, variant.seed + 100):
        model = random_model(variant, seed)
        if variant.architecture is not None:
            expected = _run_encoder(model, variant, seed)
            break
        expected, gap = (_run if hasattr(model, "generate") else _run_reference)(model, variant, seed)
        if gap >= SMALLEST_GAP and len(np.unique(expected.greedy_ids)) >= DISTINCT_IDS:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives a varied continuation with a clear winner at each step")
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, variant.rewrite)
    return expected


def read_expected(folder: Path) -> Expected:
    """The committed results of a golden folder."""
    with np.load(folder / "expected.npz", allow_pickle=False) as stored:
        return Expected(**{name: stored[name] for name in stored.files})


def random_model(variant: Variant, seed: int) -> Any:
    """The variant's reference model with all parameters at random."""
    config = variant.config
    if "position_encoding_2d" in config or "block_position_encoding" in config:
        from oracle.glm import Reference

        return _randomised(Reference(config).eval(), config["hidden_size"], variant.gain, seed)
    import torch
    import transformers

    fields = {name: value for name, value in config.items() if name != "model_type"}
    # transformers completes the nested rope parameters in place
    if "rope_parameters" in fields:
        fields["rope_parameters"] = dict(fields["rope_parameters"])
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    if hf_config.is_encoder_decoder:
        model = transformers.AutoModelForSeq2SeqLM.from_config(hf_config, attn_implementation="eager")
    elif variant.architecture is None:
        model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    else:
        hf_config.architectures = [variant.architecture]
        hf_config._attn_implementation = "eager"
        model = getattr(transformers, variant.architecture)(hf_config)
    model = model.float().eval()
    if variant.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return _randomised(model, hf_config.hidden_size, variant.gain, seed)


def _randomised(model: Any, hidden: int, gain: float, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):  # not a parameter
            model.final_logits_bias.copy_(0.3 * torch.randn(model.final_logits_bias.shape, generator=generator))
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = any(part in name for part in ("norm", "ln_", "LayerNorm"))
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif is_norm:
                parameter.copy_((gain if "post_" in name else 1) + 0.3 * noise)
            elif "lm_head" in name or "embed" in name or "shared" in name or "wte" in name or "wpe" in name:
                parameter.copy_(2.0 * noise / hidden**0.5)
            else:
                parameter.copy_(1.5 * gain * noise / hidden**0.5)
    return model


def _run(model: Any, variant: Variant, seed: int) -> tuple[Expected, float]:
    import torch

    ids = np.random.default_rng(seed).integers(3, variant.config["vocab_size"], variant.prompt)
    tokens = torch.from_numpy(ids)[None]
    encoded = model.config.is_encoder_decoder
    target = np.concatenate([[model.config.decoder_start_token_id or 0], ids[::-2]]) if encoded else ids
    given = {"decoder_input_ids": torch.from_numpy(target)[None]} if encoded else {}
    with torch.no_grad():
        output = model(
            tokens, **given, output_hidden_states=True
        )  # before generating: dynamic rope remembers the longest length
        greedy = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            no_repeat_ngram_size=variant.ngram,
            output_scores=True,
            return_dict_in_generate=True,
        )
    hidden = output.decoder_hidden_states if encoded else output.hidden_states
    # The last one of a model with a projection before the head is not as wide as the others: it is left out.
    states = [state for state in hidden if state.shape == hidden[0].shape]
    best = torch.stack(greedy.scores).topk(2).values
    expected = Expected(
        ids=target,
        logits=output.logits[0].numpy(),
        hidden_states=torch.stack(states)[:, 0].numpy(),
        greedy_ids=greedy.sequences[0, 1 if encoded else variant.prompt :].numpy(),
        source=ids if encoded else None,
        encoder_states=torch.stack(output.encoder_hidden_states)[:, 0].numpy() if encoded else None,
    )
    return expected, float((best[..., 0] - best[..., 1]).min())


def _run_encoder(model: Any, variant: Variant, seed: int) -> Expected:
    import torch

    rng = np.random.default_rng(seed)
    ids = rng.integers(3, variant.config["vocab_size"], variant.prompt)
    types = np.sort(rng.integers(0, model.config.type_vocab_size, variant.prompt)) if _has_types(model) else None
    given = {} if types is None else {"token_type_ids": torch.from_numpy(types)[None]}
    with torch.no_grad():
        output = model(torch.from_numpy(ids)[None], output_hidden_states=True, **given)
    logits = output.logits
    if not str(variant.architecture).endswith(("SequenceClassification", "NextSentencePrediction")):
        logits = logits[0] if logits.ndim == 3 else logits[0, :, None]  # one score of each token
    return Expected(
        ids=ids,
        logits=logits.numpy(),
        hidden_states=torch.stack(output.hidden_states)[:, 0].numpy(),
        greedy_ids=np.zeros(0, np.int64),
        types=types,
    )


def _has_types(model: Any) -> bool:
    return getattr(model.config, "type_vocab_size", 0) > 0


def blank_prompt(config: dict[str, Any], length: int, seed: int) -> np.ndarray:
    """A text with a mask, then the start token and the first tokens of the blank, for a model that fills one."""
    ids = np.random.default_rng(seed).integers(3, 60, length)
    ids[length // 3] = config["mask_token_id"]
    ids[-4] = config["bos_token_id" if "position_encoding_2d" in config else "sop_token_id"]
    return ids


def _run_reference(model: Any, variant: Variant, seed: int) -> tuple[Expected, float]:
    import torch

    ids = blank_prompt(variant.config, variant.prompt, seed)
    tokens, gap = torch.from_numpy(ids), float("inf")
    with torch.no_grad():
        logits, states = model(tokens)
        for _ in range(NEW_TOKENS):
            best = model(tokens)[0][-1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            tokens = torch.cat([tokens, best.indices[:1]])
    hidden = torch.stack(states).numpy()
    return Expected(ids, logits.numpy(), hidden, tokens[len(ids) :].numpy()), gap


def save_model(model: Any, folder: Path, rewrite: Rewrite | None = None) -> None:
    """Write the model's config.json and model.safetensors."""
    from safetensors.numpy import save_file

    tensors = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    if isinstance(model.config, dict):
        (folder / "config.json").write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    if model.config.is_encoder_decoder:  # both stacks read the table that stands as "shared"
        tensors = {name: value for name, value in tensors.items() if "embed_tokens" not in name}
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            tensors.pop("lm_head.weight")
    elif model.config.tie_word_embeddings:
        for name in ("lm_head.weight", *(getattr(model, "_tied_weights_keys", None) or ())):
            tensors.pop(name, None)
    if rewrite is None:
        model.config.to_json_file(folder / "config.json", use_diff=False)
    else:
        config, tensors = rewrite(model.config.to_dict(), tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _as_chatglm2(
    config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A GLM-4 model in the layout of ChatGLM2."""
    written = {
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "ffn_hidden_size": config["intermediate_size"],
        "hidden_size": config["hidden_size"],
        "kv_channels": config["head_dim"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "num_attention_heads": config["num_attention_heads"],
        "num_layers": config["num_hidden_layers"],
        "padded_vocab_size": config["vocab_size"],
        "rmsnorm": True,
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000,
        "seq_length": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    renamed = {
        "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
        "model.norm.weight": "transformer.encoder.final_layernorm.weight",
        "lm_head.weight": "transformer.output_layer.weight",
    }
    parts = {
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    found = {}
    for name, value in tensors.items():
        if "model.layers." not in name:
            found[renamed[name]] = value
        elif ".q_proj." in name:
            joined = np.concatenate([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
            found[name.replace("model.layers", "transformer.encoder.layers")] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            for part, other in parts.items():
                name = name.replace(part, other)
            found[name.replace("model.layers", "transformer.encoder.layers")] = value
    return written, found


def main(names: list[str]) -> None:
    """Write the golden folders of `names`, or all."""
    for name in names or variants():
        folder = HERE / name
        expected = build(name, folder)
        stored = {name: value for name, value in vars(expected).items() if value is not None}
        np.savez_compressed(folder / "expected.npz", **stored)
        size = sum(path.stat().st_size for path in folder.iterdir())
        distinct = len(set(expected.greedy_ids.tolist()))
        print(f"{name:22} {size:8,} bytes  |logits| <= {np.abs(expected.logits).max():.1f}  {distinct} distinct ids")


if __name__ == "__main__":
    main(sys.argv[1:])
