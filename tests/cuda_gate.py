"""What the CUDA compiler made of each kernel: registers, spills, and instructions that must or must not be there.

``python tests/cuda_gate.py`` compiles every ``csrc/cuda/*.cu`` for sm_80 and sm_90a, prints a table and ends with 1 if
a rule below is broken. It needs nvcc, and cuobjdump with nvdisasm (CUDA's own, or the wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm); no GPU.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
# The compiler serialised wgmma, or ignored setmaxnreg: correct and slow.
SLOW_WARNINGS = re.compile(r"C7508|C751[0-5]|(wgmma|setmaxnreg).*(serialized|ignored)")
WGMMA = ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS", "ACQBULK", "PREEXIT")
FORBIDDEN = ("LDL", "STL")  # local memory: an array that is indexed at run time, or a spill
SECONDS = 10  # of CPU time that compiling a file for an architecture may take
INSTRUCTION_BYTES, MOST_KB = 16, 96  # a kernel's code; the cache of instructions that a multiprocessor has holds 128 KB
# Loads, stores, atomics and copies of global memory, or of a space that is not known.
REACHES_MEMORY = re.compile(r"LDG(?!DEPBAR)|STG|LD$|ST$|ATOM$|ATOMG|RED|UTMALDG|UTMASTG|UBLKCP")


@dataclass(frozen=True)
class Rule:
    """What holds for the kernels whose name contains `name`; `hopper` instructions on sm_90a only.

    `registers` is the most that a thread may have, or with `exact` (on sm_90a) what it has to have. `early`
    instructions may reach memory before the wait for earlier kernels: they bring weights, which never change.
    """

    name: str
    registers: int
    required: tuple[str, ...] = ()
    hopper: tuple[str, ...] = ("ACQBULK", "PREEXIT")  # griddepcontrol.wait and .launch_dependents
    exact: bool = False
    early: tuple[str, ...] = ()


# Two blocks of the decode matmul, of two launches that overlap, share a multiprocessor and its 64 Ki registers; 112
# leave room for blocks of up to 288 threads. A block of decode attention has 128 threads, so any number fits beside.
# The kernels of sampling have blocks of 1,024 threads, the other small ones of 256: 64 each is what a block may have.
RULES = (
    Rule("skinny_matmul_kernel", 112, ("HMMA", "LDSM", "LDGSTS"), early=("LDGSTS",)),
    Rule("split_matmul_kernel", 112, ("HMMA", "LDSM", "LDGSTS", "ATOMG"), early=("LDGSTS",)),
    # 168 registers of 384 threads are all that a block can start with. Its three warpgroups then share them out anew,
    # to 40, 232 and 232: with fewer at the start there would not be as many, and the last one would wait for ever.
    Rule("wgmma_matmul_kernel", 168, (), WGMMA, exact=True),
    Rule("wgmma_attention_kernel", 168, (), WGMMA, exact=True),
    Rule("mma_matmul_kernel", 255, ("HMMA", "LDSM", "LDGSTS")),
    Rule("plain_matmul_kernel", 128, ("FFMA",)),
    Rule("plain_attention_kernel", 128, ("FFMA",)),
    Rule("split_attention_kernel", 112, ("HMMA", "LDSM", "LDGSTS")),
    Rule("prompt_attention_kernel", 255, ("HMMA", "LDSM", "LDGSTS")),
    Rule("norm_kernel", 64),
    Rule("activation_kernel", 64),
    Rule("axpby_kernel", 64),
    Rule("embedding_kernel", 64),
    Rule("gather_columns_kernel", 64),
    Rule("rope_angles_kernel", 64),
    Rule("rope_kernel", 64),
    Rule("qkv_write_kernel", 64),
    Rule("kv_write_kernel", 64),
    Rule("advance_kernel", 64),
    Rule("read_probe_kernel", 64, ("LDG.128",)),
    Rule("empty_probe_kernel", 64),
    Rule("sample_kernel", 64, ("ATOMS",)),
    Rule("logprobs_kernel", 64, ("ATOMS",)),
)


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: ``LDG``, ``.E.128`` and ``R4, [R2]``."""

    address: int
    name: str
    modifiers: str
    operands: str
    guarded: bool = False  # by a predicate

    def written(self) -> range:
        """The registers that it writes, as far as the first of them and the width tell."""
        match = re.match(r"(?:U?PT?\d*, *)*R(\d+)\b", self.operands)
        if match is None or "SETP" in self.name:
            return range(0)
        width = 4 if ".128" in self.modifiers or ".x4" in self.modifiers else 2 if ".64" in self.modifiers else 1
        return range(int(match[1]), int(match[1]) + width * (2 if "WIDE" in self.modifiers else 1))


