"""Training against torch: all gradients of transformers' models, the optimizer, and folders that transformers loads."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import goldens
from training import Batch, CountedData, gradients, make_batch

from pyllm.folder import read_config
from pyllm.models import family_of, open_checkpoint, read_spec
from pyllm.ops_training import TrainingOps
from pyllm.train import TrainConfig, Trainer, learning_rate
from pyllm.train.head_loss import IGNORED, count_labels
from pyllm.train.parameters import Parameters, load_values
from pyllm.weight_names import Transform

MODELS = ["gpt2", "llama", "llama-tied-biased", "qwen3"]
OTHERS = [
    "bloom",
    "bloom-normed",
    "cohere",
    "cohere-normed",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "gpt2-scaled-relu",
    "gpt_neox",
    "gpt_neox-serial",
    "gptj",
    "llama-longrope",
    "llama-yarn",
    "mistral",
    "mpt",
    "mpt-clipped",
    "openai-gpt",
    "opt",
    "opt-post",
    "phi3",
    "qwen2",
    "qwen2-window",
]
VOCAB = 67

if not os.environ.get("PYLLM_REQUIRE_ORACLE"):
    pytest.importorskip("torch", reason="the live comparison needs the oracle extra: torch")
    pytest.importorskip("transformers", reason="the live comparison needs the oracle extra: transformers")


def torch_model(folder: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).train(False)


def random_model(name: str, folder: Path, seed: int = 0) -> None:
    """A model with all parameters at random, in `folder`."""
    model = goldens.random_model(goldens.variants()[name], seed)
    folder.mkdir(exist_ok=True)
    goldens.save_model(model, folder)


def torch_loss(model: Any, batch: Batch) -> Any:
    """Mean over the counted labels of all sequences, each by itself."""
    import torch

    ids, labels, starts = batch
    total: Any = 0
    for first, end in pairwise(starts):
        if first == end:
            continue
        logits = model(torch.from_numpy(ids[first:end].astype(np.int64))[None]).logits[0].float()
        wanted = torch.from_numpy(labels[first:end].astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / int((labels != IGNORED).sum())


def by_slot(folder: Path, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays under the checkpoint's names as slots, [out, in]."""
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
    names, found = family_of(read_config(folder)).names, {}
    for row in names.expand(spec):
        values = tensors[row.name] if Transform.LESS_ONE in row.transform else row.read(tensors[row.name])
        found |= {slot: values[place] for slot, place in row.places(spec).items()}
    return found


def torch_gradients(folder: Path, batch: Batch, autocast: bool = False) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    model = torch_model(folder)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = torch_loss(model, batch)
    loss.backward()
    named = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return float(loss.detach()), by_slot(folder, named)


def parameters_of(folder: Path, dtype: str = "float32") -> Parameters:
    with open_checkpoint(folder) as checkpoint:
        parameters = Parameters(checkpoint.spec, TrainingOps(threads=2), dtype)
        load_values(parameters, checkpoint.tensors)
    return parameters


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], keys_unrotated: bool) -> None:
    """Gradients of all slots; those of biases of keys that are not rotated are zero but for rounding, as all scores of
    a query move together."""
    largest = max(float(np.abs(gradient).max()) for gradient in expected.values())
    for slot, gradient in expected.items():
        if keys_unrotated and slot.endswith("attn.k.bias"):
            assert np.abs(found[slot]).max() <= 1e-6 * largest, slot
            continue
        assert np.abs(found[slot] - gradient).max() <= 1e-4 * np.abs(gradient).max() + 1e-7 * largest, slot


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_all_gradients_are_those_of_torch(name: str, tmp_path: Path) -> None:
    random_model(name, tmp_path)
    batch = make_batch(VOCAB, 90, 4, 0)
    expected_loss, expected = torch_gradients(tmp_path, batch)
    loss, found = gradients(parameters_of(tmp_path), batch)
    assert abs(loss - expected_loss) <= 1e-6 * expected_loss
    assert set(found) == set(expected)
    pad = read_spec(tmp_path).pad_token_id
    if pad is not None:  # torch leaves out what comes to this row through the embedding
        expected["embed.weight"][pad] = found["embed.weight"][pad]
    assert_same(found, expected, read_spec(tmp_path).rope is None)


ENCODERS = [  # a golden model, what its config says of labels, and how many rows of the batch have them
    ("bert", None),
    ("roberta", None),
    ("distilbert", None),
    ("electra-generator", None),
    ("electra-discriminator", None),
    ("bert-classifier", "single_label_classification"),
    ("roberta-classifier", "multi_label_classification"),
    ("distilbert-classifier", "regression"),
    ("electra-classifier", "single_label_classification"),
    ("bert-labels", None),
    ("bert-next", "single_label_classification"),
    ("electra-labels", None),
]


def encoder_batch(name: str, problem: str | None) -> tuple[np.ndarray, ...]:
    """Tokens, labels for each token or for each sequence, starts, and types."""
    ids, _, starts = make_batch(VOCAB, 90, 4, 0)
    rng = np.random.default_rng(4)
    ids = np.where(ids < 3, ids + 3, ids).astype(np.int32)  # torch leaves out what comes to the row of padding
    types = (rng.random(90) < (0.5 if name.startswith(("bert", "electra")) else 0)).astype(np.int32)
    rows = len(starts) - 1 if problem else 90
    classes = 2 if name == "bert-next" else 3 if problem or name.endswith("labels") else VOCAB
    empty = np.diff(starts) == 0 if problem else np.zeros(90, bool)
    if problem == "single_label_classification" or (problem is None and "discriminator" not in name):
        labels = rng.integers(0, classes, rows).astype(np.int32)
        labels[empty | (rng.random(rows) < (0 if problem else 0.8))] = IGNORED
        return ids, labels, starts, types
    columns = 1 if problem is None else 3
    values = rng.normal(size=(rows, columns)) if problem == "regression" else rng.random((rows, columns)) < 0.4
    values = values.astype(np.float32)
    values[empty] = np.nan
    if problem is None:
        values[rng.random(rows) < 0.2] = np.nan
    return ids, values, starts, types


