"""How good the stories of a model are: `python -m stories.quality MODEL --train corpus/train.jsonl`, from examples/.

Prints the share of stories that the checker finds consistent, the share of their 8-grams of words that no training
story holds, and how many are a training story word for word.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyllm import LLM, SamplingParams

from .check import check

PROMPTS = ("Once upon a time", "Long ago", "There once was", "In a")
N = 8
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Quality:
    """Measures over `stories` stories at `temperature`."""

    stories: int
    temperature: float
    consistent: float  # share that the checker finds nothing wrong with
    understood: float  # share of sentences that the checker can read
    new_8_grams: float  # share that no training story holds
    copies: int  # stories that are in the training set
    repeats: int  # stories that the model told before
    problems: dict[str, int]  # the most frequent


def measure(model: Path, train: Path, count: int, temperature: float, seed: int = 0) -> tuple[Quality, list[str]]:
    """Let a model tell `count` stories and read them."""
    llm = LLM(model, max_num_seqs=16)
    stories = []
    for at in range(0, count, len(PROMPTS)):
        params = SamplingParams(max_tokens=320, temperature=temperature, seed=seed + at)
        for prompt, output in zip(PROMPTS, llm.generate(list(PROMPTS), params), strict=True):
            stories.append(prompt + output.outputs[0].text)
    verdicts = [check(text) for text in stories]
    vocabulary: dict[str, int] = {}
    known, texts = _training(train, vocabulary)
    grams = np.concatenate([_grams(text, vocabulary) for text in stories])
    place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    unread = sum(problem.startswith("not understood") for problem in problems)
    kinds = Counter(problem.split(":")[0] for problem in problems)
    quality = Quality(
        stories=len(stories),
        temperature=temperature,
        consistent=sum(verdict.consistent for verdict in verdicts) / len(stories),
        understood=1 - unread / max(sum(len(verdict.steps) for verdict in verdicts) + unread, 1),
        new_8_grams=float((known[place] != grams).mean()),
        copies=sum(text in texts for text in stories),
        repeats=len(stories) - len(set(stories)),
        problems=dict(kinds.most_common(8)),
    )
    return quality, stories


def _training(path: Path, vocabulary: dict[str, int]) -> tuple[NDArray[np.uint64], set[str]]:
    """The sorted hashes of all 8-grams of a corpus, and its stories."""
    parts, texts = [], set()
    with path.open() as file:
        for line in file:
            text = json.loads(line)["text"]
            texts.add(text)
            parts.append(_grams(text, vocabulary))
    return np.unique(np.concatenate(parts)), texts


def _grams(text: str, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """A hash of every run of 8 words and signs."""
    words = WORD.findall(text)
    ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], np.uint64)
    if len(ids) < N:
        return np.zeros(0, np.uint64)
    value = np.zeros(len(ids) - N + 1, np.uint64)
    for i in range(N):  # wraps around, as meant
        value = value * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - N + 1 + i]
    return value ^ (value >> np.uint64(29))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the stories of a model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--show", type=int, default=0, help="print so many stories, too")
    arguments = parser.parse_args()
    quality, stories = measure(arguments.model, arguments.train, arguments.stories, arguments.temperature)
    for text in stories[: arguments.show]:
        print(text, *check(text).problems, sep="\n", end="\n\n")
    print(json.dumps(asdict(quality), indent=2))


if __name__ == "__main__":
    main()
