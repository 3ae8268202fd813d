"""An experiment: which plans are chosen and reported, and that it comes to the same however it was stopped or divided.

Distances are made up here, so that a test can say which plan is the best; `fpdm experiment` has real ones.
"""

import json
import shutil
from dataclasses import replace
from functools import lru_cache
from zlib import crc32

import pytest

from fpdm import drawing
from fpdm.experiments import experiment as tables
from fpdm.experiments import trainings
from fpdm.experiments import tune as tuning
from fpdm.experiments.experiment import REPORTING
from fpdm.experiments.points import Axes
from fpdm.experiments.rows import lines_of
from fpdm.experiments.sweep import all_points
from fpdm.experiments.table import Ground, Model, Part
from fpdm.experiments.trainings import train_missing
from fpdm.files import read_json
from fpdm.sampling import load_plans, measure_profile
from tests.commands import contents
from tests.experiments.bench import load_pipeline, make_bench, preferring
from tests.experiments.tables import (
    ALONE,
    GROUND,
    MODELS,
    SIZES,
    TABLE,
    WAYS,
    experiment,
    fork_trainings,
    train_here,
)

operations_of_training = lru_cache(tables.operations_of_training)


@pytest.fixture
def bench(monkeypatch, cache):
    bench = make_bench(monkeypatch)
    # What is slow and the same for all tests is made once.
    monkeypatch.setattr(tables, "load_pipeline", load_pipeline)
    monkeypatch.setattr(tables, "operations_of_training", operations_of_training)
    return bench


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of all trainings."""
    runs = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        train_missing(experiment(runs, runs).trainings(), runs, 1, lambda text: None)
    return runs


def salted(salt):
    """Distances as by chance, but the same whenever they are asked for."""
    return lambda point, images: crc32(repr((salt, point.key, images)).encode()) % 1000 / 10 + 1


def cells(result):
    return {(point["model"], point["seed"], point["way"], point["budget"]) for point in result["points"]}


def cell(result, model, seed, way, budget):
    (found,) = [
        p for p in result["points"] if (p["model"], p["seed"], p["way"], p["budget"]) == (model, seed, way, budget)
    ]
    return found


# What is trained


def test_every_model_is_trained_with_every_seed_and_row_by_row(tmp_path):
    whole = experiment(tmp_path / "out", tmp_path / "runs", data="DATA")
    assert [(t.label, t.seed) for t in whole.trainings()] == [("looped", 0), ("plain", 0), ("looped", 1), ("plain", 1)]
    for training in whole.trainings():
        config = training.config
        assert (config.run.seed, config.run.device, config.data.data) == (training.seed, "cpu", "DATA")
        assert config.model.network == ("dit" if training.label == "plain" else "fpdm")
        assert config.model.hidden_size == 16, "of the ground"
    assert not list(tmp_path.iterdir())


def test_a_part_has_the_trainings_that_plans_are_chosen_by(tmp_path):
    whole = experiment(tmp_path / "out", tmp_path / "runs")
    asked = whole.trainings(Part(models=["plain"], seeds=[1]))
    assert [(t.label, t.seed) for t in asked] == [("plain", 0), ("plain", 1)]


def test_trainings_have_equally_many_steps_or_operations(tmp_path):
    models = {**MODELS, "thick": Model("Thick", {"num_core": 4}), "deep": Model("Deep", {"network": "dit", "depth": 9})}
    by_steps = experiment(tmp_path, tmp_path, replace(TABLE, models=models), Ground("digits", {**SIZES, "steps": 1000}))
    assert set(by_steps.steps().values()) == {1000}
    by_operations = replace(by_steps, table=replace(by_steps.table, equal="operations"))
    steps, costs = by_operations.steps(), {label: by_operations.operations(label) for label in models}
    assert steps["looped"] == 1000
    assert len(set(steps.values())) == 4
    for label in models:
        assert abs(steps[label] * costs[label] - 1000 * costs["looped"]) <= 0.5 * costs[label]
    assert {t.label: t.config.optimizer.steps for t in by_operations.trainings()} == steps


# Which plans are chosen


@pytest.mark.parametrize("salt", range(3))
def test_the_plan_with_the_lowest_distance_of_the_choosing_is_chosen(salt, bench, trained, tmp_path):
    """Whatever the reporting finds of it."""
    low = salted(salt)
    bench.distance = lambda point, images: low(point, images) if images == GROUND.chosen_on else -low(point, images)
    experiment(tmp_path / "out", trained).run()
    measured = {point.key: bench.distance(point, GROUND.chosen_on) for point in bench.of("choose")}
    for label in MODELS:
        rows = read_json(tmp_path / f"out/chosen/{label}.json")
        assert {(row["way"], row["budget"]) for row in rows} == {("ddim", 6), ("ddim", 12), ("dpm", 12)}
        for row in rows:
            scheduler = {"ddim": "ddim", "dpm": "dpm++"}[row["way"]]
            among = [
                p
                for p in bench.of("choose")
                if (p.label, p.budget, p.choices.scheduler) == (label, row["budget"], scheduler)
            ]
            if among:
                best = min(among, key=lambda point: measured[point.key])
                assert row["choices"] == best.choices.to_dict()
                assert row["value"] == measured[best.key]
                assert sorted(other["value"] for other in row["among"]) == sorted(measured[p.key] for p in among)
        at_12 = {row["way"]: row for row in rows if row["budget"] == 12}
        best = min(at_12, key=lambda way: at_12[way]["value"])
        assert [way for way in at_12 if at_12[way]["best"]] == [best]


def test_plans_are_tried_with_all_iterations_of_a_way_and_an_only_plan_is_not(bench, trained, tmp_path):
    experiment(tmp_path / "out", trained).run()
    tried = {(p.label, p.budget, p.choices.scheduler, p.choices.iterations) for p in bench.of("choose")}
    assert tried == {
        *(("looped", budget, "ddim", n) for budget in (6, 12) for n in (1, 2)),
        *(("looped", 12, "dpm++", n) for n in (1, 2, 3)),
        ("plain", 12, "ddim", None), ("plain", 12, "dpm++", None),
    }  # fmt: skip
    assert len(bench.of("choose")) == len(tried), "an explicit network has one plan of each way and budget"


def test_what_is_chosen_is_of_the_first_training_and_drawn_by_all(bench, trained, tmp_path):
    bench.distance = preferring(iterations=2, scheduler="dpm++")
    result = experiment(tmp_path / "out", trained).run()
    assert {p.folder for p in bench.of("choose")} == {str(trained / f"{label}-12-seed0/pipeline") for label in MODELS}
    for seed in GROUND.seeds:
        assert cell(result, "looped", seed, "dpm", 12)["iterations"] == 2
        assert cell(result, "looped", seed, "ddim", 6)["iterations"] == 2


# What is reported


def test_all_trainings_are_measured_in_all_ways(bench, trained, tmp_path):
    bench.distance = preferring(scheduler="dpm++")
    result = experiment(tmp_path / "out", trained).run()
    assert cells(result) == {
        (label, seed, way, budget)
        for label in MODELS for seed in GROUND.seeds for way, axes in WAYS.items() for budget in axes.budgets
    }  # fmt: skip
    assert len(bench.of("report")) == len(cells(result)), "no more are measured"
    assert {place[1] for place in cells(result) if cell(result, *place)["best"] and place[2:] == ("dpm", 12)} == {0, 1}


def test_the_reporting_has_noise_of_its_own_and_as_many_images_as_asked(bench, trained, tmp_path):
    result = experiment(tmp_path / "out", trained).run()
    assert bench.images("choose") == {60}
    assert bench.images("report") == {100}
    assert {point.choices.seed for point in bench.of("report")} == {REPORTING}
    assert REPORTING not in {point.choices.seed for point in bench.of("choose")}
    assert {point["samples"] for point in result["points"]} == {100}


def test_a_cell_has_what_was_measured_of_its_point(bench, trained, tmp_path):
    bench.distance = salted(0)
    result = experiment(tmp_path / "out", trained).run()
    reported = {point.key: point for point in bench.of("report")}
    for row in all_points(tmp_path / "out/report"):
        point = reported[row["key"]]
        label, _, seed = point.label.partition("-12-seed")
        way = {"ddim": "ddim", "dpm++": "dpm"}[point.choices.scheduler]
        found = cell(result, label, int(seed), way, point.budget)
        value = bench.distance(point, 100)
        assert found["measures"] == {"FD-fake": [value, value - 1, value + 1]}
        assert (found["plan"], found["operations"]) == (row["plan"], point.operations)
        assert found["passes"] <= found["budget"]


def test_the_result_tells_the_table_and_its_trainings(bench, trained, tmp_path):
    whole = experiment(tmp_path / "out", trained, data=None)
    result = whole.run()
    assert json.loads(json.dumps(result)) == read_json(tmp_path / "out/result.json")
    assert (result["table"], result["question"], result["equal"]) == ("tiny", TABLE.question, "steps")
    assert result["models"] == {"looped": "Looped", "plain": "Plain"}
    assert (result["ways"], result["budgets"]) == (["ddim", "dpm"], [6, 12])
    assert result["real"] == {"FD-fake": 0.5}
    trained_ones = {(t["model"], t["seed"]): t for t in result["trainings"]}
    assert set(trained_ones) == {(label, seed) for label in MODELS for seed in (0, 1)}
    for (label, _), training in trained_ones.items():
        assert training["operations"] == 12 * 8 * whole.operations(label)
        assert training["parameters"] > 0
        assert ("convergence" in training) is (label == "looped")


# Tuned plans


@pytest.fixture
def tuned(bench, trained, tmp_path, monkeypatch):
    """An experiment with a tuned way, on copies of the runs, since plans are written into them."""
    runs = shutil.copytree(trained, tmp_path / "runs")
    profile = lru_cache(lambda folder, *given: measure_profile(*given))
    monkeypatch.setattr(tuning, "measure_profile", lambda *given: profile("", *given))
    monkeypatch.setattr(tables, "load_pipeline", drawing.load_pipeline)
    ways = {"by hand": Axes((12,), ("dpm++",), (1,)), "tuned": Axes((12,), ("dpm++",), tuned=True)}
    return experiment(tmp_path / "out", runs, replace(ALONE, ways=ways))


def test_later_trainings_are_drawn_by_the_plans_tuned_for_the_first(tuned, bench):
    bench.distance = preferring(reuse="linear")
    result = tuned.run()
    first, later = (cell(result, "looped", seed, "tuned", 12) for seed in (0, 1))
    assert first["reuse"] == later["reuse"] == "linear"
    assert first["plan"] == later["plan"]
    assert [plan.budget for plan in load_plans(tuned.runs / "looped-12-seed0/pipeline")] == [12]
    assert not (tuned.runs / "looped-12-seed1/pipeline/plans.json").exists()
    count = len(bench.measured)
    assert tuned.run() == result
    assert len(bench.measured) == count


def test_tuning_does_not_see_the_noise_of_the_reporting(tuned, bench):
    tuned.run()
    assert REPORTING not in {point.choices.seed for name, point, _ in bench.measured if name != "report"}


def test_a_plan_that_was_tuned_with_guidance_is_not_the_one_that_is_missing(tuned, bench):
    tuned.run()
    path = tuned.runs / "looped-12-seed0/pipeline/plans.json"
    path.write_text(json.dumps([{**plan, "guidance_scale": 2.0} for plan in read_json(path)]))
    shutil.rmtree(tuned.out)
    assert ("looped", 0, "tuned", 12) in cells(tuned.run())


# Stopped, and divided


@pytest.mark.parametrize("stop_at", [0, 4, 9, 12])
def test_a_stopped_experiment_keeps_what_there_is_and_goes_on_to_the_same(stop_at, bench, trained, tmp_path):
    """The choosing has 9 points."""
    bench.distance = salted(1)
    wanted = experiment(tmp_path / "whole", trained).run()
    points, bench.measured, bench.stop_at = bench.measured, [], stop_at
    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path / "out", trained).run()
    kept = read_json(tmp_path / "out/result.json")
    assert kept["trainings"] == wanted["trainings"]
    assert len(kept["points"]) == max(0, stop_at - 9)
    assert all(point in wanted["points"] for point in kept["points"])
    bench.stop_at = None
    assert experiment(tmp_path / "out", trained).run() == wanted
    assert [(name, point.key) for name, point, _ in bench.measured] == [(name, point.key) for name, point, _ in points]


def test_an_experiment_that_is_stopped_while_it_trains_goes_on_to_the_same(bench, trained, tmp_path, monkeypatch):
    bench.distance = salted(2)
    names, started = train_here(monkeypatch), trainings.started

    def start(training, runs, threads):
        if len(names) == 3:
            raise KeyboardInterrupt
        return started(training, runs, threads)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "started", start)
        with pytest.raises(KeyboardInterrupt):
            experiment(tmp_path / "out", tmp_path / "runs").run()
    found, wanted = experiment(tmp_path / "out", tmp_path / "runs").run(), experiment(tmp_path / "whole", trained).run()
    assert names == [f"{label}-12-seed{seed}" for seed in (0, 1) for label in MODELS]
    for result in (found, wanted):
        for training in result["trainings"]:
            del training["seconds"]
    assert found == wanted


@pytest.mark.parametrize(
    "parts",
    [
        [Part(models=["plain"]), Part(models=["looped"])],
        [Part(seeds=[1]), Part(seeds=[0])],
        [Part(seeds=[0]), Part(models=["looped"]), Part()],
        [Part(ways=["dpm"]), Part(ways=["ddim"])],
        [Part(budgets=[12]), Part(budgets=[6])],
        [Part(ways=["ddim"], budgets=[12]), Part(models=["plain"], seeds=[1]), Part()],
    ],
    ids=str,
)
def test_parts_of_a_table_add_up_to_the_whole(parts, bench, trained, tmp_path):
    bench.distance = salted(3)
    wanted = experiment(tmp_path / "whole", trained).run()
    for part in parts:
        result = experiment(tmp_path / "out", trained).run(part)
    assert result == wanted


def test_a_part_of_a_table_is_all_that_is_computed(bench, trained, tmp_path, monkeypatch):
    names = train_here(monkeypatch)
    result = experiment(tmp_path / "out", tmp_path / "runs").run(Part(models=["plain"], seeds=[0], budgets=[12]))
    assert names == ["plain-12-seed0"]
    assert cells(result) == {("plain", 0, "ddim", 12), ("plain", 0, "dpm", 12)}
    assert {(point.label, point.budget) for point in bench.of("choose")} == {("plain", 12)}


@pytest.mark.parametrize("salt", range(3))
@pytest.mark.parametrize(("table", "first", "then"), [
    (TABLE, [Part(seeds=[0])], Part()),
    (TABLE, [Part(seeds=[0])], Part(seeds=[1])),
    (TABLE, [Part(models=["plain"])], Part(models=["looped"])),
    (TABLE, [Part(seeds=[0]), Part(models=["plain"])], Part()),
    (ALONE, [Part(seeds=[0])], Part(seeds=[1])),
    (TABLE, [Part()], Part()),
    (TABLE, [Part(ways=["ddim"])], Part()),
    (TABLE, [Part(ways=["ddim"])], Part(ways=["dpm"])),
    (TABLE, [Part(budgets=[12])], Part()),
    (TABLE, [Part(seeds=[0], ways=["dpm"]), Part(models=["looped"], budgets=[6])], Part()),
    (ALONE, [Part(ways=["ddim"])], Part()),
])  # fmt: skip
def test_a_table_of_elsewhere_is_gone_on_with_to_the_same(salt, table, first, then, bench, trained, tmp_path):
    bench.distance = salted(salt)
    wanted = experiment(tmp_path / "whole", trained, table).run()
    for part in first:
        experiment(tmp_path / "elsewhere", trained, table).run(part)
    kept = read_json(tmp_path / "elsewhere/result.json")
    drawn = len(bench.of("choose"))
    result = experiment(tmp_path / "here", trained, table, kept=kept).run(then)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(wanted)) == read_json(tmp_path / "here/result.json")
    if cells(kept) >= {cell for cell in cells(wanted) if cell[1] == 0}:
        assert len(bench.of("choose")) == drawn  # nothing is chosen anew


@pytest.mark.parametrize("salt", range(3))
def test_a_table_that_has_got_more_models_is_gone_on_with(salt, bench, trained, tmp_path):
    bench.distance = salted(salt)
    wanted = experiment(tmp_path / "whole", trained).run()
    kept = json.loads(json.dumps(experiment(tmp_path / "elsewhere", trained, ALONE).run()))
    result = experiment(tmp_path / "here", trained, kept=kept).run()
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(wanted))


def test_only_what_is_missing_is_done(bench, trained, tmp_path, monkeypatch):
    """Of the later training, too, and where another way turns out to be better than what is kept."""
    bench.distance = preferring(scheduler="dpm++")
    experiment(tmp_path / "elsewhere", trained).run(Part(models=["plain"]))
    experiment(tmp_path / "elsewhere", trained).run(Part(models=["looped"], ways=["ddim"]))
    kept = read_json(tmp_path / "elsewhere/result.json")
    names, drawn, chosen = train_here(monkeypatch), len(bench.of("report")), len(bench.of("choose"))
    result = experiment(tmp_path / "here", tmp_path / "runs", kept=kept).run()
    assert {p.choices.scheduler for p in bench.of("choose")[chosen:]} == {"dpm++"}, "nothing that is kept"
    assert names == ["looped-12-seed0", "looped-12-seed1"]
    assert {(p.label, p.budget, p.choices.scheduler) for p in bench.of("report")[drawn:]} == {
        ("looped-12-seed0", 12, "dpm++"), ("looped-12-seed1", 12, "dpm++"),
    }  # fmt: skip
    assert [cell(result, "looped", seed, way, 12)["best"] for seed in (0, 1) for way in WAYS] == [False, True] * 2


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_all_trainings_have_is_shown_until_they_have_what_is_better(where, bench, trained, tmp_path):
    """All were measured in the one way, and then the first in the other, which is better."""
    bench.distance = preferring(scheduler="dpm++")
    kept = json.loads(json.dumps(experiment(tmp_path / "elsewhere", trained).run(Part(ways=["ddim"]))))
    one = experiment(tmp_path / where, trained, kept=kept if where == "here" else None)
    result = one.run(Part(seeds=[0]))
    assert cells(result) >= cells(kept)
    shown = {label: values for label, _, values in lines_of(result, None)}
    of_both = [cell(result, "looped", seed, "ddim", 12) for seed in GROUND.seeds]
    assert shown["looped"][12] == [point["measures"]["FD-fake"][0] for point in of_both]
    assert one.run() == experiment(tmp_path / "whole", trained).run()


def test_points_say_what_they_were_made_with_when_they_are_from_different_machines(bench, trained, tmp_path):
    kept = json.loads(json.dumps(experiment(tmp_path / "elsewhere", trained).run(Part(seeds=[0]))))
    assert kept["made_with"] == [{"device": "cpu"}]
    kept["made_with"] = [{"device": "another"}]
    result = experiment(tmp_path / "here", trained, kept=kept).run()
    made = {(point["seed"], result["made_with"][point["made_with"]]["device"]) for point in result["points"]}
    assert made == {(0, "another"), (1, "cpu")}


def test_what_is_kept_is_not_trained(bench, trained, tmp_path, monkeypatch):
    experiment(tmp_path / "elsewhere", trained).run(Part(seeds=[0]))
    kept = read_json(tmp_path / "elsewhere/result.json")
    names = train_here(monkeypatch)
    experiment(tmp_path / "here", tmp_path / "runs", kept=kept).run()
    assert sorted(names) == ["looped-12-seed1", "plain-12-seed1"]


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "other"}, "the kept result has another table than tiny"),
        ({"equal": "operations", "models": {"looped": "Looped", "plain": "Flat"}}, "has another equal and models than"),
        ({"points": [{"model": "plain", "seed": 0, "way": "ddpm", "budget": 6}]}, "has another ways than"),
        ({"points": [{"model": "plain", "seed": 0, "way": "dpm", "budget": 6}]}, "has another ways than"),
        ({"ground": {"recipe": "digits"}}, "has another ground"),
        ({"trainings": [{"model": "plain", "seed": 0, "steps": 13}]}, "plain trained for 13 steps, and here it is 12"),
    ],
)
def test_another_table_is_not_gone_on_with(changes, message, bench, trained, tmp_path):
    kept = json.loads(json.dumps(experiment(tmp_path / "elsewhere", trained).run(Part(seeds=[0]))))
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path / "here", trained, kept={**kept, **changes}).run()
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(models=["loped"]), "unknown model 'loped'. Did you mean 'looped'"),
        (Part(seeds=[2]), "unknown seed '2'"),
        (Part(ways=["dpm++"]), "unknown way 'dpm"),
        (Part(budgets=[13]), "unknown budget '13'"),
    ],
)
def test_a_part_that_is_none_of_the_table_is_refused(part, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path / "out", tmp_path / "runs").run(part)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def done(bench, trained, tmp_path):
    """A finished experiment, and its runs."""
    runs = shutil.copytree(trained, tmp_path / "runs")
    whole = experiment(tmp_path / "out", runs)
    whole.run()
    bench.measured.clear()
    return whole


def test_runs_that_are_others_are_refused(done, bench, monkeypatch):
    names, before = train_here(monkeypatch), contents(done.out / "report")
    other = replace(done, ground=replace(GROUND, changes={**SIZES, "lr": 0.5}))
    with pytest.raises(ValueError, match=r"lr was 0.001, is 0.5.*Choose another --runs-dir"):
        other.run()
    assert not names
    assert not bench.measured
    assert contents(done.out / "report") == before


def test_what_is_refused_leaves_the_result_as_it_was(done):
    before = (done.out / "result.json").read_bytes()
    other = replace(done, ground=replace(GROUND, changes={**SIZES, "lr": 0.5}))
    with pytest.raises(ValueError, match=r"lr was 0\.001"):
        other.run()
    assert (done.out / "result.json").read_bytes() == before


@pytest.mark.parametrize("of", ["another number of images", "no experiment"])
def test_a_folder_that_holds_something_else_is_refused_before_anything_is_trained(of, done, tmp_path, monkeypatch):
    names = train_here(monkeypatch)
    if of == "no experiment":
        (tmp_path / "mine/choose").mkdir(parents=True)
        (tmp_path / "mine/choose/notes.txt").write_text("mine")
        other = replace(done, out=tmp_path / "mine", runs=tmp_path / "others")
    else:
        other = replace(done, ground=replace(GROUND, chosen_on=70), runs=tmp_path / "others")
    with pytest.raises(ValueError, match=r"(c|C)hoose another"):
        other.run()
    assert not names


def test_data_that_is_not_there_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    fork_trainings(monkeypatch)
    ground = Ground("images", {**SIZES, "image_size": 8}, data="a folder of images")
    with pytest.raises(ValueError, match="there is no"):
        experiment(tmp_path / "out", tmp_path / "runs", ground=ground, data=str(tmp_path / "nowhere")).run()
    assert not list(tmp_path.iterdir())
