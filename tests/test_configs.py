"""Configs of every family: what spec they give, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.errors import ConfigError
from pyllm.models import FAMILIES, family_of, read_spec
from pyllm.position_bias import Alibi
from pyllm.prefix import PrefixSpec
from pyllm.rope import RopeKind
from pyllm.spec import Activation, ModelSpec, NormKind

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 128,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 67}


def read(config: dict[str, Any]) -> ModelSpec:
    return family_of(config).read(config)


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(config)
    return str(caught.value)


def test_gpt2_config() -> None:
    spec = read({**GPT2, "n_positions": 50, "n_inner": None, "layer_norm_epsilon": 1e-4, "bos_token_id": 3})
    block = spec.blocks[2]
    assert len(spec.blocks) == 3
    assert (block.norm.kind, block.norm.eps, block.norm.bias) == (NormKind.LAYER, 1e-4, True)
    assert (block.mlp.hidden, block.mlp.activation, block.mlp.gated) == (128, Activation.GELU_TANH, False)
    assert block.attention.scale == 8**-0.5
    assert (spec.head.tied, spec.embedding.positions, spec.bos_token_id) == (True, 50, 3)
    assert spec.eos_token_ids == (), "the class default 50256 lies outside of this vocabulary"


def test_gpt2_scales() -> None:
    spec = read({**GPT2, "scale_attn_by_inverse_layer_idx": True})
    assert [block.attention.scale for block in spec.blocks] == [8**-0.5 / (layer + 1) for layer in range(3)]
    assert read({**GPT2, "scale_attn_weights": False}).blocks[1].attention.scale == 1.0


@pytest.mark.parametrize(
    ("word", "activation"),
    [
        ("gelu_new", Activation.GELU_TANH),
        ("gelu_pytorch_tanh", Activation.GELU_TANH),
        ("gelu", Activation.GELU_ERF),
        ("quick_gelu", Activation.QUICK_GELU),
        ("relu", Activation.RELU),
        ("relu2", Activation.RELU_SQUARED),
        ("sigmoid", Activation.SIGMOID),
        ("silu", Activation.SILU),
        ("swish", Activation.SILU),
        ("tanh", Activation.TANH),
    ],
)
def test_activations(word: str, activation: Activation) -> None:
    assert read({**GPT2, "activation_function": word}).blocks[0].mlp.activation is activation
    assert read({**LLAMA, "hidden_act": word}).blocks[0].mlp.activation is activation


def test_class_defaults_for_missing_keys() -> None:
    gpt2 = read({"model_type": "gpt2"})
    assert (gpt2.vocab_size, gpt2.hidden, len(gpt2.blocks), gpt2.max_positions) == (50257, 768, 12, 1024)
    assert (gpt2.head.tied, gpt2.bos_token_id, gpt2.eos_token_ids) == (True, 50256, (50256,))
    llama = read({"model_type": "llama"})
    assert (llama.vocab_size, llama.hidden, llama.max_positions, llama.head.tied) == (32000, 4096, 2048, False)
    assert llama.blocks[0].attention.kv_heads == 32
    assert (llama.bos_token_id, llama.eos_token_ids, llama.pad_token_id) == (1, (2,), None)
    mistral = read({"model_type": "mistral"})
    assert mistral.blocks[31].attention.window == 4096
    assert mistral.blocks[0].attention.kv_heads == 8
    qwen2 = read({"model_type": "qwen2"})
    assert {block.attention.window for block in qwen2.blocks} == {None}
    assert (qwen2.blocks[0].attention.qkv_bias, qwen2.blocks[0].attention.out_bias) == (True, False)
    qwen3 = read({"model_type": "qwen3"})
    assert qwen3.blocks[0].attention.head_dim == 128
    assert qwen3.blocks[0].attention.qk_norm is not None


@pytest.mark.parametrize(
    ("model_type", "eps"),
    [("bert", 1e-12), ("distilbert", 1e-12), ("electra", 1e-12), ("roberta", 1e-12), ("bart", 1e-5), ("mbart", 1e-5),
     ("t5", 1e-6), ("mt5", 1e-6), ("gpt2", 1e-5), ("openai-gpt", 1e-5), ("opt", 1e-5), ("bloom", 1e-5), ("mpt", 1e-5),
     ("gpt_neox", 1e-5), ("gptj", 1e-5), ("cohere", 1e-5), ("glm", 1.5625e-7), ("glm4", 1.5625e-7),
     ("llama", 1e-6), ("gemma2", 1e-6)],
)  # fmt: skip
def test_eps_where_a_config_has_none(model_type: str, eps: float) -> None:
    """As its class in transformers has it, which for RoBERTa is not what its checkpoints say."""
    spec = read({"model_type": model_type})
    assert {block.norm.eps for block in spec.blocks} == {eps}


def test_classes_with_other_heads_are_refused_by_name() -> None:
    for model_type, name in (
        ("gpt2", "GPT2ForSequenceClassification"),
        ("llama", "LlamaForTokenClassification"),
        ("bart", "BartForQuestionAnswering"),
        ("t5", "T5EncoderModel"),
    ):
        assert f"architectures = ['{name}']" in refusal({"model_type": model_type, "architectures": [name]})
    for name in ("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"):
        read({"model_type": "gpt2", "architectures": [name]})
    read({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]})
    twice = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "a"}}
    assert "a name of its own for each label" in refusal(twice)


def test_start_tokens_where_a_config_has_none() -> None:
    assert {name: read({"model_type": name}).decoder_start_token_id for name in ("t5", "mt5", "bart")} == {
        "t5": 0, "mt5": 0, "bart": 2,
    }  # fmt: skip


def test_size_of_the_default_llama() -> None:
    assert read({"model_type": "llama"}).num_parameters() == 6_738_415_616


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # a config as its file has it, and the parameters of the model
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    "chatglm3-6b": (
        {
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "architectures": ["ChatGLMModel"],
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "eos_token_id": 2,
            "ffn_hidden_size": 13696,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "hidden_size": 4096,
            "kv_channels": 128,
            "layernorm_epsilon": 1e-05,
            "model_type": "chatglm",
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 32,
            "num_layers": 28,
            "original_rope": True,
            "pad_token_id": 0,
            "padded_vocab_size": 65024,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 8192,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.27.1",
            "use_cache": True,
        },
        6_243_584_000,
    ),
    "glm-4-9b-chat-hf": (
        {
            "architectures": ["GlmForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "max_position_embeddings": 131072,
            "model_type": "glm",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 151552,
        },
        9_399_951_360,
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "openai-gpt": (
        {
            "afn": "gelu",
            "architectures": ["OpenAIGPTLMHeadModel"],
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "openai-gpt",
            "n_ctx": 512,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 512,
            "n_special": 0,
            "predict_special_tokens": True,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 40478,
        },
        116_534_784,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert read(config).num_parameters() == parameters


def test_gpt1_config() -> None:
    """Its "gelu" is the one by tanh, and no other spelling is known to its class."""
    config = PUBLISHED["openai-gpt"][0]
    assert read(config).blocks[0].mlp.activation is Activation.GELU_TANH
    for change in ({"afn": "gelu_new"}, {"n_special": 3}, {"n_head": 5}):
        assert next(iter(change)) in refusal({**config, **change})


def test_chatglm2_config() -> None:
    config = {**PUBLISHED["chatglm3-6b"][0], "rope_ratio": 50}
    spec = read(config)
    assert spec.rope is not None
    assert (spec.rope.dim, spec.rope.theta) == (64, 500_000)
    for change in (
        {"multi_query_attention": False},
        {"multi_query_group_num": 3},
        {"rmsnorm": False},
        {"post_layer_norm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"quantization_bit": 4},
        {"pre_seq_len": 128},
        {"kv_channels": 6},
    ):
        assert next(iter(change)) in refusal({**config, **change})


CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "gmask_token_id": 130001,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "mask_token_id": 130000,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "use_cache": True,
    "vocab_size": 130528,
}
GLM: dict[str, Any] = {
    "attention_scale": 1.0,
    "block_position_encoding": True,
    "eos_token_id": 50258,
    "hidden_size": 1024,
    "mask_token_id": 50260,
    "max_sequence_length": 512,
    "model_type": "glm",
    "num_attention_heads": 16,
    "num_layers": 24,
    "relative_encoding": False,
    "sop_token_id": 50257,
    "vocab_size": 50304,
}


def test_configs_of_models_that_fill_blanks() -> None:
    chatglm, glm = read(CHATGLM), read(GLM)
    assert chatglm.prefix == PrefixSpec(130004, ((130001,), (130000,)))
    assert chatglm.blocks[0].residual_scale == math.sqrt(56)
    assert read({**CHATGLM, "num_layers": 2}).blocks[0].residual_scale == math.sqrt(56)
    assert chatglm.num_parameters() == 6_173_286_400 + 130528 * 4096  # the head is not counted where it is published
    first = {key: value for key, value in CHATGLM.items() if not key.endswith("token_id")}  # and its older ids
    assert read({**first, "vocab_size": 150528}).prefix == PrefixSpec(150004, ((150001,), (150000,)))
    assert glm.prefix == PrefixSpec(50257, ((50260,),), restarts=True)
    assert glm.embedding.positions == glm.embedding.second_positions == 513
    assert read({**GLM, "hidden_act": "gelu"}).blocks[0].mlp.activation is Activation.GELU_ERF
    for change in (
        {"position_encoding_2d": False},
        {"quantization_bit": 4},
        {"mask_token_id": None},
        {"pre_seq_len": 9},
        {"num_attention_heads": 33},
    ):
        assert next(iter(change)) in refusal({**CHATGLM, **change})
    for change in ({"relative_encoding": True}, {"sop_token_id": None}, {"mask_token_id": None}, {"spell_length": 3}):
        assert next(iter(change)) in refusal({**GLM, **change})


def test_rope_spellings_agree() -> None:
    parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {"original_max_position_embeddings": 64}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **parameters, **original}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **parameters, **original}}
    both = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **parameters}}
    beside = {**both, **original}
    nested = {**LLAMA, "rope_parameters": {"full_attention": new["rope_parameters"]}}
    rope = read(new).rope
    assert rope is not None
    assert (rope.kind, rope.theta, rope.pretrained_positions) == (RopeKind.LLAMA3, 5e5, 64)
    assert rope == read(old).rope == read(beside).rope == read(nested).rope
    both_rope = read(both).rope
    assert both_rope is not None
    assert both_rope.pretrained_positions == 128


def test_longrope_factor_is_the_ratio_of_lengths_unless_given() -> None:
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 32, **lists}
    rope = read({**LLAMA, "rope_scaling": scaling}).rope
    assert rope is not None
    assert rope.factor == 4.0
    assert rope.attention_scaling == math.sqrt(1 + math.log(4) / math.log(32))


def test_partial_rotation() -> None:
    rope = read({**LLAMA, "partial_rotary_factor": 0.5}).rope
    assert rope is not None
    assert rope.dim == 4


def test_context_grows_with_rope_scaling() -> None:
    assert read({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4}}).max_positions == 512


def test_windows() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 16}

    def windows(config: dict[str, Any]) -> list[int | None]:
        return [block.attention.window for block in read(config).blocks]

    assert windows(qwen) == [None, None, None]
    assert windows({**qwen, "use_sliding_window": True, "max_window_layers": 1}) == [None, 16, 16]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows({**qwen, "use_sliding_window": True, "layer_types": types}) == [16, None, 16]
    assert "layer_types" in refusal({**qwen, "layer_types": types})
    assert windows({**LLAMA, "model_type": "mistral", "sliding_window": 8}) == [8, 8, 8]
    assert windows({**LLAMA, "model_type": "mistral", "sliding_window": None}) == [None, None, None]
    assert "sliding_window" in refusal({**LLAMA, "sliding_window": 8})


def test_aliases() -> None:
    renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    config = {renamed.get(name, name): value for name, value in LLAMA.items()}
    assert read(config) == read(LLAMA)
    assert "one thing" in refusal({**LLAMA, "n_embd": 33})


def test_token_ids() -> None:
    spec = read({**LLAMA, "eos_token_id": [5, 6], "bos_token_id": None, "pad_token_id": -1})
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((5, 6), None, None)


def test_unknown_model_type_names_the_nearest() -> None:
    message = refusal({"model_type": "qwen"})
    assert all(name in message for name in FAMILIES)
    assert "did you mean qwen" in message
    for value in (None, 3, ["llama"], {"a": 1}):
        assert "model_type" in refusal({"model_type": value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 300}, "head_dim"),
        ({"head_dim": 7}, "rotated channels"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -(10**400)}, "rope_theta"),
        ({"rope_scaling": 4}, "rope_scaling"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "speed": 3}}, "rope_scaling.'speed'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1] * 4}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": "x", "long_factor": [1] * 4}}, "short_factor"),
        ({"rope_parameters": {"a": {"rope_type": "linear", "factor": 2}, "b": {}}}, "layer type"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": [[], {}, 3]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hiden_size": 64}, "did you mean hidden_size"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_bad_llama_configs(change: dict[str, Any], named: str) -> None:
    assert named in refusal({**LLAMA, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "n_head"),
        ({"n_inner": 0}, "n_inner"),
        ({"scale_attn_weights": 1}, "scale_attn_weights"),
        ({"activation_function": "softplus"}, "gelu_new"),
        ({"rope_theta": 10000.0}, "rope_theta"),
    ],
)
def test_bad_gpt2_configs(change: dict[str, Any], named: str) -> None:
    assert named in refusal({**GPT2, **change})


def test_all_problems_at_once() -> None:
    message = refusal({**LLAMA, "hidden_act": "mish", "rms_norm_eps": -1, "wings": 2, "rope_scaling": {"type": "su"}})
    assert "4 problems" in message
    assert all(name in message for name in ("hidden_act", "rms_norm_eps", "wings", "rope_scaling.type"))


def test_harmless_keys() -> None:
    extra = {"reorder_and_upcast_attn": True, "resid_pdrop": 0.1, "id2label": {"0": "x"}, "n_ctx": 64}
    assert read({**GPT2, **extra}) == read(GPT2)


def test_auto_map_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="auto_map is ignored"):
        spec = read({**LLAMA, "auto_map": {"AutoModel": "modeling_evil.Evil"}})
    assert spec == read(LLAMA)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    *LLAMA,
    *GPT2,
    *("head_dim", "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "hidden_act"),
    *("eos_token_id", "dtype", "torch_dtype", "n_inner", "use_sliding_window", "max_window_layers", "pruned_heads"),
]
ROPE_KEYS = ["type", "rope_type", "factor", "rope_theta", "original_max_position_embeddings", "truncate", "mscale"]
ROPE = st.dictionaries(
    st.sampled_from(ROPE_KEYS), JSON | st.sampled_from([kind.value for kind in RopeKind]), max_size=4
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON | ROPE, max_size=4),
)
def test_any_json_gives_a_spec_or_a_config_error(family: str, changes: dict[str, Any]) -> None:
    base = GPT2 if family == "gpt2" else LLAMA
    try:
        spec = read({**base, **changes, "model_type": family})
    except ConfigError as error:
        assert str(error).isprintable() or "\n" in str(error)
    else:
        assert spec.num_parameters() > 0
        if spec.rope is not None:
            assert np.isfinite(spec.rope.inv_freq(10)).all()


def test_read_spec_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_spec(tmp_path) == read(LLAMA)


def test_bloom_and_mpt_configs() -> None:
    bloom = read({"model_type": "bloom", "n_embed": 48, "n_layer": 3, "num_attention_heads": 12, "seq_length": 99})
    assert (bloom.hidden, len(bloom.blocks), bloom.max_positions, bloom.head.tied) == (48, 3, 99, True)
    assert bloom.blocks[0].attention.bias == Alibi()
    assert bloom.blocks[0].attention.scale == 0.5
    assert bloom.blocks[0].mlp.hidden == 192
    assert bloom.embedding.norm == bloom.final_norm
    mpt = read({"model_type": "mpt", "d_model": 48, "n_heads": 3, "attn_config": {"alibi_bias_max": 4}, "verbose": 0})
    assert (mpt.blocks[0].attention.bias, mpt.blocks[0].attention.scale) == (Alibi(4.0), 0.25)
    assert not mpt.blocks[0].norm.bias


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bloom", "n_head": 7}, "n_head"),
        ({"model_type": "bloom", "n_inner": 100}, "n_inner"),
        ({"model_type": "mpt", "expansion_ratio": 2}, "expansion_ratio"),
        ({"model_type": "mpt", "attn_config": {"clip_qkv": 0}}, "attn_config.clip_qkv = 0: expected"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "attn_config.alibi"),
        ({"model_type": "mpt", "attn_config": {"attn_types": 1}}, "did you mean attn_type?"),
        ({"model_type": "mpt", "attn_config": 3}, "attn_config = 3: expected an object or null"),
        ({"model_type": "mpt", "no_bias": False}, "no_bias"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_bad_bloom_and_mpt_configs(config: dict[str, Any], words: str) -> None:
    assert words in refusal(config)


GEMMA: dict[str, Any] = {"model_type": "gemma2", "num_hidden_layers": 5, "sliding_window": 7}
GEMMA3: dict[str, Any] = {**GEMMA, "model_type": "gemma3_text"}


def test_gemma_configs() -> None:
    gemma2 = read(GEMMA)
    assert [block.attention.window for block in gemma2.blocks] == [7, None, 7, None, 7]
    attention = gemma2.blocks[0].attention
    assert (attention.scale, attention.softcap, gemma2.head.softcap) == (256**-0.5, 50.0, 30.0)
    assert (attention.heads, attention.kv_heads, attention.head_dim, gemma2.embedding.scale) == (8, 4, 256, 2304**0.5)
    assert read({**GEMMA, "attn_logit_softcapping": None}).blocks[0].attention.softcap is None
    assert gemma2.local_rope is None
    gemma3 = read({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 4})
    assert [block.attention.window for block in gemma3.blocks] == [7, 7, 7, None, 7]
    assert (gemma3.blocks[0].attention.softcap, gemma3.head.softcap) == (None, None)
    assert gemma3.rope is not None
    assert gemma3.local_rope is not None
    assert (gemma3.rope.theta, gemma3.rope.kind, gemma3.rope.factor) == (1e6, RopeKind.LINEAR, 8.0)
    assert gemma3.max_positions == 131072
    assert (gemma3.local_rope.theta, gemma3.local_rope.kind) == (1e4, RopeKind.DEFAULT)
    each = {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 20.0}}
    nested = read({**GEMMA3, "rope_parameters": each})
    assert nested.rope is not None
    assert nested.local_rope is not None
    assert (nested.rope.theta, nested.local_rope.theta) == (50.0, 20.0)
    dynamic = {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}, "full_attention": {}}
    assert "rotary embedding of layers with a window" in refusal({**GEMMA3, "rope_parameters": dynamic})
    assert "attn_logit_softcapping" in refusal({**GEMMA3, "attn_logit_softcapping": 50.0})
    assert "use_bidirectional_attention" in refusal({**GEMMA3, "use_bidirectional_attention": True})
    assert "rope_parameters" in refusal({**GEMMA, "rope_parameters": each}), "one base for all layers"


def test_cohere_configs() -> None:
    spec = read({"model_type": "cohere", "num_hidden_layers": 2, "use_qk_norm": True, "num_key_value_heads": 8})
    assert (spec.hidden, spec.head.tied, spec.head.scale, spec.rope and spec.rope.theta) == (8192, True, 0.0625, 5e5)
    slots = spec.slots()
    assert slots["blocks.1.attn.q_norm.weight"] == (64, 128)
    assert slots["blocks.1.attn.k_norm.weight"] == (8, 128)
    assert "blocks.1.mlp_norm.weight" not in slots
    assert spec.block_weights == 2 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 22528)
    assert "logit_scale" in refusal({"model_type": "cohere", "logit_scale": "x"})
