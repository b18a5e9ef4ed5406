"""GPT-J: attention and feed-forward part read one norm; rotated channels are neighbours; the head has a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.models.config_reader import ConfigReader
from pyllm.models.family import Family
from pyllm.models.shared import ACTIVATIONS, HEADS, HIDDEN, LAYERS, MLP_HIDDEN, NORM_EPS, POSITIONS, read_special_tokens
from pyllm.rope import RopeSpec
from pyllm.spec import AttentionSpec, BlockSpec, HeadSpec, MlpSpec, ModelSpec, NormKind, NormSpec, Placement
from pyllm.weight_names import NameTable, Row, Transform, linear


def read(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-J config."""
    reader = ConfigReader(config, "gptj")
    vocab_size = reader.integer("vocab_size", default=50400)
    hidden = reader.integer(*HIDDEN, default=4096)
    layers = reader.integer(*LAYERS, default=28, maximum=10_000)
    heads = reader.integer(*HEADS, default=16)
    positions = reader.integer(*POSITIONS, default=2048)
    size = max(hidden // heads, 1)
    block = BlockSpec(
        norm=NormSpec(NormKind.LAYER, reader.number(*NORM_EPS, default=1e-5, maximum=0.1), bias=True),
        attention=AttentionSpec(heads=heads, kv_heads=heads, head_dim=size, scale=size**-0.5),
        mlp=MlpSpec(
            hidden=reader.integer(*MLP_HIDDEN, default=4 * hidden),
            activation=reader.choice("activation_function", options=ACTIVATIONS, default="gelu_new"),
            gated=False,
            bias=True,
        ),
        placement=Placement.SHARED,
    )
    rotated = reader.integer("rotary_dim", default=64)
    tied = reader.boolean("tie_word_embeddings", default=False)
    tokens = read_special_tokens(reader, vocab_size, 50256, (50256,))
    dtype = reader.dtype()
    if hidden % heads:
        reader.refuse("n_head", heads, f"a divisor of n_embd = {hidden}")
    if rotated % 2 or rotated > size:
        reader.refuse("rotary_dim", rotated, f"an even number up to the head size of {size}")
    reader.finish()
    return ModelSpec(
        family="gptj",
        vocab_size=vocab_size,
        hidden=hidden,
        blocks=(block,) * layers,
        final_norm=block.norm,
        max_positions=positions,
        rope=RopeSpec(dim=rotated, max_positions=positions),
        head=HeadSpec(tied=tied, bias=True),
        dtype=dtype,
        **tokens,
    )


_AT, _BLOCK = "transformer.h.{i}", "blocks.{i}"
NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("transformer.wte.weight", ("embed.weight",)),
        *linear(f"{_AT}.ln_1", f"{_BLOCK}.attn_norm"),
        *(
            Row(f"{_AT}.attn.{part}_proj.weight", (f"{_BLOCK}.attn.{part}.weight",), Transform.INTERLEAVED)
            for part in "qk"
        ),
        Row(f"{_AT}.attn.v_proj.weight", (f"{_BLOCK}.attn.v.weight",)),
        Row(f"{_AT}.attn.out_proj.weight", (f"{_BLOCK}.attn.o.weight",)),
        *linear(f"{_AT}.mlp.fc_in", f"{_BLOCK}.mlp.up"),
        *linear(f"{_AT}.mlp.fc_out", f"{_BLOCK}.mlp.down"),
        *linear("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias", "h.*.attn.embed_positions"),
)

GPTJ = Family("gptj", read, NAMES)
