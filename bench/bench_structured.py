"""What structured output costs: the table of a vocabulary, made once, compiling a grammar, and the mask of a token.

The vocabulary is byte-level BPE of 128,256 made-up tokens, as many as Llama 3 has. A mask is timed with the change of
logits by it, over outputs that match, each token drawn from those that may come.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import Any

import numpy as np
import pytest
from conftest import sized
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from pyllm import StructuredOutputs
from pyllm.structured import GrammarCompiler
from pyllm.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the extra structured")

VOCABULARY = sized(128_256, 2_000)
OUTPUTS = sized(20, 2)
END = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema": {"json": SCHEMA},
    "object": {"json_object": True},
    "regex": {"regex": r"[a-z ]{5,80}[0-9]+"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    rng = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: i for i, token in enumerate([*tokens, "</s>"])}
    merges: list[tuple[str, str]] = []
    letters = [token for token in tokens if token.isalnum()]
    while len(known) < VOCABULARY:
        pair = rng.choice(tokens), rng.choice(letters)
        if len(whole := "".join(pair)) <= 12 and known.setdefault(whole, len(known)) == len(known) - 1:
            tokens.append(whole)
            merges.append(pair)
    made = Library(models.BPE(known, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("vocabulary")
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, [END])


def test_table_of_the_vocabulary(benchmark: Any, tokenizer: Tokenizer) -> None:
    benchmark.pedantic(lambda: GrammarCompiler(tokenizer, VOCABULARY, [END]), rounds=3)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_compile(benchmark: Any, compiler: GrammarCompiler, kind: str) -> None:
    wanted = StructuredOutputs(**GRAMMARS[kind])
    assert benchmark(compiler.compile, wanted).error is None


@pytest.mark.parametrize("kind", GRAMMARS)
def test_mask(benchmark: Any, compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str) -> None:
    rng = np.random.default_rng(0)
    times: list[float] = []

    def output() -> None:
        matcher, ids = compiler.compile(StructuredOutputs(**GRAMMARS[kind])), []
        while len(ids) < 100:
            logits = rng.standard_normal(VOCABULARY, np.float32)
            began = time.perf_counter()
            np.minimum(logits, matcher.ceiling(), out=logits)
            times.append(time.perf_counter() - began)
            ids.append(int(rng.choice(np.flatnonzero(np.isfinite(logits)))))
            if ids[-1] == END:
                if kind != "regex":
                    json.loads(tokenizer.decode(ids))
                return
            matcher.append(ids[-1])

    benchmark.pedantic(output, rounds=OUTPUTS)
    benchmark.extra_info["mask_us"] = round(statistics.median(times) * 1e6, 1)
    benchmark.extra_info["mask_us_p99"] = round(statistics.quantiles(times, n=100)[-1] * 1e6, 1)
