"""Other engines behind one small interface, each imported only when asked for, so that a benchmark has a row for each.

An engine takes token ids: ``prefill(ids)`` runs a prompt from nothing and gives the next token; ``prepare(ids)`` runs
one and ``decode(count)`` then generates `count` tokens greedily behind it, each call going on where the last one ended
(CTranslate2, which cannot, begins again behind the prompt). All run on the given number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """What a row of the end-to-end benchmark can do."""

    def prefill(self, ids: Sequence[int]) -> int: ...
    def prepare(self, ids: Sequence[int]) -> None: ...
    def decode(self, count: int) -> int: ...


def missing(engine: str) -> list[str]:
    """Packages that an engine needs and that are not installed."""
    return [name for name in NEEDS[engine] if find_spec(name) is None]


class Pyllm:
    """This project."""

    def __init__(self, folder: Path, dtype: str, threads: int, longest: int) -> None:
        from pyllm import LLM

        self.llm = LLM(
            folder,
            dtype=dtype,
            threads=threads,
            max_model_len=longest,
            max_num_seqs=1,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
        )
        self.fresh = 0
        self.pieces: Any = None

    def _run(self, ids: Sequence[int], count: int) -> int:
        request = {"prompt_token_ids": list(ids)}
        [output] = self.llm.generate(request, max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
        assert len(output.outputs[0].token_ids) == count
        return output.outputs[0].token_ids[-1]

    def prefill(self, ids: Sequence[int]) -> int:
        self.fresh += 1  # another first token, so that nothing is found in the prefix cache
        return self._run([self.fresh, *ids[1:]], 1)

    def prepare(self, ids: Sequence[int]) -> None:
        if self.pieces is not None:
            self.pieces.close()
        room = self.llm.max_model_len - len(ids)
        request = {"prompt_token_ids": list(ids)}
        self.pieces = self.llm.stream(request, max_tokens=room, temperature=0, ignore_eos=True, detokenize=False)
        next(self.pieces)

    def decode(self, count: int) -> int:
        return sum(len(next(self.pieces).token_ids) for _ in range(count))


class Torch:
    """transformers on torch, its own cache."""

    def __init__(self, folder: Path, dtype: str, threads: int, longest: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.cache: Any = None
        self.token = 0

    def _step(self, ids: Sequence[int], cache: Any) -> tuple[int, Any]:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    def prefill(self, ids: Sequence[int]) -> int:
        return self._step(ids, None)[0]

    def prepare(self, ids: Sequence[int]) -> None:
        self.token, self.cache = self._step(ids, None)

    def decode(self, count: int) -> int:
        for _ in range(count):
            self.token, self.cache = self._step([self.token], self.cache)
        return count


class LlamaCpp:
    """llama.cpp through llama-cpp-python, from a GGUF of the same weights."""

    def __init__(self, folder: Path, dtype: str, threads: int, longest: int) -> None:
        import llama_cpp

        self.llm = llama_cpp.Llama(
            str(write_gguf(folder)),
            n_ctx=longest,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            n_ubatch=512,
            verbose=False,
        )

    def _last(self) -> int:
        logits = self.llm._ctx.get_logits_ith(-1)
        return int(np.ctypeslib.as_array(logits, (self.llm.n_vocab(),)).argmax())

    def prefill(self, ids: Sequence[int]) -> int:
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.llm.eval(list(ids))
        return self._last()

    def prepare(self, ids: Sequence[int]) -> None:
        self.token = self.prefill(ids)

    def decode(self, count: int) -> int:
        for _ in range(count):
            self.llm.eval([self.token])
            self.token = self._last()
        return count


class CTranslate2:
    """CTranslate2, from its own conversion of the same weights; tokens stand there under made-up names."""

    def __init__(self, folder: Path, dtype: str, threads: int, longest: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(convert_ctranslate2(folder, dtype)), compute_type=dtype, intra_threads=threads, inter_threads=1
        )
        self.prompt: list[str] = []

    def _run(self, tokens: list[str], count: int, static: list[str] | None = None) -> int:
        [result] = self.generator.generate_batch(
            [tokens],
            static_prompt=static,
            cache_static_prompt=True,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            end_token=[],
        )
        assert len(result.sequences_ids[0]) == count
        return int(result.sequences_ids[0][-1])

    def prefill(self, ids: Sequence[int]) -> int:
        return self._run([f"t{i}" for i in ids], 1)

    def prepare(self, ids: Sequence[int]) -> None:
        self.prompt = [f"t{i}" for i in ids]
        self.decode(1)

    def decode(self, count: int) -> int:
        self._run(self.prompt[-1:], count, self.prompt[:-1] or None)
        return count


ENGINES: dict[str, Any] = {
    "pyllm": Pyllm,
    "torch": Torch,
    "llama-cpp-python": LlamaCpp,
    "ctranslate2": CTranslate2,
}
NEEDS = {
    "pyllm": ["pyllm"],
    "torch": ["torch", "transformers"],
    "llama-cpp-python": ["llama_cpp", "gguf"],
    "ctranslate2": ["ctranslate2", "transformers", "torch"],
}

# GGUF names of the tensors of a block, by family: checkpoint's name -> GGUF's.
_LLAMA_NAMES = {
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
_GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(folder: Path) -> Path:
    """The checkpoint in `folder` as folder/model.gguf, without a vocabulary; kept for the next time.

    Rotary channels are not reordered: the weights are random, and the time is the same.
    """
    import gguf
    from safetensors import safe_open

    path = folder / "model.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    llama = config["model_type"] == "llama"
    writer = gguf.GGUFWriter(str(path) + ".part", "llama" if llama else "gpt2")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"] if llama else config["n_positions"])
    writer.add_embedding_length(config["hidden_size"] if llama else config["n_embd"])
    writer.add_block_count(config["num_hidden_layers"] if llama else config["n_layer"])
    writer.add_head_count(config["num_attention_heads"] if llama else config["n_head"])
    writer.add_feed_forward_length(config["intermediate_size"] if llama else 4 * config["n_embd"])
    if llama:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    else:
        writer.add_layer_norm_eps(1e-5)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            tensor = file.get_tensor(name)
            if not llama and tensor.ndim == 2 and ".c_" in name:
                tensor = np.ascontiguousarray(tensor.T)
            if tensor.ndim == 1:
                tensor = tensor.astype(np.float32)
            target = _gguf_name(name, _LLAMA_NAMES if llama else _GPT2_NAMES)
            if str(tensor.dtype) == "bfloat16":
                writer.add_tensor(target, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(str(path) + ".part").rename(path)
    return path


def _gguf_name(name: str, blocks: dict[str, str]) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "transformer.wte.weight": "token_embd.weight",
        "transformer.wpe.weight": "position_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "transformer.ln_f.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    at = name.split(".")
    start = 2 if at[0] in ("model", "transformer") else 1
    return f"blk.{at[start]}.{blocks['.'.join(at[start + 1 : -1])]}.{at[-1]}"


def convert_ctranslate2(folder: Path, dtype: str) -> Path:
    """The checkpoint in `folder` as CTranslate2 wants it, in folder/ctranslate2-DTYPE; kept for the next time."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models

    target = folder / f"ctranslate2-{dtype}"
    if target.exists():
        return target
    config = json.loads((folder / "config.json").read_text())
    vocabulary = {f"t{i}": i for i in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    special = {f"{kind}_token": "t0" for kind in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    TransformersConverter(str(folder), low_cpu_mem_usage=True).convert(str(target), quantization=dtype)
    return target
