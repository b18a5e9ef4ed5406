"""Writes pairs that an encoder-decoder can learn from in minutes: numbers up to 9999 and their names in English.

python number_names.py numbers.jsonl
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


def write(path: Path) -> None:
    """All of them, in random order; digits stand apart, so that each is a token."""
    numbers = list(range(10000))
    random.Random(0).shuffle(numbers)
    lines = ({"source": " ".join(str(number)), "target": name_of(number)} for number in numbers)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
