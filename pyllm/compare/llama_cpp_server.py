"""llama-cpp-python's server beside ours: one model of random weights for both, and how that server is started.

Its requests hold text, so the model has a vocabulary here: the token of a byte has the byte's value as its id. A text
of printable ASCII without spaces is then as many tokens, the same ones, in both.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from pyllm.compare import shapes

DTYPE = "bfloat16"
SPECIAL = ("<unk>", "<s>", "</s>")  # in the place of bytes that no text has
_NEEDED = ("llama_cpp", "gguf", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context")


def missing() -> list[str]:
    """Packages that the server needs and that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def prepare(shape: str, models_folder: Path) -> tuple[Path, Path]:
    """The model called `shape` (see `shapes.SHAPES`) in bfloat16, as a folder for `pyllm serve` and as a GGUF file."""
    from pyllm.compare.gguf_file import write_gguf

    folder = shapes.make(shape, models_folder / f"{shape}-{DTYPE}-served", DTYPE)
    tokens = _tokens(json.loads((folder / "config.json").read_text())["vocab_size"])
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token=SPECIAL[0], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, write_gguf(folder, folder.with_name(f"{folder.name}.gguf"), tokens)


def command(model: Path, threads: int, length: int) -> list[str]:
    """What starts its server of a GGUF file at 127.0.0.1, but for the port; with a context of `length` tokens.

    By its default a streamed request ends where another one comes: here all are answered.
    """
    options = {
        "host": "127.0.0.1",
        "n_ctx": length,
        "n_threads": threads,
        "n_threads_batch": threads,
        "interrupt_requests": False,
        "verbose": False,
    }
    listed = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "llama_cpp.server", "--model", str(model), *listed]


def _tokens(vocabulary: int) -> list[str]:
    """The token of each id: bytes, in the spelling of SentencePiece, and behind them made-up words."""
    return [*SPECIAL, *(f"<0x{i:02X}>" for i in range(len(SPECIAL), 256)), *(f"t{i}" for i in range(256, vocabulary))]
