"""What an experiment takes: a line per model, of what is not there yet."""

from dataclasses import replace

import pytest

from fpdm.experiments import estimate as estimating
from fpdm.experiments.estimate import estimate, time_steps
from fpdm.experiments.points import Axes
from fpdm.experiments.table import Part
from fpdm.experiments.trainings import train_missing
from tests.experiments.tables import ALONE, GROUND, MODELS, TABLE, experiment, train_here
from tests.training.runs import interrupt_at

HOUR = 3600.0


@pytest.fixture
def timed(monkeypatch):
    """Steps of an hour, and calls and iterations of an hour per batch; the labels of what was timed."""
    labels, pipes = [], {}

    class Call:
        fixed = per_iteration = HOUR * estimating.AT_ONCE

    def steps(training):
        labels.append(training.label)
        if training.label not in pipes:
            pipes[training.label] = time_steps(training)[1]
        return HOUR, pipes[training.label]

    monkeypatch.setattr(estimating, "time_steps", steps)
    monkeypatch.setattr(estimating, "measure_seconds", lambda *given: Call)
    return labels


def rows(lines):
    """Label -> hours of trainings, how many they are, hours of choosing and of reporting."""
    _, *models, _ = (line.split() for line in lines)
    return {label: (float(hours), int(count.strip("()")), float(choosing), float(reporting))
            for label, hours, count, choosing, reporting in models}  # fmt: skip


def test_each_model_has_a_line_and_the_sum_is_shared_by_processes(timed, tmp_path):
    asked = experiment(tmp_path / "out", tmp_path / "runs", processes=4)
    head, *models, total = estimate(asked)
    assert "trainings" in head
    found = rows([head, *models, total])
    assert timed == list(found) == list(MODELS)
    assert all((hours, count) == (2 * 12, 2) for hours, count, *_ in found.values())
    hours = sum(part for trained, _, *parts in found.values() for part in (trained, *parts))
    assert f"about {hours / 4:.1f} hours with 4 processes" in total
    assert not list(tmp_path.iterdir())


def test_the_hours_are_those_of_all_plans_that_are_drawn(timed, tmp_path):
    """Of one call for two block passes and one more per iteration, an hour for each call and for each iteration."""
    ways = {"ddim": Axes((6,), ("ddim",), (1, 4))}  # two timesteps of 1 iteration, or one of 4
    asked = experiment(tmp_path, tmp_path, replace(ALONE, ways=ways))
    _, _, choosing, reporting = rows(estimate(asked))["looped"]
    assert choosing == GROUND.chosen_on * (4 + 5)
    assert reporting == 2 * GROUND.reported_on * 5, "the dearest, of both trainings"


def test_what_is_trained_is_not_counted_again(timed, tmp_path, monkeypatch):
    train_here(monkeypatch)
    asked = experiment(tmp_path / "out", tmp_path / "runs")
    train_missing(asked.trainings()[:3], asked.runs, 1, lambda text: None)
    found = rows(estimate(asked))
    assert [(label, *row[:2]) for label, row in found.items()] == [("looped", 0, 0), ("plain", 12, 1)]


def test_a_part_is_counted_alone(timed, tmp_path):
    asked = experiment(tmp_path, tmp_path)
    whole, part = rows(estimate(asked)), rows(estimate(asked, Part(models=["looped"], ways=["dpm"])))
    assert list(part) == ["looped"]
    assert part["looped"][:2] == whole["looped"][:2]
    assert all(0 < some < all_ways for some, all_ways in zip(part["looped"][2:], whole["looped"][2:], strict=True))
    nothing = rows(estimate(asked, Part(models=["plain"], budgets=[6])))["plain"]
    assert nothing[3] < whole["plain"][3]


def test_steps_are_timed_for_real(tmp_path):
    training = experiment(tmp_path, tmp_path).trainings()[0]
    seconds, pipe = time_steps(training)
    assert 0 < seconds < 5
    assert pipe.transformer.config.hidden_size == 16
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_an_estimate(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        list(estimate(experiment(tmp_path, tmp_path)))


def test_a_tuned_way_is_not_for_nothing(timed, tmp_path):
    ways = {"tuned": Axes((12,), ("dpm++",), tuned=True)}
    (row,) = rows(estimate(experiment(tmp_path, tmp_path, replace(TABLE, models=ALONE.models, ways=ways)))).values()
    assert row[2] > 0
    assert row[3] > 0


def test_points_that_are_kept_are_not_counted(timed, tmp_path):
    """A training of which a way is kept is made once more, for the other; one that is all there is not."""
    points = [
        {"model": "looped", "seed": seed, "way": "ddim", "budget": budget} for seed in (0, 1) for budget in (6, 12)
    ]
    points += [{"model": "looped", "seed": 1, "way": "dpm", "budget": 12}]
    asked = experiment(tmp_path, tmp_path, ALONE)
    wanted = rows(estimate(asked, Part(seeds=[0], ways=["dpm"])))
    assert wanted["looped"][1] == 1
    assert rows(estimate(replace(asked, kept={"points": points}))) == wanted
