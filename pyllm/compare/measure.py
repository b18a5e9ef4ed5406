"""Drives the engines turn by turn: for every model and dtype all cells, in rounds of A B C, A B C, ...

Each round begins with this machine's limits, because a shared machine's speed drifts. Engines that do not fit memory
together are measured in several groups, ours in each.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyllm import limits as machine_limits
from pyllm.compare import shapes
from pyllm.compare.engine import DTYPES, ENGINES, OURS, EngineInfo, Settings, Unsupported, prompts
from pyllm.compare.results import Cell, CellResult, Comparison, ModelResult, Turn
from pyllm.compare.worker import Worker, WorkerError, engine_version
from pyllm.limits import Limits
from pyllm.models import read_spec
from pyllm.spec import ModelSpec
from pyllm.system import available_memory

CELLS = {
    cell.name: cell
    for cell in (
        Cell("load", "load"),
        Cell("prefill-512", "prefill", prompt=512),
        Cell("decode", "decode"),
        Cell("decode-2048", "decode", prompt=2048),
        Cell("decode-8192", "decode", prompt=8192),
        *(Cell(f"batch-{count}", "decode", sequences=count) for count in (2, 4, 8, 16, 32)),
    )
}
QUICK_CELLS = ("load", "prefill-512", "decode", "batch-4")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 34 / 32, "int4": 18 / 32}  # of a weight, with scales of groups of 32
STORED = {"int8": "bfloat16", "int4": "bfloat16"}  # the checkpoint that quantized models are made from
WARM_STEPS = 4  # decoded before anything is timed
PROCESS_BYTES = 1 << 30  # an engine beside its weights and its cache: libraries, activations


@dataclass(frozen=True)
class Plan:
    """What to measure: names of `shapes.SHAPES`, `DTYPES`, `CELLS` and engines, and where the models are kept."""

    models: Sequence[str]
    dtypes: Sequence[str]
    cells: Sequence[str]
    peers: Sequence[str]
    threads: int
    rounds: int
    folder: Path

    def check(self, engines: Mapping[str, EngineInfo] = ENGINES) -> None:
        """Raise `ValueError` for a name that there is not."""
        for what, names, known in (
            ("models", self.models, shapes.SHAPES),
            ("dtypes", self.dtypes, DTYPES),
            ("cells", self.cells, CELLS),
            ("peers", self.peers, [name for name in engines if name != OURS]),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what}: expected some of {', '.join(known)}, got {name!r}")


def compare(
    plan: Plan,
    say: Callable[[str], None],
    *,
    engines: Mapping[str, EngineInfo] = ENGINES,
    measure_limits: Callable[[int], Limits] = machine_limits.measure,
) -> Iterator[Comparison]:
    """Measure everything in `plan`; gives the comparison so far after each cell. `say` is told of progress.

    Raises `ValueError` for unknown names. What an engine cannot do is noted in the result and stops nothing.
    """
    plan.check(engines)
    comparison = Comparison(_machine(), plan.threads, plan.rounds, time.strftime("%Y-%m-%d %H:%M"))
    for model in plan.models:
        for dtype in plan.dtypes:
            run = _Run(plan, model, dtype, say, {name: engines[name] for name in (OURS, *plan.peers)}, measure_limits)
            comparison.models.append(run.result)
            for _ in run.measure():
                yield comparison


class _Run:
    """One model at one dtype."""

    spec: ModelSpec
    settings: Settings

    def __init__(
        self,
        plan: Plan,
        model: str,
        dtype: str,
        say: Callable[[str], None],
        engines: Mapping[str, EngineInfo],
        measure_limits: Callable[[int], Limits],
    ) -> None:
        self.plan, self.model, self.dtype, self.engines = plan, model, dtype, engines
        self.say = say
        self.measure_limits = measure_limits
        self.result = ModelResult(model, dtype)
        self.forms: dict[str, Path] = {}  # the model in each engine's own format
        self.cache_value_bytes: dict[str, float] = {}

    def measure(self) -> Iterator[None]:
        """Fill `result`; comes back whenever a cell is done, and at the end."""
        stored = STORED.get(self.dtype, self.dtype)
        self._tell("preparing the model")
        folder = shapes.make(self.model, self.plan.folder / f"{self.model}-{stored}", stored)
        self.spec = read_spec(folder)
        for name in self.engines:
            self._prepare(name, folder)
        cells = [cell for cell in CELLS.values() if cell.name in self.plan.cells and self._holds(cell)]
        longest = max((self._length(cell) for cell in cells), default=1)
        tokens = max((cell.sequences * self._length(cell) for cell in cells), default=1)
        sequences = max((cell.sequences for cell in cells), default=1)
        self.settings = Settings(self.dtype, self.plan.threads, sequences, longest, tokens)
        self.result.cells = [self._cell_result(cell) for cell in cells]
        for group in groups(list(self.forms), self._engine_bytes(), available_memory()):
            yield from self._measure_group(group)
        yield

    def _prepare(self, name: str, folder: Path) -> None:
        info = self.engines[name]
        if info.missing:
            packages = ", ".join(info.missing)
            self.result.missing[name] = f"not installed ({packages}): pip install 'pyllm[compare]'"
            return
        try:
            with Worker(info, self.plan.threads) as worker:
                self.forms[name] = worker.prepare(folder, self.dtype)
            self.result.versions[name] = f"{info.distribution} {engine_version(info)}"
        except (Unsupported, WorkerError) as reason:
            self._miss(name, reason)

    def _holds(self, cell: Cell) -> bool:
        length = self._length(cell)
        if length <= self.spec.max_positions:
            return True
        self.result.skipped[cell.name] = f"{length} tokens, more than the context of {self.spec.max_positions}"
        return False

    def _measure_group(self, group: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            workers = self._load(group, stack)
            yield
            for result in self.result.cells:
                if result.cell.kind != "load" and workers:
                    self._measure_cell(result, workers)
                    yield

    # Loading: processes begin anew each round; those of the last one go on to the other cells.

    def _load(self, group: Sequence[str], stack: ExitStack) -> dict[str, Worker]:
        result = next((result for result in self.result.cells if result.cell.kind == "load"), None)
        rounds = self.plan.rounds if result is not None else 1
        alive = {name: ExitStack() for name in group}
        for scope in alive.values():
            stack.push(scope)
        workers: dict[str, Worker] = {}
        for number in range(rounds):
            self._tell(f"loading, round {number + 1} of {rounds}")
            turn = self._turn() if result is not None else None
            for name in list(alive):
                alive[name].close()
                try:
                    workers[name] = alive[name].enter_context(Worker(self.engines[name], self.plan.threads))
                    seconds = self._first_token(name, workers[name], result)
                except (Unsupported, WorkerError) as reason:
                    self._miss(name, reason)
                    alive.pop(name).close()
                    workers.pop(name, None)
                    continue
                if turn is not None:
                    turn.seconds[name] = seconds
            if result is not None and turn is not None and turn.seconds:
                result.turns.append(turn)
        return workers

    def _first_token(self, name: str, worker: Worker, result: CellResult | None) -> float:
        """Load and run a short prompt: the seconds of both, libraries being imported and files in the page cache."""
        size = _read_through(self.forms[name])
        loaded = worker.load(self.forms[name], self.settings)
        reserved = worker.call("reserve", 1, CELLS["load"].prompt + 1)
        first = worker.call("start", prompts(1, CELLS["load"].prompt, self.spec.vocab_size))
        read = (self.spec.block_weights + self.spec.vocab_size * self.spec.hidden) / self.spec.num_parameters()
        self.result.weight_bytes[name] = loaded.result["weight_bytes"] or size * read
        self.cache_value_bytes[name] = loaded.result["cache_value_bytes"]
        if result is not None:
            result.bytes[name] = size
            result.peak_memory[name] = worker.memory["peak"]
        return loaded.seconds + reserved.seconds + first.seconds

    # The other cells: all engines get ready, then take turns.

    def _measure_cell(self, result: CellResult, workers: dict[str, Worker]) -> None:
        cell = result.cell
        ids = prompts(cell.sequences, cell.prompt, self.spec.vocab_size)
        steps = self._steps(cell)
        self._tell(f"{cell.name}, getting ready")
        ready = {}
        for name, worker in workers.items():
            try:
                worker.call("reserve", cell.sequences, self._length(cell))
                first = worker.call("start", ids).result
                rows = [[token] for token in first]
                if cell.kind == "decode":
                    warm = worker.call("decode", WARM_STEPS).result[1]
                    rows = [[token, *more] for token, more in zip(first, warm, strict=True)]
            except (Unsupported, WorkerError) as reason:
                result.missing[name] = str(reason)
                continue
            ready[name] = worker
            result.greedy[name] = [token for row in rows for token in row]
            result.bytes[name] = self._bytes(cell, name)
        for number in range(self.plan.rounds):
            turn = self._turn()
            for name, worker in list(ready.items()):
                try:
                    if cell.kind == "decode":
                        worker.call("decode", 1)
                        turn.seconds[name] = worker.call("decode", steps).result[0]
                    else:
                        turn.seconds[name] = worker.call("start", ids).seconds
                except (Unsupported, WorkerError) as reason:
                    result.missing[name] = str(reason)
                    del ready[name]
            if turn.seconds:
                result.turns.append(turn)
                rates = ", ".join(f"{name} {result.tokens / s:.1f}" for name, s in turn.seconds.items())
                self._tell(f"{cell.name}, round {number + 1} of {self.plan.rounds}: {rates} tok/s")
        for name, worker in ready.items():
            result.peak_memory[name] = worker.memory["peak"]

    def _turn(self) -> Turn:
        return Turn(self.measure_limits(self.plan.threads))

    def _tell(self, text: str) -> None:
        self.say(f"{self.model} {self.dtype}: {text}")

    def _miss(self, name: str, reason: Exception) -> None:
        self.result.missing[name] = str(reason)
        self._tell(f"{name} is left out: {reason}")

    # What there is to do

    def _steps(self, cell: Cell) -> int:
        """Tokens to decode per sequence and round: about a second's worth at 20 GB/s."""
        read = BYTES[self.dtype] * self.spec.block_weights + 4 * self._cache_values() * cell.prompt * cell.sequences
        return min(64, max(8, int(20e9 / read)))

    def _length(self, cell: Cell) -> int:
        """Tokens that a sequence reaches: prompt, warm-up, and each round one untimed step and the timed ones; and room
        for one more, as a sequence that fills its context is over."""
        steps = WARM_STEPS + self.plan.rounds * (1 + self._steps(cell)) if cell.kind == "decode" else 0
        return cell.prompt + 1 + steps + 1

    def _cell_result(self, cell: Cell) -> CellResult:
        if cell.kind != "decode":
            return CellResult(cell, cell.prompt, self.spec.operations(cell.prompt))
        tokens = self._steps(cell) * cell.sequences
        return CellResult(cell, tokens, tokens * self.spec.operations(1, self._depth(cell)))

    def _bytes(self, cell: Cell, name: str) -> float:
        weights = self.result.weight_bytes[name]
        if cell.kind != "decode":
            return weights
        cache = self._cache_values() * self.cache_value_bytes[name] * self._depth(cell) * cell.sequences
        return self._steps(cell) * (weights + cache)

    def _depth(self, cell: Cell) -> int:
        """Tokens before the one that is decoded, half way through the rounds."""
        return (cell.prompt + self._length(cell)) // 2

    def _cache_values(self) -> int:
        """Numbers that the cache holds for a token: keys and values of all layers."""
        return sum(2 * block.attention.kv_heads * block.attention.head_dim for block in self.spec.blocks)

    def _engine_bytes(self) -> float:
        weights = BYTES[self.dtype] * self.spec.num_parameters()
        return 1.25 * weights + 4 * self._cache_values() * self.settings.tokens + PROCESS_BYTES


def groups(names: Sequence[str], each: float, room: float) -> list[list[str]]:
    """Engines that fit memory together, at `each` bytes apiece: ours in every group, with at least one other."""
    ours, peers = [name for name in names if name == OURS], [name for name in names if name != OURS]
    count = max(1, int(room / each) - len(ours))
    chunks = [peers[begin : begin + count] for begin in range(0, len(peers), count)] or [[]]
    return [group for chunk in chunks if (group := [*ours, *chunk])]


def _read_through(path: Path) -> int:
    """Read all weights at `path` once, so that they are in the page cache; their bytes."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    buffer = bytearray(1 << 24)
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return sum(file.stat().st_size for file in files)


def _machine() -> str:
    """Name of the processor and number of its cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
