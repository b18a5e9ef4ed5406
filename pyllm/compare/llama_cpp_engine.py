"""llama.cpp through llama-cpp-python's low-level functions, from a GGUF file of the same weights."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np

from pyllm.compare.engine import Decoded, Settings, Unsupported
from pyllm.compare.gguf_file import write_gguf

FILE_TYPES = {
    "float32": None,
    "bfloat16": None,
    "int8": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": api.LLAMA_FTYPE_MOSTLY_Q4_0,
}
BATCH = 512


class LlamaCpp:
    """A model and a context that is made anew for every number of sequences and every length.

    The defaults of llama.cpp hold: file mapped, weights repacked where it has a faster layout, cache in float16.
    """

    weight_bytes: int | None = None
    cache_value_bytes = 2.0

    def __init__(self, model: Path, settings: Settings) -> None:
        api.llama_log_set(_silent, ctypes.c_void_p(0))
        self.threads = settings.threads
        self.model = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{model}: llama.cpp could not load it")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.last: list[int] = []
        self.depth = 0

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        """A GGUF file beside the folder; Q8_0 and Q4_0 as llama.cpp's own quantizer makes them."""
        plain = write_gguf(folder, folder.with_name(f"{folder.name}.gguf"))
        if (kind := FILE_TYPES[dtype]) is None:
            return plain
        target = folder.with_name(f"{folder.name}.{dtype}.gguf")
        if not target.exists():
            api.llama_log_set(_silent, ctypes.c_void_p(0))
            params = api.llama_model_quantize_default_params()
            params.ftype = kind
            part = Path(f"{target}.part")
            if api.llama_model_quantize(str(plain).encode(), str(part).encode(), ctypes.byref(params)):
                raise Unsupported(f"llama.cpp could not quantize {plain}")
            part.rename(target)
        return target

    def reserve(self, sequences: int, length: int) -> None:
        """A context whose cache holds just that."""
        if self.context is not None:
            api.llama_free(self.context)
        params = api.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * -(-length // 256) * 256  # a multiple of 256 for each, as it rounds itself
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            self.context = None
            raise Unsupported(f"llama.cpp makes no context for {sequences} sequences of {length} tokens")

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts from nothing; the next token of each."""
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        self.depth = len(prompts[0])
        pieces = [
            (token, at, sequence, at + 1 == self.depth)
            for sequence, ids in enumerate(prompts)
            for at, token in enumerate(ids)
        ]
        self.last = []
        for begin in range(0, len(pieces), BATCH):
            self.last += self._run(pieces[begin : begin + BATCH])
        return self.last

    def decode(self, steps: int) -> Decoded:
        """Generate `steps` further tokens of every sequence."""
        tokens = []
        began = time.perf_counter()
        for _ in range(steps):
            self.last = self._run([(token, self.depth, at, True) for at, token in enumerate(self.last)])
            self.depth += 1
            tokens.append(self.last)
        return Decoded(time.perf_counter() - began, [list(row) for row in zip(*tokens, strict=True)])

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wanted) together; the likeliest token behind each wanted one."""
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        failed = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        return [self._likeliest(at) for at, row in enumerate(rows) if row[3]]

    def _likeliest(self, row: int) -> int:
        logits = api.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


@api.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _silent(level: int, text: bytes, data: Any) -> None:
    """Say nothing."""
