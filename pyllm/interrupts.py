"""Ctrl-C while an engine works: held back where half a change would be left behind."""

from __future__ import annotations

import signal
import threading
from threading import get_ident
from types import FrameType


class Interrupts:
    """Ctrl-C while requests are in the engine: inside ``with interrupts``, where bookkeeping must not stop halfway, it
    waits for the end of the block; a second one comes through at once.

    Until `remove` its handler stands where Python's own did, in the main thread: other handlers are their owner's
    business. Outside the blocks it does what Python's own does.
    """

    def __init__(self) -> None:
        self._pending = self._held = False
        self._before = signal.getsignal(signal.SIGINT)
        replaceable = self._before is signal.default_int_handler or isinstance(
            getattr(self._before, "__self__", None), Interrupts
        )
        self._thread = None
        if replaceable and threading.current_thread() is threading.main_thread():
            self._thread = threading.get_ident()
            signal.signal(signal.SIGINT, self._note)

    def remove(self) -> None:
        """Put the handler back that was there before."""
        if self._thread == threading.get_ident() and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self._before)

    def __enter__(self) -> None:
        """Hold Ctrl-C back."""
        self._held = self._thread == get_ident()

    def __exit__(self, *_: object) -> None:
        """Raise `KeyboardInterrupt` where Ctrl-C came meanwhile."""
        self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending or not self._held:
            raise KeyboardInterrupt
        self._pending = True
