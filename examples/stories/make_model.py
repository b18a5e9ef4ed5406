"""Makes the model that ships with pyllm: `python -m stories.make_model WORK`, from the folder examples/.

In WORK: corpus/ (the stories), tokenizer/, run/ (the training, which goes on where it was stopped) with its curve
run.png, and at the end model/, with bfloat16 weights and quality.json. What is there already is not made again; each
folder but run/ appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
from safetensors.numpy import load_file, save_file

from pyllm.convert.new_folder import new_folder
from pyllm.default_model import TEMPERATURE

from .quality import measure
from .write import write

HERE = Path(__file__).parent
STORIES, VOCABULARY = 240_000, 2048
KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make(work: Path) -> Path:
    """All steps; gives the folder of the model."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "corpus").exists():
        with new_folder(work / "corpus") as partial:
            write(partial, STORIES)
    if not (work / "tokenizer").exists():
        template = HERE / "chat_template.jinja"
        _pyllm(work, "train-tokenizer", "corpus/train.jsonl", "--out", "tokenizer",
               "--vocab-size", str(VOCABULARY), "--chat-template", str(template))  # fmt: skip
    if not (work / "model").exists():
        if (work / "run" / "last").exists():
            _pyllm(work, "train", "--resume", "--out", "run")
        else:
            _pyllm(work, "train", "--config", str(HERE / "run.yaml"))
        _pyllm(work, "plot", "run", "--out", "run.png")
        with new_folder(work / "model") as partial:
            shrink(work / "run" / "best", partial)
    quality, _ = measure(work / "model", work / "corpus" / "train.jsonl", 400, TEMPERATURE)
    (work / "model" / "quality.json").write_text(json.dumps(asdict(quality), indent=2) + "\n")
    print(json.dumps(asdict(quality), indent=2))
    return work / "model"


def shrink(source: Path, target: Path) -> None:
    """Fill `target`, an empty folder, with a model of bfloat16 weights and nothing that only training needs."""
    weights = {
        name: values.astype(ml_dtypes.bfloat16) for name, values in load_file(source / "model.safetensors").items()
    }
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
    for name in KEPT:
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(HERE / "model_card.md", target / "README.md")


def _pyllm(work: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pyllm", *arguments], cwd=work, check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the model that ships with pyllm.")
    parser.add_argument("work", type=Path)
    print(make(parser.parse_args().work))


if __name__ == "__main__":
    main()
