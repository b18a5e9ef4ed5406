"""Write a corpus: `python -m stories.write FOLDER --stories 250000`, from the folder examples/.

FOLDER/train.jsonl and FOLDER/valid.jsonl get one story a line, {"text": ...}. Story i has seed FIRST + i; every
hundredth is a validation story. The same arguments give the same bytes, whatever the number of processes. A story that
was there before is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from .compose import story

BATCH = 2000


def stories(first: int, count: int, processes: int) -> Iterator[tuple[int, str]]:
    """Seeds and stories, in order, none of them twice."""
    seen: set[bytes] = set()
    starts = range(first, first + count, BATCH)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for batch in pool.imap(_batch, [(start, min(BATCH, first + count - start)) for start in starts]):
            for seed, text in batch:
                digest = blake2b(text.encode(), digest_size=12).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield seed, text


def write(folder: Path, count: int, first: int = 0, processes: int = 2) -> tuple[int, int]:
    """Write both files; gives the numbers of training and of validation stories."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [0, 0]
    with (folder / "train.jsonl").open("w") as train, (folder / "valid.jsonl").open("w") as valid:
        for seed, text in stories(first, count, processes):
            held_out = (seed - first) % 100 == 99
            (valid if held_out else train).write(json.dumps({"text": text}) + "\n")
            counts[held_out] += 1
    return counts[0], counts[1]


def _batch(task: tuple[int, int]) -> list[tuple[int, str]]:
    start, count = task
    return [(seed, story(seed)) for seed in range(start, start + count)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a corpus of stories.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stories", type=int, default=250_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first story")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    train, valid = write(arguments.folder, arguments.stories, arguments.first, arguments.processes)
    print(f"{arguments.folder}: {train} stories to train on, {valid} to validate with")


if __name__ == "__main__":
    main()
