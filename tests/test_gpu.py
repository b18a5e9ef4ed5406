"""The CUDA kernels on a GPU through their bindings, against float64; skipped where there is none.

Outputs are NaN before each run, sizes odd, and three runs give the same bits.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from oracle.activation import activation as activation_formula
from oracle.attention import Rule, Scores, softmax

from pyllm import device
from pyllm.ops import ACTIVATIONS
from pyllm.spec import Activation

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
MISSING = device.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no GPU to run on: {MISSING}")]
PAGE = 64


@pytest.fixture(scope="module")
def gpu():
    return device.open_device()


class Kernels:
    """The launchers of `pyllm._cuda`, which take device arrays here."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        launcher = getattr(self._module, name)
        return lambda *arguments: launcher(*(getattr(a, "raw", a) for a in arguments))


@pytest.fixture(scope="module")
def kernels(gpu):
    return Kernels(gpu.kernels)


def thrice(gpu, launch, shape, dtype):
    """What `launch(output)` writes, three times the same bits over NaN."""
    results = []
    for _ in range(3):
        out = gpu.upload(np.full(shape, np.nan, dtype))
        launch(out)
        results.append(out.numpy())
    for run, other in enumerate(results[1:], 2):
        same_bits(results[0], other, f"run {run}")
    return results[0].astype("f8")


def same_bits(first, other, what):
    """The first element that is not the same in both is named."""
    if first.tobytes() != other.tobytes():
        first, other = first.astype("f8"), other.astype("f8")
        differ = ~((first == other) | (np.isnan(first) & np.isnan(other)))
        pytest.fail(f"{what} is not the first one bit for bit: {first_of(differ, other, first)}")


def close(got, expected, bound):
    """The error's norm is at most so much of the result's; else the first element that is far off is named."""
    scale = np.linalg.norm(expected)
    error = np.linalg.norm(got - expected) / max(scale, 1e-30)
    if not error <= bound:
        far = ~(np.abs(got - expected) <= 4 * bound * scale / max(expected.size, 1) ** 0.5)
        told = f"relative error {error:.3g}, at most {bound:g} may be"
        pytest.fail(f"{told}: {first_of(far, got, expected)}")


def first_of(chosen, got, expected):
    """The first element that is chosen, and how many are."""
    if not chosen.any():
        return "no element by itself"
    place = tuple(int(i) for i in np.argwhere(chosen)[0])
    of = f"one of {chosen.sum()} among {chosen.size} in {list(chosen.shape)}"
    return f"{list(place)} is {got[place]:g} instead of {expected[place]:g}, {of}"


@pytest.mark.parametrize("dtype", [float32, bfloat16])
def test_memory_goes_there_and_back(gpu, dtype):
    for shape in ((), (0, 3), (1,), (3, 1001)):
        host = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        assert np.array_equal(gpu.upload(host).numpy(), host)


SIZES = [
    (1, 40, 1024), (3, 18, 1032), (16, 34, 128), (16, 34, 14344), (33, 300, 1048), (64, 130, 72), (130, 32, 328),
    (257, 1000, 72), (200, 400, 584), (130, 200, 456),
    # Pairs with tiles of each width, and two, four and eight parts of K with some of them.
    (130, 200, 72), (130, 330, 72), (390, 1500, 584), (65, 330, 328), (65, 330, 456),
    # Pairs with more steps than a ring has stages, with tiles of 256, 192 and 128.
    (200, 500, 200), (260, 130, 200), (390, 2000, 456),
]  # fmt: skip
TILE_SIZES = [(257, 1000, 584), (65, 330, 328), (390, 2000, 456)]  # which tiles of all widths make, see plans()


def plans(gpu):
    """Numbers of multiprocessors with which wgmma_matmul has other tiles: fewer give wider tiles, no pairs of
    blocks, and blocks of several tiles."""
    return gpu.multiprocessors, 2, 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", ["skinny", "split", "mma", "wgmma", "plain", "plain float32"])
