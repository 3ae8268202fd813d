"""Commands that several processes carry out together."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End this process without taking the process group down, which can wait for ever (PyTorch 2.13 with gloo): the
    group's threads need the interpreter to free their last tensors, and the interpreter waits for the threads. All that
    the command had to write is written by now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Within the context SIGTERM does what Ctrl-C does. Off the main thread, where nobody may say so, it does not."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
