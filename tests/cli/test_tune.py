"""`fpdm tune`, with real distances: from a model without plans to images drawn by the plan that was found."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from fpdm.cli.main import main
from fpdm.experiments import tune as tuning
from fpdm.experiments.sweep import all_points
from fpdm.pipeline import FixedPointDiTPipeline
from tests.commands import refusal, wait_for
from tests.experiments.sweeps import points_in
from tests.processes import Program

OPTIONS = ["--data", "digits", "--num-images", "50", "--batch-size", "50", "--device", "cpu", "--schedulers", "dpm++"]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run whose model was tuned, without an interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(models["looped"], run / "pipeline")
    assert tune(f"mine={run}", "--budget", 5) == 0
    return run


@pytest.fixture
def model(models, tmp_path):
    """A model without plans."""
    return shutil.copytree(models["looped"], tmp_path / "model")


def words(*options):
    """Of several values of one option, the last one holds."""
    return ["tune", *OPTIONS, *map(str, options)]


def tune(*options):
    return main(words(*options))


def refused(capsys, *options):
    return refusal(capsys, words(*options))


def test_plans_are_kept_with_the_model_and_all_that_was_measured_in_its_run(whole):
    (plan,) = json.loads((whole / "pipeline/plans.json").read_text())
    assert [tuned.budget for tuned in FixedPointDiTPipeline.from_pretrained(whole / "pipeline").tuned_plans] == [5]
    rounds = [all_points(whole / f"tune/round-{number}") for number in (1, 2, 3, 4)]
    for number, points in enumerate(rounds, 1):
        assert points
        assert all(point["passes"] <= point["budget"] == 5 for point in points)
        seed = 2 if number == 4 else 1
        assert {(point["seed"], point["evaluation"]["samples"]) for point in points} == {(seed, 50)}
    values = [point["evaluation"]["measures"][0]["value"] for point in rounds[3]]
    profile = json.loads((whole / "tune/profile.json").read_text())
    assert len(profile["errors"]) == len(profile["alpha_bar"]) == 20
    assert plan["found"]["value"] == min(values) <= plan["found"]["by_hand"]
    assert plan["found"]["by_hand"] in values
    for number, points in enumerate(rounds, 1):
        report = (whole / f"tune/round-{number}/report.html").read_text()
        assert all(f'id="{point["key"]}"' in report for point in points)


def test_a_sampling_follows_the_plan_that_was_found(whole, tmp_path, capsys):
    (plan,) = json.loads((whole / "pipeline/plans.json").read_text())
    options = ["--budget", "5", "--num-images", "2", "--device", "cpu"]
    assert main(["sample", str(whole), "--out", str(tmp_path / "out"), *options]) == 0
    assert "the tuned plan for 5 block passes: dpm++" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["report"]["iterations"] == plan["iterations"]
    assert {name: report["request"][name] for name in ("scheduler", "reuse", "solver")} == {
        name: plan[name] for name in ("scheduler", "reuse", "solver")
    }


def test_an_explicit_network_is_tuned(models, tmp_path, capsys):
    folder = shutil.copytree(models["plain"], tmp_path / "plain")
    assert tune(f"mine={folder}", "--budget", 10, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "10 block passes: 2 timesteps" in said
    assert f"all that was measured is in {tmp_path / 'out'}" in said
    (plan,) = FixedPointDiTPipeline.from_pretrained(folder).tuned_plans
    assert plan.iterations == (None, None)
    assert set(points_in(tmp_path / "out/round-1")) == {"mine-10-dpmpp-seed1"}


def test_a_process_that_is_interrupted_goes_on_to_the_same_plans(model, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.move(model, run / "pipeline")
    with Program(words(f"mine={run}", "--budget", 5), tmp_path / "said") as process:
        wait_for(lambda: list((run / "tune").glob("round-2/points/*.json")))
        process.send_signal(signal.SIGINT)
        said = process.ended(30)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not (run / "pipeline/plans.json").exists()
    assert (run / "tune/round-1/report.html").is_file(), "what there is can be looked at"
    kept = {path: path.stat().st_mtime_ns for path in (run / "tune").glob("round-*/points/*.json")}
    assert tune(f"mine={run}", "--budget", 5) == 0
    assert "measuring how far" not in capsys.readouterr().out, "that is kept"
    assert (run / "pipeline/plans.json").read_bytes() == (whole / "pipeline/plans.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for number in (1, 2, 3):
        assert points_in(run / f"tune/round-{number}") == points_in(whole / f"tune/round-{number}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedulers", "dpm++,ddmp"], "unknown scheduler 'ddmp'. Did you mean 'ddpm'?"),
        (["--schedulers", ""], "unknown scheduler ''"),
        (["--budget", "2,40"], "a budget of 2 block passes is too small"),
        (["--budget", "40,x"], "--budget is '40,x'; it must be whole numbers of at least 1"),
        (["--budget", "0"], "--budget is '0'"),
        (["--num-images", 49], "--num-images must be at least 50"),
        (["--batch-size", 0], "--batch-size at least 1"),
        (["--processes", 0], "--processes is 0; it must be at least 1"),
        (["--out", "file"], "file is a file: choose another place"),
        (["--device", "cuda"], "device 'cuda' is not available here"),
        (["--dtype", "int4"], "dtype 'int4' is not one of"),
        (["--data", "nowhere"], "there is no nowhere"),
        (["--features", "classifer"], "unknown feature extractor 'classifer'. Did you mean 'classifier'?"),
    ],
    ids=lambda part: " ".join(map(str, part)) if isinstance(part, list) else "",
)
def test_what_cannot_be_is_one_clear_message_and_nothing_is_left(
    options, message, model, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    monkeypatch.setattr(tuning, "measure_profile", lambda *_: pytest.fail("it measures"))
    assert message in refused(capsys, model, "--budget", 5, "--out", "out", *options)
    assert not Path("out").exists()
    assert not (model / "plans.json").exists()
    assert Path("file").read_text() == "mine"


def test_a_model_that_cannot_be_written_to_is_refused_before_the_search(model, capsys, tmp_path, monkeypatch):
    def check(path):
        if Path(path) == model:
            raise OSError(f"{path} cannot be written to")

    monkeypatch.setattr(tuning, "check_writable", check)
    monkeypatch.setattr(tuning, "profiled", lambda *_: pytest.fail("it searches"))
    assert "cannot be written to" in refused(capsys, model, "--budget", 5, "--out", tmp_path / "out")


def test_the_real_images_are_no_place_for_measurements(model, capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    options = ["--budget", 5, "--data", tmp_path / "photos", "--out", tmp_path / "photos/tune"]
    assert "is in the folder of the real images" in refused(capsys, model, *options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("somebody/digits", "is not a folder on this machine, in which plans could be kept: download it first"),
        ("./nowhere", "there is no folder ./nowhere"),
    ],
)
def test_a_model_that_is_not_here_is_one_clear_message(name, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, name)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_with_an_equals_sign_keeps_its_measurements(models, tmp_path, monkeypatch):
    outs = []
    monkeypatch.setattr(tuning, "tune_model", lambda *given: outs.append(given[4]) or [])
    folder = shutil.copytree(models["plain"], tmp_path / "lr=1e-4")
    assert tune(folder) == 0
    assert outs == [folder / "tune"]
