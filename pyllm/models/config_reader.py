"""Strict reading of a Hugging Face config: every key is used, known to be harmless, or reported."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pyllm.errors import ConfigError, listed, shown

T = TypeVar("T")

_CAUSAL = re.compile(r".*(ForCausalLM|ForConditionalGeneration|LMHeadModel|DoubleHeadsModel|(?<!Encoder)Model)")
MAX_SIZE = 2**31 - 1
DTYPES = {name: name for name in ("float32", "float16", "bfloat16")}

# Keys that say nothing about the computation: bookkeeping, training, generation defaults, task heads.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path _num_labels
    architectures attention_dropout attn_implementation attn_pdrop bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward custom_pipelines decoder_start_token_id diversity_penalty do_sample early_stopping
    embd_pdrop encoder_no_repeat_ngram_size experts_implementation exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
    is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length min_length
    model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores prefix pretraining_tp problem_type
    remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class top_k top_p torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)

# Keys that would change the computation; only the listed values mean what pyllm computes.
UNCHANGED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}


class ConfigReader:
    """Takes values out of a config by name and collects everything wrong with it; `finish` reports it at once.

    A method that finds a bad value notes it and returns the default, so that reading goes on. `names` are the
    spellings of one key; null counts as absent.
    """

    def __init__(self, config: Mapping[str, Any], family: str, at: str = "") -> None:
        """Read `config` of a `family` model; `at` is put before key names in messages."""
        self.problems: list[str] = []
        self._config = config
        self._family = family
        self._at = at
        self._used: set[str] = set()

    def get(self, *names: str) -> Any:
        """The value under whichever name is there, None if none is."""
        self._used.update(names)
        values = {name: self._config[name] for name in names if self._config.get(name) is not None}
        if not values:
            return None
        first = next(iter(values.values()))
        if any(value != first for value in values.values()):
            pairs = ", ".join(f"{self._at}{name} = {shown(value)}" for name, value in values.items())
            self.problems.append(f"{pairs}: expected one value, these are names of one thing")
        return first

    def _spelling(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self._config.get(name) is not None), names[0])

    def has(self, name: str) -> bool:
        """Whether the key is written down, be it as null."""
        return name in self._config

    def integer(self, *names: str, default: int, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A whole number in a range."""
        value = self.get(*names)
        if value is None:
            return default
        if not _is_integer(value) or not minimum <= value <= maximum:
            self.refuse(self._spelling(names), value, f"a whole number from {minimum} to {maximum}")
            return default
        return int(value)

    def number(self, *names: str, default: float, minimum: float = 0.0, maximum: float = 1e18) -> float:
        """A finite number in a range."""
        value = self.get(*names)
        if value is None:
            return default
        if not _is_number(value) or not minimum <= value <= maximum:
            self.refuse(self._spelling(names), value, f"a number from {minimum:g} to {maximum:g}")
            return default
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number that is not negative, or None."""
        return None if self.get(name) is None else self.number(name, default=1.0)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_number(item) for item in value):
            self.refuse(name, value, "a list of numbers")
            return ()
        return tuple(float(item) for item in value)

    def boolean(self, *names: str, default: bool) -> bool:
        """True or false."""
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(self._spelling(names), value, "true or false")
            return default
        return value

    def choice(self, *names: str, options: Mapping[str, T], default: str) -> T:
        """What one of the words in `options` stands for."""
        value = self.get(*names)
        if value is None:
            return options[default]
        if not isinstance(value, str) or value not in options:
            self.refuse(self._spelling(names), value, "one of " + ", ".join(options))
            return options[default]
        return options[value]

    def token_id(self, name: str, default: int | None, vocab_size: int) -> int | None:
        """A token id, or None: here null means that there is no such token."""
        ids = self.token_ids(name, () if default is None else (default,), vocab_size)
        if len(ids) > 1:
            self.refuse(name, list(ids), "one token id or null")
        return ids[0] if ids else None

    def token_ids(self, name: str, default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them, or null for none. Ids beyond the vocabulary can never occur and are dropped."""
        value = self.get(name)
        if value is None:
            ids: Sequence[Any] = () if self.has(name) else default
        else:
            ids = value if isinstance(value, list) else (value,)
        if not all(_is_integer(item) and -1 <= item <= MAX_SIZE for item in ids):
            self.refuse(name, value, "a token id, a list of token ids, or null")
            return ()
        return tuple(item for item in ids if 0 <= item < vocab_size)

    def dtype(self) -> str | None:
        """The declared dtype of the weights; `torch_dtype` is its older name, and `dtype` wins."""
        self._used.update(("dtype", "torch_dtype"))
        name = "dtype" if self._config.get("dtype") is not None else "torch_dtype"
        return None if self._config.get(name) is None else self.choice(name, options=DTYPES, default="float32")

    def only(self, name: str, *values: Any) -> None:
        """Refuse the key unless it is absent or has one of the values that change nothing."""
        self._used.add(name)
        if name in self._config and not any(_same(self._config[name], value) for value in values):
            self.refuse(name, self._config[name], " or ".join(_json(value) for value in values))

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Note a value that is malformed or not supported."""
        self.problems.append(f"{self._at}{name} = {shown(value)}: expected {expected}")

    def nested(self, name: str, value: Any) -> ConfigReader:
        """A reader of the object under `name`, whose problems join these once it is `check_unused`."""
        reader = ConfigReader(value, self._family, at=f"{self._at}{name}.")
        reader.problems = self.problems
        return reader

    def check_unused(self, harmless: frozenset[str] = frozenset()) -> None:
        """Note every key that nobody asked for."""
        for name in self._config:
            if name in self._used or name in harmless:
                continue
            near = get_close_matches(name, self._used, n=1) if isinstance(name, str) else []
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(
                f"{self._at}{shown(name)} = {shown(self._config[name])}: not a known key of {self._family} models{hint}"
            )

    def finish(self) -> None:
        """Raise one `ConfigError` for everything noted."""
        for name, values in UNCHANGED.items():
            if name not in self._used:
                self.only(name, *values)
        if "auto_map" in self._config:
            self._used.add("auto_map")
            warnings.warn("config.json: auto_map is ignored: pyllm never runs code from a checkpoint", stacklevel=2)
        self.check_unused(HARMLESS)
        names = self._config.get("architectures")
        if "architectures" not in self._used and not all(_CAUSAL.fullmatch(str(name)) for name in names or ()):
            self.refuse("architectures", names, "a class that generates text: other heads of this family do not run")
        if self.problems:
            raise ConfigError(listed(f"config.json of a {self._family} model is not supported", self.problems))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -(MAX_SIZE**2) < value < MAX_SIZE**2 if isinstance(value, int) else math.isfinite(value)


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _json(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
