"""Everything that a GPU has to show, in one command of at most 8 minutes:

    python bench/gpu_check.py OUT

Steps run one after the other, the cheapest and most telling first, each in a process of its own with a deadline, and
all within 8 minutes. They leave OUT/<step>.json and, with all that they said, OUT/<step>.log; what fails, hangs or is
missing is told there and stops no other step, nor does a figure that fails the figures after it; at its deadline a step
ends with all processes that it started, and what it had found stays. A table of at most 40 lines comes last.

Each kernel is tested in processes of its own: what hangs or breaks the GPU for its process is named with its sizes, and
so is the first wrong element of what is wrong. Where a kernel of Hopper fails, the steps after that run on those of
Ampere, with PYLLM_WGMMA=off, as all do where that was set before.

``--only STEP,...`` runs some steps, ``--emulated`` all on tiny sizes on the emulated GPU of the tests, to check the
program itself.

Figures are fractions of roofs of the same run: bytes over the read stream, operations over torch's product of 8192^3
where torch is installed with CUDA. Weights and caches lie in as many copies as the L2 cannot hold.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

from gpu import correct, end_to_end, machine, roofs, speed  # noqa: E402
from gpu.process import Check, Row, Step, python, run_apart, run_here  # noqa: E402
from gpu.report import table  # noqa: E402

LIMIT = 465  # seconds of all steps together, whatever their deadlines
STEPS = {
    "facts": Step(machine.facts, 15),
    "build": Step(machine.build, 200),
    "roofs": Step(roofs.roofs, 30),
    "kernels": Step(correct.kernels, 100),
    "models": Step(correct.models, 100),
    "decode": Step(speed.decode, 30),
    "products": Step(speed.products, 30),
    "attention": Step(speed.attention, 20),
    "gpt2": Step(end_to_end.model("gpt2"), 30),
    "llama-1b": Step(end_to_end.model("llama-1b"), 40),
    "llama-8b": Step(end_to_end.model("llama-8b"), 50),
    "transformers": Step(end_to_end.transformers, 40),
    "sanitizer": Step(correct.sanitizer, 60),
}


def run(check: Check, name: str, left: float) -> Row:
    """A step in a process of its own, of at most the `left` seconds; what it found, or what became of it."""
    seconds = min(STEPS[name].seconds * check.patience, left)
    command = python(str(Path(__file__).resolve()), str(check.out.resolve()), "--step", name, "--seconds", str(seconds))
    found = run_apart([*command, "--emulated"] if check.emulated else command, check, name, seconds)
    if name == "kernels" and correct.hopper_failed(found):
        os.environ["PYLLM_WGMMA"] = "off"  # which the steps after it inherit
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0 where all did what they should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for a JSON file of each step")
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU of the tests, on tiny sizes")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    check = Check(given.out, given.emulated, given.seconds)
    if given.tiny:
        correct.tiny(given.emulated)
        return 0
    if given.step is not None:
        run_here(STEPS[given.step], check, given.step)
        return 0
    names = given.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + LIMIT * check.patience
    results = {name: run(check, name, max(ends - time.monotonic(), 0)) for name in names}
    note = "PYLLM_WGMMA=off: the steps after kernels, or all where it was set before, went without Hopper's own"
    lines = table(results, [note] if os.environ.get("PYLLM_WGMMA") == "off" else [])
    print("\n".join(lines))
    return 0 if all(found["state"] == "done" for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
