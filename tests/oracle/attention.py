"""Attention of a ragged batch from its formula, and the layout of the paged cache and its rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PAGE, PAD, GROUP = 64, 16, 16
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.int8)]


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees; prefix has a number for each sequence."""

    causal: bool = True
    prefix: tuple[int, ...] | None = None
    window: int = 0
    sinks: int = 0

    def seen(self, b: int, rows: int, length: int) -> Array:
        """bool [rows, length], the rows being the last positions of sequence b."""
        i = np.arange(length - rows, length)[:, None]
        j = np.arange(length)[None, :]
        near = i - j if self.causal else np.abs(i - j)
        before = (j <= i) | (j < (self.prefix[b] if self.prefix else 0)) | (not self.causal)
        return before & ((near < self.window) | (j < self.sinks) | (self.window == 0))


@dataclass(frozen=True)
class Scores:
    """What becomes of scores: bias [H, 2n + 1] by the distance of the key from -n to n, slopes [H]."""

    bias: Array | None = None
    slopes: Array | None = None
    softcap: float | None = None

    def changed(self, score: Array) -> Array:
        """Scores [H, rows, length] as they enter the softmax, the rows being the last positions."""
        if self.softcap is not None:
            score = np.tanh(score / score.dtype.type(self.softcap)) * score.dtype.type(self.softcap)
        distance = self.distance(score)
        if self.bias is not None:
            score = score + self.bias.astype(score.dtype)[:, self.column(distance)]
        if self.slopes is not None:
            score = score + self.slopes.astype(score.dtype)[:, None, None] * distance.astype(score.dtype)
        return score

    def gradients(self, score: Array, dscore: Array) -> tuple[Array, Array | None]:
        """Those of scores and of the bias [H, 2n + 1], from that of changed scores [H, rows, length]."""
        dbias = None
        if self.bias is not None:
            dbias = np.zeros(self.bias.shape, score.dtype)
            column = self.column(self.distance(score))
            for at in range(self.bias.shape[1]):
                dbias[:, at] = dscore[:, column == at].sum(axis=1)
        if self.softcap is not None:
            dscore = dscore * (1 - np.tanh(score / score.dtype.type(self.softcap)) ** 2)
        return dscore, dbias

    def distance(self, score: Array) -> Array:
        rows, length = score.shape[1:]
        return np.arange(length)[None, :] - np.arange(length - rows, length)[:, None]

    def column(self, distance: Array) -> Array:
        assert self.bias is not None
        reach = self.bias.shape[1] // 2
        return np.clip(distance, -reach, reach) + reach


UNCHANGED = Scores()


def softmax(score: Array, seen: Array) -> tuple[Array, Array]:
    """Weights and lse [..., 1] of scores [..., keys]; 0 and -inf in rows that see nothing."""
    score = np.where(seen, score, -np.inf)
    top = score.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    total = np.exp(score - top).sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return np.exp(score - np.where(np.isfinite(lse), lse, 0)), lse


def attention(
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    starts: Array,
    scale: float,
    rule: Rule,
    scores: Scores = UNCHANGED,
) -> Array:
    """Softmax attention in the dtype of q [T, H, E]; keys[b] and values[b] are [length, G, E] of sequence b.

    Rows [starts[b], starts[b + 1]) stand at the last positions of sequence b.
    """
    out = np.empty_like(q)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = q[starts[b] : starts[b + 1]]
        group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(a.astype(q.dtype), group, axis=1) for a in (k, v))
        score = scores.changed(np.einsum("the,she->hts", rows, k) * q.dtype.type(scale))
        weight, _ = softmax(score, rule.seen(b, len(rows), len(k)))
        out[starts[b] : starts[b + 1]] = np.einsum("hts,she->the", weight, v)
    return out


