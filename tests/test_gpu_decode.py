"""The fused kernels of decoding on a GPU through their bindings, against float64; skipped where there is none.

Outputs are NaN before each run, sizes odd, and three runs give the same bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle.norm import norm as norm_formula
from oracle.rope import rope as rope_formula
from test_gpu import Kernels, close, thrice

from pyllm import device
from pyllm.cuda_weights import load_qkv

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
MISSING = device.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no GPU to run on: {MISSING}")]
PAGE, BLOCKS = 64, 2
rng = np.random.default_rng


@pytest.fixture(scope="module")
def gpu():
    return device.open_device()


@pytest.fixture(scope="module")
def kernels(gpu):
    return Kernels(gpu.kernels)


class Heads:
    """Rows of H heads of queries, G of keys and G of values, and where the cache takes them; the second is no slot."""

    def __init__(self, rows, heads, kv_heads, size, half, dtype):
        self.heads, self.kv_heads, self.size, self.half, self.dtype = heads, kv_heads, size, half, dtype
        self.cos, self.sin = rng(size).standard_normal((2, rows, half)).astype("f4")
        self.slots = rng(rows).permutation(BLOCKS * PAGE)[:rows].astype(np.int64)
        if rows > 1:
            self.slots[1] = -1
        self.shape = BLOCKS, kv_heads, 2, PAGE, -(-size // 16) * 16

    def on(self, gpu):
        """cos, sin and slots there."""
        angles = [gpu.upload(a) if self.half else None for a in (self.cos, self.sin)]
        return *angles, gpu.upload(self.slots)

    def check(self, q, cache, expected, bound):
        """q [T, H * E] and the cache are those of ``expected`` [T, H + 2 G, E], not rotated yet, and no more."""
        rotated = self.heads + self.kv_heads
        keyed = rope_formula(expected[:, :rotated], self.cos.astype("f8"), self.sin.astype("f8"))
        close(q, keyed[:, : self.heads].reshape(len(keyed), -1), bound)
        written = np.isfinite(cache).any(axis=(1, 2, 4))
        places = {(slot // PAGE, slot % PAGE) for slot in self.slots if slot >= 0}
        assert {tuple(place) for place in np.argwhere(written)} == places
        for row, slot in enumerate(self.slots):
            if slot >= 0:
                found = cache[slot // PAGE, :, :, slot % PAGE, : self.size]
                close(found, np.stack([keyed[row, self.heads :], expected[row, rotated:]], axis=1), bound)


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size", "half"),
    [(1, 4, 2, 64, 32), (5, 3, 1, 20, 6), (8, 2, 2, 128, 64), (16, 1, 1, 48, 0)],
)
def test_skinny_qkv(gpu, kernels, rows, heads, kv_heads, size, half, norm):
    case, k = Heads(rows, heads, kv_heads, size, half, bfloat16), 1032
    counts = (heads * size, kv_heads * size, kv_heads * size)
    parts = [(rng(count).standard_normal((count, k)) / np.sqrt(k)).astype(bfloat16) for count in counts]
    x, weight, bias = (rng(1).standard_normal(shape).astype("f4") for shape in ((rows, k), k, sum(counts)))
    w = load_qkv(gpu, parts, "bfloat16", size, half)
    added, places = w.bias(gpu.upload(bias)), [gpu.upload(x), w.values]
    of_x = (gpu.upload(weight), None, 1, 1e-5) if norm else (None, None, 0, 0.0)
    arrays, caches = case.on(gpu), []

    def launch(q):
        caches.append(gpu.upload(np.full(case.shape, np.nan, bfloat16)))
        kernels.skinny_qkv(
            q, caches[-1], *places, added, *arrays, size, *of_x, gpu.multiprocessors, gpu.stream
        )  # fmt: skip

    q = thrice(gpu, launch, (rows, heads * size), bfloat16)
    assert caches[0].numpy().tobytes() == caches[2].numpy().tobytes()
    normed = norm_formula(x.astype("f8"), weight, None, "rms", 1e-5) if norm else x.astype("f8")
    expected = normed @ np.concatenate(parts).astype("f8").T + bias
    case.check(q, caches[0].numpy().astype("f8"), expected.reshape(rows, -1, size), 1e-2)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize(("kind", "paired"), [(None, False), (None, True), ("rms", False), ("layer", True)])
@pytest.mark.parametrize(("size", "half"), [(64, 32), (20, 6), (130, 65)])
def test_qkv_write(gpu, kernels, size, half, kind, paired, rows):
    heads, kv_heads = 3, 2
    case, keyed = Heads(rows, heads, kv_heads, size, half, bfloat16), heads + kv_heads
    qkv = rng(0).standard_normal((rows, keyed + kv_heads, size)).astype("f4")
    weights = rng(1).standard_normal((2, size)).astype("f4")
    order = [*np.arange(2 * half).reshape(2, half).T.ravel(), *range(2 * half, size)] if paired else range(size)
    given = np.concatenate([qkv[:, :keyed][..., list(order)], qkv[:, keyed:]], axis=1).reshape(rows, -1)
    there, (cos, sin, slots), caches = gpu.upload(given), case.on(gpu), []
    norms = (*(gpu.upload(a) for a in weights), int(kind == "rms"), 1e-5) if kind else (None, None, 0, 0.0)

    def launch(q):
        caches.append(gpu.upload(np.full(case.shape, np.nan, bfloat16)))
        kernels.qkv_write(q, caches[-1], there, slots, size, paired, cos, sin, *norms, gpu.stream)

    q = thrice(gpu, launch, (rows, heads * size), float32 if rows == 3 else bfloat16)
    assert caches[0].numpy().tobytes() == caches[2].numpy().tobytes()
    expected = qkv.astype("f8")
    if kind:
        for part, weight in ((slice(0, heads), weights[0]), (slice(heads, keyed), weights[1])):
            expected[:, part] = norm_formula(expected[:, part], weight.astype("f8"), None, kind, 1e-5)
    case.check(q, caches[0].numpy().astype("f8"), expected, 1e-2)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (16, 1000), (5, 50257)])
def test_skinny_argmax(gpu, kernels, rows, n):
    """Weights and inputs are small whole numbers, so that sums are exact and equal ones are equal."""
    x = rng(rows).integers(-3, 4, (rows, 136)).astype("f4")
    w = rng(n).integers(-3, 4, (n, 136)).astype("f4")
    w[n // 2 :] = w[: n - n // 2]  # every largest stands twice
    if rows > 1:
        x[1] = np.nan
    logits = x.astype("f8") @ w.astype("f8").T
    expected = np.where(np.isnan(logits).any(1), -1, logits.argmax(1))
    arrays = [gpu.upload(a) for a in (x, w.astype(bfloat16))]
    ticket = gpu.upload(np.zeros(1, np.uint32))
    for multiprocessors in (gpu.multiprocessors, 3, 1):
        tokens = gpu.upload(np.full(rows, -7, np.int32))
        partial = gpu.upload(np.full((multiprocessors, rows), -1, np.int64))
        kernels.skinny_argmax(
            tokens, *arrays, None, None, None, 0, 0.0, partial, ticket, multiprocessors, gpu.stream
        )  # fmt: skip
        assert tokens.numpy().tolist() == expected.tolist()
        assert not ticket.numpy().any()
