"""Whether the models that ours are compared with live are at hand: what the extra `oracle` installs."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers")


def missing(*more: str) -> str | None:
    """Why live comparisons, with `more` packages, cannot run here; None where they can.

    With PYLLM_REQUIRE_ORACLE=1 that is a failure.
    """
    lacking = [name for name in (*PACKAGES, *more) if not _installed(name)]
    if not lacking:
        return None
    reason = f"the live comparison needs the oracle extra: {', '.join(lacking)}"
    if os.environ.get("PYLLM_REQUIRE_ORACLE") == "1":
        raise RuntimeError(f"{reason}, and PYLLM_REQUIRE_ORACLE=1: install it, or unset the variable")
    return reason


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
