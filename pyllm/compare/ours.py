"""This project, as a row of the comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyllm.cache import BLOCK_TOKENS, blocks_for
from pyllm.compare.engine import Decoded, Settings
from pyllm.convert import convert
from pyllm.engine.request import Request
from pyllm.llm import LLM
from pyllm.planning import plan
from pyllm.sampling import SamplingParams

QUANTIZED = ("int8", "int4")


class Pyllm:
    """`LLM`, driven step by step."""

    def __init__(self, model: Path, settings: Settings) -> None:
        # A converted folder has plain embeddings and head: at load they become integers too.
        kind: dict[str, Any] = {"quantization" if settings.dtype in QUANTIZED else "dtype": settings.dtype}
        blocks = settings.sequences + blocks_for(max(settings.tokens, settings.length))
        block = plan(model, max_model_len=BLOCK_TOKENS, max_num_seqs=1, **kind)
        self.llm = LLM(
            model,
            device="cpu",
            threads=settings.threads,
            max_model_len=settings.length,
            max_num_seqs=settings.sequences,
            kv_cache_bytes=blocks * (block.cache // block.cache_blocks),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            **kind,
        )
        values = sum(2 * b.attention.kv_heads * b.attention.head_dim for b in self.llm.spec.blocks)
        self.weight_bytes: int | None = self.llm.weight_bytes
        self.cache_value_bytes = self.llm.plan.cache / self.llm.plan.cache_tokens / values
        self.requests: list[Request] = []
        self.given = 0  # tokens of each sequence that were asked for so far

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        """The folder itself, or what `pyllm convert` makes of it, beside it."""
        if dtype not in QUANTIZED:
            return folder
        target = folder.with_name(f"{folder.name}.{dtype}")
        if not target.exists():
            convert(folder, target, quantization=dtype)
        return target

    def reserve(self, sequences: int, length: int) -> None:
        """Keys and values are paged: only what runs now has to end."""
        while self.requests:
            self.llm.engine.abort(self.requests.pop())

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts from nothing; the next token of each."""
        self.reserve(len(prompts), len(prompts[0]))
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=None)
        self.requests = [self.llm.engine.add(None, ids, params, 0) for ids in prompts]
        self.given = 0
        return [row[0] for row in self._next(1)]

    def decode(self, steps: int) -> Decoded:
        """Generate `steps` further tokens of every sequence."""
        began = time.perf_counter()
        tokens = self._next(steps)
        return Decoded(time.perf_counter() - began, tokens)

    def _next(self, count: int) -> list[list[int]]:
        """That many tokens of every sequence; those whose prompts ended early may be ahead of the others."""
        end = self.given + count
        while not all(len(self._tokens(request)) >= end for request in self.requests):
            self.llm.engine.step()
        tokens = [self._tokens(request)[self.given : end] for request in self.requests]
        self.given = end
        return tokens

    def _tokens(self, request: Request) -> list[int]:
        if request.error is not None:
            raise request.error
        if request.finished:
            raise RuntimeError("a sequence ended early: the cache or the context is too small for this cell")
        return request.completions[0].output.token_ids
