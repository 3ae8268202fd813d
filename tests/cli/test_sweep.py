"""`fpdm sweep` as its users meet it: refused before it begins, added to, stopped, killed, and gone on with."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from fpdm import DiT
from fpdm.cli.main import main
from fpdm.data import open_images
from fpdm.experiments import sweep
from tests.commands import contents, refusal, wait_for
from tests.experiments.sweeps import grids_in, points_in, read_strictly, save_pipeline, times_of
from tests.processes import Program

OPTIONS = [
    "--data", "digits", "--num-images", "50", "--batch-size", "20", "--budgets", "6,12",
    "--schedulers", "dpm++", "--device", "cpu",
]  # fmt: skip
NEVER = "6,12,60000"  # the last of these takes minutes: a sweep of them is not done before it is stopped
CLASSIFIER = files("fpdm.evaluation") / "classifiers/digits.safetensors"
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A sweep that nothing came between."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(*models.values(), out=out) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of a finished sweep."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def words(*arguments, out):
    """Of several values of one option, the last one holds."""
    return ["sweep", *OPTIONS, "--out", str(out), *map(str, arguments)]


def run(*arguments, out):
    return main(words(*arguments, out=out))


def start(*arguments, out):
    """The same in a process of its own, which leads a group of its own as a shell's commands do."""
    return Program(words(*arguments, out=out), out.parent / "said", leads=True)


def refused(*arguments, out, captured):
    return refusal(captured, words(*arguments, out=out))


def still_there(process):
    """The processes of its group, less those that have ended and only wait for their parent to notice."""
    said = subprocess.run(["ps", "-A", "-o", "pgid=,pid=,stat="], check=True, capture_output=True, text=True).stdout
    return [pid for group, pid, state in map(str.split, said.splitlines())
            if int(group) == process.pid and not state.startswith("Z")]  # fmt: skip


