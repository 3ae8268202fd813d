"""The axes of a sweep: which points they make, what those are called, and that they differ in what they say."""

import dataclasses
import json
import re
import shutil

import pytest

from fpdm.experiments.page import write_report
from fpdm.experiments.points import Axes, Settings, points_of
from fpdm.experiments.sweep import run_sweep
from fpdm.sampling import TunedPlan, save_plans
from tests.experiments.sweeps import points_in, times_of

TUNED = [  # of 6 and 12 block passes; the budget of 12 has another scheduler, reuse and solver
    TunedPlan(6, (1, 1), "ddim", "plain", "picard", {}),
    TunedPlan(12, (3, 2, 1), "dpm++", "linear", "anderson:2", {}),
]


@pytest.fixture(scope="module")
def settings(cache):
    return Settings("digits", num_images=50, batch_size=50, device="cpu")


@pytest.fixture
def tuned(models, tmp_path):
    """The models with tuned plans."""
    for label, folder in models.items():
        shutil.copytree(folder, tmp_path / label)
    save_plans(tmp_path / "looped", TUNED)
    save_plans(tmp_path / "plain", [TunedPlan(12, (None, None), "ddim", "plain", "picard", {})])
    return {label: str(tmp_path / label) for label in models}


MANY = Axes(
    budgets=[40],
    schedulers=["ddim", "dpm++"],
    iterations=[2, 4],
    allocations=["constant", "linear:1"],
    reuses=["plain", "linear"],
    solvers=["picard", "anderson:2"],
    seeds=[0, 1],
)


def test_all_combinations_appear_once_with_keys_of_their_own(models, settings):
    points, left_out = points_of([models["looped"]], MANY, settings)
    assert left_out == []
    assert len(points) == 2**6
    chosen = {
        (c.budget, c.scheduler, c.iterations, c.allocation, c.reuse, c.solver, c.seed)
        for c in (point.choices for point in points)
    }
    assert len(chosen) == len({point.key for point in points}) == len(points)
    assert all(re.fullmatch(r"[a-z0-9_.-]+", point.key) for point in points), "they name files"
    assert {point.tuned for point in points} == {False}


def test_an_explicit_network_takes_no_part_in_the_axes_of_solves(models, settings):
    points, left_out = points_of([models["plain"]], MANY, settings)
    assert left_out == [], "there is nothing that would be the same"
    assert sorted(point.key for point in points) == sorted(
        f"plain-40-{scheduler}{seed}" for scheduler in ("ddim", "dpmpp") for seed in ("", "-seed1")
    )


def test_the_keys_of_defaults_are_those_of_older_sweeps_and_the_others_say_what_is_not_default(models, settings):
    """A key that changed would have a finished point computed again."""
    points, _ = points_of(list(models.values()), Axes([40], ["ddpm", "dpm++"]), settings)
    assert {point.key for point in points} == {
        f"{label}-40-{scheduler}" for label in models for scheduler in ("ddpm", "dpmpp")
    }
    for axes, key in (
        (Axes([40], ["ddim"], [4]), "looped-40-ddim-4-iterations"),
        (Axes([40], ["ddim"], allocations=["linear:-0.5"]), "looped-40-ddim-linear_-0.5"),
        (Axes([40], ["ddim"], reuses=["none"]), "looped-40-ddim-none-reuse"),
        (Axes([40], ["ddim"], solvers=["anderson:3"]), "looped-40-ddim-anderson_3"),
        (Axes([40], ["ddim"], seeds=[7]), "looped-40-ddim-seed7"),
        (
            Axes([40], ["unipc"], [4], ["cosine:1"], ["quadratic"], ["broyden"], [2]),
            "looped-40-unipc-4-iterations-cosine_1-quadratic-reuse-broyden-seed2",
        ),
    ):
        assert [point.key for point in points_of([models["looped"]], axes, settings)[0]] == [key]


@pytest.mark.parametrize(
    ("axes", "first", "others"),
    [
        (Axes([40], ["ddim"], [None, 2]), "looped-40-ddim", ["looped-40-ddim-2-iterations"]),
        (
            Axes([40], ["ddim"], allocations=["rising", "linear:1", "linear:1.0"]),
            "looped-40-ddim-rising",
            ["looped-40-ddim-linear_1", "looped-40-ddim-linear_1.0"],
        ),
        # One timestep has nothing to share out.
        (Axes([4], ["ddim"], allocations=["constant", "linear:1"]), "looped-4-ddim", ["looped-4-ddim-linear_1"]),
    ],
)
def test_combinations_of_the_same_plan_are_left_out_with_the_reason(axes, first, others, models, settings):
    points, left_out = points_of([models["looped"]], axes, settings)
    assert [point.key for point in points] == [first]
    assert left_out == [f"{key}: the same plan as another" for key in others]


def test_every_key_names_a_file(models, settings):
    (point,) = points_of([models["looped"]], Axes([40], ["ddim"], [4], ["linear:1/2"]), settings)[0]
    assert "/" not in point.key


# Tuned plans


