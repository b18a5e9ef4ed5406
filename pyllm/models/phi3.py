"""Phi-3 and Phi-4: LLaMA with q, k and v in one tensor, gate and up in another, and rotation of part of a head.

Where a completion passes `original_max_position_embeddings`, the keys that are cached keep their rotation, as they do
in other models with longrope; transformers computes them anew for this family.
"""

from __future__ import annotations

from dataclasses import replace

from pyllm.models.config_reader import ConfigReader
from pyllm.models.llama import NAMES, Biases, Variant, llama_like
from pyllm.models.shared import read_layer_windows, read_window
from pyllm.weight_names import Row

_FUSED = {"self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up_proj": ("mlp.gate", "mlp.up")}
_SEPARATE = ("q_proj.", "k_proj.", "v_proj.", "gate_proj.", "up_proj.")


def _biases(reader: ConfigReader) -> Biases:
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    return Biases(qkv=False, out=False, mlp=False)


def _windows(reader: ConfigReader, layers: int) -> list[int | None]:
    return read_layer_windows(reader, layers, read_window(reader, default=None))


PHI3 = llama_like(
    Variant(
        model_type="phi3",
        vocab_size=32064,
        intermediate_size=8192,
        max_positions=4096,
        biases=_biases,
        windows=_windows,
        hidden=3072,
        norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(32000,),
        names=replace(
            NAMES,
            rows=(
                *(row for row in NAMES.rows if not any(part in row.name for part in _SEPARATE)),
                *(
                    Row(f"model.layers.{{i}}.{name}.weight", tuple(f"blocks.{{i}}.{slot}.weight" for slot in slots))
                    for name, slots in _FUSED.items()
                ),
            ),
        ),
    )
)
