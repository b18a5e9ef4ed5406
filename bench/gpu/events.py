"""A plugin of pytest that tells of each test as it begins and as it ends, a JSON line each in the file that
GPU_CHECK_EVENTS names: it stays when the process hangs or crashes."""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_collection_finish(session: Any) -> None:
    _tell(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(begun=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:  # a fixture that fails or skips is the test's result
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else crash.message if crash else None
        _tell(ended=report.nodeid, outcome=report.outcome, reason=reason or str(report.longrepr or ""))


def _tell(**event: Any) -> None:
    with open(os.environ["GPU_CHECK_EVENTS"], "a") as events:
        events.write(json.dumps(event) + "\n")
