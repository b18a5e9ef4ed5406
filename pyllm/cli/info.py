"""`pyllm info`: what is installed and what it uses here."""

from __future__ import annotations

import typer

from pyllm.cli import options as o
from pyllm.cli.output import write, write_json


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("info")(info)


def info(json: o.Json = False) -> int:
    """Version, compiler, instruction sets and the one in use, threads, CUDA."""
    import platform

    from pyllm.device import open_device, unavailable
    from pyllm.isa import build_info

    missing = unavailable()
    facts: dict[str, object] = {**build_info(), "cuda": missing is None, "cuda_missing": missing}
    facts |= {"python": platform.python_version(), "platform": platform.platform()}
    if json:
        write_json(facts)
        return 0
    available = facts["isas_available"]
    assert isinstance(available, list)
    write(f"pyllm {facts['version']}, {facts['build_type']} build by gcc or clang {facts['compiler']}", end="\n")
    write(f"Python {facts['python']} on {facts['platform']}", end="\n")
    write(f"instruction set: {facts['isa']} (this machine runs {', '.join(available)})", end="\n")
    write(f"threads: {facts['threads']} ({facts['cores']} physical cores available)", end="\n")
    write(f"CUDA: {'yes, ' + open_device().name if missing is None else 'no: ' + missing}", end="\n")
    return 0
