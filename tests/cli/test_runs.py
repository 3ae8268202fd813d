"""`fpdm runs`: how every run stands, those that are training not disturbed."""

import os
import shutil
import signal

import pytest

from fpdm.cli.main import main
from fpdm.cli.runs import ago
from fpdm.training.listing import standings
from fpdm.training.loop import Trainer
from tests.commands import refusal, wait_for
from tests.processes import command, start
from tests.training.runs import interrupt_at, log_of, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs in every state that no process is needed for."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(tiny(holdout=20, validate_every=10), folder / "finished").run()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(tiny(), folder / "stopped").run()
    Trainer(tiny(), folder / "new")
    shutil.copytree(folder / "finished", folder / "damaged")
    (folder / "damaged/config.json").write_text('{"optimizer": {"ste')
    shutil.copytree(folder / "finished", folder / "empty-config")
    (folder / "empty-config/config.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "file.txt").write_text("no run")
    return folder


def rows(capsys, folder):
    """The table: name -> cells by heading."""
    capsys.readouterr()
    assert main(["runs", str(folder)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    columns = ["run", "state", "step", "of", "loss", "validation loss", "grad norm", "skipped steps"]
    assert [word for name in columns for word in name.split()] == head.split()[:11]
    return {line.split()[0]: dict(zip(columns, line.split(), strict=False)) for line in lines}


def test_every_run_is_listed_with_its_state_and_nothing_else_is(folder, capsys):
    found = rows(capsys, folder)
    assert {name: row["state"] for name, row in found.items()} == {
        "damaged": "damaged", "empty-config": "damaged", "finished": "finished", "new": "stopped", "stopped": "stopped",
    }  # fmt: skip
    assert {name: row["step"] for name, row in found.items() if name not in ("damaged", "empty-config")} == {
        "finished": "10", "new": "0", "stopped": "6",
    }  # fmt: skip
    assert found["new"]["loss"] == "-"


def test_the_last_numbers_are_those_of_the_log(folder, capsys):
    row, log = rows(capsys, folder)["finished"], log_of(folder / "finished")
    lines = [line for line in log if "loss" in line]
    (look,) = [line["validation"] for line in log if "validation" in line]
    assert row["of"] == "10"
    assert row["loss"] == f"{lines[-1]['loss']:.4g}"
    assert row["grad norm"] == f"{lines[-1]['grad_norm']:.4g}"
    assert row["validation loss"] == f"{look['loss']:.4g}"
    assert row["skipped steps"] == "0"


def test_a_finished_run_that_was_asked_for_more_is_not_finished(tmp_path):
    constant = {"lr_schedule": "constant"}
    Trainer(tiny(steps=2, log_every=1, **constant), tmp_path / "run").run()
    assert [(s.state, s.step, s.steps) for s in standings(tmp_path)] == [("finished", 2, 2)]
    Trainer(tiny(steps=4, **constant), tmp_path / "run")
    assert [(s.state, s.step, s.steps) for s in standings(tmp_path)] == [("stopped", 2, 4)]


def test_torn_lines_are_passed_over(folder, tmp_path):
    path = shutil.copytree(folder / "stopped", tmp_path / "run")
    with (path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (found,) = standings(tmp_path)
    assert (found.state, found.step) == ("stopped", 6)
    (path / "log.jsonl").unlink()
    (found,) = standings(tmp_path)
    assert (found.step, found.age, found.last) == (6, None, {})


def test_a_damaged_log_does_not_hide_the_other_runs(folder, tmp_path):
    path = shutil.copytree(folder / "stopped", tmp_path / "run")
    shutil.copytree(folder / "finished", tmp_path / "other")
    with (path / "log.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x80\n")
    assert len(standings(tmp_path)) == 2


def test_a_run_is_training_while_its_process_lives_and_is_not_disturbed(tmp_path, capsys):
    folder = tmp_path / "runs"
    words = ["train", "digits", "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4", "--batch-size", "8"]
    more = ["--log-every", "1", "--steps", "100000", "--runs-dir", str(folder)]
    process = start(command, [*words, *more], said=tmp_path / "said")
    log = folder / "digits/log.jsonl"
    try:
        for lines in (1, 4, 7):
            wait_for(lambda lines=lines: log.is_file() and log.read_text().count("\n") >= lines)
            assert rows(capsys, folder)["digits"]["state"] == "training"
        assert process.is_alive()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert rows(capsys, folder)["digits"]["state"] == "stopped"


def test_a_run_by_itself_is_listed_too(folder, capsys):
    run = next(path.parent for path in folder.glob("*/config.json"))
    assert main(["runs", str(run)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", run.name]


def test_no_runs_and_no_folder(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    assert "there is no folder" in refusal(capsys, ["runs", tmp_path / "elsewhere"])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (7200, "2 h ago"), (86400 * 3, "3 d ago")],
)
def test_ages(seconds, said):
    assert ago(seconds) == said
