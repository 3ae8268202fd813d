"""What a process does when it is asked to stop, for as long as it does something else than usual."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


@contextmanager
def handled_by(handler: Callable[..., Any] | int, *numbers: signal.Signals) -> Iterator[None]:
    """Within the context these signals do what `handler` says. Off the main thread, where nobody may say so, they do
    not."""
    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
