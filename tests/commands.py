"""What tests of commands share: a refusal, waiting, and the contents of a folder."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fpdm.cli.main import main


def refused(words: Sequence[object], captured: pytest.CaptureFixture) -> str:
    """What a command says that is refused with exit status 2, without a traceback, in whichever process."""
    captured.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as exit:
        status = exit.code
    said = captured.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    return said


def refusal(captured: pytest.CaptureFixture, words: Sequence[object]) -> str:
    """The message of a command that is refused, which is one line."""
    said = refused(words, captured)
    (message,) = [line for line in said.splitlines() if line.startswith(f"fpdm {words[0]}: ")]
    return message


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
