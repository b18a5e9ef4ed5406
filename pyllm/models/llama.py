"""LLaMA 1, 2, 3, and what its descendants share with it: RMS norms, rotary positions, grouped heads, gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import (
    ACTIVATIONS,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP_HIDDEN,
    NORM_EPS,
    POSITIONS,
    read_layer_windows,
    read_local_rope,
    read_rope,
    read_special_tokens,
)
from pyllm.spec import (
    MAX_HEAD_DIM,
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
    Placement,
)
from pyllm.weight_names import NameTable, Row, linear

_LINEARS = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "post_attention_layernorm": "mlp_norm",
}
NAMES = NameTable(
    prefix="model.",
    rows=(
        Row("model.embed_tokens.weight", ("embed.weight",)),
        *(Row(f"model.layers.{{i}}.{name}.weight", (f"blocks.{{i}}.{slot}.weight",)) for name, slot in _NORMS.items()),
        *(
            row
            for name, slot in _LINEARS.items()
            for row in linear(f"model.layers.{{i}}.{name}", f"blocks.{{i}}.{slot}")
        ),
        Row("model.norm.weight", ("final_norm.weight",)),
        Row("lm_head.weight", ("head.weight",)),
    ),
    ignored=("*rotary_emb.inv_freq",),
)


@dataclass(frozen=True)
class Biases:
    """Which projections have a bias."""

    qkv: bool
    out: bool
    mlp: bool


@dataclass(frozen=True)
class Others:
    """What LLaMA has no word for."""

    embedding: EmbeddingSpec = field(default_factory=EmbeddingSpec)
    attention: Mapping[str, Any] = field(default_factory=dict)  # fields of AttentionSpec
    head: Mapping[str, Any] = field(default_factory=dict)  # fields of HeadSpec
    qk_norm_each: bool = False  # heads of q and k have norms with weights of their own
    local_rope: bool = False  # layers with a window rotate by parameters of their own


@dataclass(frozen=True)
class Variant:
    """Where a descendant of LLaMA differs: the defaults of its config class, and the parts that it reads itself."""

    model_type: str
    vocab_size: int
    intermediate_size: int
    max_positions: int
    biases: Callable[[ConfigReader], Biases]
    windows: Callable[[ConfigReader, int], list[int | None]]
    hidden: int = 4096
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden / heads
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rotated_part: float = 1.0  # of a head's channels
    placement: Placement = Placement.PRE
    layers: int = 32
    heads: int = 32
    norm_kind: NormKind = NormKind.RMS
    activation: tuple[str, str] = ("hidden_act", "silu")  # the key, and its default
    theta: float = 10000.0
    is_stretched: bool = False  # max_position_embeddings counts what the scaling of a linear rope adds
    tied: bool = False
    others: Callable[[ConfigReader, int], Others] = lambda reader, hidden: Others()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    names: NameTable = NAMES


def llama_like(variant: Variant) -> Family:
    """The family of a variant."""

    def read(config: Mapping[str, Any]) -> ModelSpec:
        return _read(config, variant)

    return Family(variant.model_type, read, variant.names)


def _read(config: Mapping[str, Any], variant: Variant) -> ModelSpec:
    reader = ConfigReader(config, variant.model_type)
    vocab_size = reader.integer("vocab_size", default=variant.vocab_size)
    hidden = reader.integer(*HIDDEN, default=variant.hidden)
    layers = reader.integer(*LAYERS, default=variant.layers, maximum=10_000)
    heads = reader.integer(*HEADS, default=variant.heads)
    kv_default = variant.kv_heads if variant.kv_heads and not reader.has("num_key_value_heads") else heads
    kv_heads = reader.integer("num_key_value_heads", default=kv_default)
    head_dim = reader.integer("head_dim", default=variant.head_dim or max(hidden // heads, 1))
    max_positions = reader.integer(*POSITIONS, default=variant.max_positions)
    norm = NormSpec(variant.norm_kind, reader.number(*NORM_EPS, default=variant.norm_eps, maximum=0.1), bias=False)
    biases = variant.biases(reader)
    mlp = MlpSpec(
        hidden=reader.integer(*MLP_HIDDEN, default=variant.intermediate_size),
        activation=reader.choice(variant.activation[0], options=ACTIVATIONS, default=variant.activation[1]),
        gated=True,
        bias=biases.mlp,
    )
    windows = variant.windows(reader, layers)
    tied = reader.boolean("tie_word_embeddings", default=variant.tied)
    tokens = read_special_tokens(reader, vocab_size, variant.bos_token_id, variant.eos_token_ids, variant.pad_token_id)
    dtype = reader.dtype()
    if not reader.has("head_dim") and variant.head_dim is None and hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim beside it")
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    if head_dim > MAX_HEAD_DIM:
        reader.refuse("head_dim", head_dim, f"at most {MAX_HEAD_DIM}")
    others = variant.others(reader, hidden)
    layer_type = "full_attention" if others.local_rope else None
    rope = read_rope(reader, head_dim, max_positions, variant.rotated_part, variant.theta, layer_type)
    local_rope = read_local_rope(reader, head_dim, max_positions) if others.local_rope else None
    reader.finish()

    attention = AttentionSpec(
        **{
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "qkv_bias": biases.qkv,
            "out_bias": biases.out,
            "qk_norm": norm if variant.qk_norm or others.qk_norm_each else None,
            "qk_norm_each": others.qk_norm_each,
            **others.attention,
        }
    )

    def block(window: int | None) -> BlockSpec:
        return BlockSpec(norm, replace(attention, window=window), mlp, variant.placement)

    return ModelSpec(
        family=variant.model_type,
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=tuple(block(window) for window in windows),
        final_norm=norm,
        max_positions=max_positions if variant.is_stretched else rope.stretched_positions,
        embedding=others.embedding,
        rope=rope,
        local_rope=local_rope,
        head=HeadSpec(tied=tied, **others.head),
        dtype=dtype,
        **tokens,
    )


def _llama_biases(reader: ConfigReader) -> Biases:
    attention = reader.boolean("attention_bias", default=False)
    return Biases(qkv=attention, out=attention, mlp=reader.boolean("mlp_bias", default=False))


def no_windows(reader: ConfigReader, layers: int) -> list[int | None]:
    """The windows of a family that has none: the config may say so."""
    reader.only("sliding_window", None)
    return read_layer_windows(reader, layers, None)


LLAMA = llama_like(
    Variant(
        model_type="llama",
        vocab_size=32000,
        intermediate_size=11008,
        max_positions=2048,
        biases=_llama_biases,
        windows=no_windows,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
)
