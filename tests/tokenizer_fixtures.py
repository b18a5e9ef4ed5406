"""Small tokenizers made on the spot, in the layouts that models come with."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "Hello world! Hello there, wörld. Füße, naïve café; 12345 + 67890",
    "def main():\n    return [i ** 2 for i in range(10)]\n\n\n",
    "日本語のテキスト 🦙 emoji 👩‍👩‍👧 and more",
] * 4


def byte_level_bpe(vocab_size: int = 400) -> Tokenizer:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def write_byte_level(folder: Path, **config: Any) -> Path:
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", **config})
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes) -> bytes:
    """One protobuf field."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def sentencepiece_model(
    pieces: list[tuple[str, float, int]],
    model_type: int,
    byte_fallback: bool = False,
    remove_extra_whitespaces: bool = False,
    charsmap: bytes = b"",
    ids: tuple[int, int, int, int] = (0, 1, 2, -1),
) -> bytes:
    """`ids` are those of the unknown piece, the start, the end and padding; -1: none."""
    trainer = field(3, model_type) + field(35, int(byte_fallback))
    trainer += b"".join(field(number, index % 2**64) for number, index in enumerate(ids, start=40))
    normalizer = field(3, 1) + field(4, int(remove_extra_whitespaces)) + field(5, 1)
    if charsmap:
        normalizer += field(2, charsmap)
    return b"".join(piece(*entry) for entry in pieces) + field(2, trainer) + field(3, normalizer)


CONTROL_PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTE_PIECES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]


def small_bpe(user_defined: tuple[str, ...] = ()) -> bytes:
    """SentencePiece BPE with byte fallback; merges come before the characters, as trained models have it."""
    merged = [
        "\u2581t",
        "he",
        "\u2581the",
        "aa",
        "aaa",
        "aaaa",
        "aba",
        "ab",
        "ba",
        "\u2581\u2581",
        "ll",
        "llo",
        "\u2581he",
    ]
    characters = list("\u2581theabloHw.")
    pieces = CONTROL_PIECES + BYTE_PIECES + [(text, 0.0, 4) for text in user_defined]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(merged + characters)]
    return sentencepiece_model(pieces, model_type=2, byte_fallback=True)


def small_unigram(byte_fallback: bool = False, user_defined: tuple[str, ...] = ()) -> bytes:
    words = {
        "\u2581the": -2.0,
        "\u2581": -2.5,
        "he": -3.0,
        "ll": -3.25,
        "hello": -6.0,
        "a": -4.0,
        "aa": -6.0,
        "aaa": -9.5,
    }
    words |= {character: -5.0 - index / 7 for index, character in enumerate("tehlow.b")}
    pieces = CONTROL_PIECES + (BYTE_PIECES if byte_fallback else [])
    pieces += [(text, 0.0, 4) for text in user_defined] + [(text, score, 1) for text, score in words.items()]
    return sentencepiece_model(pieces, model_type=1, byte_fallback=byte_fallback, remove_extra_whitespaces=True)
