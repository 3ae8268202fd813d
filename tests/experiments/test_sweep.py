"""A sweep: which points there are, what is kept of each, and that a stopped one goes on to the same end."""

import dataclasses
import math
import re
import shutil
import signal

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fpdm.drawing import load_pipeline, schedule_of
from fpdm.evaluation import Evaluation, Instrument, open_samples
from fpdm.experiments import sweep
from fpdm.experiments.points import Axes, Settings, labelled, points_of
from fpdm.experiments.sweep import all_points, run_sweep
from fpdm.imaging import grid
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.weights import digest
from tests.experiments.sweeps import DIGITS, grids_in, points_in, read_strictly, save_pipeline, times_of

BUDGETS, SCHEDULERS, IMAGES = [6, 12], ["dpm++"], 50
BATCHES = [list(range(20)), list(range(20, 40)), list(range(40, 50))]


@pytest.fixture(scope="module")
def settings(cache):
    return Settings("digits", num_images=IMAGES, batch_size=20, device="cpu")


@pytest.fixture(scope="module")
def whole(models, settings, tmp_path_factory):
    """A sweep that nothing came between."""
    out = tmp_path_factory.mktemp("whole")
    sweep_all(models, settings, out)
    return out


def sweep_all(models, settings, out, processes=1):
    return run_sweep(list(models.values()), Axes(BUDGETS, SCHEDULERS), settings, out, processes)


# Which points there are


def test_the_parameters_of_a_point_are_the_networks_in_8_bits_too(models, settings, tmp_path):
    model = next(iter(models.values()))
    eight = dataclasses.replace(settings, dtype="int8")
    (found,) = run_sweep([model], Axes([12], SCHEDULERS), eight, tmp_path / "sweep")
    pipe = load_pipeline(labelled([model]).popitem()[1], "cpu", "float32")
    assert found["parameters"] == sum(weight.numel() for weight in pipe.transformer.parameters())


def test_points_are_all_models_budgets_schedulers_and_iterations(models, settings):
    schedulers = ["ddim", "dpm++"]
    points, left_out = points_of(list(models.values()), Axes(BUDGETS, schedulers, [1, 2]), settings)
    found = [(point.label, point.budget, point.choices.scheduler, point.choices.iterations) for point in points]
    looped = [("looped", b, s, n) for b in BUDGETS for s in schedulers for n in (1, 2)]
    plain = [("plain", b, s, None) for b in BUDGETS for s in schedulers]  # an explicit network has no iterations
    assert sorted(found, key=str) == sorted(looped + plain, key=str)
    assert left_out == []
    assert len({point.key for point in points}) == len(points)
    assert all(re.fullmatch(r"[a-z0-9-]+", point.key) for point in points)
    assert [point.budget for point in points] == sorted(point.budget for point in points), "the cheapest come first"


def test_without_iterations_there_is_one_plan_of_each_budget(models, settings):
    points, _ = points_of(list(models.values()), Axes(BUDGETS, SCHEDULERS), settings)
    assert {point.choices.iterations for point in points} == {None}
    assert len(points) == len(models) * len(BUDGETS) * len(SCHEDULERS)


def test_points_that_cannot_be_are_left_out_with_the_reason(models, settings):
    points, left_out = points_of(list(models.values()), Axes([4, 12], ["ddim"], [2, 8]), settings)
    assert {(point.label, point.budget, point.choices.iterations) for point in points} == {
        ("looped", 4, 2),
        ("looped", 12, 2),
        ("looped", 12, 8),
        ("plain", 12, None),
    }
    reasons = dict(reason.split(": ", 1) for reason in left_out)
    assert set(reasons) == {"looped-4-ddim-8-iterations", "plain-4-ddim"}
    assert "needs 10" in reasons["looped-4-ddim-8-iterations"]
    assert "smallest possible is 5" in reasons["plain-4-ddim"]


def test_no_point_at_all_is_refused_with_the_reasons(models, settings, tmp_path):
    with pytest.raises(ValueError, match=r"none of these points can be.*looped-1-ddim.*plain-1-ddim") as error:
        run_sweep(list(models.values()), Axes([1], ["ddim"]), settings, tmp_path / "out")
    assert "smallest possible is 5" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["rising", "falling", "linear:0.5", "cosine:-1"])
