"""Encoder folders for tests: golden models with a WordPiece tokenizer of single letters and a few words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "fast", "red", "hat"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(chr, range(ord("a"), ord("z") + 1))]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def encoder_folder(name: str, folder: Path, **changes: Any) -> Path:
    """The golden model `name` in `folder`, with a tokenizer, and `changes` of its config.json."""
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name / file, folder / file)
    config = json.loads((folder / "config.json").read_text())
    nothing = {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps({**config, **nothing, **changes}))
    tokens = [*TOKENS, *(f"##{token}" for token in TOKENS[-26:])]
    assert len(tokens) <= config["vocab_size"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
