"""Writes pairs that an encoder-decoder can learn from in minutes: numbers up to 9999 and their names in English.

python number_names.py numbers.jsonl unseen.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def name_of(number: int) -> str:
    """In words."""
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {name_of(number % size)}" if number % size else ""
            return f"{name_of(number // size)} {word}{rest}"
    if number < len(SMALL):
        return SMALL[number]
    tens = TENS[number // 10 - 2]
    return f"{tens}-{SMALL[number % 10]}" if number % 10 else tens


UNSEEN = 500  # numbers that are kept from training


def write(path: Path, unseen: Path) -> None:
    """All of them, in random order; digits stand apart, so that each is a token."""
    numbers = list(range(10000))
    random.Random(0).shuffle(numbers)
    lines = [json.dumps({"source": " ".join(str(number)), "target": name_of(number)}) + "\n" for number in numbers]
    path.write_text("".join(lines[UNSEEN:]))
    unseen.write_text("".join(lines[:UNSEEN]))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
