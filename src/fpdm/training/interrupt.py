"""Ctrl-C and SIGTERM end the step that is running, not the process; a second Ctrl-C does."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Set once the process has been asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step; once more stops at once.", file=sys.stderr, flush=True)


@contextmanager
def deferred_interrupts() -> Iterator[Interrupt]:
    """Within the context, interrupts are noted instead of raised. Only the main thread can do this."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
