"""Real processes without the seconds that imports take: forked from a server that has imported all that training needs.

They are processes as any others: they can be killed, and form process groups.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # where the processes find what they are to call, however pytest was started
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "diffusers", "fpdm.training.loop", "fpdm.pipeline", "fpdm.cli.main"])


def start(
    function: Callable[..., Any],
    *arguments: Any,
    said: Path,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    leads: bool = False,
) -> BaseProcess:
    """Call `function` in a process of its own, which outlives no test session; its output goes to `said`. One that
    `leads` may have processes of its own, in a group that it leads, as a shell's commands do."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("FPDM_")}  # since the server's
    given = (function, arguments, str(said), rank, ranks, port, leads, environment)
    process = CONTEXT.Process(target=_call, args=given, daemon=not leads)
    process.start()
    return process


class Program:
    """`fpdm WORDS` in a process of its own, to be used as a Popen is."""

    def __init__(self, words: Sequence[object], said: Path, leads: bool = False):
        self.process = start(command, [str(word) for word in words], said=said, leads=leads)
        self.pid, self.said, self.leads = self.process.pid, said, leads

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        if self.leads:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.kill()
        self.process.join()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 60) -> int | None:
        self.process.join(timeout)
        assert self.returncode is not None, "it goes on"
        return self.returncode

    def ended(self, timeout: float = 60) -> str:
        """What it said, once it is done."""
        self.wait(timeout)
        return self.said.read_text()


def done(words: Sequence[object], said: Path) -> None:
    """Wait for `fpdm WORDS`, which is to end well."""
    with Program(words, said) as program:
        assert program.wait(120) == 0, said.read_text()


def together(
    function: Callable[..., Any], *arguments: Any, said: Path, ranks: int = 2, seconds: float = 240
) -> list[int]:
    """Call `function` in processes that form a group; their exit statuses.

    If one crashes in native code, all are started once more, as users would. gloo, by which processes on CPUs speak to
    each other, corrupts its memory now and then: in one of 66 groups that shared parameters beside two busy processes,
    in the list of sends that it expects (`gloo::transport::Context::Mutator`, torch 2.13). The warning tells all of it.
    """
    statuses = _together(function, arguments, said, ranks, seconds)
    if {-signal.SIGSEGV, -signal.SIGABRT} & {*statuses}:
        traces = "".join(said.with_suffix(f".{rank}").read_text() for rank in range(ranks))
        warnings.warn(f"crash in a group of processes, {statuses}: {traces}", RuntimeWarning, stacklevel=2)
        statuses = _together(function, arguments, said, ranks, seconds)
    return statuses


def _together(
    function: Callable[..., Any], arguments: tuple[Any, ...], said: Path, ranks: int, seconds: float
) -> list[int]:
    port = free_port()
    processes = [start(function, *arguments, said=said.with_suffix(f".{rank}"), rank=rank, ranks=ranks, port=port)
                 for rank in range(ranks)]  # fmt: skip
    for process in processes:
        process.join(seconds)
        process.kill()  # what is done does not mind
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    said: str,
    rank: int,
    ranks: int,
    port: int,
    leads: bool,
    environment: dict[str, str],
) -> None:
    if leads:
        os.setsid()
    for name in [name for name in os.environ if name.startswith("FPDM_")]:
        del os.environ[name]
    os.environ.update(environment)
    with open(said, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.enable()  # a crash in native code says where it was
    if ranks > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="localhost")
    sys.exit(function(*arguments))


def command(words: list[str]) -> int:
    """`fpdm WORDS`, in this process."""
    import signal

    import torch

    from fpdm.cli.main import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a fork server ignores
    return main(words)