def test_tuned_plans_are_points_of_their_own_budgets(tuned, settings):
    axes = Axes([6, 12, 24], ["ddim"], seeds=[0, 1], tuned=True)
    points, left_out = points_of(list(tuned.values()), axes, settings)
    assert sorted(left_out) == [f"{name}-tuned: the model has no such plan" for name in
                                ("looped-24", "plain-24", "plain-6")]  # fmt: skip
    by_hand, by_tuning = ([point for point in points if point.tuned is which] for which in (False, True))
    assert len(by_hand) == 2 * 3 * 2
    assert [point.key for point in by_hand] == [
        point.key for point in points_of(list(tuned.values()), dataclasses.replace(axes, tuned=False), settings)[0]
    ]
    found = sorted((point.label, point.budget, point.choices.seed) for point in by_tuning)
    assert found == [("looped", 6, 0), ("looped", 6, 1), ("looped", 12, 0), ("looped", 12, 1),
                     ("plain", 12, 0), ("plain", 12, 1)]  # fmt: skip
    (twelve,) = [point for point in by_tuning if (point.label, point.budget, point.choices.seed) == ("looped", 12, 0)]
    assert twelve.choices.iterations == (3, 2, 1)
    assert (twelve.choices.scheduler, twelve.choices.reuse, twelve.choices.solver) == ("dpm++", "linear", "anderson:2")


def test_the_key_of_a_tuned_plan_is_stable_and_changes_with_the_plan(tuned, tmp_path, settings):
    axes = Axes([12], ["ddim"], seeds=[0, 1], tuned=True)

    def keys():
        return [point.key for point in points_of([tuned["looped"]], axes, settings)[0] if point.tuned]

    first = keys()
    assert re.fullmatch(r"looped-12-tuned-[0-9a-f]{6}", first[0])
    assert first[1] == first[0] + "-seed1"
    assert keys() == first
    save_plans(tmp_path / "looped", [dataclasses.replace(TUNED[1], iterations=(2, 2, 2))])
    assert not set(keys()) & set(first)


# What is measured


def test_seeds_reuse_and_tuned_plans_are_measured_apart_and_shown(tuned, settings, tmp_path):
    out = tmp_path / "out"
    axes = Axes([12], ["ddim"], reuses=["plain", "linear"], seeds=[0, 1], tuned=True)
    points = run_sweep([tuned["looped"]], axes, settings, out)
    assert len(points) == 2 * 2 + 2
    values = [point["evaluation"]["measures"][0]["value"] for point in points]
    assert len(set(values)) == len(values), "other images have other numbers"
    for point in points:
        request = point["request"]
        assert (point["seed"], point["reuse"], point["solver"], point["allocation"]) == (
            request["seed"], request["reuse"], request["solver"], request["allocation"],
        )  # fmt: skip
        assert point["tuned"] is ("tuned" in point["key"])
        assert (point["budget"], point["passes"]) == (12, 12)
        assert f"seed{point['seed']}" in point["key"] or point["seed"] == 0
    page = write_report(points, out).read_text()
    assert all(f'id="{point["key"]}"' in page for point in points)
    assert "linear reuse, seed 1" in page
    assert "tuned, linear reuse, anderson:2, seed 1" in page

    before = times_of(out)
    assert run_sweep([tuned["looped"]], axes, settings, out) == points
    assert times_of(out) == before


# Sweeps of before there were these axes


@pytest.fixture
def older(models, settings, tmp_path):
    """A finished sweep as an older version left it, and what its settings are changed by."""
    run_sweep([models["plain"]], Axes([6], ["ddim"]), settings, tmp_path / "out")
    path = next((tmp_path / "out/points").iterdir())
    point = json.loads(path.read_text())
    for name in ("allocation", "reuse", "solver", "seed", "tuned"):
        del point[name]
    path.write_text(json.dumps(point))

    def with_settings(**changes):
        kept = json.loads((tmp_path / "out/sweep.json").read_text())
        kept["settings"] |= {"seed": 0, "allocation": "constant", "reuse": True, **changes}
        (tmp_path / "out/sweep.json").write_text(json.dumps(kept))
        return tmp_path / "out"

    return with_settings


def test_an_older_sweep_is_added_to_and_shown(older, models, settings):
    out = older()
    before = times_of(out)
    points = run_sweep([models["plain"]], Axes([6, 12], ["ddim"]), settings, out)
    assert before.items() <= times_of(out).items()
    assert set(points_in(out)) == {"plain-6-ddim", "plain-12-ddim"}
    page = write_report(points, out).read_text()
    assert 'id="plain-6-ddim"' in page
    assert 'id="plain-12-ddim"' in page


@pytest.mark.parametrize("changes", [{"seed": 1}, {"reuse": False}, {"allocation": "rising"}], ids=str)
def test_points_of_an_older_sweep_with_other_settings_are_not_taken_for_defaults(changes, older, models, settings):
    with pytest.raises(ValueError, match=next(iter(changes))):
        run_sweep([models["plain"]], Axes([6], ["ddim"]), settings, older(**changes))
