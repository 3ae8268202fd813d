"""The trainings of a table: what their commands say, which are started, and how they are stopped and gone on with."""

import json
import shlex
import shutil
import signal
import time

import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

from fpdm.cli import train
from fpdm.cli.main import make_parser
from fpdm.experiments import trainings
from fpdm.experiments.catalog import GROUNDS, TABLES
from fpdm.experiments.table import Training
from fpdm.experiments.trainings import (
    check_runs,
    is_trained,
    output_of,
    portable,
    seconds_of,
    steps_done,
    steps_kept,
    train_missing,
    written,
)
from fpdm.training.listing import numbers, standing
from fpdm.training.loop import Trainer
from tests.commands import contents, wait_for
from tests.experiments.tables import SIZES, fork_trainings, train_here
from tests.training.runs import interrupt_at, tensors_of


def training(seed=0, label="looped", **changes):
    settings = {**SIZES, "device": "cpu", **changes, "seed": seed}
    return Training(label, seed, "digits", settings)


def quiet(text):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of two trainings."""
    runs = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        train_missing([training(0), training(1)], runs, 1, quiet)
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


# Commands


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("digits", {}),
        ("digits", {"min_snr_gamma": None, "model": None, "time_limit": None}),
        ("digits", {"min_snr_gamma": 5.0, "time_limit": 90.5, "lr": 3e-7, "beta2": 0.1 + 0.2, "weight_decay": 0}),
        (
            "digits",
            {"time_in_pre_post": False, "input_skip": False, "compile": True, "flip": True, "conditional": False},
        ),
        ("digits", {"network": "dit", "depth": 3}),
        ("digits", {"gradient": "phantom", "damping": 0.25, "exit_loss": "target", "warm_share": 0.5}),
        ("images", {"data": "/a folder/of 'pictures'", "source": "folder", "model": "S/4", "patch_size": None}),
    ],
)
def test_the_words_of_a_command_give_the_config(recipe, changes):
    """Those of the recipe that are None, false or a float included."""
    asked = Training("label", 3, recipe, {**changes, "seed": 3})
    options = make_parser().parse_args(shlex.split(shlex.join(["train", *asked.words])))
    assert train.resolve(options) == asked.config
    assert asked.config.run.seed == 3


def test_the_words_of_all_models_give_their_configs():
    rows = {label: model for table in TABLES.values() for label, model in table.models.items()}
    for ground in GROUNDS.values():
        for label, model in rows.items():
            asked = Training(label, 0, ground.recipe, {"device": "cpu", **model.changes, "steps": 7, "seed": 0})
            assert train.resolve(make_parser().parse_args(["train", *asked.words])) == asked.config


def test_the_name_of_a_training_tells_its_length_and_seed():
    assert training(2).name == "looped-12-seed2"
    assert training(2, steps=20).name == "looped-20-seed2"


def test_a_command_that_is_kept_does_not_say_where_the_data_are():
    asked = Training("label", 0, "images", {"data": "/home/somebody/pictures", "seed": 0})
    assert portable(asked).words == ["images", "--data", "DATA", "--seed", "0"]


# What is there already


def test_what_is_missing_is_trained_and_nothing_twice(runs, monkeypatch):
    said, names = [], train_here(monkeypatch)
    before = contents(runs)
    train_missing([training(0), training(1)], runs, 1, said.append)
    assert not names
    assert contents(runs) == before
    train_missing([training(0), training(2), training(1)], runs, 1, said.append)
    assert names == ["looped-12-seed2"]
    assert said == ["2 of 2 trainings are there", "2 of 3 trainings are there"]
    assert is_trained(training(2), runs)


def test_a_training_that_was_stopped_is_gone_on_with(trained, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(training().config, tmp_path / training().name).run()
    assert not is_trained(training(), tmp_path)
    names = train_here(monkeypatch)
    train_missing([training()], tmp_path, 1, quiet)
    assert names == [training().name]
    found, wanted = (tensors_of(folder / training().name, 12) for folder in (tmp_path, trained))
    assert all((found[name] == wanted[name]).all() for name in wanted)
    assert written(training(), tmp_path)["loss"] == written(training(), trained)["loss"]


def test_the_time_left_counts_what_a_killed_training_does_once_more(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr("fpdm.experiments.trainings.tqdm", lambda **words: bars.append(tqdm(**words)) or bars[0])
    folder, names = tmp_path / training().name, train_here(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(training().config, folder).run()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 10}\n')
    train_missing([training()], tmp_path, 1, quiet)
    (bar,) = bars
    assert names
    assert (bar.initial, bar.n, bar.total) == (6, 12, 12)


def test_what_was_saved_after_the_last_line_of_the_log_counts_as_done(tmp_path):
    """Or the time left would be below zero until the next line."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(training().config, tmp_path / training().name).run()
    assert numbers(tmp_path / training().name / "log.jsonl")["step"] == 4
    assert steps_done(training(), tmp_path) == steps_kept(training(), tmp_path) == 6


