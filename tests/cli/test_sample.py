"""`fpdm sample`: its options reach the sampling, tuned plans are used and told of, one command at a time per folder."""

import io
import json
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image

from fpdm import drawing
from fpdm.cli.main import main
from fpdm.cli.sample import parse_classes
from fpdm.diffusion import for_sampling
from fpdm.experiments import trace
from fpdm.imaging import grid
from fpdm.models import FixedPointDiT
from fpdm.models.float8 import float8_missing
from fpdm.models.int8 import BACKEND
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import TunedPlan, save_plans
from tests.commands import refusal, wait_for
from tests.processes import Program

BUDGET = ["--budget", "40"]  # of "looped": 10 timesteps of 2 iterations
NEW = ("solver", "tolerance", "pooled", "guidance_interval", "guidance_channels", "guidance_share")  # of a request
FINE = TunedPlan(320, (2,) * 80, "dpm++", "plain", "picard", {})
COARSE = TunedPlan(80, (5,) * 5 + (4,) * 5 + (1,) * 5, "ddim", "linear", "anderson:2", {})


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory):
    """The model with tuned plans for 80 and 320 block passes."""
    folder = tmp_path_factory.mktemp("tuned") / "looped"
    shutil.copytree(models["looped"], folder)
    save_plans(folder, [FINE, COARSE])
    return folder


def command(model, out, *options):
    """Of several values of one option, the last one holds."""
    return ["sample", str(model), "--out", str(out), "--num-images", "3", *map(str, options)]


def sample(*arguments):
    return main(command(*arguments))


def refused(capsys, *arguments):
    return refusal(capsys, command(*arguments))


def drawn(model, out, *options):
    """Images, request and report of a command that is not refused."""
    assert sample(model, out, *options) == 0
    kept = json.loads((out / "report.json").read_text())
    assert kept["request"] == json.loads((out / "request.json").read_text())
    return images_in(out), kept["request"], kept["report"]


def images_in(out):
    return {path.name: path.read_bytes() for path in out.glob("0*.png")}


# Options


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory):
    return drawn(models["looped"], tmp_path_factory.mktemp("plain"), *BUDGET)


@pytest.fixture(scope="module")
def guided(models, tmp_path_factory):
    return drawn(models["looped"], tmp_path_factory.mktemp("guided"), *BUDGET, "--guidance-scale", "2")


@pytest.mark.parametrize(
    ("option", "value", "kept", "same"),
    [
        ("--reuse", "none", "none", False),
        ("--reuse", "plain", "plain", True),
        ("--reuse", "linear", "linear", False),
        ("--reuse", "quadratic", "quadratic", False),
        ("--solver", "picard", "picard", True),
        ("--solver", "picard:0.5", "picard:0.5", False),
        ("--solver", "anderson:2", "anderson:2", False),
        ("--solver", "broyden", "broyden", False),
        ("--tolerance", "1e-9", 1e-9, True),
        ("--tolerance", "0.5", 0.5, False),
        ("--allocation", "constant", "constant", True),
        ("--allocation", "linear:1", "linear:1", False),
        ("--allocation", "cosine:-1.5", "cosine:-1.5", False),
        ("--scheduler", "ddim", "ddim", False),
        ("--scheduler", "unipc", "unipc", False),
    ],
)
def test_an_option_of_the_plan_reaches_the_sampling(option, value, kept, same, models, plain, tmp_path):
    images, request, report = drawn(models["looped"], tmp_path, *BUDGET, option, value)
    assert request == {**plain[1], option[2:]: kept}
    assert (images == plain[0]) is same
    assert report["planned"] == 40
    assert report["spent"] < 40 if value == "0.5" and option == "--tolerance" else report["spent"] == 40


