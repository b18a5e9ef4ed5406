"""GLM (2021) and ChatGLM-6B in torch, one sequence at a time, written from their papers' formulas: no library has them.

Modules are named so that a state dict has the names of the published checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Reference(nn.Module):
    """A model of a config.json of GLM, or with `position_encoding_2d` of ChatGLM-6B."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.rotary = config, bool(config.get("position_encoding_2d"))
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        inner = config.get("inner_hidden_size", 4 * hidden)
        words = nn.Embedding(vocab, hidden)
        self.transformer = nn.Module()
        if self.rotary:
            self.transformer.word_embeddings = words
            self.lm_head = nn.Linear(hidden, vocab, bias=False)
        else:
            self.word_embeddings = words
            rows = config["max_sequence_length"] + 1
            self.transformer.position_embeddings = nn.Embedding(rows, hidden)
            self.transformer.block_position_embeddings = nn.Embedding(rows, hidden)
        self.words = [words]  # in a list: it is no module twice
        eps = config.get("layernorm_epsilon", 1e-5)
        self.transformer.layers = nn.ModuleList(_layer(hidden, inner, eps) for _ in range(config["num_layers"]))
        self.transformer.final_layernorm = nn.LayerNorm(hidden, eps)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [T, V] of ids [T], and states: of the embedding, behind each block, the last after the final norm."""
        tokens = ids.tolist()
        start = self.config["bos_token_id" if self.rotary else "sop_token_id"]
        first, second = self.places(tokens, start)
        prefix = tokens.index(start) if start in tokens else len(tokens)
        rows = torch.arange(len(tokens))
        seen = (rows[None] <= rows[:, None]) | (rows[None] < prefix)
        x = self.words[0](ids)
        if not self.rotary:
            x = x + self.transformer.position_embeddings(first) + self.transformer.block_position_embeddings(second)
        states = [x]
        for layer in self.transformer.layers:
            x = self._block(layer, x, seen, first, second)
            states.append(x)
        states[-1] = self.transformer.final_layernorm(x)
        head = self.lm_head.weight if self.rotary else self.words[0].weight
        return states[-1] @ head.T, states

    def places(self, tokens: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both positions of each token."""
        config = self.config
        prefix = tokens.index(start) if start in tokens else len(tokens)
        if self.rotary:
            gmask, mask = config["gmask_token_id"], config["mask_token_id"]
            kind = [gmask] if gmask in tokens[:prefix] else [mask]
        else:
            kind = [config[name] for name in ("mask_token_id", "smask_token_id", "gmask_token_id") if name in config]
        masks = [i for i, token in enumerate(tokens[:prefix]) if token in kind]
        first, second, blank, count = [], [], -1, 0
        for i, token in enumerate(tokens):
            if i < prefix:
                first.append(i)
                second.append(0)
                continue
            if token == start and (blank < 0 or not self.rotary):
                blank, count = blank + 1, 0
            count += 1
            first.append(masks[min(blank, len(masks) - 1)])
            second.append(count)
        return torch.tensor(first), torch.tensor(second)

    def _block(self, layer: Any, x: torch.Tensor, seen: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        normed = layer.input_layernorm(x)
        attended = self._attention(layer.attention, normed, seen, *places)
        if self.rotary:
            alpha = math.sqrt(2 * 28)
            x = layer.post_attention_layernorm(alpha * normed + attended)
            return alpha * x + _mlp(layer.mlp, x)
        x = x + attended
        return x + _mlp(layer.mlp, layer.post_attention_layernorm(x))

    def _attention(
        self, layer: Any, x: torch.Tensor, seen: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        size = x.shape[1] // heads
        mixed = layer.query_key_value(x)
        if self.rotary:  # q, k and v of each head together
            q, k, v = mixed.view(len(x), heads, 3, size).unbind(2)
            q, k = (
                torch.cat([_rotated(left, first), _rotated(right, second)], -1)
                for left, right in (y.chunk(2, -1) for y in (q, k))
            )
        else:
            q, k, v = (part.view(len(x), heads, size) for part in mixed.chunk(3, -1))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return layer.dense(torch.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1))


def _layer(hidden: int, inner: int, eps: float) -> nn.Module:
    layer = nn.Module()
    layer.input_layernorm = nn.LayerNorm(hidden, eps)
    layer.attention = nn.Module()
    layer.attention.query_key_value = nn.Linear(hidden, 3 * hidden)
    layer.attention.dense = nn.Linear(hidden, hidden)
    layer.post_attention_layernorm = nn.LayerNorm(hidden, eps)
    layer.mlp = nn.Module()
    layer.mlp.dense_h_to_4h = nn.Linear(hidden, inner)
    layer.mlp.dense_4h_to_h = nn.Linear(inner, hidden)
    return layer


def _mlp(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer.dense_4h_to_h(nn.functional.gelu(layer.dense_h_to_4h(x), approximate="tanh"))


def _rotated(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [T, heads, d] with channels (k, k + d / 2) turned; frequencies have the precision of float16."""
    size = x.shape[-1]
    inverse = (1 / 10000 ** (torch.arange(0, size, 2).float() / size)).half().float()
    angles = (places[:, None].float() * inverse).repeat(1, 2)[:, None]
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()
