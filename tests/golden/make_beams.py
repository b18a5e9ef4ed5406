"""What Hugging Face transformers' beam search and greedy search give, with options, for models of the golden folders.

    python tests/golden/make_beams.py              # rewrite beams.json beside this script

Needs the `oracle` extra; reading the file needs only the standard library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STORED = HERE / "beams.json"
PAD = 0


@dataclass(frozen=True)
class Case:
    """A prompt of random ids for a golden model, and options by transformers' names."""

    model: str
    prompt: int
    options: dict[str, Any]
    ends: list[int] = field(default_factory=lambda: [2])
    seed: int = 0


CASES = [
    Case("gpt2", 59, {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 33}),
    Case("gpt2", 30, {"num_beams": 5, "num_return_sequences": 5, "length_penalty": 0.5, "early_stopping": "never",
                      "no_repeat_ngram_size": 2, "max_new_tokens": 31}, [2, 5, 9, 11], 9),
    Case("gpt2", 33, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0, "early_stopping": True,
                      "max_new_tokens": 9}, [2, 5, 9, 11], 1),
    Case("gpt2", 10, {"num_beams": 6, "num_return_sequences": 4, "length_penalty": 0.0, "max_new_tokens": 25},
         [2, 5, 9, 11], 11),
    Case("llama", 62, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "repetition_penalty": 1.3,
                       "min_new_tokens": 6, "max_new_tokens": 20}, [2, 5, 9], 5),
    Case("llama", 64, {"num_beams": 2, "max_new_tokens": 32, "no_repeat_ngram_size": 3, "early_stopping": True}),
    Case("llama", 1, {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "forced_bos_token_id": 7,
                      "forced_eos_token_id": 2}, seed=3),
    Case("llama", 20, {"no_repeat_ngram_size": 1, "max_new_tokens": 24}),
    Case("llama-tied-biased", 20, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "max_new_tokens": 32}),
    Case("llama-tied-biased", 40, {"max_new_tokens": 5, "forced_eos_token_id": 2}),
]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Output ids of each returned sequence, ended by an end token or their length; their scores, of beams only."""

    prompt: list[int]
    outputs: list[list[int]]
    scores: list[float]


def run(case: Case) -> Found:
    """What transformers gives."""
    import torch
    import transformers

    folder = HERE / case.model
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    prompt = np.random.default_rng(case.seed).integers(3, model.config.vocab_size, case.prompt)
    tokens = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            eos_token_id=case.ends,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            **case.options,
        )
    outputs = [_until_end(sequence[case.prompt :].tolist(), case.ends) for sequence in output.sequences]
    scores = output.sequences_scores.tolist() if case.options.get("num_beams", 1) > 1 else []
    return Found(prompt.tolist(), outputs, scores)


def read() -> list[Found]:
    """The committed results, in the order of `CASES`."""
    return [Found(**found) for found in json.loads(STORED.read_text())]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


if __name__ == "__main__":
    STORED.write_text("[\n" + ",\n".join(json.dumps(asdict(run(case))) for case in CASES) + "\n]\n")