@pytest.mark.skipif(bool(BACKEND.missing()), reason=BACKEND.missing() or "-")
def test_int8_draws_nearly_the_same_under_the_same_plan_and_is_another_model(models, plain, tmp_path, capsys):
    images, request, report = drawn(models["looped"], tmp_path, *BUDGET, "--dtype", "int8")
    assert images.keys() == plain[0].keys()
    assert images != plain[0]
    for name in images:
        one, other = (np.asarray(Image.open(io.BytesIO(found[name])), dtype=float) for found in (images, plain[0]))
        assert np.abs(one - other).mean() < 8  # of 255
    assert {**request, "model": plain[1]["model"]} == plain[1]
    assert request["model"] != plain[1]["model"]
    assert report["spent"] == plain[2]["spent"]
    said = refused(capsys, models["looped"], tmp_path, *BUDGET)
    assert "of another request: model had other weights, or another --dtype. Choose" in said


@pytest.mark.parametrize(
    ("options", "message"), [(["--scheduler", "unipc"], None), ([], "scheduler was 'ddpm', is 'unipc'")]
)
def test_a_folder_begun_with_a_model_saved_with_another_scheduler(options, message, models, tmp_path, capsys):
    """As versions before UniPC saved them: where the scheduler is named, the images are the same."""
    before, _, _ = drawn(models["looped"], tmp_path / "out", *BUDGET, *options)
    folder = shutil.copytree(models["looped"], tmp_path / "saved-anew")
    pipe = FixedPointDiTPipeline.from_pretrained(folder)
    pipe.scheduler = for_sampling(pipe.scheduler)
    pipe.save_pretrained(folder)
    if message is None:
        assert sample(folder, tmp_path / "out", *BUDGET, *options) == 0
        assert drawn(folder, tmp_path / "other", *BUDGET, *options)[0] == before
    else:
        assert message in refused(capsys, folder, tmp_path / "out", *BUDGET, *options)


def test_a_pipeline_that_is_interrupted_leaves_no_image_half_drawn(models, tmp_path):
    pipe = FixedPointDiTPipeline.from_pretrained(models["looped"])
    step, calls = pipe.progress_bar, []

    def stopped(*given, **how):
        calls.append(len(calls))
        pipe._interrupt = len(calls) == 2
        return step(*given, **how)

    pipe.progress_bar = stopped
    with pytest.raises(InterruptedError, match="images 2 to 3 are not drawn"):
        drawing.draw_missing(pipe, tmp_path / "out", 6, [0], 2, drawing.Choices(budget=20, iterations=2))
    assert sorted(images_in(tmp_path / "out")) == ["000000.png", "000001.png"]


def test_fewer_images_than_are_there_leave_all_of_them_in_the_grid_in_their_places(models, tmp_path, capsys):
    drawn(models["looped"], tmp_path, *BUDGET, "--num-images", "5")
    before = (tmp_path / "grid.png").read_bytes()
    capsys.readouterr()
    assert drawn(models["looped"], tmp_path, *BUDGET, "--num-images", "2")[2]["images"] == 5
    assert f"5 images in {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / "grid.png").read_bytes() == before
    (tmp_path / "000003.png").unlink()
    drawn(models["looped"], tmp_path, *BUDGET, "--num-images", "2")
    expected = np.array(Image.open(io.BytesIO(before)))
    fourth = (slice(None), slice(3 * expected.shape[1] // 5, 4 * expected.shape[1] // 5))
    assert (expected[fourth] < 255).any()
    expected[fourth] = 255
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), expected)


