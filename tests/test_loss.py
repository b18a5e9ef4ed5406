"""Cross-entropy and its gradient against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import loss as oracles
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa
from oracle.loss import cross_entropy

from pyllm.ops_training import IGNORED_LABEL, TrainingOps

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(23)
ONE = np.ones(1, np.float32)
KINDS = [(0.0, 0.0), (1e-3, 0.0), (0.0, 0.1), (1e-2, 1.0)]


def case(rows: int, vocab: int, spread: float = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, vocab, rows).astype(np.int32)
    labels[1::5] = IGNORED_LABEL
    return RNG.normal(1, spread, (rows, vocab)).astype(np.float32), labels


def at_least_rounded(naive: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Sums of exponentials of about 1 are wrong by 2^-24, though a naive result may be exact by luck."""
    return naive if np.abs(naive - oracle).max(initial=0) >= 2**-24 else oracle + 2**-24


def test_formula_is_the_derivative() -> None:
    logits, labels = case(4, 7)
    logits = logits.astype(np.float64)
    for z_loss, smoothing in KINDS:
        _, gradient = cross_entropy(logits, labels, z_loss, smoothing)
        for at in np.ndindex(*logits.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = logits.copy()
                moved[at] += step
                ends.append(cross_entropy(moved, labels, z_loss, smoothing)[0].sum())
            assert abs((ends[0] - ends[1]) / 2e-5 - gradient[at]) < 1e-8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("z_loss", "smoothing"), KINDS)
def test_matches_formula(isa: str, z_loss: float, smoothing: float) -> None:
    for vocab in [*DIMS, 1023, 1024, 1025, 5000]:
        for rows in (0, 1, 7):
            logits, labels = case(rows, vocab)
            given, loss = Framed(logits, offset=vocab % 5), np.full(rows, np.nan, np.float32)
            scale = np.array([0.37], np.float32)
            options = {"z_loss": z_loss, "label_smoothing": smoothing}
            with at_isa(isa):
                losses_only = OPS.cross_entropy(given.array, labels, None, **options)
                assert given.array.tobytes() == logits.tobytes()
                assert OPS.cross_entropy(given.array, labels, scale, loss=loss, **options) is loss
            assert losses_only.tobytes() == loss.tobytes()
            given.check()
            oracle, naive = (cross_entropy(logits.astype(t), labels, **options) for t in (np.float64, np.float32))
            assert_close(loss, oracle[0], at_least_rounded(naive[0], oracle[0]))
            expected, usual = oracle[1] * np.float64(scale[0]), naive[1] * scale[0]
            assert_close(given.array, expected, at_least_rounded(usual, expected))
            ignored = labels == IGNORED_LABEL
            assert not loss[ignored].any()
            assert not given.array[ignored].any()


