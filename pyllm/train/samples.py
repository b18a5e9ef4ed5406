"""Text from a model that is being trained, by the engine that serves it later, on the weights where they are."""

from __future__ import annotations

from collections.abc import Sequence

from pyllm.cache import BlockPool, KVCache, blocks_for
from pyllm.engine.engine import Engine
from pyllm.engine.runner import Runner
from pyllm.generation_config import GenerationConfig
from pyllm.model import Model
from pyllm.ops import Ops
from pyllm.sampling import SamplingParams
from pyllm.tokenizer import Tokenizer

MAX_TOKENS = 256  # of one step; a bidirectional prefix is not cut
MAX_SEQUENCES = 8


class Sampler:
    """Completes prompts with a model whose weights may change between calls."""

    def __init__(self, model: Model, ops: Ops, tokenizer: Tokenizer, defaults: GenerationConfig | None = None) -> None:
        """`defaults` is what the model's folder says of its outputs' first and last tokens."""
        self.model, self.ops, self.tokenizer, self.defaults = model, ops, tokenizer, defaults

    def complete(self, prompts: Sequence[str], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """How each prompt goes on, or with an encoder what is written about it; an empty prompt is the start token of
        the model."""
        spec = self.model.spec
        encoded = [self._encode(prompt) for prompt in prompts]
        if spec.prefix is not None:
            encoded = [spec.prefix.completed(ids) for ids in encoded]
        length = min(spec.max_positions, max(map(len, encoded), default=1) + max_tokens)
        most = MAX_TOKENS if spec.prefix is None else max(MAX_TOKENS, length)
        blocks = blocks_for(length) * min(len(prompts), MAX_SEQUENCES)
        cache = KVCache(spec, max(blocks, 1), self.model.weights.dtype)
        cross = None if spec.encoder is None else KVCache(spec, cache.blocks, self.model.weights.dtype, cross=True)
        engine = Engine(
            Runner(self.model, self.ops, cache, most, MAX_SEQUENCES, length, cross=cross, max_source=length),
            BlockPool(cache.blocks),
            self.tokenizer,
            sorted({*spec.eos_token_ids, *self.tokenizer.eos_token_ids}),
            max_sequences=MAX_SEQUENCES,
            max_tokens=most,
            max_length=length,
            share_prefixes=False,
            defaults=self.defaults,
        )
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        requests = [
            engine.add(prompt, ids[: length - 1], params, seed) for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        while not engine.idle:
            engine.step()
        return [request.completions[0].output.text for request in requests]

    def _encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt)
        if ids:
            return ids
        start = self.model.spec.bos_token_id
        return [start if start is not None else next(iter(self.model.spec.eos_token_ids), 0)]