def test_a_compiled_network_draws_the_same(models, plain, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(drawing, "check_compiler", lambda device: None)
    monkeypatch.setattr(FixedPointDiT, "compile_repeated_blocks", lambda self: made.append(self))
    assert drawn(models["looped"], tmp_path, *BUDGET, "--compile")[0] == plain[0]
    assert len(made) == 1


def test_without_a_compiler_nothing_is_compiled(models, tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        message = refused(capsys, models["looped"], tmp_path / "out", *BUDGET, "--compile")
    assert "--compile needs a C++ compiler, which there is not: install g++ or clang++" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_are_refused_without_a_gpu(models, tmp_path, capsys):
    message = refused(capsys, models["looped"], tmp_path / "out", *BUDGET, "--cuda-graphs")
    assert "--cuda-graphs are for a GPU, not for cpu: leave them out" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(float8_missing("cpu")), reason=float8_missing("cpu") or "-")
def test_float8_draws_under_the_same_plan(models, plain, tmp_path):
    images, request, report = drawn(models["looped"], tmp_path, *BUDGET, "--dtype", "float8")
    assert images.keys() == plain[0].keys()
    assert images != plain[0]
    assert request["model"] != plain[1]["model"]
    assert report["spent"] == plain[2]["spent"]


@pytest.mark.parametrize(
    ("allocation", "first", "last"), [("linear:1", 1, 3), ("linear:-1", 3, 1), ("cosine:1", 1, 3), ("rising", 1, 3)]
)
def test_an_allocation_gives_its_iterations_from_noise_to_image(allocation, first, last, models, tmp_path):
    report = drawn(models["looped"], tmp_path, *BUDGET, "--allocation", allocation)[2]
    assert (report["iterations"][0], report["iterations"][-1], sum(report["iterations"])) == (first, last, 20)


@pytest.mark.parametrize(
    ("option", "value", "kept", "same", "total"),
    [
        ("--guidance-interval", "0,1000", [0, 1000], True, 80),
        ("--guidance-interval", "0,499.5", [0, 499.5], False, 60),  # at 499, 399, ..., 99
        ("--guidance-channels", "1", 1, True, 80),  # there is only one
        ("--guidance-share", "1", 1, True, 80),
        ("--guidance-share", "0.5", 0.5, False, 70),  # of 2 iterations, 1
    ],
)
def test_an_option_of_guidance_reaches_the_sampling(option, value, kept, same, total, models, guided, tmp_path):
    images, request, report = drawn(models["looped"], tmp_path, *BUDGET, "--guidance-scale", "2", option, value)
    assert request == {**guided[1], option[2:].replace("-", "_"): kept}
    assert (images == guided[0]) is same
    assert (report["spent"], report["total_passes"]) == (40, total)


def test_what_a_tolerance_leaves_over_is_told_and_never_more_is_spent_than_planned(models, tmp_path, capsys):
    _, _, report = drawn(
        models["looped"], tmp_path / "own", "--budget", "60", "--iterations", "8", "--tolerance", "0.1"
    )
    assert report["spent"] < 60
    assert f"; {report['spent']:.1f} of 60 block passes each" in capsys.readouterr().out
    assert report["most"] <= 60
    options = ["--budget", "60", "--iterations", "8", "--tolerance", "0.1", "--pooled"]
    _, request, pooled = drawn(models["looped"], tmp_path / "pooled", *options)
    assert request["pooled"] is True
    assert report["spent"] <= pooled["spent"] <= 60


LEFT_BEHIND = "draw_missing checks a tolerance only in the pipeline's call, after the folder is claimed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reuse", "yes"], ["unknown reuse 'yes'", "none, plain, linear, quadratic"]),
        (["--reuse", "linera"], ["'linera'", "'linear'"]),
        (["--no-reuse"], ["--no-reuse", "'--reuse'"]),
        (["--solver", "andersen"], ["unknown solver 'andersen'", "'anderson'"]),
        (["--solver", "anderson:two"], ["'anderson:two'", "'two' is not a whole number"]),
        (["--solver", "anderson:0"], ["memory is 0"]),
        (["--solver", "picard:nan"], ["damping is nan"]),
        (["--tolerance", "small"], ["--tolerance", "'small'"]),
        *(
            pytest.param(
                ["--tolerance", value], ["tolerance is", "above 0"],
            )
            for value in ("0", "-1", "nan", "inf")
        ),
        (["--allocation", "liner:1"], ["unknown allocation 'liner:1'"]),
        (["--allocation", "linear:2"], ["'linear:2'", "between -2 and 2"]),
        (["--allocation", "linear:steep"], ["'linear:steep'", "between -2 and 2"]),
        (["--allocation", "rising:1"], ["unknown allocation 'rising:1'"]),
        pytest.param(
            ["--allocation", "linear:1/0"], ["'linear:1/0'"],
        ),
        (["--guidance-interval", "5"], ["--guidance-interval is '5'", "LOW,HIGH"]),
        (["--guidance-interval", "1,2,3"], ["--guidance-interval is '1,2,3'", "LOW,HIGH"]),
        (["--guidance-interval", "800,100"], ["guidance_interval", "the lower one first"]),
        (["--guidance-interval", "nan,5"], ["--guidance-interval is 'nan,5'", "LOW,HIGH"]),
        (["--guidance-channels", "0"], ["guidance_channels is 0"]),
        (["--guidance-channels", "2"], ["guidance_channels is 2", "1 channels"]),
        (["--guidance-share", "0"], ["guidance_share is 0"]),
        (["--guidance-share", "1.5"], ["guidance_share is 1.5"]),
        (["--guidance-share", "nan"], ["guidance_share is nan"]),
    ],
    ids=lambda part: " ".join(part) if part[0].startswith("--") else "",
)  # fmt: skip
def test_a_bad_value_is_refused_before_anything_is_drawn(arguments, words, models, capsys, tmp_path):
    said = refused(capsys, models["looped"], tmp_path / "out", *BUDGET, "--guidance-scale", "2", *arguments)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


