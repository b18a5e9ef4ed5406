"""A tiny random LLaMA with a byte-level BPE tokenizer, as a folder: all that a test of the whole path needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "Grüße aus Köln, 你好世界, привет, 🙂🙃 and some numbers: 3.14159, 2718, 42.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]


def make(
    folder: Path, *, seed: int = 0, chat: bool = False, tokenizer: bool = True, poison: str = "", **config: Any
) -> Path:
    """Write the model into `folder`; keywords replace values of its config.

    With `chat` it has a chat template; the weight named by `poison` holds a NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, chat) if tokenizer else 300
    values = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": size,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    weights = random_weights(values, seed)
    if poison:
        weights[poison].flat[0] = np.nan
    save_file(weights, folder / "model.safetensors")
    return folder


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """All parameters of the LLaMA that `config` describes, norms and biases included, drawn at random."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden if name in "qo" else kv, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()
    }


def write_tokenizer(folder: Path, chat: bool = False) -> int:
    """Train a byte-level BPE on a few sentences, write it with its config, and give the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