@pytest.mark.parametrize("isa", ISAS)
def test_wide_vocabularies(isa: str) -> None:
    """Loss within 1e-6 however wide, and a gradient whose rows add up to nothing."""
    logits, labels = case(6, 128_256)
    oracle = cross_entropy(logits.astype(np.float64), labels)
    given = logits.copy()
    with at_isa(isa):
        loss = OPS.cross_entropy(given, labels, ONE)
    assert np.abs(loss - oracle[0]).max() <= 1e-6 * oracle[0].max()
    assert np.abs(given - oracle[1]).max() <= 1e-6
    assert np.abs(given.astype(np.float64).sum(-1)).max() <= 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_far_apart(isa: str) -> None:
    """Logits far from one another or from 0: nothing overflows, and what is certain costs nothing."""
    logits = np.array([[1e4, 0, -1e4], [3e38, -3e38, 0], [-1e4, -1e4, -1e4], [-np.inf, 2, -np.inf]], np.float32)
    for label, expected in (
        (0, [0, 0, np.log(3), np.inf]),
        (1, [1e4, np.inf, np.log(3), 0]),
    ):
        given = logits.copy()
        with at_isa(isa):
            loss = OPS.cross_entropy(given, np.full(4, label, np.int32), ONE)
        np.testing.assert_allclose(loss, np.float32(expected), rtol=1e-6)
        assert np.isfinite(given).all()
        assert given[1].tolist() == ([0, 0, 0] if label == 0 else [1, -1, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_shows(isa: str, wrong: float) -> None:
    for at in (0, 5, 1024, 1999):
        logits, labels = case(3, 2000)
        expected = logits.copy()
        labels[:] = 7
        logits[2, at] = wrong
        with at_isa(isa):
            loss = OPS.cross_entropy(logits, labels, ONE)
            usual = OPS.cross_entropy(expected, labels, ONE)
        assert np.isnan(loss[2])
        assert loss[:2].tobytes() == usual[:2].tobytes()
        assert logits[:2].tobytes() == expected[:2].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_the_lowest_logits_are_logits(isa: str) -> None:
    logits = np.full((1, 40), -3.3e38, np.float32)
    with at_isa(isa):
        loss = OPS.cross_entropy(logits, np.array([3], np.int32), ONE)
    assert abs(loss[0] - np.log(40)) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_threads_company_and_graph(isa: str) -> None:
    logits, labels = case(33, 1999)
    scale, ops = np.zeros(1, np.float32), TrainingOps(threads=2)
    with at_isa(isa):
        expected = logits.copy()
        loss = TrainingOps(threads=1).cross_entropy(expected, labels, ONE, z_loss=1e-4, label_smoothing=0.1)
        for threads in (2, 3):
            given = logits.copy()
            again = TrainingOps(threads).cross_entropy(given, labels, ONE, z_loss=1e-4, label_smoothing=0.1)
            assert again.tobytes() == loss.tobytes()
            assert given.tobytes() == expected.tobytes()
        for r in (0, 1, 32):
            alone = Framed(logits[r : r + 1], offset=r % 4).array
            own = OPS.cross_entropy(alone, labels[r : r + 1], ONE, z_loss=1e-4, label_smoothing=0.1)
            assert own.tobytes() == loss[r : r + 1].tobytes()
            assert alone.tobytes() == expected[r].tobytes()
        given = np.empty_like(logits)
        ops.begin_recording()
        recorded = ops.cross_entropy(given, labels, scale, z_loss=1e-4, label_smoothing=0.1)
        graph = ops.end_recording()
        for value in (1.0, 0.5):
            given[...], scale[0] = logits, value
            ops.replay(graph)
            assert recorded.tobytes() == loss.tobytes()
            assert (given if value == 1 else given * np.float32(2)).tobytes() == expected.tobytes()
        labels[3] = 1999
        with pytest.raises(ValueError, match=r"labels\[3\]: expected a column of logits in \[0, 1999\)"):
            ops.replay(graph)


def test_bad_arguments() -> None:
    logits, labels = case(3, 8)
    for changes, error, message in (
        (
            {"labels": np.array([0, 8, 1], np.int32)},
            ValueError,
            r"labels\[1\]: expected a column of logits in \[0, 8\)",
        ),
        ({"labels": np.array([0, -1, 1], np.int32)}, ValueError, r"labels\[1\]: .* or -100 to ignore, got -1"),
        ({"labels": labels.astype(np.int64)}, TypeError, "labels: expected int32"),
        ({"scale": np.ones(2, np.float32)}, ValueError, r"scale: expected float32\[1\]"),
        ({"z_loss": -1.0}, ValueError, "z_loss: expected"),
        ({"z_loss": float("nan")}, ValueError, "z_loss: expected"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1"),
        ({"loss": np.zeros(4, np.float32)}, ValueError, r"loss: expected float32\[3\]"),
        ({"logits": logits.T}, ValueError, "logits: expected"),
    ):
        with pytest.raises(error, match=message):
            OPS.cross_entropy(**({"logits": logits, "labels": labels, "scale": ONE} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["sigmoid_cross_entropy", "squared_error"])
def test_losses_of_single_numbers(isa: str, name: str) -> None:
    kernel, oracle = getattr(OPS, name), getattr(oracles, name)
    for dim in (1, 2, 7, 33, 257):
        for rows in (0, 1, 9):
            x = RNG.normal(0, 4, (rows, dim)).astype(np.float32)
            targets = RNG.random((rows, dim)).astype(np.float32)
            targets[RNG.random((rows, dim)) < 0.2] = np.nan
            given, scale = Framed(x, offset=dim % 5), np.array([0.37], np.float32)
            with at_isa(isa):
                losses_only = kernel(given.array, targets, None)
                assert given.array.tobytes() == x.tobytes()
                loss = kernel(given.array, targets, scale)
            assert losses_only.tobytes() == loss.tobytes()
            given.check()
            wide, naive = oracle(x.astype(np.float64), targets), oracle(x, targets)
            assert_close(loss, wide[0], naive[0])
            assert_close(given.array, wide[1] * np.float64(scale[0]), (naive[1] * scale[0]).astype(np.float32))
            assert not given.array[np.isnan(targets)].any()


@pytest.mark.parametrize("isa", ISAS)
def test_sigmoid_far_from_zero(isa: str) -> None:
    x = np.array([[1e4], [-1e4], [3e38], [-3e38], [np.nan]], np.float32)
    with at_isa(isa):
        loss = OPS.sigmoid_cross_entropy(x, np.ones((5, 1), np.float32), ONE)
    np.testing.assert_allclose(loss, np.float32([0, 1e4, 0, 3e38, np.nan]))
    np.testing.assert_allclose(x[:, 0], [0, -1, 0, -1, np.nan])


def test_bad_arguments_of_losses_of_single_numbers() -> None:
    x = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"targets: expected float32\[3, 2\]"):
        OPS.sigmoid_cross_entropy(x, np.zeros((3, 1), np.float32), ONE)
    with pytest.raises(ValueError, match="targets: expected memory of its own"):
        OPS.squared_error(x, x, ONE)
    with pytest.raises(ValueError, match=r"loss: expected float32\[3\]"):
        OPS.squared_error(x, np.zeros((3, 2), np.float32), ONE, loss=np.zeros(2, np.float32))
