"""Groups of processes that tests start: what dies in native code is started once more, and told."""

import os
import signal
from pathlib import Path

import pytest

from tests.processes import together


def crash(folder, times, by):
    """Process 1 dies by a signal at the first `times` calls."""
    if os.environ["RANK"] == "1":
        calls = len(list(Path(folder).glob("call-*")))
        Path(folder, f"call-{calls}").touch()
        if calls < times:
            os.kill(os.getpid(), by)


@pytest.mark.parametrize(("by", "name"), [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted")])
def test_a_group_that_crashed_is_started_again_and_where_it_was_is_told(by, name, tmp_path):
    with pytest.warns(RuntimeWarning, match=f"(?s)crash in a group.*{name}.*in crash"):
        assert together(crash, str(tmp_path), 1, by, said=tmp_path / "said") == [0, 0]


def test_a_group_that_crashes_again_fails(tmp_path):
    with pytest.warns(RuntimeWarning):
        assert together(crash, str(tmp_path), 2, signal.SIGSEGV, said=tmp_path / "said") == [0, -signal.SIGSEGV]
    assert len(list(tmp_path.glob("call-*"))) == 2
