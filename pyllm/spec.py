"""What a model is, as data: frozen dataclasses and enums, the whole vocabulary of architectures.

Families differ only in the values they put here; code that computes reads these values and never asks for a family's
name. Sizes in shape comments: D hidden, H query heads, K key/value heads, E head size, F feed-forward, V vocabulary,
P learned positions, R rotated channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from pyllm.errors import ConfigError

Floats = npt.NDArray[np.float32]
MAX_HEAD_DIM = 256  # the attention kernels keep a head's row in registers and on the stack


class NormKind(str, Enum):
    """How a normalisation layer scales its input."""

    LAYER = "layer"
    RMS = "rms"


class Activation(str, Enum):
    """Pointwise function of the feed-forward part."""

    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    RELU = "relu"


class RopeKind(str, Enum):
    """How rotary frequencies are stretched to longer contexts; the values are those of Hugging Face configs."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True)
class NormSpec:
    """A layer norm or RMS norm; `eps` is added to the variance or mean square, inside the root."""

    kind: NormKind
    eps: float
    bias: bool

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        _require(math.isfinite(self.eps) and 0 <= self.eps < 1, "norm eps", "0 <= eps < 1", self.eps)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the first `dim` channels of a head, pair k being channels (k, k + dim/2).

    `factor`, `original_max_positions` and what follows are parameters of the scaling kinds; a kind ignores those that
    it does not use. `original_max_positions` is the context of pretraining, before the context was stretched to
    `max_positions`; None means that the two are equal.
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = RopeKind.DEFAULT
    max_positions: int = 2048
    original_max_positions: int | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope: given instead of derived
    short_factor: tuple[float, ...] = ()  # longrope, one per pair
    long_factor: tuple[float, ...] = ()  # longrope, one per pair

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        _require(self.dim > 0 and self.dim % 2 == 0, "rotated channels of a head", "a positive even number", self.dim)
        _require(1 < self.theta <= 1e18, "rope theta", "above 1 and at most 1e18", self.theta)
        _require(self.max_positions > 0, "rope max_positions", "at least 1", self.max_positions)
        _require(self.pretrained_positions > 0, "rope original_max_positions", "at least 1", self.pretrained_positions)
        _require(0 < self.factor <= 1e6, "rope factor", "above 0 and at most 1e6", self.factor)
        if self.kind is RopeKind.DYNAMIC:
            _require(self.dim > 2, "rotated channels of a head under dynamic scaling", "at least 4", self.dim)
            _require(self.factor >= 1, "factor of dynamic rope scaling", "at least 1", self.factor)
        if self.kind is RopeKind.LLAMA3:
            _require(0 < self.low_freq_factor < self.high_freq_factor < math.inf,
                     "llama3 rope (low_freq_factor, high_freq_factor)", "0 < low < high",
                     (self.low_freq_factor, self.high_freq_factor))  # fmt: skip
        if self.kind is RopeKind.YARN:
            _require(0 < self.beta_slow <= self.beta_fast < math.inf, "yarn rope (beta_slow, beta_fast)",
                     "0 < slow <= fast", (self.beta_slow, self.beta_fast))  # fmt: skip
        if self.kind is RopeKind.LONGROPE:
            for name in ("short_factor", "long_factor"):
                factors: tuple[float, ...] = getattr(self, name)
                _require(len(factors) == self.dim // 2, f"length of longrope {name}", str(self.dim // 2), len(factors))
                _require(all(0 < f < math.inf for f in factors), f"longrope {name}", "finite numbers above 0", factors)
            _require(self.attention_factor is not None or self.factor <= 1 or self.pretrained_positions > 1,
                     "longrope original_max_positions", "at least 2", self.pretrained_positions)  # fmt: skip
        if self.attention_factor is not None:
            _require(0 <= self.attention_factor < math.inf, "rope attention_factor", "a finite number, not negative",
                     self.attention_factor)  # fmt: skip

    @property
    def pretrained_positions(self) -> int:
        """The context of pretraining, in tokens."""
        return self.max_positions if self.original_max_positions is None else self.original_max_positions

    @property
    def stretched_positions(self) -> int:
        """The longest context that the scaling serves, in tokens: that of pretraining times the factor."""
        if self.kind in (RopeKind.LINEAR, RopeKind.DYNAMIC):
            return max(self.max_positions, int(self.max_positions * self.factor))
        if self.kind is RopeKind.YARN:
            return max(self.max_positions, int(self.pretrained_positions * self.factor))
        return self.max_positions

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by (scores get its square)."""
        if self.attention_factor is not None and self.kind in (RopeKind.YARN, RopeKind.LONGROPE):
            return self.attention_factor
        if self.kind is RopeKind.YARN:
            if self.mscale and self.mscale_all_dim:
                return _yarn_magnitude(self.factor, self.mscale) / _yarn_magnitude(self.factor, self.mscale_all_dim)
            return _yarn_magnitude(self.factor, 1.0)
        if self.kind is RopeKind.LONGROPE and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.pretrained_positions))
        return 1.0

    def length_class(self, length: int) -> Hashable:
        """Two lengths of one class have the same `inv_freq`: the key to cache it under."""
        if self.kind is RopeKind.DYNAMIC:
            return max(length, self.max_positions)
        if self.kind is RopeKind.LONGROPE:
            return length > self.pretrained_positions
        return None

    def inv_freq(self, length: int) -> Floats:
        """Angle per position of each pair, float32 [R/2], while a sequence is `length` tokens long.

        Powers are rounded once from float64; every other step is float32, in the order of Hugging Face transformers,
        so that angles agree with it at large positions. Only `dynamic` and `longrope` depend on the length: keys that
        are cached already keep the rotation of the length they were computed at.
        """
        if self.kind is RopeKind.DYNAMIC:
            return _inverse(_powers(self._dynamic_theta(length), self.dim))
        if self.kind is RopeKind.LONGROPE:
            stretch = self.long_factor if length > self.pretrained_positions else self.short_factor
            return _inverse(np.asarray(stretch, np.float32) * _powers(self.theta, self.dim))
        if self.kind is RopeKind.YARN:
            return self._yarn_inv_freq()
        inv_freq = _inverse(_powers(self.theta, self.dim))
        if self.kind is RopeKind.LINEAR:
            stretched: Floats = inv_freq / np.float32(self.factor)
            return stretched
        if self.kind is RopeKind.LLAMA3:
            return self._llama3_inv_freq(inv_freq)
        return inv_freq

    def _dynamic_theta(self, length: int) -> float:
        """NTK-aware base: long waves are stretched by the excess over the trained length, short ones hardly."""
        exponent = self.dim / (self.dim - 2)
        if length <= self.max_positions:
            return float(self.theta * (self.factor - (self.factor - 1)) ** exponent)
        excess = np.float32(self.factor) * np.float32(length) / np.float32(self.max_positions)
        grown = np.float32(float(excess - np.float32(self.factor - 1)) ** exponent)
        return float(np.float32(self.theta) * grown)

    def _llama3_inv_freq(self, inv_freq: Floats) -> Floats:
        """Long waves are divided by the factor, short ones kept, those between are interpolated."""
        length = self.pretrained_positions
        wavelength = np.float32(2 * math.pi) / inv_freq
        is_long = wavelength > np.float32(length / self.low_freq_factor)
        is_short = wavelength < np.float32(length / self.high_freq_factor)
        span = np.float32(self.high_freq_factor - self.low_freq_factor)
        smooth = (np.float32(length) / wavelength - np.float32(self.low_freq_factor)) / span
        between = (np.float32(1) - smooth) * inv_freq / np.float32(self.factor) + smooth * inv_freq
        return np.where(is_long, inv_freq / np.float32(self.factor), np.where(is_short, inv_freq, between))

    def _yarn_inv_freq(self) -> Floats:
        """YaRN (Peng et al. 2023): a linear ramp over channels from unscaled to fully interpolated frequencies."""

        def channel(rotations: float) -> float:  # the channel that turns this often over the pretrained context
            context = self.pretrained_positions / (rotations * 2 * math.pi)
            return self.dim * math.log(context) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
        powers = _powers(self.theta, self.dim)
        kept = np.float32(1) - ramp
        interpolated = _inverse(np.float32(self.factor) * powers)
        mixed: Floats = interpolated * (np.float32(1) - kept) + _inverse(powers) * kept
        return mixed


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention: query head h reads key/value head h // (heads / kv_heads); scores are multiplied by `scale`.

    `qk_norm` normalises each head of q and k before the rotation. With a `window` of W, token i sees keys i-W+1 .. i.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        _require(self.heads > 0, "attention heads", "at least 1", self.heads)
        _require(self.kv_heads > 0 and self.heads % self.kv_heads == 0, "key/value heads",
                 f"a divisor of the {self.heads} query heads", self.kv_heads)  # fmt: skip
        _require(0 < self.head_dim <= MAX_HEAD_DIM, "head size", f"1 to {MAX_HEAD_DIM}", self.head_dim)
        _require(math.isfinite(self.scale) and self.scale > 0, "attention scale", "a finite number above 0", self.scale)
        _require(self.window is None or self.window > 0, "attention window", "at least 1, or None", self.window)
        _require(self.qk_norm is None or not self.qk_norm.bias, "q/k norm", "a norm without bias", self.qk_norm)


@dataclass(frozen=True)
class MlpSpec:
    """down(act(up x)), or when gated down(act(gate x) * (up x))."""

    hidden: int
    activation: Activation
    gated: bool
    bias: bool

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        _require(self.hidden > 0, "feed-forward size", "at least 1", self.hidden)


@dataclass(frozen=True)
class BlockSpec:
    """x += attention(norm(x)); x += mlp(norm(x)), both norms of the same spec."""

    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embedding (+ learned positions), blocks, final norm, head.

    `family` is for messages only. `learned_positions` is the rows of the position table, 0 for none. `max_positions`
    is the longest context that the checkpoint is made for, rope scaling included. `dtype` is the checkpoint's declared
    one ("float32", "float16" or "bfloat16"), if any.
    """

    family: str
    vocab_size: int
    hidden: int
    blocks: tuple[BlockSpec, ...]
    final_norm: NormSpec
    max_positions: int
    learned_positions: int = 0
    rope: RopeSpec | None = None
    tied: bool = False
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        _require(self.vocab_size > 0, "vocabulary size", "at least 1", self.vocab_size)
        _require(self.hidden > 0, "hidden size", "at least 1", self.hidden)
        _require(len(self.blocks) > 0, "number of layers", "at least 1", len(self.blocks))
        _require(self.max_positions > 0, "context length", "at least 1", self.max_positions)
        _require(self.learned_positions == 0 or self.learned_positions >= self.max_positions,
                 "rows of the position table", f"0, or at least the context of {self.max_positions}",
                 self.learned_positions)  # fmt: skip
        if self.rope is not None:
            smallest = min(block.attention.head_dim for block in self.blocks)
            _require(self.rope.dim <= smallest, "rotated channels of a head", f"at most the head size of {smallest}",
                     self.rope.dim)  # fmt: skip

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model needs: canonical name -> shape, matrices as [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.hidden)}
        if self.learned_positions:
            shapes["positions.weight"] = (self.learned_positions, self.hidden)
        for index, block in enumerate(self.blocks):
            shapes.update(self._block_slots(f"blocks.{index}", block))
        shapes.update(_norm_slots("final_norm", self.final_norm, self.hidden))
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.hidden)
        return shapes

    def num_parameters(self) -> int:
        """Numbers in all slots; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.slots().values())

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of all blocks: what every token is multiplied with."""
        slots = self.slots().items()
        return sum(math.prod(shape) for name, shape in slots if name.startswith("blocks.") and len(shape) == 2)

    def operations(self, tokens: int, past: int = 0) -> int:
        """Multiplications and additions of `tokens` tokens that follow `past` others, with the head for the last one.

        They are those of the matrices and of causal attention; windows are not counted off.
        """
        keys = tokens * past + tokens * (tokens + 1) // 2  # that the queries see, all together
        attention = sum(2 * b.attention.heads * b.attention.head_dim for b in self.blocks) * keys
        return 2 * (self.block_weights * tokens + attention + self.vocab_size * self.hidden)

    def _block_slots(self, at: str, block: BlockSpec) -> dict[str, tuple[int, ...]]:
        attention, mlp = block.attention, block.mlp
        rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        shapes = _norm_slots(f"{at}.attn_norm", block.norm, self.hidden)
        for name, out in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            shapes.update(_linear_slots(f"{at}.attn.{name}", out, self.hidden, attention.qkv_bias))
        if attention.qk_norm is not None:
            for name in ("q_norm", "k_norm"):
                shapes.update(_norm_slots(f"{at}.attn.{name}", attention.qk_norm, attention.head_dim))
        shapes.update(_linear_slots(f"{at}.attn.o", self.hidden, rows, attention.out_bias))
        shapes.update(_norm_slots(f"{at}.mlp_norm", block.norm, self.hidden))
        for name in ("gate", "up") if mlp.gated else ("up",):
            shapes.update(_linear_slots(f"{at}.mlp.{name}", mlp.hidden, self.hidden, mlp.bias))
        shapes.update(_linear_slots(f"{at}.mlp.down", self.hidden, mlp.hidden, mlp.bias))
        return shapes


def _require(holds: bool, what: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{what}: expected {expected}, found {found}")


def _norm_slots(name: str, norm: NormSpec, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    if norm.bias:
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _linear_slots(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _powers(theta: float, dim: int) -> Floats:
    """theta^(2k/R) for k < R/2: the exponent rounded to float32, then the power."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers: npt.NDArray[np.float64] = np.power(float(np.float32(theta)), exponent.astype(np.float64))
    return powers.astype(np.float32)


def _inverse(values: Floats) -> Floats:
    inverse: Floats = np.float32(1) / values
    return inverse


def _yarn_magnitude(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