def rounded_queries(q: Array, scale: float, cache: np.dtype[Any], dots: bool) -> Array:
    """float32 queries [..., E] as the kernel takes them.

    In bfloat16 where it multiplies that (`dots`), for an int8 cache in 16-bit integers by each row's largest magnitude.
    """
    unit = np.float32(scale) * np.float32(np.log2(np.e))
    scaled = q * unit
    if cache == np.int8:
        most = np.maximum(np.abs(scaled).max(axis=-1, keepdims=True), np.float32(2**-110))
        return np.rint(scaled * (np.float32(32767) / most)) * (most / np.float64(32767)) / np.float64(unit)
    return scaled.astype(BF16).astype(np.float64) / np.float64(unit) if dots and cache == BF16 else q


def weight_error(cache: np.dtype[Any], dots: bool) -> float:
    """By how much rounded weights move an output at most, relative to the largest value.

    bfloat16 weights are wrong by 2^-8 of themselves, the 64 int16 weights of a page each by 2^-16 of the largest.
    """
    return 2**-10 if cache == np.int8 else 1.1 * 2**-8 if dots and cache == BF16 else 0.0


def attention_backward(
    dout: Array,
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    starts: Array,
    scale: float,
    rule: Rule,
    factors: Callable[[int, int, int], Array] | None = None,
    given: tuple[Array, Array] | None = None,
    scores: Scores = UNCHANGED,
) -> tuple[Array, ...]:
    """Gradients dq [T, H, E], dk and dv [S, G, E] of the keys in turn, in the dtype of q; then out and lse [T, H], and
    dbias [H, 2n + 1] where there is a bias.

    factors(row, head, length) are what dropout multiplies a row's weights with; out and lse may be `given`.
    """
    dq, out = np.empty_like(q), np.empty_like(q)
    groups = keys[0].shape[1]
    ends = np.cumsum([0] + [len(k) for k in keys])
    dk, dv = (np.empty((ends[-1], groups, q.shape[2]), q.dtype) for _ in range(2))
    log_sums = np.empty(q.shape[:2], q.dtype)
    group = q.shape[1] // groups
    dbias: Array | None = None
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = slice(starts[b], starts[b + 1])
        n = len(k)
        k, v = (np.repeat(a.astype(q.dtype), group, axis=1) for a in (k, v))
        count = starts[b + 1] - starts[b]
        seen = rule.seen(b, count, n)
        plain = products(q[rows], k) * q.dtype.type(scale)
        score = scores.changed(plain)
        p, lse = softmax(score, seen)
        if given is not None:
            lse = given[1][rows].T[..., None]
            p = np.where(seen, np.exp(score - lse), 0)
        m = np.ones_like(p)
        if factors is not None:
            for h in range(q.shape[1]):
                for t in range(count):
                    m[h, t] = factors(starts[b] + t, h, n)
        out[rows] = mix(p * m, v) if given is None else given[0][rows]
        log_sums[rows] = lse[..., 0].T
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        ds, grown_bias = scores.gradients(plain, p * (m * products(dout[rows], v) - delta))
        dbias = grown_bias if dbias is None or grown_bias is None else dbias + grown_bias
        ds = ds * q.dtype.type(scale)
        dq[rows] = mix(ds, k)
        for to, grown in (
            (dk, mix(ds.transpose(0, 2, 1), q[rows])),
            (dv, mix((p * m).transpose(0, 2, 1), dout[rows])),
        ):
            to[ends[b] : ends[b + 1]] = grown.reshape(n, groups, group, q.shape[2]).sum(axis=2)
    results = dq, dk, dv, out, log_sums
    return results if dbias is None else (*results, dbias)


def products(a: Array, b: Array) -> Array:
    """[T, H, E] and [S, H, E] -> [H, T, S]: products over E; in float32 summed plainly, one after the other."""
    if a.dtype == np.float64:
        return np.asarray(a.transpose(1, 0, 2) @ b.transpose(1, 2, 0))
    return np.asarray(np.einsum("the,she->hts", a, b))


