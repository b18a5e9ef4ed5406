"""The whole model in float64 numpy, one token sequence at a time, written from the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle.activation import activation
from oracle.attention import Scores, softmax
from oracle.clamp import clamp

from pyllm.position_bias import Alibi, Buckets
from pyllm.rope import RopeSpec
from pyllm.spec import ENCODER, AttentionSpec, BlockSpec, HeadKind, MlpSpec, ModelSpec, NormKind, NormSpec, Placement

Array = npt.NDArray[np.float64]


def forward(
    spec: ModelSpec,
    tensors: Mapping[str, Any],
    ids: npt.NDArray[Any],
    prefix: int = 0,
    types: npt.NDArray[Any] | None = None,
    source: npt.NDArray[Any] | None = None,
) -> tuple[Array, list[Array]]:
    """Logits [T, V] (of a pooled head [1, N]; none without a head) and the hidden states that transformers reports:
    embeddings, then the output of each block, the last one after the final norm. The first `prefix` tokens are seen by
    all; where a start token ends the prefix, by itself that says how many. `source` is what an encoder beside the
    decoder reads."""
    weights = {slot: np.asarray(tensors[slot]).astype(np.float64) for slot in tensors}
    states = None if source is None else encode(spec, weights, source)
    hidden = run_stack(spec, weights, ids, types, prefix, states)
    if spec.head.kind is HeadKind.NONE:
        return np.zeros((0, 0)), hidden
    x, at = hidden[-1], spec.head.at
    if spec.head.kind.is_pooled:
        x = x[:1]
    if spec.head.transform is not None:
        x = activation(linear(x, weights, f"{at}.transform"), spec.head.transform.activation)
        if spec.head.transform.norm is not None:
            x = normalise(x, spec.head.transform.norm, weights, f"{at}.norm")
    elif spec.projects_to_head:
        x = linear(x, weights, "head.project")
    head = weights["embed.weight" if spec.head.tied else f"{at}.weight"]
    logits = spec.head.scale * (x @ head.T) + weights.get(f"{at}.bias", 0.0)
    if spec.head.softcap is not None:
        logits = spec.head.softcap * np.tanh(logits / spec.head.softcap)
    return logits, hidden


def encode(spec: ModelSpec, weights: Mapping[str, Array], source: npt.NDArray[Any]) -> Array:
    """States of the encoder beside a decoder."""
    assert spec.encoder is not None
    own = {slot.removeprefix(ENCODER): value for slot, value in weights.items() if slot.startswith(ENCODER)}
    return run_stack(spec.encoder, {"embed.weight": weights["embed.weight"], **own}, source, None, 0, None)[-1]


def run_stack(
    spec: ModelSpec,
    weights: Mapping[str, Array],
    ids: npt.NDArray[Any],
    types: npt.NDArray[Any] | None,
    prefix: int,
    states: Array | None,
) -> list[Array]:
    fills = spec.prefix is not None and spec.prefix.start_id is not None
    first, second = blank_positions(spec, list(ids)) if fills else (np.arange(len(ids)), None)
    if fills and prefix == 0:
        prefix = list(ids).index(spec.prefix.start_id) if spec.prefix.start_id in ids else len(ids)
    x = embed(spec, weights, ids, first, second, types)
    hidden = [x]
    for index, block in enumerate(spec.blocks):
        rope = spec.local_rope if spec.local_rope and block.attention.window else spec.rope
        x = run_block(x, block, rope, weights, f"blocks.{index}", prefix, (first, second), states)
        hidden.append(x)
    if spec.final_norm is not None:
        hidden[-1] = normalise(x, spec.final_norm, weights, "final_norm")
    return hidden


def embed(
    spec: ModelSpec, weights: Mapping[str, Array], ids: npt.NDArray[Any], first: Any, second: Any, types: Any
) -> Array:
    embedding = spec.embedding
    x = embedding.scale * weights["embed.weight"][ids]
    if embedding.width and not embedding.projects_sum:
        x = embedding.scale * linear(weights["embed.weight"][ids], weights, "embed.project")
    if embedding.positions:
        x = x + weights["positions.weight"][embedding.position_offset :][first]
    if embedding.second_positions:
        x = x + weights["second_positions.weight"][second]
    if embedding.types:
        x = x + weights["types.weight"][0 if types is None else types]
    if embedding.norm is not None:
        x = normalise(x, embedding.norm, weights, "embed.norm")
    return linear(x, weights, "embed.project") if embedding.projects_sum else x


def run_block(
    x: Array,
    block: BlockSpec,
    rope: RopeSpec | None,
    weights: Mapping[str, Array],
    at: str,
    prefix: int,
    places: Any,
    states: Array | None,
) -> Array:
    def norm(x: Array, name: str) -> Array:
        return normalise(x, block.norm, weights, f"{at}.{name}")

    def attention(x: Array) -> Array:
        return attend(x, x, block.attention, rope, weights, f"{at}.attn", prefix, places)

    def cross(x: Array) -> Array:
        assert block.cross is not None and states is not None
        return attend(x, states, block.cross, None, weights, f"{at}.cross")

    def mlp(x: Array) -> Array:
        return feed_forward(x, block.mlp, weights, at)

    match block.placement:
        case Placement.PRE:
            x = x + attention(norm(x, "attn_norm"))
            if block.cross is not None:
                x = x + cross(norm(x, "cross_norm"))
            return x + mlp(norm(x, "mlp_norm"))
        case Placement.POST:
            x = norm(x + attention(x), "attn_norm")
            if block.cross is not None:
                x = norm(x + cross(x), "cross_norm")
            return norm(x + mlp(x), "mlp_norm")
        case Placement.SANDWICH:
            x = x + norm(attention(norm(x, "attn_norm")), "attn_post_norm")
            return x + norm(mlp(norm(x, "mlp_norm")), "mlp_post_norm")
        case Placement.NORMED:
            x = norm(x, "attn_norm")
            x = block.residual_scale * x + attention(x)
            x = norm(x, "mlp_norm")
            return block.residual_scale * x + mlp(x)
        case Placement.PARALLEL:
            return x + attention(norm(x, "attn_norm")) + mlp(norm(x, "mlp_norm"))
        case Placement.SHARED:
            return x + attention(norm(x, "attn_norm")) + mlp(norm(x, "attn_norm"))


def normalise(x: Array, norm: NormSpec, weights: Mapping[str, Array], name: str) -> Array:
    if norm.kind is NormKind.LAYER:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if norm.bias else y


def linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", np.zeros(1))


def attend(
    x: Array,
    keys: Array,
    spec: AttentionSpec,
    rope: RopeSpec | None,
    weights: Mapping[str, Array],
    at: str,
    prefix: int = 0,
    places: Any = None,
) -> Array:
    """Attention of x [T, D] to keys and values made of `keys` [S, D]: of x itself, or of what an encoder gave."""
    length = len(keys)
    heads = {}
    for name, of, count in (("q", x, spec.heads), ("k", keys, spec.kv_heads), ("v", keys, spec.kv_heads)):
        projected = linear(of, weights, f"{at}.{name}").reshape(len(of), count, spec.head_dim)
        if spec.clip is not None:
            projected = clamp(projected, spec.clip)
        if name != "v" and spec.qk_norm is not None:
            projected = normalise(projected, spec.qk_norm, weights, f"{at}.{name}_norm")
        if name != "v" and rope is not None:
            projected = rotate(projected, rope, *places)
        heads[name] = projected
    distance = np.arange(len(x))[:, None] - np.arange(length)[None, :]
    seen = (distance >= 0) | (np.arange(length) < prefix) | (not spec.causal)
    visible = seen & ((distance if spec.causal else np.abs(distance)) < (spec.window or max(len(x), length)))
    k, v = (np.repeat(heads[name], spec.heads // spec.kv_heads, axis=1) for name in "kv")
    scores = changes(spec, weights).changed(spec.scale * np.einsum("the,she->hts", heads["q"], k))
    weight, _ = softmax(scores, visible)
    out = np.einsum("hts,she->the", weight, v)
    return linear(out.reshape(len(x), -1), weights, f"{at}.o")


def blank_positions(spec: ModelSpec, tokens: list[int]) -> tuple[Any, Any]:
    """First and second positions of tokens in a prefix with masks and in the blanks behind it."""
    rule = spec.prefix
    assert rule is not None
    prefix = tokens.index(rule.start_id) if rule.start_id in tokens else len(tokens)
    kinds = [[i for i in range(prefix) if tokens[i] in group] for group in rule.mask_ids]
    masks = next((places for places in kinds if places), [])
    first, second = list(range(prefix)), [0] * prefix
    blank = -1
    for token in tokens[prefix:]:
        begins = token == rule.start_id and (blank < 0 or rule.restarts)
        blank += begins
        first.append(masks[min(blank, len(masks) - 1)])
        second.append(1 if begins else second[-1] + 1)
    return np.array(first), np.array(second)


def changes(spec: AttentionSpec, weights: Mapping[str, Array]) -> Scores:
    bias = slopes = None
    if isinstance(spec.bias, Alibi):
        slopes = spec.bias.slopes(spec.heads).astype(np.float64)
    elif isinstance(spec.bias, Buckets):
        bias = weights["relative_bias.weight"][:, spec.bias.of_distances(two_sided=not spec.causal)]
    return Scores(bias, slopes, spec.softcap)


def rotate(x: Array, rope: RopeSpec, first: Any, second: Any) -> Array:
    frequencies = rope.inv_freq(len(x)).astype(np.float64)
    angles = first[:, None, None] * frequencies
    if rope.sections == 2:
        angles = np.concatenate([angles, second[:, None, None] * frequencies], -1)
    cos, sin = np.cos(angles) * rope.attention_scaling, np.sin(angles) * rope.attention_scaling
    half = rope.dim // 2
    a, b = x[..., :half], x[..., half : rope.dim]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rope.dim :]], -1)


def feed_forward(x: Array, spec: MlpSpec, weights: Mapping[str, Array], at: str) -> Array:
    up = linear(x, weights, f"{at}.mlp.up")
    if spec.gated:
        inner = activation(linear(x, weights, f"{at}.mlp.gate"), spec.activation.value) * up
    else:
        inner = activation(up, spec.activation.value)
    return linear(inner, weights, f"{at}.mlp.down")
