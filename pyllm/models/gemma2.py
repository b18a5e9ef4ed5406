"""Gemma 2: norms before and behind each part, with weights stored less 1, soft caps, windows in every other layer."""

from __future__ import annotations

from dataclasses import replace

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import NAMES, Biases, Others, Variant, llama_like
from pyllm.models.shared import read_layer_windows, read_window
from pyllm.spec import EmbeddingSpec, Placement
from pyllm.weight_names import Row, Transform

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
}


def _biases(reader: ConfigReader) -> Biases:
    attention = reader.boolean("attention_bias", default=False)
    return Biases(qkv=attention, out=attention, mlp=False)


def windows(reader: ConfigReader, layers: int, pattern: int) -> list[int | None]:
    """Those of all layers but every `pattern`-th, where `layer_types` says nothing else."""
    window = read_window(reader, default=4096)
    if reader.get("layer_types") is not None:
        return read_layer_windows(reader, layers, window)
    return [window if (layer + 1) % pattern else None for layer in range(layers)]


def read_others(reader: ConfigReader, hidden: int, score_cap: float | None, logit_cap: float | None) -> Others:
    """What Gemma has besides LLaMA's parts; the caps are the defaults of the config class."""
    for dropped in ("hidden_act", "cache_implementation"):  # the first is not what counts: hidden_activation is
        reader.get(dropped)
    reader.only("use_bidirectional_attention", None, False)

    def cap(name: str, default: float | None) -> float | None:
        return reader.optional_number(name) if reader.has(name) else default

    return Others(
        embedding=EmbeddingSpec(scale=hidden**0.5),
        attention={
            "scale": reader.number("query_pre_attn_scalar", default=256.0, minimum=1e-6) ** -0.5,
            "softcap": cap("attn_logit_softcapping", score_cap),
        },
        head={"softcap": cap("final_logit_softcapping", logit_cap)},
    )


VARIANT = Variant(
    model_type="gemma2",
    vocab_size=256000,
    intermediate_size=9216,
    max_positions=8192,
    biases=_biases,
    windows=lambda reader, layers: windows(reader, layers, pattern=2),
    hidden=2304,
    layers=26,
    heads=8,
    kv_heads=4,
    head_dim=256,
    placement=Placement.SANDWICH,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    tied=True,
    others=lambda reader, hidden: read_others(reader, hidden, score_cap=50.0, logit_cap=30.0),
    bos_token_id=2,
    eos_token_ids=(1,),
    pad_token_id=0,
    names=replace(
        NAMES,
        rows=(
            *(row for row in NAMES.rows if "norm" not in row.name),
            *(
                Row(f"model.layers.{{i}}.{name}.weight", (f"blocks.{{i}}.{slot}.weight",), Transform.LESS_ONE)
                for name, slot in _NORMS.items()
            ),
            Row("model.norm.weight", ("final_norm.weight",), Transform.LESS_ONE),
        ),
    ),
)

GEMMA2 = llama_like(VARIANT)