def mix(weights: Array, values: Array) -> Array:
    """[H, T, S] and [S, H, E] -> [T, H, E]: sums over S, as in `products`."""
    if weights.dtype == np.float64:
        return np.asarray((weights @ values.transpose(1, 0, 2)).transpose(1, 0, 2))
    return np.asarray(np.einsum("hts,she->the", weights, values))


def padded(head_size: int) -> int:
    """Head size rounded up as the cache stores it."""
    return (head_size + PAD - 1) // PAD * PAD


def empty(blocks: int, heads: int, head_size: int, dtype: np.dtype[Any]) -> Array:
    """One layer's cache [blocks, G, 2, PAGE * Ep], in int8 PAGE * (Ep + 2), that undefined bytes fill."""
    width = padded(head_size)
    if dtype != np.int8:
        return np.full((blocks, heads, 2, PAGE * width), np.nan, dtype)
    cache = np.full((blocks, heads, 2, PAGE * (width + 2)), -77, np.int8)
    cache[..., PAGE * width :].view(BF16)[...] = np.nan
    return cache


def quantized(x: Array) -> tuple[Array, Array]:
    """int8 [..., E] and bfloat16 scale [...] of float32 x [..., E]."""
    finite = np.isfinite(x).all(axis=-1)
    scale = (np.abs(x).max(axis=-1) / np.float32(127)).astype(BF16)
    wide = scale.astype(np.float32)
    scale = np.where(finite, np.where(wide < 2**-100, np.float32(0), wide), np.nan).astype(BF16)
    known = finite & (wide >= 2**-100)
    integers = np.rint(np.where(known[..., None], x, 0) / np.where(known, wide, 1)[..., None])
    return integers.astype(np.int8), scale


def stored(x: Array, dtype: np.dtype[Any]) -> Array:
    """float32 x [..., E] as the cache gives it back."""
    if dtype != np.int8:
        return x.astype(dtype).astype(np.float32)
    integers, scale = quantized(x)
    return integers * scale.astype(np.float32)[..., None]


def put(cache: Array, slot: int, k: Array, v: Array) -> None:
    """Write one token's k and v [G, E] into its slot of cache [blocks, G, 2, PAGE * Ep], element by element."""
    block, at = divmod(slot, PAGE)
    heads, size = k.shape
    width = padded(size)
    if cache.dtype == np.int8:
        halves = [quantized(a) for a in (k, v)]
        for g in range(heads):
            keys = cache[block, g, 0, : PAGE * width].reshape(PAGE // GROUP, width // 2, GROUP, 2)
            values = cache[block, g, 1, : PAGE * width].reshape(PAGE // 2, width, 2)
            row = np.zeros((2, width), np.int8)
            row[:, :size] = [integers[g] for integers, _ in halves]
            keys[at // GROUP, :, at % GROUP] = row[0].reshape(-1, 2)
            values[at // 2, :, at % 2] = row[1]
            for half, (_, scale) in zip(cache[block, g], halves, strict=True):
                half[PAGE * width :].view(BF16)[at] = scale[g]
        return
    for g in range(heads):
        if cache.dtype == np.float32:
            keys = cache[block, g, 0, : PAGE * size].reshape(PAGE // GROUP, size, GROUP)
            keys[at // GROUP, :, at % GROUP] = k[g]
            row = cache[block, g, 1].reshape(PAGE, width)[at]
        else:
            keys = cache[block, g, 0].reshape(PAGE // GROUP, width // 2, GROUP, 2)[at // GROUP, :, at % GROUP]
            full = np.zeros(width, cache.dtype)
            full[:size] = k[g].astype(cache.dtype)
            keys[...] = full.reshape(-1, 2)
            row = cache[block, g, 1].reshape(PAGE // 2, width, 2)[at // 2, :, at % 2]
        row[:size] = v[g].astype(cache.dtype)
        row[size:] = 0
