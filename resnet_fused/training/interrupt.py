"""Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["interrupt_later"]


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Inside, Ctrl-C waits; it raises KeyboardInterrupt (or does what the caller's handler does) at the end.

    Only Python's main thread has signals, and a handler that Python did not install cannot be called: then
    nothing changes.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
