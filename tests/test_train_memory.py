"""The memory of training, as it is planned and as it is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from training import TINY

from pyllm.models import family_of
from pyllm.train import StepShape, plan_training
from pyllm.train.memory import head_rows, step_floats

MIDDLE = {
    **TINY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 8000,
    "max_position_embeddings": 256,
}
NEOX = {
    **{key: value for key, value in MIDDLE.items() if key != "num_key_value_heads"},
    "model_type": "gpt_neox",
}
GPTJ = {"model_type": "gptj", "n_embd": 512, "n_inner": 1536, "n_layer": 3, "n_head": 8, "vocab_size": 8000,
        "n_positions": 256, "rotary_dim": 32, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 512, "ffn_dim": 1536, "num_hidden_layers": 3, "num_attention_heads": 8,
       "vocab_size": 8000, "max_position_embeddings": 256, "word_embed_proj_dim": 256,
       "do_layer_norm_before": False}  # fmt: skip
GLM4 = {**MIDDLE, "model_type": "glm4", "head_dim": 64, "pad_token_id": 0}
ELECTRA = {"model_type": "electra", "architectures": ["ElectraForMaskedLM"], "hidden_size": 512, "embedding_size": 128,
           "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 8000,
           "max_position_embeddings": 256}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_decoder_layers": 3,
      "num_heads": 8, "vocab_size": 8000, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}  # fmt: skip
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from pyllm.train import Trainer, TrainConfig

config, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Data:
    def next_batch(self):
        ids = np.random.default_rng(0).integers(0, config["vocab_size"], 1024).astype(np.int32)
        batch = ids, np.roll(ids, -1), np.arange(0, 1025, 256, dtype=np.int32)
        return (*batch, ids[:800], np.arange(0, 801, 200, dtype=np.int32)) if config["model_type"] == "t5" else batch
    def state(self):
        return {}
    def load_state(self, state):
        pass

def peak():
    [line] = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
trainer = Trainer(config, Data(), TrainConfig(Path("unused"), steps=9, threads=2, **settings))
trainer.step()
trainer.step()
print(json.dumps({"planned": trainer.plan.total, "taken": peak() - before}))
"""


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16"}, {"checkpoint_activations": True}, {"dropout": 0.1}], ids=str
)
def test_a_run_takes_what_was_planned(settings: dict[str, Any]) -> None:
    """Within 5 %, measured in a process of its own."""
    assert_planned(MIDDLE, settings)


@pytest.mark.parametrize("config", [NEOX, GPTJ, OPT, GLM4, ELECTRA, T5], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_so_do_other_shapes_of_blocks(config: dict[str, Any], checkpointed: bool) -> None:
    assert_planned(config, {"checkpoint_activations": checkpointed})


def assert_planned(config: dict[str, Any], settings: dict[str, Any]) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(config), json.dumps(settings)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["planned"] == pytest.approx(found["taken"], rel=0.05), found


def test_parts_of_a_plan() -> None:
    spec = family_of(MIDDLE).read(MIDDLE)
    plain = plan_training(spec, StepShape(1024, 4))
    rounded = plan_training(spec, StepShape(1024, 4, "bfloat16"))
    assert plain.gradients == plain.weights >= 4 * spec.num_parameters()
    assert plain.optimizer == 2 * plain.gradients
    assert plain.weights < rounded.weights < 1.6 * plain.weights
    assert (
        plain.total
        == plain.weights + plain.gradients + plain.optimizer + plain.activations + plain.cache + plain.scratch
    )
    fewer = plan_training(spec, StepShape(1024, 4, checkpoint_activations=True))
    assert fewer.activations < 0.7 * plain.activations


def test_logits_never_stand_for_all_tokens_of_a_large_batch() -> None:
    spec = family_of(TINY).read({**TINY, "vocab_size": 50257})
    for tokens in (1, 17, 256, 1024, 4096, 100_000):
        rows = head_rows(spec, tokens)
        assert 0 < rows <= tokens
        assert rows * spec.vocab_size * 4 <= 160 << 20
    assert step_floats(spec, StepShape(100_000, 100)).total < 100_000 * spec.vocab_size
