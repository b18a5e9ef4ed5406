"""Parts of the spec in combinations that no family at hand has: results and gradients in float64, memory as planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import transformer
from training import assert_gradients_of_float64, assert_takes_what_is_laid_out, make_batch, values

from pyllm.batch import Batch
from pyllm.cache import KVCache
from pyllm.errors import ConfigError
from pyllm.model import Model
from pyllm.ops_training import TrainingOps
from pyllm.position_bias import Alibi, Buckets
from pyllm.spec import (
    Activation,
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormSpec,
)
from pyllm.train.parameters import Parameters

VOCAB, HIDDEN = 41, 24
LAYER, RMS = NormSpec(NormKind.LAYER, 1e-5, bias=True), NormSpec(NormKind.RMS, 1e-5, bias=False)


def spec(*attentions: dict[str, Any], **more: Any) -> ModelSpec:
    def block(changes: dict[str, Any]) -> BlockSpec:
        attention = AttentionSpec(**{"heads": 3, "kv_heads": 1, "head_dim": 8, "scale": 0.4, **changes})
        return BlockSpec(RMS, attention, MlpSpec(20, Activation.TANH, gated=True, bias=False))

    blocks = tuple(block(changes) for changes in attentions)
    return ModelSpec("parts", VOCAB, HIDDEN, blocks, RMS, 64, **more)


SPECS = {
    "learned-biases": spec({"bias": Buckets(8, 12)}, {"softcap": 1.5}, {"bias": Buckets(8, 12), "window": 9}),
    "linear-biases": spec(
        {"bias": Alibi(3.0), "softcap": 2.0},
        {"kv_heads": 3},
        embedding=EmbeddingSpec(positions=64, scale=1.7, norm=LAYER),
        head=HeadSpec(tied=True, scale=0.3, softcap=0.8),
    ),
    "narrow": spec(
        {},
        embedding=EmbeddingSpec(width=16, positions=66, position_offset=2, scale=0.6, norm=RMS),
        head=HeadSpec(bias=True, scale=-1.5),
    ),
    "scaled": spec({}, embedding=EmbeddingSpec(scale=5.0), head=HeadSpec(softcap=3.0)),
}


def parameters_of(name: str, ops: TrainingOps) -> Parameters:
    parameters = Parameters(SPECS[name], ops)
    rng = np.random.default_rng(len(name))
    parameters.fill(lambda slot, shape: (rng.normal(size=shape) * 0.4 + slot.endswith("norm.weight")).astype("f4"))
    return parameters


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_float64(name: str) -> None:
    """As a prompt, and token after token with the same bits."""
    ops = TrainingOps(threads=2)
    parameters, length = parameters_of(name, ops), 40
    model, ids = Model(parameters.spec, parameters.model_weights), np.arange(3, 3 + length) % VOCAB

    def run(cache: KVCache, first: int, end: int) -> np.ndarray:
        batch = Batch.empty(end - first, 1, 1, parameters.spec)
        batch.tokens[:] = ids[first:end]
        batch.positions[:] = batch.slots[:] = np.arange(first, end)
        batch.starts[:], batch.lengths[:] = [0, end - first], end
        x = model.forward(ops, batch, cache)
        return model.logits(ops, x, np.arange(end - first, dtype=np.int32))

    whole = run(KVCache(parameters.spec, 1, "float32"), 0, length)
    expected, _ = transformer.forward(parameters.spec, values(parameters), ids)
    assert np.abs(whole - expected).max() <= 2e-5 * max(1, np.abs(expected).max())
    cache = KVCache(parameters.spec, 1, "float32")
    single = [run(cache, 0, 7), *(run(cache, i, i + 1) for i in range(7, length))]
    assert np.concatenate(single).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_float64(name: str) -> None:
    assert_gradients_of_float64(parameters_of(name, TrainingOps(threads=2)), make_batch(VOCAB, 60, 3, 0))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"checkpoint_activations": True}], ids=str)
def test_a_step_takes_the_memory_that_was_laid_out(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(VOCAB, 37, 3, 0, longest=20)
    assert_takes_what_is_laid_out(parameters_of(name, TrainingOps(threads=1)), batch, monkeypatch, **options)


def test_impossible_parts() -> None:
    for make, message in (
        (lambda: spec({"bias": Buckets(8, 12)}, {"bias": Buckets(16, 20)}), "learned biases of distances"),
        (lambda: spec({"bias": Buckets(8, 12)}, {"bias": Buckets(8, 12), "heads": 2}), "learned biases of distances"),
        (lambda: spec({"softcap": 0.0}), "soft cap of scores"),
        (lambda: HeadSpec(softcap=-1.0), "soft cap of logits"),
        (lambda: HeadSpec(scale=float("nan")), "scale of the head"),
        (lambda: EmbeddingSpec(scale=float("inf")), "embedding scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