# A folder gone on with


@pytest.mark.parametrize(
    "reuse",
    [
        "plain",
        pytest.param(True),
    ],
)
def test_a_request_without_the_new_keys_is_gone_on_with(reuse, models, plain, tmp_path):
    drawn(models["looped"], tmp_path, *BUDGET, "--num-images", "2")
    path = tmp_path / "request.json"
    older = {name: value for name, value in json.loads(path.read_text()).items() if name not in NEW}
    path.write_text(json.dumps({**older, "reuse": reuse}))
    assert drawn(models["looped"], tmp_path, *BUDGET)[:2] == plain[:2]


def test_a_report_of_an_older_version_is_one_clear_message_and_costs_no_image(models, tmp_path, capsys):
    drawn(models["looped"], tmp_path, *BUDGET)
    path = tmp_path / "report.json"
    kept = json.loads(path.read_text())
    kept["report"] = {
        name: v for name, v in kept["report"].items() if name not in ("most", "passes", "running", "status")
    }
    path.write_text(json.dumps(kept))
    before = images_in(tmp_path)
    assert "not a report of this version" in refused(capsys, models["looped"], tmp_path, *BUDGET)
    assert images_in(tmp_path) == before


def test_another_value_of_an_option_is_another_request(models, tmp_path, capsys):
    drawn(models["looped"], tmp_path, *BUDGET)
    for option, value, message in (
        ("--reuse", "linear", "reuse was 'plain', is 'linear'"),
        ("--solver", "broyden", "solver was 'picard', is 'broyden'"),
        ("--tolerance", "0.1", "tolerance was None, is 0.1"),
        ("--guidance-scale", "2", "guidance_scale was 1.0, is 2.0"),
    ):
        assert message in refused(capsys, models["looped"], tmp_path, *BUDGET, option, value)


UNEVEN = "report_of keeps rows of residuals that only unconditional evaluations made: merged() raises IndexError"


@pytest.mark.parametrize("scale", [1, pytest.param(2)])
def test_batches_whose_images_stop_on_their_own_are_reported_as_one(scale, models, tmp_path):
    options = ["--budget", "60", "--iterations", "8", "--tolerance", "0.1", "--guidance-scale", scale]
    more = ["--classes", "1-4", "--num-images", "4", "--batch-size", "2"]
    report = drawn(models["looped"], tmp_path, *options, *more)[2]
    assert [len(row) for row in report["residuals"]] == [len(row) for row in report["running"]]
    assert all(residual > 0 for row in report["residuals"] for residual in row)


def test_an_image_that_is_drawn_again_beside_new_ones_counts_once(models, tmp_path):
    drawn(models["looped"], tmp_path, *BUDGET)
    (tmp_path / "000001.png").unlink()
    report = drawn(models["looped"], tmp_path, *BUDGET, "--num-images", "5")[2]
    assert report["images"] == 5
    assert [sum(counts.values()) for counts in report["status"]] == [5] * 10


# The trace


