"""Pieces of config reading that several families share: activations, rotary parameters, windows."""

from __future__ import annotations

from typing import Any

from pyllm.errors import ConfigError
from pyllm.models.config_reader import MAX_SIZE, ConfigReader
from pyllm.rope import RopeKind, RopeSpec
from pyllm.spec import Activation

# Spellings of one size, of which a config uses any.
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
MLP_HIDDEN = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "inner_hidden_size")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
NORM_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon")

ACTIVATIONS = {
    "gelu": Activation.GELU_ERF,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "quick_gelu": Activation.QUICK_GELU,
    "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
    "sigmoid": Activation.SIGMOID,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "tanh": Activation.TANH,
}
ROPE_KINDS = {kind.value: kind for kind in RopeKind}
NEEDED = {  # parameters without which a scaling kind is not defined
    RopeKind.LINEAR: ("factor",),
    RopeKind.DYNAMIC: ("factor",),
    RopeKind.LLAMA3: ("factor", "low_freq_factor", "high_freq_factor"),
    RopeKind.LONGROPE: ("short_factor", "long_factor"),
}
OF_KIND = {  # parameters that mean something to a scaling kind, besides the needed ones
    RopeKind.YARN: ("factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    RopeKind.LONGROPE: ("factor", "attention_factor"),
}
LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def read_special_tokens(
    reader: ConfigReader, vocab_size: int, bos: int | None, eos: tuple[int, ...], pad: int | None = None
) -> dict[str, Any]:
    """The fields of `ModelSpec` that name tokens; `bos`, `eos` and `pad` are what the config class defaults to."""
    return {
        "bos_token_id": reader.token_id("bos_token_id", bos, vocab_size),
        "eos_token_ids": reader.token_ids("eos_token_id", eos, vocab_size),
        "pad_token_id": reader.token_id("pad_token_id", pad, vocab_size),
    }


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    max_positions: int,
    default_part: float = 1.0,
    default_theta: float = 10000.0,
    layer_type: str | None = None,
) -> RopeSpec:
    """Rotary parameters, spelled as `rope_theta` + `rope_scaling` (older files) or all in `rope_parameters`.

    `default_part` of a head's channels are rotated, from `default_theta` on, where nothing else is said. Those of one
    layer type are read where `rope_parameters` has some for each; they have to be equal where it is None.
    """
    parameters = _rope_parameters(reader, layer_type)
    inner = reader.nested("rope_parameters" if reader.has("rope_parameters") else "rope_scaling", parameters)
    theta = reader.number("rope_theta", "rotary_emb_base", default=default_theta, minimum=1.0000001)
    theta = inner.number("rope_theta", default=theta, minimum=1.0000001)
    partial = reader.number("partial_rotary_factor", "rotary_pct", default=default_part, minimum=1e-6, maximum=1.0)
    partial = inner.number("partial_rotary_factor", default=partial, minimum=1e-6, maximum=1.0)
    problems = len(inner.problems)
    kind = inner.choice("rope_type", "type", options=ROPE_KINDS, default="default")
    is_known = len(inner.problems) == problems
    for name in NEEDED.get(kind, ()):
        if inner.get(name) is None:
            inner.problems.append(f"rope scaling {kind.value} needs {name}")
    original = _original_positions(reader, inner)
    values: dict[str, Any] = {}
    for name in (*NEEDED.get(kind, ()), *OF_KIND.get(kind, ())):
        if inner.get(name) is not None:
            values[name] = _rope_value(inner, name)
    if kind in (RopeKind.YARN, RopeKind.LONGROPE):
        values.setdefault("factor", max_positions / (original or max_positions))
    if is_known:  # else nobody can say which parameters belong here
        inner.check_unused()
    try:
        return RopeSpec(int(head_dim * partial), theta, kind, max_positions, original, **values)
    except ConfigError as error:
        inner.problems.append(str(error))
        return RopeSpec(dim=2)


def read_local_rope(reader: ConfigReader, head_dim: int, max_positions: int) -> RopeSpec:
    """Rotary parameters of layers with a window: those of their type in `rope_parameters`, or a base in
    `rope_local_base_freq`."""
    theta = reader.number("rope_local_base_freq", default=10000.0, minimum=1.0000001)
    parameters = reader.get("rope_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("sliding_attention"), dict):
        return RopeSpec(head_dim, theta, max_positions=max_positions)
    return read_rope(reader, head_dim, max_positions, default_theta=theta, layer_type="sliding_attention")


def read_window(reader: ConfigReader, default: int | None) -> int | None:
    """`sliding_window`: null means none, absent means the default of the family."""
    if reader.has("sliding_window") and reader.get("sliding_window") is None:
        return None
    if not reader.has("sliding_window") and default is None:
        return None
    return reader.integer("sliding_window", default=default or 1)


def read_layer_windows(reader: ConfigReader, layers: int, window: int | None, first: int = 0) -> list[int | None]:
    """The window of each layer: from layer `first` on, unless `layer_types` says which layers have it."""
    windows = [window if layer >= first else None for layer in range(layers)]
    types = reader.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != layers or any(t not in LAYER_TYPES for t in map(_hashable, types)):
        reader.refuse("layer_types", types, f"a list of {layers}, each {' or '.join(LAYER_TYPES)}")
        return windows
    if window is None and "sliding_attention" in types:
        reader.refuse("layer_types", types, "full_attention everywhere, as no sliding window is in use")
    return [window if LAYER_TYPES[name] else None for name in types]


def _rope_parameters(reader: ConfigReader, layer_type: str | None) -> dict[str, Any]:
    value = reader.get("rope_parameters", "rope_scaling")
    if value is None:
        return {}
    if not isinstance(value, dict):
        reader.refuse(
            "rope_parameters" if reader.has("rope_parameters") else "rope_scaling", value, "an object or null"
        )
        return {}
    if value and all(isinstance(inner, dict) for inner in value.values()):  # one object per layer type
        if layer_type in value:
            return dict(value[layer_type])
        variants = list(value.values())
        if any(variant != variants[0] for variant in variants):
            reader.refuse("rope_parameters", value, "the same parameters for every layer type")
        return dict(variants[0])
    return value


def _original_positions(reader: ConfigReader, inner: ConfigReader) -> int | None:
    """Beside the object it wins over the one inside."""
    inside = inner.integer("original_max_position_embeddings", default=0) or None
    beside = reader.integer("original_max_position_embeddings", default=0) or None
    return beside or inside


def _rope_value(inner: ConfigReader, name: str) -> Any:
    if name in ("short_factor", "long_factor"):
        return inner.numbers(name)
    if name == "truncate":
        return inner.boolean(name, default=True)
    return inner.number(name, default=1.0, maximum=float(MAX_SIZE))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else None
