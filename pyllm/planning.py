"""What a model will take, in bytes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pyllm.cache import BLOCK_TOKENS, CACHE_DTYPES, KVCache, blocks_for
from pyllm.cuda_limits import MATMUL_FLOATS, attention_workspace, recorded_memory, takes_bfloat16
from pyllm.device import Device
from pyllm.engine.recorded import step_bytes, steps_kept
from pyllm.engine.runner import HEAD_ROWS, SCRATCH_DTYPE, decode_floats, head_rows, scratch_blocks, step_floats
from pyllm.engine.speculative import drafts_per_step
from pyllm.errors import ConfigError, InsufficientMemoryError
from pyllm.models import open_checkpoint
from pyllm.packed import Precision, packed_bytes, plain_bytes, precision_of
from pyllm.prefix import PrefixSpec
from pyllm.spec import HeadKind, ModelSpec
from pyllm.system import available_memory
from pyllm.weights import Checkpoint, resolve

GB = 1e9
SPARE = 200_000_000  # left to the interpreter and its libraries
PREFIX_TOKENS = 2048  # of a bidirectional prefix that a step has room for at least, where the context is as long


CATCH_UP = 1  # tokens that a draft model has to take in beside the newest, after a step whose drafts were all right


@dataclass(frozen=True)
class DraftPlan:
    """Bytes of a draft model; its cache has as many blocks as the model's."""

    precision: Precision
    cache_dtype: str
    max_length: int
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose; `available` is what the system can give now without swapping, within this process's limits, or
    what is free on the GPU `gpu` where the model goes there.

    `step_tokens` is what a step computes at most, `prefix_tokens` the longest bidirectional prefix that it takes.
    `drafts` is the number of tokens guessed for a sequence in a step, 0 without speculative decoding. With an encoder
    `cross` is the cache of its sources, of as many blocks as the other, and `max_source` the tokens of the longest.
    """

    spec: ModelSpec
    precision: Precision
    cache_dtype: str
    max_model_len: int
    step_tokens: int
    prefix_tokens: int
    cache_blocks: int
    weights: int
    cache: int
    workspace: int
    available: int
    drafts: int = 0
    draft_model: DraftPlan | None = None
    cross: int = 0
    max_source: int = 0
    gpu: str | None = None

    @property
    def dtype(self) -> str:
        """What the weights are packed as."""
        return str(self.precision)

    @property
    def total(self) -> int:
        """All of it."""
        draft_model = self.draft_model.total if self.draft_model is not None else 0
        return self.weights + self.cache + self.cross + self.workspace + draft_model

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
        workspace = f"workspace {self.workspace / GB:.2f}"
        if self.cross:
            workspace = f"cache of sources {self.cross / GB:.2f}, {workspace}"
        if self.draft_model is not None:
            workspace += f", draft model {self.draft_model.total / GB:.2f}"
        place = "" if self.gpu is None else f" on {self.gpu}"
        raise InsufficientMemoryError(
            f"not enough memory{place}: needed {self.total / GB:.2f} GB (weights {self.weights / GB:.2f} as "
            f"{self.dtype}, "
            f"cache {self.cache / GB:.2f} for {self.cache_tokens} tokens as {self.cache_dtype}, "
            f"{workspace}), free {max(self.available - SPARE, 0) / GB:.2f} GB. Lower max_model_len "
            "(--ctx-size), kv_cache_bytes, or max_num_batched_tokens, choose a smaller dtype or a quantization, or "
            "free memory."
        )


def plan(
    model: str | Path,
    *,
    draft_model: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    **options: object,
) -> Plan:
    """Plan for a folder or hub name, from its config and the headers of its weights; options as those of `LLM`."""
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(resolve(str(model), revision=revision, offline=offline)))
        draft = None
        if draft_model is not None:
            draft = opened.enter_context(open_checkpoint(resolve(str(draft_model), offline=offline)))
        return plan_memory(checkpoint, draft, **options)  # type: ignore[arg-type]


def plan_memory(
    checkpoint: Checkpoint,
    draft: Checkpoint | None = None,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    quantization_skip: Sequence[str] = (),
    kv_cache_dtype: str = "auto",
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    prefix: bool = False,
    speculative: str | None = None,
    num_speculative_tokens: int | None = None,
    gpu: Device | None = None,
) -> Plan:
    """Plan for an open checkpoint, with a draft model's or not, on the CPU or a GPU; `ValueError` for arguments out of
    range."""
    spec = checkpoint.spec
    if prefix and (spec.is_encoder or spec.encoder is not None):
        raise ValueError(
            f"prefix: expected False, got True: this {spec.family} model has an encoder, which sees its whole text "
            "anyway: leave it out"
        )
    if prefix and spec.prefix is None:
        spec = replace(spec, prefix=PrefixSpec())
    _check_length(spec, max_model_len)
    drafts = drafts_per_step(speculative, draft, num_speculative_tokens)
    for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
            raise ValueError(f"{name}: expected an integer from 1 to {1 << 20}, got {value!r}")
    precision = _precision(checkpoint, dtype, quantization, quantization_skip, gpu)
    cache_as = _cache_dtype(kv_cache_dtype, precision.dtype, spec, gpu)
    available = available_memory() if gpu is None else gpu.memory()[0]
    weights = _weight_bytes(checkpoint, precision, gpu)
    if spec.is_encoder and drafts:
        raise ValueError("speculative decoding: expected a model that generates, got an encoder: leave it out")
    step_tokens = prefix_tokens = max_num_batched_tokens
    if spec.is_encoder:
        step_tokens = max(step_tokens, max_model_len or spec.max_positions)
    if spec.prefix is not None:
        prefix_tokens = max(step_tokens, min(max_model_len or spec.max_positions, PREFIX_TOKENS))
        step_tokens = prefix_tokens + max_num_seqs * (1 + drafts)  # others that decode keep no prefix waiting
    longest = min(spec.max_positions, max_model_len) if isinstance(max_model_len, int) else spec.max_positions
    max_source = 0 if spec.encoder is None else min(spec.encoder.max_positions, longest)
    workspace = _workspace(spec, max_num_seqs, step_tokens, drafts, max_source)
    if gpu is not None:
        width = blocks_for(max(max_model_len or spec.max_positions, max_source))
        workspace += 4 * (attention_workspace(spec, max_num_seqs, width)[0] + MATMUL_FLOATS)
        workspace += _recorded_bytes(spec, max_num_seqs, drafts, width, gpu)
    if spec.is_encoder:
        length, blocks = _encoder_cache_size(spec, max_model_len, kv_cache_bytes, max_num_seqs, step_tokens)
        return Plan(
            spec=spec,
            precision=precision,
            cache_dtype=cache_as,
            max_model_len=length,
            step_tokens=step_tokens,
            prefix_tokens=prefix_tokens,
            cache_blocks=blocks,
            weights=weights,
            cache=blocks * KVCache.block_bytes(spec, cache_as, shared=True),
            workspace=workspace,
            available=available,
            gpu=None if gpu is None else gpu.name,
        )
    block, guessing = KVCache.block_bytes(spec, cache_as), None
    cross = 0 if spec.encoder is None else KVCache.block_bytes(spec, cache_as, cross=True)
    if draft is not None:
        guessing = _draft_plan(
            draft,
            spec,
            _precision(draft, dtype, quantization, quantization_skip, gpu),
            kv_cache_dtype,
            max_num_seqs,
            step_tokens,
            gpu,
        )
    length, blocks = _cache_size(
        spec,
        block + cross + (guessing.cache if guessing else 0),
        max_model_len,
        kv_cache_bytes,
        max_num_seqs,
        available - SPARE - weights - workspace - (guessing.weights + guessing.workspace if guessing else 0),
    )
    if guessing is not None:
        guessing = replace(guessing, cache=blocks * guessing.cache, max_length=min(length, guessing.max_length))
    return Plan(
        spec=spec,
        precision=precision,
        cache_dtype=cache_as,
        max_model_len=length,
        step_tokens=step_tokens,
        prefix_tokens=prefix_tokens,
        cache_blocks=blocks,
        weights=weights,
        cache=blocks * block,
        workspace=workspace,
        available=available,
        drafts=drafts,
        draft_model=guessing,
        cross=blocks * cross,
        max_source=min(max_source, length),
        gpu=None if gpu is None else gpu.name,
    )


def _precision(
    checkpoint: Checkpoint, dtype: str, quantization: str | None, skip: Sequence[str], gpu: Device | None
) -> Precision:
    """What matrices are held as. On a GPU float16 becomes bfloat16, and integers of a checkpoint its float dtype."""
    precision = precision_of(checkpoint, dtype, quantization, skip)
    if gpu is None:
        return precision
    return Precision("bfloat16" if precision.dtype == "float16" else precision.dtype)


def _weight_bytes(checkpoint: Checkpoint, precision: Precision, gpu: Device | None) -> int:
    return packed_bytes(checkpoint, precision) if gpu is None else plain_bytes(checkpoint, precision)


def _draft_plan(
    draft: Checkpoint,
    target: ModelSpec,
    precision: Precision,
    kv_cache_dtype: str,
    sequences: int,
    tokens: int,
    gpu: Device | None,
) -> DraftPlan:
    """That of a draft model of `target`, with one block of cache."""
    spec = draft.spec
    if target.encoder is not None:
        raise ConfigError(
            f"draft_model: expected none, for this {target.family} model has an encoder, whose source a draft model "
            "does not read: guess with speculative='ngram' instead"
        )
    found = None if spec.head.kind is HeadKind.TOKENS else f"one with a head for {spec.head.kind.value}"
    if spec.is_encoder or spec.encoder is not None:
        found = "an encoder" if spec.is_encoder else "one with an encoder"
    if found is not None:
        raise ConfigError(
            f"draft_model: expected a decoder that predicts tokens, got {found} ({spec.family}): choose a smaller "
            "model of the same kind, or guess with speculative='ngram'"
        )
    if spec.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model: expected the model's vocabulary of {target.vocab_size} tokens, got one of "
            f"{spec.vocab_size}: choose a draft model that was made for the same tokenizer"
        )
    cache_as = _cache_dtype(kv_cache_dtype, precision.dtype, spec, gpu)
    workspace = _workspace(spec, sequences, tokens, CATCH_UP)
    if gpu is not None:
        width = blocks_for(spec.max_positions)
        workspace += 4 * attention_workspace(spec, sequences, width)[0]
        workspace += _recorded_bytes(spec, sequences, CATCH_UP, width, gpu)
    return DraftPlan(
        precision=precision,
        cache_dtype=cache_as,
        max_length=spec.max_positions,
        weights=_weight_bytes(draft, precision, gpu),
        cache=KVCache.block_bytes(spec, cache_as),
        workspace=workspace,
    )


def _cache_dtype(asked: str, weights: str, spec: ModelSpec, gpu: Device | None) -> str:
    """What keys and values are held as; `weights` is the dtype of the matrices."""
    if asked == "auto":
        return "bfloat16" if weights == "bfloat16" and (gpu is None or takes_bfloat16(spec)) else "float32"
    if asked not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype: expected one of auto, {', '.join(CACHE_DTYPES)}, got {asked!r}")
    return asked


def _workspace(spec: ModelSpec, sequences: int, tokens: int, drafts: int, max_source: int = 0) -> int:
    """Activations of the largest step and of recorded steps; logits of a step's ends and of a piece of a prompt."""
    rows, ends = min(HEAD_ROWS, tokens), head_rows(sequences, drafts)
    logits = (min(ends, tokens) + rows) * spec.outputs
    scratch = 0
    if spec.encoder is not None:
        blocks = scratch_blocks(max(tokens, max_source), sequences)
        scratch = blocks * KVCache.block_bytes(spec.encoder, SCRATCH_DTYPE, shared=True)
    return 4 * (step_floats(spec, tokens, max_source) + decode_floats(spec, ends) + logits) + scratch