def test_matmul_matches_formula(gpu, kernels, kernel, size, gated):
    rows, n, k = size
    if rows > {"skinny": 16, "split": 64}.get(kernel, rows):
        pytest.skip("more rows than it takes")
    if kernel == "wgmma" and not gpu.has_wgmma:
        pytest.skip("no Hopper, or PYLLM_WGMMA=off")
    dtype = float32 if kernel == "plain float32" else bfloat16
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, k)).astype(dtype), (rng.standard_normal((n, k)) / np.sqrt(k)).astype(dtype)
    columns = n // 2 if gated else n
    bias, residual = rng.standard_normal(n).astype("f4"), rng.standard_normal((rows, columns)).astype("f4")
    arrays = [gpu.upload(a) for a in (x, w, bias, residual)]
    tail = (ACTIVATIONS[Activation.SILU], gated)
    parts, tickets = gpu.upload(np.full(256 * 64 * 128, np.nan, "f4")), gpu.upload(np.zeros(256, np.uint32))

    def launch(y, multiprocessors):
        if kernel == "skinny":
            kernels.skinny_matmul(y, *arrays, *tail, None, None, 0, 0.0, multiprocessors, gpu.stream)
        elif kernel == "split":
            kernels.split_matmul(y, *arrays, *tail, parts, tickets, gpu.stream)
        elif kernel == "wgmma":
            kernels.wgmma_matmul(y, *arrays, *tail, multiprocessors, gpu.stream)
        elif kernel == "mma":
            kernels.mma_matmul(y, *arrays, *tail, gpu.stream)
        else:
            kernels.plain_matmul(y, *arrays, *tail, gpu.stream)

    y = x.astype("f8") @ w.astype("f8").T + bias
    y = activation_formula(y[:, 0::2], "silu") * y[:, 1::2] if gated else activation_formula(y, "silu")
    for multiprocessors in plans(gpu) if kernel == "wgmma" else [gpu.multiprocessors]:
        got = thrice(gpu, partial(launch, multiprocessors=multiprocessors), (rows, columns), float32)
        close(got, y + residual, 1e-3 if dtype == float32 else 1e-2)


@pytest.mark.parametrize("size", TILE_SIZES, ids=str)
def test_wgmma_tiles_of_all_widths_add_alike(gpu, kernels, size):
    """As a batch of any size has to give a row the same bits."""
    if not gpu.has_wgmma:
        pytest.skip("no Hopper, or PYLLM_WGMMA=off")
    rng, (rows, n, k) = np.random.default_rng(0), size
    x, w = (gpu.upload(rng.standard_normal(shape).astype(bfloat16)) for shape in ((rows, k), (n, k)))
    results = []
    for multiprocessors in plans(gpu):
        y = gpu.upload(np.full((rows, n), np.nan, float32))
        kernels.wgmma_matmul(y, x, w, None, None, 0, False, multiprocessors, gpu.stream)
        results.append(y.numpy())
    for other in results[1:]:
        same_bits(results[0], other, "a plan's result")


@pytest.mark.parametrize("activation", [Activation.GELU_ERF, Activation.GELU_TANH])
@pytest.mark.parametrize("kernel", ["skinny", "split", "mma", "wgmma"])
def test_matmul_stores_bfloat16(gpu, kernels, kernel, activation):
    """Of whole tiles, behind other activations."""
    if kernel == "wgmma" and not gpu.has_wgmma:
        pytest.skip("no Hopper, or PYLLM_WGMMA=off")
    rng, rows, n, k = np.random.default_rng(3), {"skinny": 8, "split": 64}.get(kernel, 256), 768, 264
    x, w = rng.standard_normal((rows, k)).astype(bfloat16), (rng.standard_normal((n, k)) / 16).astype(bfloat16)
    bias = rng.standard_normal(n).astype("f4")
    arrays = [gpu.upload(x), gpu.upload(w), gpu.upload(bias), None, ACTIVATIONS[activation], False]
    parts, tickets = gpu.upload(np.full(256 * 64 * 128, np.nan, "f4")), gpu.upload(np.zeros(256, np.uint32))
    more = {
        "skinny": (None, None, 0, 0.0, gpu.multiprocessors), "split": (parts, tickets), "mma": (),
        "wgmma": (gpu.multiprocessors,),
    }  # fmt: skip
    launcher = getattr(kernels, f"{kernel}_matmul")
    got = thrice(gpu, lambda y: launcher(y, *arrays, *more[kernel], gpu.stream), (rows, n), bfloat16)
    close(got, activation_formula(x.astype("f8") @ w.astype("f8").T + bias, activation.value), 1e-2)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_skinny_matmul_normalises_its_input(gpu, kernels, kind):
    rng = np.random.default_rng(1)
    x, weight, bias = (rng.standard_normal(shape).astype("f4") for shape in ((5, 1160), 1160, 1160))
    w = (rng.standard_normal((18, 1160)) / 34).astype(bfloat16)
    arrays = [gpu.upload(a) for a in (x, w, weight, bias)]

    def launch(y):
        kernels.skinny_matmul(
            y, arrays[0], arrays[1], None, None, 0, False, arrays[2], arrays[3], int(kind == "rms"), 1e-5,
            gpu.multiprocessors, gpu.stream,
        )  # fmt: skip

    normed = x.astype("f8") - (x.astype("f8").mean(1, keepdims=True) if kind == "layer" else 0)
    normed = normed / np.sqrt((normed**2).mean(1, keepdims=True) + 1e-5) * weight + bias
    close(thrice(gpu, launch, (5, 18), float32), normed @ w.astype("f8").T, 1e-2)


RULES = {
    "causal": Rule(),
    "window": Rule(window=70),
    "sinks": Rule(window=70, sinks=3),
    "prefix": Rule(prefix=(95, 1000, 9)),  # or all of a shorter sequence
    "float32": Rule(),  # queries and results in float32, and the log of the sum of exponentials
    "whole": Rule(causal=False),
    "bias": Rule(),
    "slopes": Rule(),
    "softcap": Rule(),
    "all": Rule(window=70, sinks=3),  # a bias, slopes and a cap
}