@pytest.mark.parametrize(
    ("group", "name", "value"), [("run", "seed", 7), ("optimizer", "lr", 1.0), ("model", "network", "dit")]
)
def test_a_folder_of_another_run_is_refused_before_anything_starts(group, name, value, runs, monkeypatch):
    names, path = train_here(monkeypatch), runs / training(1).name / "config.json"
    config = json.loads(path.read_text())
    now, config[group][name] = config[group][name], value
    path.write_text(json.dumps(config))
    before = contents(runs)
    with pytest.raises(ValueError, match="holds another run than this table's") as refused:
        train_missing([training(2), training(0), training(1)], runs, 2, quiet)
    assert str(path.parent) in str(refused.value)
    assert f"{name} was {value!r}, is {now!r}" in str(refused.value)
    assert "--runs-dir" in str(refused.value)
    assert not names
    assert contents(runs) == before


def test_a_run_at_which_another_command_is_at_work_is_refused(runs, monkeypatch):
    names = train_here(monkeypatch)
    with FileLock(runs / training(1).name / ".lock"), pytest.raises(ValueError, match="is being trained by another"):
        train_missing([training(2), training(0), training(1)], runs, 1, quiet)
    assert not names


def test_how_a_run_was_computed_may_differ(runs):
    for changes in ({"log_every": 1}, {"device": "auto"}, {"checkpoint_every": 3}):
        check_runs([training(**changes)], runs)


def test_a_damaged_config_is_told(runs):
    path = runs / training(1).name / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        train_missing([training(0), training(1)], runs, 1, quiet)


def test_a_line_of_fewer_steps_is_not_timed(tmp_path):
    whole, partial = {"step": 4, "images_per_second": 8.0}, {"step": 5, "images_per_second": 2.0, "partial": True}
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(whole)}\n{json.dumps(partial)}\n")
    assert seconds_of(tmp_path, training(0).config) == 4.0  # 4 steps of 8 images


