"""transformers on torch, with the cache that it uses by default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pyllm.compare.engine import Decoded, Settings, Unsupported


class Torch:
    """A causal model in eager mode, scaled dot-product attention."""

    weight_bytes: int | None = None

    def __init__(self, model: Path, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        dtype = getattr(torch, settings.dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.cache_value_bytes = float(dtype.itemsize)
        self.cache: Any = None
        self.last = torch.empty(0, 1, dtype=torch.long)

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        """The folder itself."""
        if dtype not in ("float32", "bfloat16"):
            raise Unsupported(f"transformers needs further packages for {dtype} weights on a CPU")
        return folder

    def reserve(self, sequences: int, length: int) -> None:
        """The cache grows by itself."""
        self.cache = None

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts from nothing; the next token of each."""
        self.cache = None
        self._step(torch.tensor(prompts))
        return [int(token) for token in self.last]

    def decode(self, steps: int) -> Decoded:
        """Generate `steps` further tokens of every sequence."""
        began = time.perf_counter()
        tokens = [self._step(self.last) for _ in range(steps)]
        seconds = time.perf_counter() - began
        return Decoded(seconds, torch.cat(tokens, 1).tolist())

    def _step(self, ids: Any) -> Any:
        with torch.inference_mode():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
            self.last = out.logits[:, -1].argmax(-1, keepdim=True)
        return self.last
