"""What a model will take, in bytes, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyllm.cache import BLOCK_TOKENS, CACHE_DTYPES, KVCache, blocks_for
from pyllm.engine.runner import HEAD_ROWS, arena_floats, decode_floats
from pyllm.errors import InsufficientMemoryError
from pyllm.models import open_checkpoint
from pyllm.packed import packed_bytes, weight_dtype
from pyllm.spec import ModelSpec
from pyllm.system import available_memory
from pyllm.weights import Checkpoint, resolve

GB = 1e9
SPARE = 200_000_000  # left to the interpreter and its libraries


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose; `available` is what the system can give now without swapping, within this process's limits."""

    spec: ModelSpec
    dtype: str
    cache_dtype: str
    max_model_len: int
    cache_blocks: int
    weights: int
    cache: int
    workspace: int
    available: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds, over all sequences."""
        return self.cache_blocks * BLOCK_TOKENS

    @property
    def fits(self) -> bool:
        """Whether it fits what is available, with some room for the interpreter."""
        return self.total + SPARE <= self.available

    def check(self) -> None:
        """Raise `InsufficientMemoryError` where it does not fit."""
        if self.fits:
            return
        raise InsufficientMemoryError(
            f"not enough memory: needed {self.total / GB:.2f} GB (weights {self.weights / GB:.2f} as {self.dtype}, "
            f"cache {self.cache / GB:.2f} for {self.cache_tokens} tokens as {self.cache_dtype}, workspace "
            f"{self.workspace / GB:.2f}), free {max(self.available - SPARE, 0) / GB:.2f} GB. Lower max_model_len "
            "(--ctx-size), kv_cache_bytes, or max_num_batched_tokens, choose a smaller dtype, or free memory."
        )


def plan(model: str | Path, *, revision: str | None = None, offline: bool = False, **options: object) -> Plan:
    """Plan for a folder or hub name, from its config and the headers of its weights; options as those of `LLM`."""
    with open_checkpoint(resolve(str(model), revision=revision, offline=offline)) as checkpoint:
        return plan_memory(checkpoint, **options)  # type: ignore[arg-type]


def plan_memory(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
) -> Plan:
    """Plan for an open checkpoint; `ValueError` for arguments out of range."""
    spec = checkpoint.spec
    for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
            raise ValueError(f"{name}: expected an integer from 1 to {1 << 20}, got {value!r}")
    weights_as = weight_dtype(checkpoint, dtype)
    cache_as = _cache_dtype(kv_cache_dtype, weights_as)
    available = available_memory()
    weights = packed_bytes(spec, weights_as)
    workspace = _workspace(spec, max_num_seqs, max_num_batched_tokens)
    length, blocks = _cache_size(
        spec,
        KVCache.block_bytes(spec, cache_as),
        max_model_len,
        kv_cache_bytes,
        max_num_seqs,
        available - SPARE - weights - workspace,
    )
    return Plan(
        spec=spec,
        dtype=weights_as,
        cache_dtype=cache_as,
        max_model_len=length,
        cache_blocks=blocks,
        weights=weights,
        cache=blocks * KVCache.block_bytes(spec, cache_as),
        workspace=workspace,
        available=available,
    )


def _cache_dtype(asked: str, weights: str) -> str:
    if asked == "auto":
        return "bfloat16" if weights == "bfloat16" else "float32"
    if asked not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype: expected one of auto, {', '.join(CACHE_DTYPES)}, got {asked!r}")
    return asked


def _workspace(spec: ModelSpec, sequences: int, tokens: int) -> int:
    """Activations of the largest step and of recorded steps; logits of a step's ends and of a piece of a prompt."""
    rows = min(HEAD_ROWS, tokens)
    logits = (min(sequences, tokens) + rows) * spec.vocab_size
    return 4 * (arena_floats(spec, tokens, rows) + decode_floats(spec, sequences) + logits)


def _cache_size(
    spec: ModelSpec, block: int, length: int | None, asked: int | None, sequences: int, room: int
) -> tuple[int, int]:
    """Context length and number of blocks: at least one full context, at most what all sequences need."""
    if length is not None and (
        isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= spec.max_positions
    ):
        raise ValueError(f"max_model_len: expected 1 to the model's context of {spec.max_positions}, got {length!r}")
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < block:
            raise ValueError(
                f"kv_cache_bytes: expected at least one block of {block} bytes ({BLOCK_TOKENS} tokens), got {asked!r}"
            )
        blocks = asked // block
        longest = min(spec.max_positions, blocks * BLOCK_TOKENS)
        if length is not None and length > longest:
            raise InsufficientMemoryError(
                f"kv_cache_bytes of {asked} hold {longest} tokens, fewer than max_model_len {length}: raise "
                f"kv_cache_bytes to {blocks_for(length) * block}, or lower max_model_len"
            )
        return length or longest, blocks
    share = max(room // 2, 0) // block
    full = length or spec.max_positions
    if length is None and blocks_for(full) > share >= 1:
        full = share * BLOCK_TOKENS
    return full, max(blocks_for(full), min(blocks_for(full) * sequences, share))
