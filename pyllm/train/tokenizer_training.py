"""Trains byte-level BPE tokenizers, over the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyllm.convert.new_folder import new_folder, refuse_existing
from pyllm.errors import ConfigError, DataError, listed
from pyllm.train.documents import read_texts

BEGIN, END = "<s>", "</s>"
PURPOSES = {"<pad>": "pad_token", "<mask>": "mask_token"}  # of further special tokens, by their names
SENTINEL = "<extra_id_{}>"
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
    sentinels: int = 0,
) -> int:
    """Write the folder `out` with a tokenizer of at most `vocab_size` entries; gives how many it has.

    `files` are `.txt` or `.jsonl`. The vocabulary holds `<s>`, `</s>`, `special`, T5's `sentinels` from `<extra_id_0>`
    on, and the 256 bytes, so that every text can be written. `<pad>` and `<mask>` among the special tokens are those
    for padding and masks. With `begin`, `<s>` stands before each text. transformers reads the folder, too. Raises
    `DataError`, `ConfigError` and `FileExistsError`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokens = [BEGIN, END, *special, *(SENTINEL.format(i) for i in range(sentinels))]
    least = BYTES + len(tokens)
    problems = []
    if not least <= vocab_size <= 1 << 20:
        problems.append(f"vocab_size: expected at least {least} (bytes and special tokens), got {vocab_size}")
    if not 0 <= sentinels <= 1000:
        problems.append(f"sentinels: expected 0 to 1000, got {sentinels}")
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
    named = {PURPOSES[token]: token for token in special if token in PURPOSES}
    with new_folder(out) as partial:
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            **named,
            "clean_up_tokenization_spaces": False,
            **({"model_max_length": context} if context is not None else {}),
        }
        _write(partial / "tokenizer_config.json", settings)
        _write(partial / "special_tokens_map.json", {"bos_token": BEGIN, "eos_token": END, **named})
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
