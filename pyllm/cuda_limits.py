"""What of a model runs on a GPU, and the memory that its kernels work with."""

from __future__ import annotations

from pyllm.device import Device
from pyllm.spec import AttentionSpec, ModelSpec

SPLIT_BLOCKS = 4  # cache blocks whose keys one thread block of decode attention takes: the order of sums hangs on it
SPLIT_ROWS = 16  # queries times heads of a group that it takes at most
MATMUL_ROWS, MATMUL_BLOCKS = 64, 256  # rows and thread blocks of a product that is split over K
MATMUL_FLOATS = MATMUL_BLOCKS * MATMUL_ROWS * 128  # its workspace
RECORDED_SHARE = 32  # one part in so many of a GPU's memory is what recorded steps may take


def refusal(
    spec: ModelSpec,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> str | None:
    """Why a model with these options of `LLM` cannot run on a GPU, in a sentence; None where it can."""
    if quantization is not None:
        return f"quantization: expected None on a GPU, got {quantization!r}: there are no kernels of integers yet"
    if dtype == "float16":
        return "dtype: expected auto, float32 or bfloat16 on a GPU, got 'float16'"
    if any(attention.clip is not None for attention in _attentions(spec)):
        return "clip_qkv: expected null for a model on a GPU, got a limit: there is no kernel of it yet"
    if kv_cache_dtype == "int8" or (kv_cache_dtype == "bfloat16" and not takes_bfloat16(spec)):
        return f"kv_cache_dtype: expected auto or float32 on a GPU for this model, got {kv_cache_dtype!r}"
    return None


def takes_bfloat16(spec: ModelSpec) -> bool:
    """Whether the kernels of attention take a bfloat16 cache of this model: its heads are cut into pieces of 8."""
    return all(attention.head_dim % 8 == 0 for attention in _attentions(spec))


def attention_workspace(spec: ModelSpec, sequences: int, width: int) -> tuple[int, int]:
    """Floats and tickets that decode attention of so many sequences, of `width` cache blocks each, works with."""
    splits, attentions = -(-width // SPLIT_BLOCKS), _attentions(spec)
    floats = max(sequences * a.kv_heads * splits * SPLIT_ROWS * (a.head_dim + 2) for a in attentions)
    return floats, sequences * max(a.kv_heads for a in attentions)


def recorded_memory(device: Device) -> int:
    """Bytes that recorded steps may take together."""
    return device.memory()[1] // RECORDED_SHARE


def _attentions(spec: ModelSpec) -> list[AttentionSpec]:
    """All attentions of a model, those to its sources and those of its encoder included."""
    own = [attention for block in spec.blocks for attention in (block.attention, block.cross) if attention is not None]
    return own if spec.encoder is None else own + _attentions(spec.encoder)
