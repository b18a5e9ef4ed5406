"""Weak symbols of kernel objects: what `nm` must not find.

All ISA levels are compiled from the same sources. A weak symbol (an inline function or template instance that was not
inlined) which has the same name at two levels is kept once by the linker, perhaps compiled for instructions that this
machine does not have. Run as a script on the object files of a build folder: ``python tests/symbols.py
BUILD_FOLDER``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
SHARED = re.compile(r"^[0-9a-f]+ ([VvWwu]) (\S+)$")  # weak objects, weak functions, unique globals


def shared_symbols(nm_output: str) -> list[str]:
    """Mangled names that the linker may take from any object that defines them."""
    return [match[2] for line in nm_output.splitlines() if (match := SHARED.match(line))]


def outside(symbols: list[str], level: str) -> list[str]:
    """Those that do not carry the namespace of `level`."""
    name = f"isa_{level}"
    mangled = f"{len(name)}{name}"
    return [s for s in symbols if not re.search(rf"(?<!\d){mangled}(?![a-z_0-9]*_bf16)", s)]


def nm(path: Path) -> str:
    """Defined symbols of an object file."""
    return subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout


def check_objects(build: Path) -> tuple[int, list[str]]:
    """How many kernel objects were looked at under a build folder, and what was wrong with them."""
    problems, count = [], 0
    for level in LEVELS:
        for path in sorted(build.rglob(f"pyllm_{level}.dir/**/*.o")):
            count += 1
            problems += [f"{level}/{path.name}: {s}" for s in outside(shared_symbols(nm(path)), level)]
    return count, problems


def main() -> int:
    """Check a build folder; 1 where something is wrong, and where there is nothing to check."""
    count, problems = check_objects(Path(sys.argv[1]))
    for problem in problems:
        print(f"weak symbol outside its level's namespace: {problem}")
    print(f"{count} kernel objects, {len(problems)} problems")
    return int(bool(problems) or count == 0)


if __name__ == "__main__":
    sys.exit(main())
