"""The small model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from pyllm.errors import ModelNotFoundError

# What suits it where the user says nothing: a whole story.
MAX_TOKENS, TEMPERATURE = 320, 0.4


def default_model() -> Path:
    """Its folder: a LLaMA that tells short stories for children; raises `ModelNotFoundError` where it was left out."""
    folder = Path(__file__).parent / "data" / "stories"
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the model that ships with pyllm is not in {folder}: name one with --model")
    return folder
