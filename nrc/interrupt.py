"""A clean stop on Ctrl-C: finish the step under way, save, then leave."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(what: str) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop after `what`; a second interrupts at once.

    Yields a function that says whether a stop was requested. Outside the main thread, where Python delivers no signals,
    nothing is ever requested.
    """
    requested = False

    def request(_signal: int, _frame: Any) -> None:
        nonlocal requested
        requested = True
        for number, handler in previous.items():
            signal.signal(number, handler)
        print(f"\nstopping after this {what}; Ctrl-C again to abort", file=sys.stderr)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