Groups = tuple[tuple[frozenset[int], frozenset[int]], ...]


@dataclass
class Kernel:
    """One compiled kernel."""

    name: str
    registers: int = 0
    spilled: int = 0  # bytes stored and loaded
    stack: int = 0  # bytes
    code: list[Instruction] = field(default_factory=list)

    @property
    def instructions(self) -> set[str]:
        """Names of its instructions, and of those of 16 bytes also as ``LDG.128``."""
        return {i.name for i in self.code} | {f"{i.name}.128" for i in self.code if ".128" in i.modifiers}


def read_report(text: str) -> dict[str, Kernel]:
    """Kernels of ptxas -v, by mangled name."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels[match[1]] = Kernel(match[1])
        elif kernel and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            kernel.stack, kernel.spilled = int(match[1]), int(match[2]) + int(match[3])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
    return kernels


def read_sass(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each function of a disassembly."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            code = functions.setdefault(match[1], [])
        elif match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_]*)([.\w]*)([^;]*)", line):
            code.append(Instruction(int(match[1], 16), match[3], match[4], match[5].strip(), match[2] is not None))
    return functions


def before_wait(code: list[Instruction]) -> set[str]:
    """What reaches memory before the kernel waits for earlier ones."""
    waits = [i.address for i in code if i.name == "ACQBULK"]
    return {i.name for i in code if waits and i.address < waits[0] and REACHES_MEMORY.match(i.name)}


def touched(code: list[Instruction]) -> list[Instruction]:
    """Instructions that write registers of products of wgmma that are under way, or read their sums, on any path."""
    found: dict[int, Instruction] = {}
    places = {i.address: place for place, i in enumerate(code)}
    # Groups of products: their sums' registers and their operands'. The last is not closed yet.
    nothing: Groups = ((frozenset(), frozenset()),)
    paths: list[tuple[int, Groups]] = [(0, nothing)]
    seen = set(paths)
    while paths:
        begin, groups = paths.pop()
        for i in code[begin:]:
            if i.name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", i.operands)):
                path = (places[int(target[1], 16)], groups)
                if path not in seen:
                    seen.add(path)
                    paths.append(path)
            if i.name in ("BRA", "EXIT") and not i.guarded:
                break
            if i.name == "HGMMA":
                sums, rows = groups[-1]
                first, *operands = (int(r) for r in re.findall(r"\bR(\d+)\b", i.operands))
                sums |= set(range(first, first + int(i.modifiers.split("x")[1]) // 2))
                if not re.match(r"R\d+, gdesc", i.operands):
                    rows |= set(range(operands[0], operands[0] + 4))
                groups = (*groups[:-1], (sums, rows), *(nothing if "gsb0" in i.operands else ()))
            elif i.name == "WARPGROUP" and "DEPBAR" in i.modifiers:
                groups = groups[max(len(groups) - 1 - int(i.operands.split("0x")[1], 16), 0) :]
            elif groups != nothing:
                under_way = frozenset[int]().union(*(sums for sums, _ in groups))
                busy = under_way.union(*(rows for _, rows in groups))
                read = {int(r) for r in re.findall(r"\bR(\d+)\b", i.operands)} - set(i.written())
                if busy.intersection(i.written()) or under_way & read:
                    found[i.address] = i
    return list(found.values())


def violations(kernel: Kernel, architecture: str) -> list[str]:
    """What is wrong with a kernel."""
    rule = next((r for r in RULES if r.name in kernel.name), None)
    if rule is None:
        return ["has no rule in RULES (tests/cuda_gate.py): give it one"]
    found = []
    if kernel.spilled or kernel.stack:
        found.append(f"spills {kernel.spilled} bytes, stack of {kernel.stack}: neither may be")
    if rule.exact and architecture.startswith("sm_90") and kernel.registers != rule.registers:
        found.append(f"{kernel.registers} registers, exactly {rule.registers} have to be")
    elif kernel.registers > rule.registers:
        found.append(f"{kernel.registers} registers, at most {rule.registers} may be")
    if len(kernel.code) * INSTRUCTION_BYTES > MOST_KB * 1024:
        found.append(f"{-(-len(kernel.code) * INSTRUCTION_BYTES // 1024)} KB of code, at most {MOST_KB} may be")
    required = rule.required + (rule.hopper if architecture.startswith("sm_90") else ())
    found += [f"no {word}" for word in required if word not in kernel.instructions]
    found += [f"has {word}" for word in FORBIDDEN if word in kernel.instructions]
    products = [place for place, i in enumerate(kernel.code) if i.name == "HGMMA"]
    if products and any(
        i.name == "MEMBAR" and "CTA" not in i.modifiers for i in kernel.code[products[0] : products[-1]]
    ):
        found.append("MEMBAR between products: a fence beyond the block each time")
    early = sorted(before_wait(kernel.code) - set(rule.early))
    found += [f"{word} before the wait for earlier kernels" for word in early]
    found += [
        f"{i.name} {i.operands} at {i.address:x} meets registers of a product under way" for i in touched(kernel.code)
    ]
    return found


def tool(name: str) -> str:
    """Path of a CUDA tool: on PATH, in /usr/local/cuda, or from its wheel."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    for folder in (*os.environ["PATH"].split(":"), "/usr/local/cuda/bin", *map(str, sorted(wheels.glob("*/bin")))):
        if path := shutil.which(name, path=folder):
            return path
    raise SystemExit(
        f"{name} is not installed; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or CUDA's toolkit"
    )