def encoder_gradients(name: str, folder: Path, batch: tuple[np.ndarray, ...]) -> tuple[float, dict[str, np.ndarray]]:
    """By transformers' class for the model, each sequence by itself, in torch."""
    import torch
    import transformers

    architecture = goldens.variants()[name].architecture
    model = getattr(transformers, str(architecture)).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    ids, labels, starts, types = batch
    problem = read_spec(folder).head.problem
    total: Any = 0
    for index, (first, end) in enumerate(pairwise(starts)):
        if first == end:
            continue
        given = {"token_type_ids": torch.from_numpy(types[first:end].astype(np.int64))[None]} if types.any() else {}
        logits = model.eval()(torch.from_numpy(ids[first:end].astype(np.int64))[None], **given).logits
        per_token = len(labels) == len(ids)
        logits = logits.reshape(end - first if per_token else 1, -1)
        wanted = torch.from_numpy(labels[first:end] if per_token else labels[index : index + 1])
        if problem in (None, "single_label_classification"):
            losses = torch.nn.functional.cross_entropy(logits, wanted.long(), ignore_index=IGNORED, reduction="sum")
        else:
            counted = ~torch.isnan(wanted)
            if problem == "regression":
                losses = torch.nn.functional.mse_loss(logits[counted], wanted[counted], reduction="sum")
            else:
                losses = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits[counted], wanted[counted], reduction="sum"
                )
        total = total + losses
    loss = total / count_labels(labels)
    loss.backward()
    named = {
        n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for n, p in model.named_parameters()
    }
    return float(loss.detach()), by_slot(folder, named)


@pytest.mark.parametrize(("name", "problem"), ENCODERS)
def test_gradients_of_encoders_are_those_of_torch(name: str, problem: str | None, tmp_path: Path) -> None:
    """Masked tokens, labels one of which or each by itself holds, values, and replaced tokens."""
    random_model(name, tmp_path)
    if problem is not None:
        config = read_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": problem}))
    batch = encoder_batch(name, problem)
    expected_loss, expected = encoder_gradients(name, tmp_path, batch)
    parameters = parameters_of(tmp_path)
    given = batch if parameters.spec.embedding.types else batch[:3]
    loss, found = gradients(parameters, given)  # type: ignore[arg-type]
    assert abs(loss - expected_loss) <= 2e-6 * expected_loss
    assert set(found) == set(expected)
    assert_same(found, expected, keys_unrotated=True)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_to_float32_as_that_of_torch(name: str, tmp_path: Path) -> None:
    """Twice its error is allowed, over all gradients together and over the loss of several batches."""
    random_model(name, tmp_path)
    ours, theirs, loss_ours, loss_theirs = 0.0, 0.0, [], []
    for seed in range(6):
        batch = make_batch(VOCAB, 90, 4, seed)
        exact_loss, exact = torch_gradients(tmp_path, batch)
        their_loss, their = torch_gradients(tmp_path, batch, autocast=True)
        our_loss, our = gradients(parameters_of(tmp_path, "bfloat16"), batch)
        ours += sum(float(((our[slot] - g) ** 2).sum()) for slot, g in exact.items())
        theirs += sum(float(((their[slot] - g) ** 2).sum()) for slot, g in exact.items())
        loss_ours.append(our_loss - exact_loss)
        loss_theirs.append(their_loss - exact_loss)
    assert ours**0.5 <= 2 * theirs**0.5
    assert np.linalg.norm(loss_ours) <= 2 * np.linalg.norm(loss_theirs)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_follow_torch(name: str, tmp_path: Path) -> None:
    import torch

    random_model(name, tmp_path / "model")
    config = TrainConfig(tmp_path / "run", steps=20, learning_rate=1e-3, warmup_steps=3, weight_decay=0.1, clip=0.7)
    trainer = Trainer(tmp_path / "model", CountedData(vocab=VOCAB), config)
    model = torch_model(tmp_path / "model")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "wpe" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps)
    data = CountedData(vocab=VOCAB)
    for step in range(20):
        optimizer.zero_grad()
        loss = torch_loss(model, data.next_batch())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        report = trainer.step()
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    named = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for slot, value in by_slot(tmp_path / "model", named).items():
        if name == "gpt2" and slot.endswith("attn.k.bias"):
            continue  # its gradient is zero but for rounding, which Adam makes as large as any other
        assert np.abs(trainer.parameters.get(slot) - value).max() <= 1e-5 * max(1, np.abs(value).max()), slot


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_was_trained(name: str, tmp_path: Path) -> None:
    import torch

    from pyllm import LLM

    random_model(name, tmp_path / "model")
    config = TrainConfig(tmp_path / "run", steps=3, learning_rate=1e-2)
    folder = Trainer(tmp_path / "model", CountedData(vocab=VOCAB), config).run().folder
    ids = make_batch(VOCAB, 32, 1, 5)[0].tolist()
    ours = LLM(folder, skip_tokenizer_init=True, threads=2).forward(ids).logits
    with torch.no_grad():
        theirs = torch_model(folder)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())