def scores_of(case, heads):
    """What the case does to scores."""
    rng, asked = np.random.default_rng(5), {case} if case != "all" else {"bias", "slopes", "softcap"}
    return Scores(
        bias=rng.standard_normal((heads, 81)).astype("f4") if "bias" in asked else None,
        slopes=(0.5 ** np.arange(1, heads + 1)).astype("f4") if "slopes" in asked else None,
        softcap=3.0 if "softcap" in asked else None,
    )


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("kernel", ["prompt", "wgmma", "split", "plain"])
def test_attention_matches_formula(gpu, kernels, kernel, head_size, case):
    if kernel == "wgmma" and (head_size not in (64, 128) or not gpu.has_wgmma):
        pytest.skip("no Hopper, or no head size of its")
    rng, rule = np.random.default_rng(head_size), RULES[case]
    queries, lengths, heads, kv_heads = ([1, 2, 0], [193, 300, 9], 8, 2) if kernel == "split" else (
        [5, 300, 0], [97, 1100, 9], 2, 1)  # fmt: skip
    if rule.prefix is not None:
        rule = Rule(prefix=tuple(min(pair) for pair in zip(rule.prefix, lengths, strict=True)))
    dtype = float32 if kernel == "plain" else bfloat16
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    pages = [-(-length // PAGE) for length in lengths]
    tables = np.zeros((len(lengths), max(pages)), np.int32)
    order = iter(rng.permutation(sum(pages)))
    cache = np.full((sum(pages), kv_heads, 2, PAGE, -(-head_size // 16) * 16), np.nan, dtype)
    contents = []
    for b, length in enumerate(lengths):
        kv = rng.standard_normal((2, length, kv_heads, head_size)).astype(dtype)
        contents.append(np.repeat(kv.astype("f8"), heads // kv_heads, axis=2))
        for page in range(pages[b]):
            tables[b, page] = block = next(order)
            part = kv[:, page * PAGE : (page + 1) * PAGE]
            cache[block, :, :, : part.shape[1], :head_size] = part.transpose(2, 0, 1, 3)
    q = (2 * rng.standard_normal((starts[-1], heads, head_size))).astype(float32 if case == "float32" else dtype)
    arrays = [gpu.upload(a) for a in (q, cache, starts, np.array(lengths, np.int32), tables)]
    prefix = None if rule.prefix is None else gpu.upload(np.array(rule.prefix, np.int32))
    changes = scores_of(case, heads)
    added = [None if a is None else gpu.upload(a) for a in (changes.bias, changes.slopes)]
    tail = (head_size, head_size**-0.5, rule.causal, prefix, rule.window, rule.sinks, *added, changes.softcap or 0.0,
            max(queries))  # fmt: skip
    splits = -(-tables.shape[1] // 2)
    parts = gpu.upload(np.full((len(lengths), kv_heads, splits, 16, head_size + 2), np.nan, "f4"))
    tickets = gpu.upload(np.zeros((len(lengths), kv_heads), np.uint32))
    lse = gpu.upload(np.full(q.shape[:2], np.nan, "f4")) if case == "float32" else None

    def launch(out):
        if kernel == "split":
            kernels.split_attention(out, lse, *arrays, *tail, 2, parts, tickets, gpu.stream)
        elif kernel == "plain":
            kernels.plain_attention(out, lse, *arrays, *tail, gpu.stream)
        else:
            kernels.prompt_attention(out, lse, *arrays, *tail, kernel == "wgmma", gpu.stream)

    expected, sums = np.zeros(q.shape), np.zeros(q.shape[:2])
    for b, (keys, values) in enumerate(contents):
        rows = slice(starts[b], starts[b + 1])
        scores = np.einsum("the,she->hts", q[rows].astype("f8"), keys) * head_size**-0.5
        weights, logs = softmax(changes.changed(scores), rule.seen(b, queries[b], lengths[b]))
        expected[rows], sums[rows] = np.einsum("hts,she->the", weights, values), logs[..., 0].T
    bound = 1e-3 if dtype == float32 else 1e-2
    close(thrice(gpu, launch, q.shape, q.dtype), expected, bound)
    if lse is not None:
        close(lse.numpy().astype("f8"), sums, bound)
    assert not tickets.numpy().any()


def test_the_empty_probe_runs(gpu, kernels):
    for overlapped in (False, True):
        kernels.empty_probe(overlapped, gpu.stream)
        gpu.synchronize()


def test_the_probe_reads_every_byte(gpu, kernels):
    for count in (16, 4096 * 17, 1 << 20):
        words = np.random.default_rng(count).integers(0, 2**32, count // 4, dtype=np.uint32)
        out = gpu.upload(np.zeros(5, np.uint32))
        kernels.read_probe(out, gpu.upload(words.view(np.uint8)), gpu.stream)
        assert np.bitwise_xor.reduce(out.numpy()) == np.bitwise_xor.reduce(words)