def test_what_is_kept_of_a_training(trained):
    kept = written(training(1), trained)
    log = [json.loads(line) for line in (trained / training(1).name / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert kept.pop("seconds") == round(sum(4 * 8 / line["images_per_second"] for line in lines), 1)
    assert kept.pop("command") == f"fpdm train {shlex.join(training(1).words)}"
    assert kept == {"model": "looped", "seed": 1, "steps": 12, "batch_size": 8, "loss": lines[-1]["loss"]}


# Processes


def test_so_many_are_trained_at_a_time(monkeypatch, tmp_path):
    """Processes of which each ends after some looks: as many as may be at work until few are left."""
    at_work, most = [], []

    class Working:
        returncode = 0

        def __init__(self, looks):
            self.looks = looks

        def poll(self):
            self.looks -= 1
            if self.looks:
                return None
            at_work.remove(self)
            return 0

    def started(asked, runs, threads):
        at_work.append(Working(asked.seed + 1))
        most.append((asked.seed, len(at_work), threads))
        return at_work[-1]

    monkeypatch.setattr(trainings, "PAUSE", 0)
    monkeypatch.setattr(trainings, "started", started)
    monkeypatch.setattr(trainings, "check_ended", lambda *given: None)
    train_missing([training(seed) for seed in range(5)], tmp_path, 2, quiet, threads=3)
    assert most == [(0, 1, 3), (1, 2, 3), (2, 2, 3), (3, 2, 3), (4, 2, 3)]
    assert not at_work


@pytest.mark.parametrize(("here", "processes", "threads"), [(8, 2, 4), (2, 5, 1), (1, 1, 1)])
def test_processes_share_the_threads_of_this_one(here, processes, threads, monkeypatch, tmp_path):
    """Not the machine's cores: beside other programs, OMP_NUM_THREADS says how many are left to these."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: here)
    monkeypatch.setattr(trainings, "started", lambda *given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_missing([training()], tmp_path, processes, quiet)
    assert asked == [(training(), tmp_path, threads)]


def press_at(monkeypatch, condition):
    """Have Ctrl-C pressed between two looks, as soon as the condition holds."""

    def sleep(seconds):
        time.sleep(seconds)
        if condition():
            raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "time", type("Clock", (), {"sleep": staticmethod(sleep)}))


def test_interrupted_trainings_save_and_the_same_call_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    long = {"steps": 150, "checkpoint_every": 10**6, "log_every": 2}
    wanted, runs = [training(seed, **long) for seed in (0, 1)], tmp_path / "runs"
    processes = fork_trainings(monkeypatch)
    with monkeypatch.context() as patch:
        press_at(patch, lambda: all(numbers(runs / t.name / "log.jsonl").get("step", 0) for t in wanted))
        with pytest.raises(KeyboardInterrupt):
            train_missing(wanted, runs, 2, quiet, threads=1)
    assert [process.returncode for process in processes] == [130, 130], (
        "both at once, and both have ended by themselves"
    )
    for asked in wanted:
        (saved,) = (runs / asked.name / "checkpoints").glob("step-*")
        assert standing(runs / asked.name).state == "stopped"
        assert 2 <= int(saved.name.removeprefix("step-")) < 150
    train_missing(wanted, runs, 2, quiet, threads=1)
    for asked in wanted:
        Trainer(asked.config, tmp_path / "whole" / asked.name).run()
        found, same = (tensors_of(folder / asked.name, 150) for folder in (runs, tmp_path / "whole"))
        assert all((found[name] == same[name]).all() for name in same)


def test_a_training_that_fails_is_told_by_its_last_words_and_the_others_are_saved(tmp_path, monkeypatch):
    well, ill, later = (training(seed, steps=10**6, log_every=5) for seed in range(3))
    (tmp_path / ill.name).write_text("in its way")
    processes, started = fork_trainings(monkeypatch), trainings.started

    def start(asked, *given):
        if asked == ill:
            wait_for(lambda: numbers(tmp_path / well.name / "log.jsonl").get("step", 0))
        return started(asked, *given)

    monkeypatch.setattr(trainings, "started", start)
    with pytest.raises(ChildProcessError) as error:
        train_missing([well, ill, later], tmp_path, 2, quiet, threads=1)
    said = str(error.value)
    assert f"the training {ill.name} ended with status 2" in said
    assert f"{tmp_path / ill.name} is a file: choose another place" in said
    assert str(output_of(ill, tmp_path)) in said
    assert [process.returncode for process in processes] == [130, 2]
    assert len(list((tmp_path / well.name / "checkpoints").glob("step-*"))) > 0
    assert standing(tmp_path / well.name).state == "stopped"
    assert not (tmp_path / later.name).exists(), "nothing starts after a failure"


def test_a_training_that_ends_well_without_a_model_is_a_failure(tmp_path, monkeypatch):
    class Ended:
        returncode = 0

    output_of(training(), tmp_path).write_bytes(b"".join(b"word %d\r" % i for i in range(20)) + b"\xff last\n")
    with pytest.raises(ChildProcessError) as error:
        trainings.check_ended(training(), Ended(), tmp_path)
    assert [f"word {i}" in str(error.value) for i in (15, 16, 17, 18, 19)] == [False, True, True, True, True]
    assert "\ufffd last" in str(error.value)
    assert "The same command goes on with it." in str(error.value)


def test_processes_are_asked_to_save_all_at_once_and_awaited():
    heard = []

    class Process:
        def send_signal(self, number):
            heard.append(number)

        def wait(self):
            heard.append("awaited")

    trainings.stop([Process(), Process()])
    assert heard == [signal.SIGTERM, signal.SIGTERM, "awaited", "awaited"]