@pytest.mark.parametrize(
    ("label", "options", "timesteps"),
    [
        ("looped", BUDGET, 10),
        ("looped", ["--budget", "41", "--scheduler", "heun"], 9),
        ("looped", ["--budget", "60", "--iterations", "8", "--tolerance", "0.1"], 6),
        ("looped", ["--iterations", "1", "--steps", "130"], 130),
        ("plain", ["--budget", "40"], 8),
    ],
    ids=["plain plan", "heun", "tolerance", "many timesteps", "explicit"],
)
def test_a_trace_shows_residuals_and_the_images_as_they_form(
    label, options, timesteps, models, tmp_path, capsys, monkeypatch
):
    shown, frames_of = [], trace.frames_of
    monkeypatch.setattr(trace, "frames_of", lambda *given: shown.extend(frames_of(*given)) or list(shown))
    _, _, report = drawn(models[label], tmp_path, *options, "--num-images", "8", "--trace")
    assert len(report["timesteps"]) == timesteps
    said = capsys.readouterr().out
    assert str(tmp_path / "trace.png") in said
    assert str(tmp_path / "steps.webp") in said
    with Image.open(tmp_path / "trace.png") as plot:
        assert min(plot.size) > 500
        assert np.asarray(plot.convert("L")).std() > 10, "blank"
    images = [Image.open(tmp_path / f"{i:06d}.png") for i in range(8)]
    with Image.open(tmp_path / "steps.webp") as strip:
        assert len(shown) == min(timesteps, 100)
        # What did not change from one timestep to the next is shown for longer instead of once more.
        assert strip.n_frames == 1 + sum(a.tobytes() != b.tobytes() for a, b in pairwise(shown))
        assert strip.n_frames > timesteps / 2
        strip.seek(strip.n_frames - 1)
        assert np.array_equal(np.asarray(strip.convert("L")), np.asarray(grid(images, columns=8, least=96)))


def test_without_a_trace_there_is_none_and_it_can_be_asked_for_later(models, plain, tmp_path):
    drawn(models["looped"], tmp_path, *BUDGET)
    assert not list(tmp_path.glob("*.webp"))
    report = (tmp_path / "report.json").read_bytes()
    assert drawn(models["looped"], tmp_path, *BUDGET, "--trace")[0] == plain[0]
    assert (tmp_path / "steps.webp").is_file()
    assert (tmp_path / "report.json").read_bytes() == report