def _recorded_bytes(spec: ModelSpec, sequences: int, drafts: int, width: int, gpu: Device) -> int:
    """What recorded steps, of sequences of at most `width` cache blocks, take of a GPU."""
    if spec.is_encoder:
        return 0
    kept = steps_kept(spec, sequences, head_rows(sequences, drafts), width, recorded_memory(gpu))
    return kept * step_bytes(spec, sequences, width)


def _cache_size(
    spec: ModelSpec, block: int, length: int | None, asked: int | None, sequences: int, room: int
) -> tuple[int, int]:
    """Context length and number of blocks: at least one full context, at most what all sequences need."""
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


def _encoder_cache_size(
    spec: ModelSpec, length: int | None, asked: int | None, sequences: int, tokens: int
) -> tuple[int, int]:
    """Context length and number of blocks of an encoder: those of one step, which takes texts whole."""
    if asked is not None:
        raise ValueError("kv_cache_bytes: expected None for an encoder, which keeps no keys and values: leave it out")
    return length or spec.max_positions, tokens // BLOCK_TOKENS + min(sequences, tokens)


def _check_length(spec: ModelSpec, length: int | None) -> None:
    if length is not None and (
        isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= spec.max_positions
    ):
        raise ValueError(f"max_model_len: expected 1 to the model's context of {spec.max_positions}, got {length!r}")