def compile_kernels(source: Path, architecture: str, folder: Path) -> tuple[dict[str, Kernel], list[str]]:
    """Kernels of one file, and what is wrong with its compilation: warnings, and that it takes too long."""
    compiled = folder / f"{source.stem}.{architecture}.o"
    compiler = os.environ.get("CUDACXX") or tool("nvcc")
    options = [
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-I{ROOT / 'csrc'}",
        "-DPYLLM_WGMMA",
        f"-gencode={ARCHITECTURES[architecture]}",
        "-Xptxas",
        "-v",
    ]
    command = [compiler, *options, "-Xcompiler", "-Wall,-Wextra", "-c", "-o", str(compiled), str(source)]
    before = children_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    report, took = done.stdout + done.stderr, children_seconds() - before
    if done.returncode:
        raise SystemExit(f"{source.name} does not compile for {architecture}:\n{report}")
    kernels = read_report(report)
    disassembler = tool("nvdisasm")
    environment = {**os.environ, "PATH": f"{Path(disassembler).parent}:{os.environ['PATH']}"}
    sass = subprocess.run(
        [tool("cuobjdump"), "-sass", str(compiled)], capture_output=True, text=True, check=True, env=environment
    )
    for name, code in read_sass(sass.stdout).items():
        if name in kernels:
            kernels[name].code = code
    problems = [line for line in report.splitlines() if "warning" in line.lower() or SLOW_WARNINGS.search(line)]
    if took > SECONDS:
        problems.append(f"took {took:.1f} s of CPU time to compile, at most {SECONDS} may be: split the file")
    return kernels, problems


def children_seconds() -> float:
    """CPU time of the processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def short(kernel: Kernel) -> str:
    """The rule's name and the template arguments, as mangled."""
    rule = next((r.name for r in RULES if r.name in kernel.name), kernel.name)
    match = re.search(rf"{rule}(I\w+?E)v", kernel.name)
    return rule + (f"<{match[1][1:-1]}>" if match else "")


def main() -> int:
    """Compile, print the table, and say what is wrong."""
    problems, count = [], 0
    print(f"{'kernel':44} {'for':8} {'registers':>9} {'spilled':>8} {'KB':>4}")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for architecture in ARCHITECTURES:
                kernels, wrong = compile_kernels(source, architecture, Path(folder))
                problems += [f"{source.name} for {architecture}: {what}" for what in wrong]
                for kernel in kernels.values():
                    count += 1
                    size = len(kernel.code) * INSTRUCTION_BYTES / 1024
                    print(f"{short(kernel):44} {architecture:8} {kernel.registers:9} {kernel.spilled:8} {size:4.0f}")
                    problems += [
                        f"{short(kernel)} for {architecture}: {what}" for what in violations(kernel, architecture)
                    ]
    print(*problems, f"{count} kernels, {len(problems)} problems", sep="\n")
    return int(bool(problems) or not count)


if __name__ == "__main__":
    sys.exit(main())
