"""`fpdm experiment`, with real trainings and distances: a tiny table from nothing to the page that shows it."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fpdm.cli.main import main
from fpdm.experiments import catalog, sweep, trainings
from fpdm.experiments.catalog import GROUNDS, TABLES
from fpdm.experiments.experiment import REPORTING
from fpdm.experiments.sweep import all_points
from tests.commands import contents, refusal
from tests.experiments.tables import GROUND, MODELS, TABLE, fork_trainings

pytestmark = pytest.mark.usefixtures("cache", "tiny")


@pytest.fixture(scope="module")
def tiny():
    """The catalog has a tiny table and ground more."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog.TABLES, "tiny", TABLE)
        patch.setitem(catalog.GROUNDS, "few", replace(GROUND, chosen_on=50, reported_on=60))
        yield
    signal.signal(signal.SIGTERM, handler)  # which the command takes


@pytest.fixture(scope="module")
def whole(tiny, cache, tmp_path_factory):
    """The folder of a finished table: first a part of it, by a process like a user's, then all."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out, "--models", "plain", "--seeds", 0) == 0
    with pytest.MonkeyPatch.context() as patch:
        fork_trainings(patch)
        assert run(out, "--processes", 1) == 0
    return out


@pytest.fixture
def done(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "done")


def words(out, *options):
    """Of several values of one option, the last one holds."""
    given = ["--on", "few", "--out", out, "--processes", 1, "--device", "cpu", *options]
    return ["experiment", "tiny", *map(str, given)]


def run(out, *options):
    return main(words(out, *options))


def result_in(out):
    return json.loads((out / "tiny-few/result.json").read_text())


def test_a_table_is_trained_measured_and_shown(whole):
    result = result_in(whole)
    assert {(t["model"], t["seed"]) for t in result["trainings"]} == {
        (label, seed) for label in MODELS for seed in (0, 1)
    }
    places = [(p["model"], p["seed"], p["way"], p["budget"]) for p in result["points"]]
    ways = (("ddim", 6), ("ddim", 12), ("dpm", 12))
    assert sorted(places) == sorted((label, seed, *way) for label in MODELS for seed in (0, 1) for way in ways)
    for point in result["points"]:
        value, low, high = next(iter(point["measures"].values()))
        assert value > 0
        assert low <= high
        assert point["samples"] == 60
    assert {p["evaluation"]["samples"] for p in all_points(whole / "tiny-few/choose")} == {50}
    assert set(result["real"]) == set(result["points"][0]["measures"])
    page = (whole / "tiny-few/table.md").read_text()
    assert all(model.title in page for model in MODELS.values())
    assert (whole / "tiny-few/plot.png").read_bytes().startswith(b"\x89PNG")


def test_trainings_are_runs_of_their_own_and_their_output_is_kept(whole):
    names = {f"{label}-12-seed{seed}" for label in MODELS for seed in (0, 1)}
    assert {path.name for path in (whole / "runs-few").iterdir() if path.is_dir()} == names
    said = (whole / "runs-few/plain-12-seed0.out").read_text()
    assert said.startswith("$ fpdm train digits --hidden-size 16 ")
    assert "DiT, " in said


def test_what_is_done_is_not_done_again_and_is_shown_again(done, capsys, monkeypatch):
    monkeypatch.setattr(trainings, "started", None)
    monkeypatch.setattr(sweep, "measure_point", None)
    before, wanted = contents(done), result_in(done)
    assert run(done) == 0
    said = capsys.readouterr().out
    assert TABLE.question in said
    assert f"{done / 'tiny-few/table.md'} shows it; {done / 'tiny-few/result.json'} keeps it" in said
    assert result_in(done) == wanted
    assert {path for path, old in before.items() if contents(done)[path] != old} <= {Path("tiny-few/plot.png")}


def test_a_stopped_table_shows_what_there_is_and_goes_on(done, capsys, monkeypatch):
    wanted, part = result_in(done), done / "tiny-few/report/points"
    (part / f"plain-12-seed1-6-ddim-seed{REPORTING}.json").unlink()

    def pressed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "measure_point", pressed)
        assert run(done) == 130
    said = capsys.readouterr().out
    assert "stopped: the same command goes on from here" in said
    assert "Looped" in said
    assert len(result_in(done)["points"]) == len(wanted["points"]) - 1
    assert run(done) == 0
    assert without_times(result_in(done)) == without_times(wanted)


def without_times(result):
    return {**result, "points": [{**point, "seconds": None} for point in result["points"]]}


def test_a_command_that_is_terminated_stops_as_one_that_is_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainings, "started", lambda *given: signal.raise_signal(signal.SIGTERM))
    assert run(tmp_path / "out") == 130
    assert "stopped: the same command goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_tells_the_hours(tmp_path, capsys):
    assert run(tmp_path / "out", "--dry-run", "--models", "looped", "--seeds", 0, "--ways", "dpm") == 0
    _, line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("looped")
    assert "(1)" in line
    assert total.startswith("about ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_leaves_what_is_there_as_it_is(done, capsys):
    before = contents(done)
    assert run(done, "--dry-run") == 0
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:3]] == [["0.00", "(0)"]] * 2
    assert contents(done) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mein"], "unknown table 'mein'. Did you mean 'main'?"),
        (["main", "--on", "digit"], "unknown ground 'digit'. Did you mean 'digits'?"),
        (["main", "--models", "fpdm,dit5"], "unknown model 'dit5'. Did you mean 'dit"),
        (["main", "--seeds", "0,3"], "unknown seed '3'"),
        (["main", "--seeds", "x"], "--seeds is 'x'; it must be whole numbers of at least 0"),
        (["main", "--on", "fashion-mnist", "--data", "d", "--seeds", "1"], "unknown seed '1'"),
        (["main", "--ways", "unipc"], "unknown way 'unipc'"),
        (["main", "--budgets", "25"], "unknown budget '25'"),
        (["main", "--on", "fashion-mnist"], "--data is needed on fashion-mnist: the folder of the four IDX files"),
        (["main", "--on", "cifar10", "--data", ""], "--data is needed on cifar10"),
        (["main", "--data", "d"], "--data has no meaning on digits, whose images are in the package: leave it out"),
        (["main", "--processes", "-1"], "--processes is -1; it must be at least 1"),
        (["main", "--device", "cuda"], "device 'cuda' is not available here"),
        (["main", "--out", "file"], "file is a file: choose another place"),
        (["main", "--out", "file/deeper"], "file is a file: choose another place"),
        (["main", "--modles", "fpdm"], "unknown option '--modles'. Did you mean '--models'?"),
        (["main", "--processes", "0"], "--processes is 0; it must be at least 1"),
        (["main", "--models", ""], "unknown model ''"),
        (["main", "--seeds", ""], "--seeds is ''"),
        (["main", "--budgets", ""], "--budgets is ''"),
        (["main", "--runs-dir", "file"], "file is a file: choose another place"),
        (["main", "--on", "fashion-mnist", "--data", "nowhere"], "nowhere"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_cannot_be_is_one_clear_message_and_nothing_is_left(options, message, capsys, tmp_path, monkeypatch):
    def started(*given):
        raise AssertionError("a training was started")

    monkeypatch.setattr(trainings, "started", started)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("d").mkdir()
    for dry in ([], ["--dry-run"]):
        assert message in refusal(capsys, ["experiment", *options, *dry])
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "file"]


def test_folders_of_other_runs_are_one_clear_message(done, capsys):
    path = done / "runs-few/plain-12-seed1/config.json"
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.5'))
    message = refusal(capsys, words(done))
    assert f"{path.parent} holds another run than this table's: lr was 0.5, is 0.001" in message


def test_the_help_names_all_tables_and_grounds(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in (set(TABLES) | set(GROUNDS)) - {"tiny", "few"}:
        assert name in said


def test_a_table_of_elsewhere_is_shown_as_it_is_where_nothing_is_missing(whole, tmp_path, capsys):
    kept = whole / "tiny-few/result.json"
    assert run(tmp_path / "here", "--kept", kept) == 0
    assert result_in(tmp_path / "here") == result_in(whole)
    assert not (tmp_path / "here/runs-few").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "is no result of a table"), ("{}", "is no result")],
)
def test_what_is_no_result_cannot_be_gone_on_with(text, message, tiny, tmp_path, capsys):
    path = tmp_path / "kept.json"
    if text is not None:
        path.write_text(text)
    assert run(tmp_path / "here", "--kept", path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