def test_a_trace_that_cannot_be_plotted_is_refused_before_anything_is_drawn(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "fpdm[plots]" in refused(capsys, models["looped"], tmp_path / "out", *BUDGET, "--trace")
    assert not (tmp_path / "out").exists()


# Tuned plans


def test_the_tuned_plan_of_a_budget_is_followed_exactly(tuned, tmp_path, capsys):
    images, request, report = drawn(tuned, tmp_path / "out", "--budget", "80")
    said = capsys.readouterr().out
    assert "the tuned plan for 80 block passes: ddim, reuse linear, solver anderson:2" in said
    assert "nearest" not in said
    assert report["iterations"] == list(COARSE.iterations)
    assert (report["planned"], report["spent"]) == (80, 80)
    assert (request["scheduler"], request["reuse"], request["solver"]) == ("ddim", "linear", "anderson:2")

    by_hand = ["--iterations", ",".join(map(str, COARSE.iterations)), "--scheduler", "ddim"]
    by_hand += ["--reuse", "linear", "--solver", "anderson:2"]
    assert drawn(tuned, tmp_path / "hand", *by_hand)[0] == images
    pipe = FixedPointDiTPipeline.from_pretrained(tuned)
    assert pipe([0, 1, 2], **pipe.tuned(80), seed=0, image_indices=range(3)).report.iterations == report["iterations"]


def test_at_another_budget_the_nearest_tuned_plan_is_taken_and_told(tuned, tmp_path, capsys):
    _, request, report = drawn(tuned, tmp_path, "--budget", "100")
    assert "the tuned plan for 80 block passes, the nearest one: ddim" in capsys.readouterr().out
    assert (request["scheduler"], request["reuse"], request["solver"]) == ("ddim", "linear", "anderson:2")
    assert report["asked"] == 100
    assert 95 < report["planned"] <= 100
    assert set(report["iterations"]) <= {3, 4}, "3.3 is the tuned mean"


@pytest.mark.parametrize(("budget", "nearest"), [("159", 80), ("160", 80), ("161", 320), ("1000", 320)])
def test_near_is_meant_as_a_ratio_and_of_two_as_near_the_smaller_is_taken(budget, nearest, tuned, tmp_path, capsys):
    drawn(tuned, tmp_path, "--budget", budget, "--num-images", "1")
    said = capsys.readouterr().out
    assert f"the tuned plan for {nearest} block passes, the nearest one" in said
    assert (f"far from {budget}: `fpdm tune" in said) == (budget == "1000")


def test_without_a_budget_the_tuned_plan_nearest_to_the_default_serves_that(tuned, tmp_path, capsys):
    report = drawn(tuned, tmp_path)[2]
    assert "the tuned plan for 80 block passes, the nearest one: ddim" in capsys.readouterr().out
    assert report["asked"] == 160
    assert 150 < report["spent"] <= 160


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "20"], ["--iterations", "2"], ["--allocation", "constant"], ["--reuse", "plain"],
        ["--solver", "picard"], ["--tolerance", "0.1"], ["--scheduler", "ddpm"], ["--pooled", "--tolerance", "0.1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_option_of_the_plan_leaves_tuned_plans_aside(options, tuned, models, tmp_path, capsys):
    with_plans = drawn(tuned, tmp_path / "tuned", "--budget", "80", *options)
    said = capsys.readouterr().out
    assert "the model's tuned plans are left out, which are not for --" in said
    assert next(option for option in reversed(options) if option.startswith("--")) in said
    without = drawn(models["looped"], tmp_path / "untuned", "--budget", "80", *options)
    assert with_plans[:2] == without[:2]


def test_what_is_no_part_of_a_plan_leaves_the_tuned_one_in_force(tuned, tmp_path, capsys):
    options = ["--seed", "1", "--classes", "3", "--batch-size", "2"]
    _, request, report = drawn(tuned, tmp_path, "--budget", "80", *options)
    assert "the tuned plan for 80 block passes" in capsys.readouterr().out
    assert report["iterations"] == list(COARSE.iterations)
    assert request["seed"] == 1


def test_a_plan_tuned_without_guidance_is_not_for_guided_images(tuned, tmp_path, capsys):
    request = drawn(tuned, tmp_path, "--budget", "80", "--guidance-scale", "2")[1]
    assert "tuned plans are left out, which are not for guidance scale 2" in capsys.readouterr().out
    assert request["iterations"] is None


def test_tuned_plans_can_be_left_out(tuned, tmp_path, capsys):
    request = drawn(tuned, tmp_path, "--budget", "80", "--untuned")[1]
    assert "tuned plan" not in capsys.readouterr().out
    assert request["iterations"] is None


def test_a_folder_begun_with_a_tuned_plan_is_not_gone_on_with_untuned(tuned, tmp_path, capsys):
    out = tmp_path / "out"
    begun = drawn(tuned, out, "--budget", "80", "--num-images", "2")[1]
    assert sample(tuned, out, "--budget", "80", "--untuned", "--num-images", "3") != 0
    assert "iterations" in capsys.readouterr().err
    assert json.loads((out / "request.json").read_text()) == begun


def test_a_folder_begun_before_tuning_is_gone_on_with_as_it_was_begun(models, tuned, tmp_path):
    out = tmp_path / "out"
    begun = drawn(models["looped"], out, "--budget", "80", "--num-images", "2")[1]
    assert drawn(tuned, out, "--budget", "80")[1] == begun


def test_an_explicit_network_follows_its_tuned_plans(models, tmp_path, capsys):
    shutil.copytree(models["plain"], tmp_path / "plain")
    save_plans(tmp_path / "plain", [TunedPlan(40, (None,) * 8, "ddim", "plain", "picard", {})])
    for budget, timesteps in ((40, 8), (62, 12)):
        out = tmp_path / str(budget)
        _, request, report = drawn(tmp_path / "plain", out, "--budget", budget)
        assert "the tuned plan for 40 block passes" in capsys.readouterr().out
        assert (request["scheduler"], report["iterations"]) == ("ddim", [None] * timesteps)


def damaged_plans(**changes):
    return json.dumps([{**vars(COARSE), **changes}])


UNCHECKED = "from_dict takes values of any type and range"


@pytest.mark.parametrize(
    "text",
    [
        "[{", '{"a": 1}', "[3]", "null", '[{"budget": 80}]', damaged_plans(iterations=4), damaged_plans(more=1),
        *(
            pytest.param(damaged_plans(**changes))
            for changes in ({"budget": "80"}, {"budget": 0}, {"solver": 3}, {"iterations": []}, {"scheduler": "ddmi"})
        ),
    ],
)  # fmt: skip
def test_damaged_tuned_plans_are_one_message_that_names_the_file(text, models, tmp_path, capsys):
    shutil.copytree(models["looped"], tmp_path / "model")
    (tmp_path / "model/plans.json").write_text(text)
    said = refused(capsys, tmp_path / "model", tmp_path / "out", "--budget", "80")
    assert str(tmp_path / "model/plans.json") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        pytest.param("0", "budget is 0; it must be"),
        pytest.param("-5", "budget is -5; it must be"),
        ("2", "a budget of 2 block passes is too small"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused_beside_tuned_plans_too(budget, message, tuned, tmp_path, capsys):
    assert message in refused(capsys, tuned, tmp_path / "out", "--budget", budget)


def test_a_budget_too_small_for_the_mean_iterations_of_a_tuned_plan_can_be_drawn_with(tuned, tmp_path):
    assert drawn(tuned, tmp_path, "--budget", "4")[2]["planned"] == 4


# Two commands at once


def test_a_second_command_in_a_folder_is_told_so_and_harms_nothing(models, tmp_path, capsys):
    out, never = tmp_path / "out", ["--num-images", "100000", "--batch-size", "2"]
    words = ["sample", models["looped"], "--out", str(out), *BUDGET, *never]
    with Program(words, tmp_path / "said") as first:
        wait_for((out / "000003.png").is_file)
        request = (out / "request.json").read_bytes()
        for options in (BUDGET, [*BUDGET, "--seed", "1"], [*BUDGET, "--npz", "--trace"]):
            assert "another command is at work" in refused(capsys, models["looped"], out, *options)
        assert first.poll() is None
        there = len(list(out.glob("0*.png")))
        wait_for(lambda: len(list(out.glob("0*.png"))) > there + 2)
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    assert (out / "request.json").read_bytes() == request
    assert not list(out.glob("*.npz")) + list(out.glob("*.webp"))
    covered = json.loads((out / "report.json").read_text())["report"]["images"]
    assert covered % 2 == 0
    images, _, report = drawn(models["looped"], out, *BUDGET, "--num-images", "6")
    assert report["images"] == max(6, covered)
    quiet = drawn(models["looped"], tmp_path / "quiet", *BUDGET, "--num-images", "6")[0]
    assert {name: images[name] for name in quiet} == quiet
    assert not [path for path in Path(out).iterdir() if path.name.endswith(".writing")]


@pytest.mark.parametrize(
    ("text", "classes"),
    [("2", [3]), ("10", [2]), ("0-3", [0, 1, 3, 4]), ("11", [11]), ("2,cat,9-11", [3, 11, 10, 2, 11])],
)
def test_numbers_that_are_names_mean_the_classes_called_so_in_ranges_too(text, classes):
    names = ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9", "cat"]  # as folders of these names are ordered
    assert parse_classes(text, 12, names) == classes


def test_spaces_about_classes_are_left_out_where_no_name_has_them():
    assert parse_classes("t-shirt, bag,  2-3", 4, ["bag", "t-shirt", "coat", " bag"]) == [1, 3, 2, 3]
    assert parse_classes("a - b", 2, ["a - b", "a"]) == [0]


def test_classes_that_are_counted_from_one_may_be_all_in_a_range():
    names = [str(number) for number in range(1, 11)]
    assert parse_classes("1-10", 10, names) == list(range(10))
    assert parse_classes("0", 10, names) == [0]
    with pytest.raises(ValueError, match="class 11 is out of range"):
        parse_classes("1-11", 10, names)
    padded = [f"{number:02d}" for number in range(1, 11)]
    assert parse_classes("01-03,10", 10, padded) == parse_classes("1-3,10", 10, padded) == [0, 1, 2, 9]
