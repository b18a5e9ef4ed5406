"""GLM-4-0414: GLM-4 with a norm behind attention and feed-forward part too."""

from __future__ import annotations

from dataclasses import replace

from pyllm.models.glm import VARIANT
from pyllm.models.llama import llama_like
from pyllm.spec import Placement
from pyllm.weight_names import Row

_NAMES = VARIANT.names
_POST_NORMS = {"post_self_attn_layernorm": "attn_post_norm", "post_mlp_layernorm": "mlp_post_norm"}

GLM4 = llama_like(
    replace(
        VARIANT,
        model_type="glm4",
        placement=Placement.SANDWICH,
        names=replace(
            _NAMES,
            rows=_NAMES.rows
            + tuple(
                Row(f"model.layers.{{i}}.{name}.weight", (f"blocks.{{i}}.{slot}.weight",))
                for name, slot in _POST_NORMS.items()
            ),
        ),
    )
)
