"""Trains byte-level BPE tokenizers, over the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyllm.convert.new_folder import new_folder, refuse_existing
from pyllm.errors import ConfigError, DataError, listed
from pyllm.train.documents import read_texts

BEGIN, END = "<s>", "</s>"
BYTES = 256


def train_tokenizer(
    files: Sequence[Path],
    out: Path,
    *,
    vocab_size: int,
    special: Sequence[str] = (),
    begin: bool = True,
    chat_template: str | None = None,
    context: int | None = None,
) -> int:
    """Write the folder `out` with a tokenizer of at most `vocab_size` entries; gives how many it has.

    `files` are `.txt` or `.jsonl`. The vocabulary holds `<s>`, `</s>`, `special` and the 256 bytes, so that every text
    can be written. With `begin`, `<s>` stands before each text. transformers reads the folder, too. Raises `DataError`,
    `ConfigError` and `FileExistsError`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokens = [BEGIN, END, *special]
    least = BYTES + len(tokens)
    problems = []
    if not least <= vocab_size <= 1 << 20:
        problems.append(f"vocab_size: expected at least {least} (bytes and special tokens), got {vocab_size}")
    if len(set(tokens)) != len(tokens) or not all(tokens):
        problems.append(f"special: expected different names other than {BEGIN} and {END}, got {list(special)}")
    if not files:
        problems.append("files: expected at least one")
    if problems:
        raise ConfigError(listed("tokenizer", problems))
    refuse_existing(out)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    with new_folder(out) as partial:
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            **({"model_max_length": context} if context is not None else {}),
        }
        _write(partial / "tokenizer_config.json", settings)
        _write(partial / "special_tokens_map.json", {"bos_token": BEGIN, "eos_token": END})
        if chat_template is not None:
            (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        count = 0
        for text in read_texts(path):
            count += len(text)
            yield text
        if count == 0:
            raise DataError(f"{path}: holds no text")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
