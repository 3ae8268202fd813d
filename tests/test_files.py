"""Files that are there whole or not at all, and folders that one command works in."""

import os
import subprocess
import sys
import time

import pytest

from fpdm.files import hold, is_free, wait_for, write_aside

HOLDER = """
import sys, time
from pathlib import Path
from fpdm.files import hold, wait_for
kept = {"hold": hold, "wait_for": wait_for}[sys.argv[1]](Path(sys.argv[2]))
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


def holding(kind, path, seconds):
    """Another process that holds a folder or file for so many seconds; it holds it by now."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, kind, str(path), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_command_in_a_folder_is_told(tmp_path):
    with holding("hold", tmp_path, 60) as other:
        with pytest.raises(ValueError, match=f"another command is at work in {tmp_path}: let it end, or choose"):
            hold(tmp_path)
        other.kill()
    with hold(tmp_path), hold(tmp_path):  # a dead process holds nothing, and one process may hold a folder twice
        pass


def test_a_file_that_another_process_makes_is_waited_for(tmp_path):
    with holding("wait_for", tmp_path / "file", 1.5):
        started = time.monotonic()
        with wait_for(tmp_path / "file"):
            assert time.monotonic() - started > 0.5


def test_a_folder_is_free_if_it_holds_nothing_but_hidden_files(tmp_path):
    assert is_free(tmp_path / "none")
    (tmp_path / ".lock").touch()
    assert is_free(tmp_path)
    assert not is_free(tmp_path / ".lock")
    (tmp_path / "file").touch()
    assert not is_free(tmp_path)


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def torn(aside):
        aside.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(path, torn)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path, program = tmp_path / "file", (
        "import sys; from pathlib import Path; from fpdm.files import write_aside\n"
        "for i in range(200): write_aside(Path(sys.argv[1]), lambda aside: aside.write_text(sys.argv[2] * 5000))"
    )  # fmt: skip
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_written_can_be_read_as_other_files_can(tmp_path):
    (tmp_path / "plain").touch()

    def private(aside):
        aside.touch(mode=0o600)

    write_aside(tmp_path / "file", private)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
