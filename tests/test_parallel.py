"""The thread team under stress: tiny runs by the thousand, several Python threads at once, forks in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pyllm.ops import Ops

COUNTS = [1, 2, 3, 8]


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(9, 61)).astype("float32"), rng.normal(size=(517, 61)).astype("float32")


def expected(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    ops = Ops(1)
    return ops.matmul(x, ops.pack(w))


@pytest.mark.parametrize("threads", COUNTS)
def test_many_small_runs_give_the_same_bits(threads: int):
    x, w = problem()
    right = expected(x, w)
    ops = Ops(threads)
    packed = ops.pack(w)
    out = np.empty_like(right)
    for _ in range(2000):
        out.fill(np.nan)
        ops.matmul(x, packed, out=out)
        assert np.array_equal(out, right)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**40])
def test_thread_counts_out_of_range_are_refused(threads: int):
    with pytest.raises((ValueError, TypeError)):
        Ops(threads)


@pytest.mark.parametrize("threads", COUNTS)
def test_python_threads_may_share_one_context(threads: int):
    ops = Ops(threads)
    failures: list[str] = []

    def work(seed: int) -> None:
        x, w = problem(seed)
        right = expected(x, w)
        packed = ops.pack(w)
        for _ in range(200):
            if not np.array_equal(ops.matmul(x, packed), right):
                failures.append(f"thread {seed} got another's result")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not failures


def test_contexts_come_and_go():
    x, w = problem()
    right = expected(x, w)
    for _ in range(50):
        ops = Ops(3)
        assert np.array_equal(ops.matmul(x, ops.pack(w)), right)


def wait_for(pid: int, seconds: int = 30) -> int:
    """Exit code of a child, which is killed when it takes longer."""
    alarm = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    alarm.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        alarm.cancel()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [2, 8])
def test_a_forked_child_computes_too(threads: int):
    x, w = problem()
    ops = Ops(threads)
    packed = ops.pack(w)
    right = ops.matmul(x, packed)
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            good = all(np.array_equal(ops.matmul(x, packed), right) for _ in range(50))
            os._exit(0 if good else 1)
        for _ in range(50):
            assert np.array_equal(ops.matmul(x, packed), right)
        assert wait_for(pid) == 0


def test_a_graph_is_replayed_only_where_it_was_recorded() -> None:
    one, two = Ops(threads=1), Ops(threads=2)
    x, index = np.ones((2, 4), np.float32), np.zeros(1, np.int32)
    one.begin_recording()
    one.gather(x, index)
    graph = one.end_recording()
    one.replay(graph)
    with pytest.raises(ValueError, match="recorded on these ops"):
        two.replay(graph)


def test_threads_that_cannot_start_are_an_error_not_a_hang() -> None:
    code = """
import resource
import numpy as np
from pyllm.ops import Ops
ops, x = Ops(threads=1024), np.ones((4096, 256), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
for _ in range(2):
    try:
        ops.gather(x, np.zeros(4096, np.int32))
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("could not start 1024 threads" in line and "--threads" in line for line in lines)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_forked_while_another_thread_computes(threads: int) -> None:
    x, w = problem()
    ops = Ops(threads)
    packed = ops.pack(w)
    right = ops.matmul(x, packed)
    stop = threading.Event()
    many = np.ones((4096, 61), np.float32)

    def loop() -> None:
        while not stop.is_set():
            ops.matmul(many, packed)

    other = threading.Thread(target=loop)
    other.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if np.array_equal(ops.matmul(x, packed), right) else 1)
            assert wait_for(pid) == 0
    finally:
        stop.set()
        other.join()


def in_thread(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


def test_a_recording_belongs_to_the_thread_that_began_it() -> None:
    ops, x, index = Ops(threads=1), np.ones((2, 4), np.float32), np.zeros(1, np.int32)
    ops.begin_recording()
    for call in (lambda: ops.gather(x, index), ops.begin_recording, ops.end_recording, lambda: ops.pack(x)):
        error = in_thread(call)
        assert isinstance(error, ValueError)
        assert "another thread is recording" in str(error)
    ops.gather(x, index)
    assert len(ops.end_recording()) == 1
    assert in_thread(lambda: ops.gather(x, index)) is None
