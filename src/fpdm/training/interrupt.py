"""Ctrl-C and SIGTERM end the step that is running, not the process; a second Ctrl-C does."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fpdm.signals import handled_by


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
    with handled_by(interrupt, signal.SIGINT, signal.SIGTERM):
        yield interrupt