def test_a_sweep_says_where_its_report_is(models, tmp_path, capsys):
    out = tmp_path / "new/out"
    assert run(models["looped"], f"five={models['plain']}", "--budgets", "4,5", out=out) == 0
    said = capsys.readouterr().out
    assert "left out: five-4-dpmpp: a budget of 4 block passes is too small" in said
    assert f"3 points in {out / 'report.html'}" in said
    assert set(points_in(out)) == set(grids_in(out)) == {"looped-4-dpmpp", "looped-5-dpmpp", "five-5-dpmpp"}
    report = (out / "report.html").read_text()
    assert all(f'id="{key}"' in report for key in points_in(out))
    assert set(read_strictly(out / "sweep.json")["models"]) == {"looped", "five"}


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "6,x"], "--budgets is '6,x'"),
        (["--budgets", "6,0"], "at least 1"),
        (["--budgets", ""], "--budgets is ''"),
        (["--budgets", "6,,12"], "--budgets is '6,,12'"),
        (["--budgets", "1"], "none of these points can be: looped-1-dpmpp: a budget of 1 block passes is too small"),
        (["--iterations", "2.5"], "--iterations is '2.5'"),
        (["--iterations", "0,2"], "--iterations is '0,2'"),
        (["--iterations", "20"], "one timestep with 20 iterations needs 22"),
        (["--schedulers", "ddim,dpm"], "unknown scheduler 'dpm'. Did you mean 'dpm++'?"),
        (["--schedulers", "ddim,"], "unknown scheduler ''"),
        (["--schedulers", ""], "unknown scheduler ''"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--processes", "-2"], "--processes is -2"),
        (["--num-images", "49"], "--num-images must be at least 50"),
        (["--batch-size", "0"], "--batch-size at least 1"),
        (["--guidance-scale", "inf"], "guidance_scale is inf"),
        (["--allocations", "rizing", "--iterations", "2"], "unknown allocation 'rizing'. Did you mean 'rising'?"),
        (["--allocations", "rizing"], "unknown allocation 'rizing'. Did you mean 'rising'?"),
        (["--allocations", "constant,rizing"], "unknown allocation 'rizing'. Did you mean 'rising'?"),
        (["--allocations", "linear:2"], "must be a number between -2 and 2"),
        (["--reuse", "plain,linera"], "unknown reuse 'linera'. Did you mean 'linear'?"),
        (["--reuse", ""], "unknown reuse ''"),
        (["--solvers", "picard,andersen:2"], "unknown solver 'andersen'. Did you mean 'anderson'?"),
        (["--solvers", "anderson:two"], "solver 'anderson:two': 'two' is not a whole number"),
        (["--seeds", "0,-1"], "--seeds is '0,-1'; it must be whole numbers of at least 0"),
        (["--seeds", "one"], "--seeds is 'one'"),
        (["--features", "classifer"], "unknown feature extractor 'classifer'. Did you mean 'classifier'?"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--data", "nowhere"], "there is no nowhere"),
        (["--split", "tset"], "unknown split 'tset'. Did you mean 'test'?"),
        (["--split", "test"], "digits has no split 'test'"),
        (["--device", "cuda"], "device 'cuda' is not available here"),
        (["--dtype", "int4"], "dtype 'int4' is not one of float32, bfloat16, float16, int8, float8"),
        (["{looped}x"], "there is no folder {looped}x. Did you mean {looped}?"),
        (["looped={plain}"], "two models are called looped"),
        (["{larger}"], "the models draw images of different sizes, which one sweep cannot compare: "
                       "{{'looped': 8, 'larger': 16}}"),
        (["{coloured}"], "the models draw grey and coloured images, which one sweep cannot compare: "
                         "{{'looped': 1, 'coloured': 3}}"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_left_behind(
    arguments, message, models, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    others = {"larger": {"sample_size": 16}, "coloured": {"in_channels": 3}}
    names = models | {name: save_pipeline(tmp_path / name, **changes) for name, changes in others.items()}
    arguments = [argument.format(**names) for argument in arguments]
    said = refused(models["looped"], *arguments, out="out", captured=capsys)
    assert message.format(**names) in said
    assert not Path("out").exists(), sorted(map(str, contents(Path("out"))))


def test_the_real_images_are_no_place_for_a_sweep(models, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    said = refused(models["looped"], "--data", str(tmp_path / "photos"), out=tmp_path / "photos/sweep", captured=capsys)
    assert "is in the folder of the real images" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "51"], "num_images was 50, is 51"),
        (["--guidance-scale", "2"], "guidance_scale was 1.0, is 2.0"),
        (["--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16'"),
        (["--features", "classifier"], "features was None, is 'classifier'"),
        (["looped={plain}"], "looped had other weights"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_another_sweep_is_not_mixed_into_a_folder(arguments, message, models, out, capsys):
    before = contents(out)
    named = [] if "=" in arguments[0] else [models["looped"]]
    said = refused(*named, *(argument.format(**models) for argument in arguments), out=out, captured=capsys)
    assert message in said
    assert "Choose another --out" in said
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", "is there already and holds no sweep"),
        ("sweep.json", "{", "sweep.json is damaged"),
        ("sweep.json", '{"method": "bayes"}', "sweep.json"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(name, text, message, models, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    assert message in refused(models["looped"], out=tmp_path / "out", captured=capsys)
    assert contents(tmp_path / "out") == {Path(name): text.encode()}
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(models["looped"], out=tmp_path / "file", captured=capsys)


# Added to


def test_budgets_schedulers_and_models_are_added_without_computing_a_point_again(models, out, tmp_path, capsys):
    kept, numbers = times_of(out), points_in(out)
    third = save_pipeline(tmp_path / "third", factor=0.5)
    more = ["--budgets", "6,12,20", "--batch-size", "50"]
    assert run(models["looped"], third, *more, out=out) == 0
    said = capsys.readouterr().out
    assert "2 of 6 points are there" in said
    assert "8 points in" in said
    added = {"looped-20-dpmpp", "third-6-dpmpp", "third-12-dpmpp", "third-20-dpmpp"}
    assert points_in(out).keys() - numbers.keys() == added
    assert kept.items() <= times_of(out).items()
    assert set(read_strictly(out / "sweep.json")["models"]) == {"looped", "plain", "third"}
    assert all(f'id="{key}"' in (out / "report.html").read_text() for key in points_in(out))


def test_seeds_reuse_solvers_and_allocations_are_added_to_a_folder(models, out, capsys):
    kept = times_of(out)
    more = ["--budgets", "12", "--seeds", "0,1", "--reuse", "plain,linear", "--solvers", "picard,anderson:2"]
    assert run(*models.values(), *more, out=out) == 0
    solves = ("", "-anderson_2", "-linear-reuse", "-linear-reuse-anderson_2")
    added = {f"looped-12-dpmpp{how}{seed}" for how in solves for seed in ("", "-seed1")} | {"plain-12-dpmpp-seed1"}
    assert points_in(out).keys() == kept.keys() | added
    assert kept.items() <= times_of(out).items()
    assert "2 of 10 points are there" in capsys.readouterr().out


def test_a_lost_grid_of_a_point_that_is_not_asked_for_does_not_spoil_the_report(models, out, capsys):
    (out / "grids/plain-6-dpmpp.png").unlink()
    (out / "report.html").unlink()
    assert run(models["looped"], out=out) == 0, capsys.readouterr().err
    assert 'id="looped-12-dpmpp"' in (out / "report.html").read_text()


def save_digits(path, changed=False):
    source = open_images("digits")
    images = source.images.copy()
    if changed:
        images[7] = 255 - images[7]
    np.savez(path, arr_0=images, arr_1=source.labels)
    return path


def test_data_that_moved_is_the_same_and_data_that_changed_is_refused(models, tmp_path, capsys):
    """The classifier is named, or another one would be trained on the changed data."""
    out, see = tmp_path / "out", ["--weights", CLASSIFIER]
    here, there = save_digits(tmp_path / "here.npz"), tmp_path / "elsewhere/there.npz"
    assert run(models["plain"], *see, "--data", here, "--budgets", "6", out=out) == 0
    there.parent.mkdir()
    here.rename(there)
    kept = times_of(out)
    assert run(models["plain"], *see, "--data", there, "--budgets", "6,12", out=out) == 0
    assert kept.items() <= times_of(out).items()
    assert set(points_in(out)) == {"plain-6-dpmpp", "plain-12-dpmpp"}

    before, changed = times_of(out), save_digits(tmp_path / "changed.npz", changed=True)
    said = refused(models["plain"], *see, "--data", changed, "--budgets", "6,12,20", out=out, captured=capsys)
    assert "was measured against other data or by another network" in said
    assert times_of(out) == before
    # Also where none of the points asked for is there: all of them are compared on one page.
    said = refused(models["plain"], *see, "--data", changed, "--budgets", "20", out=out, captured=capsys)
    assert "other data" in said
    assert times_of(out) == before


# Several processes


def test_two_processes_make_the_points_of_one_and_an_error_in_one_keeps_what_was_finished(
    models, whole, tmp_path, capfd, monkeypatch
):
    out, computed = tmp_path / "out", sweep.computed
    broken = save_pipeline(tmp_path / "broken", DiT, depth=12, hidden_size=32)  # the dearest: it is begun last

    def torn_after_planning(points, *others):
        weights = Path(broken) / "transformer/diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert [point.key for point in points][-1] == "broken-12-dpmpp"
        return computed(points, *others)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that each computes with one thread, as `whole` did
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "computed", torn_after_planning)
        said = refused(*models.values(), broken, "--processes", "2", out=out, captured=capfd)
    assert f"the model {broken} cannot be opened" in said
    assert (out / "report.html").is_file(), "of the points that were finished"
    wait_for(lambda: not multiprocessing.active_children())
    kept, found = times_of(out), points_in(out)
    assert found.items() <= points_in(whole).items()
    assert len(found) >= 3, "all points but the broken one, and one that may have been in the making"
    assert {read_strictly(path)["made_with"]["processes"] for path in (out / "points").iterdir()} == {2}

    assert run(*models.values(), out=out) == 0
    assert points_in(out) == points_in(whole)
    assert grids_in(out) == grids_in(whole)
    assert kept.items() <= times_of(out).items()


def test_a_worker_that_is_killed_is_one_message_and_the_same_command_goes_on(
    models, whole, tmp_path, capfd, monkeypatch
):
    """As the system does when memory runs out."""
    out, write_json, killed = tmp_path / "out", sweep.write_json, []

    def kill_one(path, value):
        write_json(path, value)
        if path.parent.name == "points" and not killed:
            killed.append(multiprocessing.active_children()[0])
            os.kill(killed[0].pid, signal.SIGKILL)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_json", kill_one)
        try:
            said = refused(*models.values(), "--budgets", NEVER, "--processes", "2", out=out, captured=capfd)
        finally:
            for worker in multiprocessing.active_children():
                worker.kill()
    assert "process" in said
    kept = times_of(out)
    assert kept
    assert run(*models.values(), out=out) == 0
    assert points_in(out) == points_in(whole)
    assert kept.items() <= times_of(out).items()


# Stopped from outside


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_goes_on_to_the_same_points(number, models, whole, tmp_path):
    out = tmp_path / "out"
    with start(*models.values(), "--budgets", NEVER, out=out) as process:
        try:
            wait_for(lambda: list(out.glob("points/*.json")) and list(out.glob("drawing/*/000010.png")))
            process.send_signal(number)
            said = process.ended(30)
        finally:
            process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130, said
        assert "stopped: the same command goes on from here" in said
        assert "Traceback" not in said
        assert f'id="{next(iter(points_in(out)))}"' in (out / "report.html").read_text()
    kept = times_of(out)
    assert run(*models.values(), out=out) == 0
    assert points_in(out) == points_in(whole)
    assert grids_in(out) == grids_in(whole)
    assert kept.items() <= times_of(out).items()


def test_ctrl_c_ends_all_processes_of_a_sweep_at_once(models, whole, tmp_path):
    """The terminal sends it to all of them."""
    out = tmp_path / "out"
    with start(*models.values(), "--budgets", "6,60000", "--processes", "2", out=out) as process:
        try:
            wait_for(lambda: len(list(out.glob("points/*.json"))) == 2 and list(out.glob("drawing/*-60000-*")))
            os.killpg(process.pid, signal.SIGINT)
            said = process.ended(10)
            wait_for(lambda: not still_there(process), seconds=5)
        finally:
            if still_there(process):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert "stopped: the same command goes on from here" in said
    assert "Traceback" not in said
    assert json.loads((out / "points/looped-6-dpmpp.json").read_text())["made_with"]["processes"] == 2
    assert points_in(out).items() <= points_in(whole).items()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_main_one_of_a_sweep(number, models, tmp_path):
    """They would draw on into folders that the next sweep uses."""
    out = tmp_path / "out"
    with start(*models.values(), "--budgets", "60000", "--processes", "2", out=out) as process:
        try:
            wait_for(lambda: len(list(out.glob("drawing/*-60000-*"))) == 2)
            assert len(still_there(process)) >= 3
            process.send_signal(number)
            process.wait(10)
            wait_for(lambda: not still_there(process), seconds=5)
        finally:
            if still_there(process):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -number
