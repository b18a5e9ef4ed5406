"""Which instruction-set level the kernels run at, and how many threads they use by default.

Every kernel is compiled for several levels; the best one that the CPU and the operating system support is used. The
environment variable PYLLM_ISA, read when this module is imported, or :func:`set_isa` choose another; PYLLM_THREADS
chooses the
default number of threads. A choice that cannot be had is a ``ValueError``.
"""

from __future__ import annotations

import os

from pyllm import _cpu, system

MAX_THREADS = 1024


def available_isas() -> list[str]:
    """Names of the levels that this machine can run, best first."""
    return list(_cpu.available_isas())


def active_isa() -> str:
    """Name of the level in use."""
    return str(_cpu.active_isa())


def set_isa(name: str) -> None:
    """Use level `name` from now on; ``ValueError`` where it is unknown or this machine cannot run it.

    Graphs recorded before keep the level they were recorded at.
    """
    _cpu.set_isa(name)


def default_threads() -> int:
    """Threads for who names none: PYLLM_THREADS, else OMP_NUM_THREADS, else the physical cores this process may use."""
    asked = os.environ.get("PYLLM_THREADS")
    if asked:
        return _thread_count(asked)
    omp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list names one number per nesting level
    cores = system.available_cores()
    return min(int(omp), MAX_THREADS) if omp.isdecimal() and int(omp) > 0 else cores


def build_info() -> dict[str, object]:
    """What this build is and what it uses here: for bug reports and ``pyllm info``."""
    from pyllm import __version__

    return {
        "version": __version__,
        "compiler": _cpu.COMPILER,
        "build_type": _cpu.BUILD_TYPE,
        "isa_levels": list(_cpu.isa_levels()),
        "isas_available": available_isas(),
        "isa": active_isa(),
        "cores": system.available_cores(),
        "threads": default_threads(),
    }


def _thread_count(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise ValueError(
        f"PYLLM_THREADS: expected an integer from 1 to {MAX_THREADS}, got {text!r}; unset it to use all cores"
    )


def _apply_environment() -> None:
    asked = os.environ.get("PYLLM_ISA")
    if not asked:
        return
    try:
        set_isa(asked)
    except ValueError as error:
        raise ValueError(f"PYLLM_ISA: {error}; unset it to use the best") from None


_apply_environment()