@pytest.mark.parametrize("iterations", [None, 2])
def test_an_allocation_holds_for_every_point_that_has_iterations(iterations, allocation, models, settings):
    points, _ = points_of([models["looped"]], Axes([40], ["ddim"], [iterations], [allocation]), settings)
    pipe = FixedPointDiTPipeline.from_pretrained(models["looped"])
    (planned,) = [point.choices.plan(pipe) for point in points]
    assert planned == pipe.plan(budget=40, iterations=iterations, allocation=allocation)


def test_operations_are_what_pytorch_counts_as_an_image_is_drawn(models, settings):
    points, _ = points_of(list(models.values()), Axes([13], ["ddim"], [1, 3]), settings)
    for point in points:
        pipe = FixedPointDiTPipeline.from_pretrained(point.folder)
        pipe.set_progress_bar_config(disable=True)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            pipe([0], budget=13, scheduler="ddim", iterations=point.choices.iterations, seed=0)
        assert point.operations == counter.get_total_flops(), point.key


def test_models_are_labelled_by_their_folders_or_by_name(models, tmp_path, monkeypatch):
    run = tmp_path / "run-of-mine"
    shutil.copytree(models["looped"], run / "pipeline")
    assert labelled([str(run)]) == {"run-of-mine": str(run / "pipeline")}
    assert labelled([str(run / "pipeline")]) == {"run-of-mine": str(run / "pipeline")}
    assert labelled([str(run) + "/", models["plain"]]) == {
        "run-of-mine": str(run / "pipeline"),
        "plain": models["plain"],
    }
    monkeypatch.chdir(run)
    assert labelled(["pipeline"]) == {"run-of-mine": "pipeline"}
    assert labelled([f"a={run}", f"b c={run}"]) == {"a": str(run / "pipeline"), "b c": str(run / "pipeline")}


def test_a_run_whose_name_has_an_equals_sign_can_be_named(models, tmp_path):
    shutil.copytree(models["looped"], tmp_path / "lr=0.1/pipeline")
    assert labelled([f"slow={tmp_path / 'lr=0.1'}"]) == {"slow": str(tmp_path / "lr=0.1/pipeline")}
    assert labelled([str(tmp_path / "lr=0.1")]) == {"lr=0.1": str(tmp_path / "lr=0.1/pipeline")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{looped}", "{looped}/"], "two models are called looped"),
        (["a={looped}", "a={plain}"], "two models are called a"),
        (["looped={plain}", "{looped}"], "two models are called looped"),
        (["={looped}"], "'' cannot name a model"),
        (["a/b={looped}"], "'a/b' cannot name a model"),
        (["<b>={looped}"], "'<b>' cannot name a model"),
        (["a={looped}x"], "there is no folder"),
    ],
)
def test_labels_that_do_not_tell_models_apart_are_refused(words, message, models):
    with pytest.raises(ValueError, match=message):
        labelled([word.format(**models) for word in words])


# What is kept of a point


def test_a_point_tells_what_was_spent_and_under_which_request(whole, models):
    points = {path.stem: read_strictly(path) for path in (whole / "points").iterdir()}
    assert set(points) == {f"{label}-{budget}-dpmpp" for label in models for budget in BUDGETS}
    for point in points.values():
        pipe = FixedPointDiTPipeline.from_pretrained(models[point["model"]])
        plan = pipe.plan(budget=point["budget"])
        assert point["passes"] == plan.planned <= point["budget"]
        assert point["plan"] == str(plan)
        assert point["operations"] > 0
        assert point["parameters"] == pipe.transformer.num_parameters()
        assert 0 < point["seconds"] < 60
        assert point["diverged"] == 0
        assert point["request"] == {
            "model": digest(pipe.transformer), "vae": None, "noise_schedule": schedule_of(pipe),
            "classes": list(range(10)), "class_names": DIGITS,
            "budget": point["budget"], "num_inference_steps": None, "iterations": None, "allocation": "constant",
            "reuse": "plain", "solver": "picard", "tolerance": None, "pooled": False,
            "scheduler": point["scheduler"], "guidance_scale": 1.0, "guidance_interval": None,
            "guidance_channels": None, "guidance_share": 1.0, "seed": 0,
        }  # fmt: skip
        assert point["made_with"]["batch_size"] == 20
        assert point["made_with"]["processes"] == point["made_with"]["threads"] == 1
        assert {"device", "hardware", "python", "torch", "fpdm"} <= set(point["made_with"])
    assert points["plain-12-dpmpp"]["passes"] == 10, "what no whole timestep fits into is left"
    assert points["looped-12-dpmpp"]["passes"] == 12
    assert points["plain-12-dpmpp"]["operations"] == 2 * points["plain-6-dpmpp"]["operations"]


