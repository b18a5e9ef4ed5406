"""Checkpoints of every family: whether their mapped weights compute the published model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from oracle.transformer import forward
from safetensors import safe_open

from pyllm.folder import read_config
from pyllm.models import FAMILIES, NAMESAKES, open_checkpoint
from pyllm.ops_training import TrainingOps
from pyllm.tokenizer import Tokenizer
from pyllm.train.checkpoint import save_model
from pyllm.train.parameters import Parameters, load_values

GOLDEN = Path(__file__).resolve().parent / "golden"
GOLDEN_NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_mapped_weights_compute_what_transformers_computes(name: str) -> None:
    with (
        np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as expected,
        open_checkpoint(GOLDEN / name) as model,
    ):
        types, source = expected.get("types"), expected.get("source")
        logits, hidden = forward(model.spec, model.tensors, expected["ids"], types=types, source=source)
        assert np.abs(logits - expected["logits"]).max() < 2e-5 * max(1, np.abs(logits).max())
        if model.spec.projects_to_head:
            hidden.pop()  # the last one, which transformers projects already
        for found, wanted in zip(hidden, expected["hidden_states"], strict=True):
            assert np.abs(found - wanted).max() < 2e-5 * max(1, np.abs(wanted).max())


def test_all_goldens_are_there() -> None:
    assert len(GOLDEN_NAMES) == 53


def test_the_table_of_families_names_all_of_them() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text()
    named = re.findall(r"^\| `([\w-]+)`(.*?)\|", text, flags=re.MULTILINE)
    assert {name for name, _ in named} == set(FAMILIES)
    for family in NAMESAKES:
        assert any(name == family.model_type and f"`{family.key}`" in rest for name, rest in named)


def test_gpt_nano_sort(shared_data: Path) -> None:
    folder = shared_data / "gpt-nano-sort"
    with open_checkpoint(folder) as model:
        assert model.spec.embedding.positions == model.spec.max_positions == 11
        assert not model.spec.head.tied
        assert model.spec.eos_token_ids == ()
        assert set(model.tensors) == set(model.spec.slots())


def test_stories260k(shared_data: Path) -> None:
    with open_checkpoint(shared_data / "stories260K") as model:
        attention = model.spec.blocks[0].attention
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (8, 4, 8)
        assert model.spec.head.tied
        assert (model.spec.bos_token_id, model.spec.eos_token_ids) == (1, (2,))
        ids = [1]
        for _ in range(12):
            ids.append(int(forward(model.spec, model.tensors, np.array(ids))[0][-1].argmax()))
    text = Tokenizer.load(shared_data / "stories260K").decode(ids)
    assert (shared_data / "stories260K" / "expected.txt").read_text().startswith(text)


def test_norms_stored_less_one_go_back_as_they_came(tmp_path: Path) -> None:
    with open_checkpoint(GOLDEN / "gemma3") as model:
        parameters = Parameters(model.spec, TrainingOps(threads=1))
        load_values(parameters, model.tensors)
        before = {slot: np.array(model.tensors[slot]) for slot in model.spec.slots()}
        name = "model.layers.1.self_attn.q_norm.weight"
        stored = model.stored("blocks.1.attn.q_norm.weight").copy()
    assert np.allclose(before["blocks.1.attn.q_norm.weight"], stored + 1, rtol=1e-6)
    save_model(tmp_path, parameters, read_config(GOLDEN / "gemma3"), None)
    with open_checkpoint(tmp_path) as model, safe_open(tmp_path / "model.safetensors", "np") as file:
        assert np.allclose(file.get_tensor(name), stored, atol=2e-7)
        for slot, values in before.items():
            assert np.allclose(model.tensors[slot], values, rtol=0, atol=1e-7), slot