def test_a_point_is_the_measurement_of_the_images_that_its_request_gives(whole, models, settings, tmp_path):
    pipe = FixedPointDiTPipeline.from_pretrained(models["looped"])
    pipe.set_progress_bar_config(disable=True)
    classes = [i % 10 for i in range(IMAGES)]
    images = pipe(classes, budget=12, scheduler="dpm++", seed=0, image_indices=range(IMAGES)).images
    for label, (i, image) in zip(classes, enumerate(images), strict=True):
        (tmp_path / "samples" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "samples" / str(label) / f"{i:06d}.png")
    instrument = Instrument.open("digits", 8, cache=tmp_path / "cache")
    expected = instrument.measure(open_samples(tmp_path / "samples"), progress=False)
    found = Evaluation.from_dict(read_strictly(whole / "points/looped-12-dpmpp.json")["evaluation"])
    # The folder has its images class by class: all but what the bootstrap draws is the same.
    assert {m.name: m.value for m in found.measures} == pytest.approx({m.name: m.value for m in expected.measures})
    assert {m.name: m.floor for m in found.measures} == {m.name: m.floor for m in expected.measures}
    assert found.identity == expected.identity
    grid(images, columns=10).save(tmp_path / "grid.png")
    assert (whole / "grids/looped-12-dpmpp.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_every_number_of_a_point_has_an_interval_and_a_floor(whole):
    for path in (whole / "points").iterdir():
        evaluation = read_strictly(path)["evaluation"]
        assert evaluation["samples"] == IMAGES
        assert [measure["name"] for measure in evaluation["measures"]] == [
            "FD-classifier", "kernel distance", "precision", "recall", "density", "coverage", "accuracy",
            "nearest real image",
            "near copies",
        ]  # fmt: skip
        for measure in evaluation["measures"]:
            assert measure["low"] <= measure["value"] <= measure["high"], measure
            assert math.isfinite(measure["floor"])
        distance = evaluation["measures"][0]
        assert 0 < distance["floor"] < distance["low"] < distance["high"], "these networks were never trained"


def test_a_model_that_diverges_is_measured_all_the_same(settings, tmp_path):
    wild = save_pipeline(tmp_path / "wild", factor=1e20)
    (point,) = run_sweep([wild], Axes([6], ["ddim"]), settings, tmp_path / "out")
    assert {**read_strictly(tmp_path / "out/points/wild-6-ddim.json"), "key": "wild-6-ddim"} == point
    assert point["diverged"] == IMAGES
    assert Evaluation.from_dict(point["evaluation"])["coverage"].value <= 0.05


def test_a_model_without_classes_is_swept_beside_others(models, settings, tmp_path):
    free = save_pipeline(tmp_path / "free", num_classes=0)
    points = run_sweep([free, models["looped"]], Axes([6], ["ddim"]), settings, tmp_path / "out")
    assert [(point["model"], point["request"]["classes"]) for point in points] == [
        ("free", None),
        ("looped", list(range(10))),
    ]
    assert ["accuracy" in str(point["evaluation"]["measures"]) for point in points] == [False, True]


# Stopped and gone on with


class Drawn(list):
    """The image numbers of each batch that was drawn; before batch number `stop_at`, Ctrl-C is pressed."""

    stop_at = None


@pytest.fixture
def drawn(monkeypatch):
    batches, call = Drawn(), FixedPointDiTPipeline.__call__

    def recorded(self, *args, **choices):
        if len(batches) == batches.stop_at:
            signal.raise_signal(signal.SIGINT)
        batches.append(list(choices["image_indices"]))
        return call(self, *args, **choices)

    monkeypatch.setattr(FixedPointDiTPipeline, "__call__", recorded)
    return batches


def test_a_sweep_stopped_within_a_point_goes_on_with_the_next_image(drawn, whole, models, settings, tmp_path):
    drawn.stop_at = 4  # the second point has one batch of three
    with pytest.raises(KeyboardInterrupt):
        sweep_all(models, settings, tmp_path)
    kept = times_of(tmp_path)
    assert set(kept) == {"plain-6-dpmpp"}
    assert len(list((tmp_path / "drawing/looped-6-dpmpp").glob("0*.png"))) == 20

    drawn.stop_at, drawn[:] = None, []
    points = sweep_all(models, settings, tmp_path)
    assert len(points) == 4
    assert drawn == BATCHES[1:] + 2 * BATCHES
    assert kept.items() <= times_of(tmp_path).items()
    assert points_in(tmp_path) == points_in(whole)
    assert grids_in(tmp_path) == grids_in(whole)
    assert not any((tmp_path / "drawing").iterdir()), "images of finished points are not kept"


def test_a_sweep_stopped_between_drawing_and_measuring_draws_nothing_again(
    drawn, whole, models, settings, tmp_path, monkeypatch
):
    def stopped(*args, **choices):
        raise KeyboardInterrupt

    one = {"plain": models["plain"]}
    with monkeypatch.context() as patch:
        patch.setattr(Instrument, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep_all(one, settings, tmp_path)
    assert drawn == BATCHES
    assert not any((tmp_path / "points").iterdir())
    sweep_all(one, settings, tmp_path)
    assert drawn == 2 * BATCHES, "the first of two points was drawn already"
    assert points_in(tmp_path).items() <= points_in(whole).items()


def test_a_sweep_stopped_as_its_folder_is_made_goes_on(models, settings, tmp_path, monkeypatch):
    def stopped(path, value):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_sweep([models["plain"]], Axes([6], ["ddim"]), settings, out)
    assert len(run_sweep([models["plain"]], Axes([6], ["ddim"]), settings, out)) == 1


def test_what_was_lost_or_torn_is_computed_again_and_nothing_else(drawn, whole, models, settings, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    points, grids = out / "points", out / "grids"
    text = (points / "looped-6-dpmpp.json").read_text()
    (points / "looped-6-dpmpp.json").write_text(text[: len(text) // 2])
    (points / "plain-6-dpmpp.json").unlink()
    (grids / "plain-12-dpmpp.png").unlink()
    assert [(point["model"], point["budget"]) for point in all_points(out)] == [("looped", 12)]
    kept = times_of(out)

    sweep_all(models, settings, out)
    assert drawn == 3 * BATCHES
    now = times_of(out)
    assert {key for key in now if now[key] == kept.get(key)} == {"looped-12-dpmpp"}
    assert points_in(out) == points_in(whole)
    assert grids_in(out) == grids_in(whole)

    drawn.clear()
    sweep_all(models, settings, out)
    assert drawn == [], "nothing is missing"


def test_weights_that_change_while_a_sweep_runs_are_not_taken_for_the_old_ones(models, settings, tmp_path, monkeypatch):
    """As if a training went on beside it: what is drawn is by the weights that the sweep's folder names, or refused."""
    out, model, computed = tmp_path / "out", tmp_path / "model", sweep.computed
    save_pipeline(model)
    before = digest(FixedPointDiTPipeline.from_pretrained(model).transformer)

    def trained_on(*args):
        save_pipeline(model, factor=0.5)
        return computed(*args)

    monkeypatch.setattr(sweep, "computed", trained_on)
    with pytest.raises(ValueError, match="model"):
        run_sweep([str(model)], Axes([6], ["ddim"]), settings, out)
    assert read_strictly(out / "sweep.json")["models"] == {"model": before}
    assert not any((out / "points").iterdir())


def test_a_model_trained_on_between_two_sweeps_of_one_process_is_drawn_as_it_is_now(settings, tmp_path):
    model = tmp_path / "model"
    for factor in (1.0, 0.5):
        save_pipeline(model, factor=factor)
        (point,) = run_sweep([str(model)], Axes([6], ["ddim"]), settings, tmp_path / f"out-{factor}")
        assert point["request"]["model"] == digest(FixedPointDiTPipeline.from_pretrained(model).transformer)
