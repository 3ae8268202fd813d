"""`fpdm evaluate` as its users meet it: what it writes, that it goes on, and what it refuses before it draws."""

import gc
import json
import shutil
import sys
import weakref
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpdm import drawing
from fpdm.cli.main import main
from fpdm.data import digits, write_npz
from fpdm.evaluation import Evaluation
from fpdm.evaluation.extractors import classifier
from fpdm.files import cache_folder
from fpdm.pipeline import FixedPointDiTPipeline
from tests.commands import refusal

TINY = [
    "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4", "--batch-size", "8", "--steps", "2",
    "--log-every", "2", "--checkpoint-every", "2", "--sample-every", "2", "--sample-budget", "6",
]  # fmt: skip
COUNT = 60
DRAWING = ["--num-images", str(COUNT), "--budget", "6", "--seed", "3"]
DIGITS = digits()


@pytest.fixture(autouse=True)
def elsewhere(cache, tmp_path, monkeypatch):
    """Nothing outside is read or written to."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "digits", "--runs-dir", str(folder), *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def model(runs):
    return str(runs / "digits")


@pytest.fixture(scope="module")
def evaluated(model, cache, tmp_path_factory):
    """The folder of an evaluation of the model."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert evaluate(model, "--out", out, *DRAWING) == 0
    return out


@pytest.fixture
def folder(evaluated, tmp_path):
    """The samples of an evaluation, in a folder of images as any program leaves it."""
    images = tmp_path / "samples"
    images.mkdir()
    for i in range(COUNT):
        shutil.copy(evaluated / f"{i:06d}.png", images)
    return images


def command(place, *arguments):
    return ["evaluate", str(place), "--data", "digits", *map(str, arguments)]


def evaluate(*arguments):
    return main(command(*arguments))


def refused(capsys, *arguments):
    return refusal(capsys, command(*arguments))


def kept(out):
    return json.loads((out / "evaluation-classifier.json").read_text())


def no_drawing(monkeypatch):
    monkeypatch.setattr(FixedPointDiTPipeline, "__call__", lambda *_, **__: pytest.fail("something is drawn"))


# What it does


def test_help_names_what_is_needed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("MODEL_OR_SAMPLES", "--data", "--features", "--statistics", "--out"))


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"FPDM_CACHE": "/some/where", "XDG_CACHE_HOME": "/caches"}, "/some/where"),
        ({"FPDM_CACHE": "", "XDG_CACHE_HOME": "/caches"}, "/caches/fpdm"),
        ({"FPDM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/fpdm"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(place)


def test_a_model_is_drawn_from_and_measured(evaluated):
    names = {path.name for path in evaluated.iterdir()}
    images = {f"{i:06d}.png" for i in range(COUNT)}
    assert names == images | {
        ".lock",
        "grid.png",
        "nearest-classifier.png",
        "request.json",
        "report.json",
        "evaluation-classifier.json",
    }
    result = kept(evaluated)
    found = Evaluation.from_dict(result["evaluation"])
    assert found.samples == COUNT
    assert found.identity["features"]["network"] == "classifier"
    assert found.real == {"name": "digits", "images": 1797, "broken": 0}
    assert found["FD-classifier"].value > 5 * found["FD-classifier"].floor
    assert 0 <= found["accuracy"].value <= 1
    assert (result["request"]["budget"], result["request"]["seed"]) == (6, 3)
    assert (result["report"]["images"], result["report"]["spent"]) == (COUNT, 6)
    assert result["made_with"]["fpdm"]


def test_the_table_is_printed(evaluated, model, capsys):
    assert evaluate(model, "--out", evaluated, *DRAWING) == 0
    said = capsys.readouterr().out
    assert str(Evaluation.from_dict(kept(evaluated)["evaluation"])) in said
    assert str(evaluated / "evaluation-classifier.json") in said


def test_the_statistics_are_kept_in_the_cache(evaluated, cache):
    assert len(list(cache.glob("statistics-*.safetensors"))) == 1


def test_a_second_time_nothing_is_drawn(evaluated, model, monkeypatch):
    no_drawing(monkeypatch)
    before, times = kept(evaluated), {path: path.stat().st_mtime_ns for path in evaluated.glob("0*.png")}
    assert evaluate(model, "--out", evaluated, *DRAWING) == 0
    assert kept(evaluated) == before
    assert {path: path.stat().st_mtime_ns for path in evaluated.glob("0*.png")} == times


def test_what_is_lost_is_drawn_again_and_the_numbers_are_the_same(evaluated, model, tmp_path):
    shutil.copytree(evaluated, tmp_path / "out")
    for i in (0, 17, 59):
        (tmp_path / f"out/{i:06d}.png").unlink()
    (tmp_path / "out/evaluation-classifier.json").unlink()
    assert evaluate(model, "--out", "out", *DRAWING) == 0
    assert kept(tmp_path / "out")["evaluation"] == kept(evaluated)["evaluation"]


def test_samples_that_fpdm_sample_drew_are_measured_alike(evaluated, model, tmp_path, capsys):
    assert main(["sample", model, "--out", "drawn", "--npz", *DRAWING]) == 0
    with np.load("drawn/samples.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (COUNT, 8, 8, 3)
        assert np.array_equal(archive["arr_1"], np.arange(COUNT) % 10)
        for i in (0, 1, COUNT - 1):
            with Image.open(f"drawn/{i:06d}.png") as image:
                assert np.array_equal(archive["arr_0"][i], np.asarray(image.convert("RGB")))
    for place, out in (("drawn", "drawn"), ("drawn", "by-folder"), ("drawn/samples.npz", "by-npz")):
        assert evaluate(place, "--out", out) == 0
        assert kept(tmp_path / out)["evaluation"] == kept(evaluated)["evaluation"]
        assert kept(tmp_path / out)["samples"] == place.split("/")[-1]
        assert (tmp_path / out / "nearest-classifier.png").read_bytes() == (
            evaluated / "nearest-classifier.png"
        ).read_bytes()


def test_a_folder_of_images_needs_no_out(evaluated, folder, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(folder) == 0
    said = capsys.readouterr().out
    assert "FD-classifier" in said
    assert "accuracy" not in said, "their classes are not known"
    assert "written" not in said
    assert sorted(tmp_path.rglob("*")) == before
    assert evaluate(folder, "--out", "out") == 0
    whole = Evaluation.from_dict(kept(evaluated)["evaluation"])
    for measure in Evaluation.from_dict(kept(tmp_path / "out")["evaluation"]).measures:
        assert measure.value == pytest.approx(whole[measure.name].value, abs=2e-3 if "kernel" in measure.name else 1e-9)


def test_statistics_are_made_where_they_are_asked_for(folder, tmp_path):
    assert evaluate(folder, "--statistics", "some/digits.safetensors") == 0
    assert [path.name for path in (tmp_path / "some").glob("[!.]*")] == ["digits.safetensors"]


def test_an_interrupt_is_told_and_the_command_goes_on(evaluated, model, tmp_path, monkeypatch, capsys):
    shutil.copytree(evaluated, tmp_path / "out")
    for i in range(40, COUNT):
        (tmp_path / f"out/{i:06d}.png").unlink()
    draw, calls = FixedPointDiTPipeline.__call__, []

    def pressed(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(FixedPointDiTPipeline, "__call__", pressed)
        assert evaluate(model, "--out", "out", *DRAWING, "--batch-size", "8") == 130
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "out/000047.png").is_file()
    assert not (tmp_path / "out/000048.png").is_file()
    assert evaluate(model, "--out", "out", *DRAWING) == 0
    assert kept(tmp_path / "out")["evaluation"] == kept(evaluated)["evaluation"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Coloured images with classes, in a folder."""
    place = tmp_path_factory.mktemp("photographs")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8)):
        (place / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{i % 2}/{i}.png")
    return place


def test_grey_samples_and_models_are_measured_against_coloured_images_in_grey(
    model, evaluated, folder, photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(classifier, "MOST_STEPS", 5)
    shutil.copytree(evaluated, tmp_path / "of-model")
    for place, out in ((folder, "of-samples"), (model, "of-model")):
        drawing = DRAWING if place == model else []
        assert main(["evaluate", str(place), "--data", str(photographs), "--out", out, *drawing]) == 0
        assert kept(tmp_path / out)["evaluation"]["identity"]["preprocessing"]["channels"] == 1


# What it refuses


@pytest.fixture(scope="module")
def others(tmp_path_factory, cache):
    """Digits, but not all; statistics of those; some that are too few; and no network's weights."""
    place = tmp_path_factory.mktemp("others")
    write_npz(place / "some.npz", DIGITS.images[:600], 600, DIGITS.labels[:600])
    write_npz(place / "few.npz", DIGITS.images[:8], 8, DIGITS.labels[:8])
    write_npz(place / "samples.npz", DIGITS.images[:COUNT], COUNT, DIGITS.labels[:COUNT])
    (place / "weights.safetensors").write_text("none")
    (place / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "MOST_STEPS", 5)
        arguments = ["--data", place / "some.npz", "--statistics", place / "some.safetensors"]
        assert evaluate(place / "samples.npz", *arguments) == 0
    return place


REFUSALS = [
    (["--features", "clasifier"], ["clasifier", "'classifier'"]),
    (["--features", "effnet"], ["effnet", "efficientnet-lite0"]),
    (["--statistics", "{others}/some.safetensors"], ["some.safetensors", "something else", "data fingerprint"]),
    (["--statistics", "{others}/weights.safetensors"], ["weights.safetensors", "damaged"]),
    (["--weights", "{others}/weights.safetensors"], ["weights.safetensors", "not a classifier"]),
    (["--weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["--data", "digitz"], ["digitz", "digits"]),
    (["--data", "nowhere"], ["nowhere", "folder of images", ".npz"]),
    (["--data", "{others}/empty"], ["holds no images"]),
    (["--split", "tets"], ["tets", "'test'"]),
    (["--split", "test"], ["digits", "IDX"]),
    (["--feature", "classifier"], ["--feature", "'--features'"]),
    (["--device", "cuda:99"], ["cuda"]),
]  # fmt: skip


def test_several_processes_are_told_that_one_measures(folder, others, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, folder)
    assert "several processes were launched, and one measures" in said


@pytest.mark.parametrize(("arguments", "words"), REFUSALS)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(
    model, others, tmp_path, capsys, monkeypatch, arguments, words
):
    no_drawing(monkeypatch)
    arguments = [word.replace("{others}", str(others)) for word in arguments]
    said = refused(capsys, model, "--out", "out", *DRAWING, *arguments)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "words"), REFUSALS)
def test_what_cannot_be_measured_is_refused_for_samples(others, folder, tmp_path, capsys, arguments, words):
    arguments = [word.replace("{others}", str(others)) for word in arguments]
    said = refused(capsys, folder, "--out", "out", *arguments)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", "49"], ["--num-images", "50"]),
        (["--batch-size", "0"], ["--batch-size", "1"]),
        (["--budget", "2"], ["3"]),
        (["--classes", "11"], ["class 11", "0 to 9"]),
        (["--scheduler", "dpm"], ["dpm", "dpm++"]),
        (["--dtype", "int4"], ["int4", "float32"]),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, tmp_path, capsys, monkeypatch, arguments, words):
    no_drawing(monkeypatch)
    said = refused(capsys, model, "--out", "out", *DRAWING, *arguments)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_model_needs_a_folder_for_its_samples(model, capsys):
    assert "--out" in refused(capsys, model, *DRAWING)


def test_a_missing_package_is_named_with_its_extra(model, tmp_path, capsys, monkeypatch):
    no_drawing(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    said = refused(capsys, model, "--out", "out", *DRAWING, "--features", "inception")
    assert "pip install 'fpdm[fid]'" in said


def test_too_few_real_images_are_refused_before_anything_is_drawn(model, others, tmp_path, capsys, monkeypatch):
    no_drawing(monkeypatch)
    weights = "--features", "efficientnet-lite0"
    assert "8" in refused(capsys, model, "--out", "out", *DRAWING, "--data", others / "few.npz", *weights)
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture(scope="module")
def coloured_model(tmp_path_factory):
    place = tmp_path_factory.mktemp("coloured")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)):
        (place / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"images/{i % 2}/{i}.png")
    arguments = ["--data", place / "images", "--image-size", "8", "--runs-dir", place / "runs", *TINY]
    assert main([str(word) for word in ["train", "images", *arguments]]) == 0
    return place / "runs/images"


def test_a_coloured_model_and_grey_data_are_refused_before_anything_is_drawn(
    coloured_model, tmp_path, capsys, monkeypatch
):
    no_drawing(monkeypatch)
    said = refused(capsys, coloured_model, "--out", "out", *DRAWING)
    assert "colour" in said
    assert "grey" in said


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--num-images", "100"], "--num-images"),
        (["--classes", "0-9"], "--classes"),
        (["--seed", "1"], "--seed"),
        (["--budget", "40"], "--budget"),
        (["--steps", "4"], "--steps"),
        (["--iterations", "2"], "--iterations"),
        (["--allocation", "rising"], "--allocation"),
        (["--reuse", "none"], "--reuse"),
        (["--solver", "picard"], "--solver"),
        (["--tolerance", "0.1"], "--tolerance"),
        (["--pooled"], "--pooled"),
        (["--scheduler", "ddim"], "--scheduler"),
        (["--guidance-scale", "2"], "--guidance-scale"),
        (["--guidance-interval", "0,500"], "--guidance-interval"),
        (["--guidance-channels", "1"], "--guidance-channels"),
        (["--guidance-share", "0.5"], "--guidance-share"),
        (["--batch-size", "3"], "--batch-size"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--compile"], "--compile"),
        (["--cuda-graphs"], "--cuda-graphs"),
        (["--untuned"], "--untuned"),
    ],
)
def test_options_of_drawing_are_refused_where_there_are_samples(folder, capsys, arguments, flag):
    said = refused(capsys, folder, *arguments)
    assert f"{flag} out" in said
    assert "holds samples" in said


def test_the_result_does_not_join_the_samples(folder, tmp_path, capsys):
    before = sorted(folder.iterdir())
    for out in (folder, f"{folder}/", "samples/../samples"):
        assert "the folder of the samples" in refused(capsys, folder, "--out", out)
    assert sorted(folder.iterdir()) == before


def test_the_result_may_not_be_below_the_samples_either(folder, capsys):
    """There, too, nearest.png would be one of them the next time."""
    first = evaluate(folder, "--out", folder / "result")
    second = evaluate(folder, "--out", folder / "result")
    assert first == second, capsys.readouterr().err


def test_samples_are_no_part_of_the_real_images(evaluated, folder, capsys):
    said = refusal(capsys, ["evaluate", str(folder), "--data", str(folder.parent)])
    assert f"is in the folder of the real images, {folder.parent}, and counted as some of them" in said
    assert main(["evaluate", str(folder), "--data", str(folder), "--features", "efficientnet-lite0"]) == 0
    assert "near copies                   1" in capsys.readouterr().out


def test_copies_are_looked_for_among_other_images(evaluated, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(folder, "--out", out) == 0
    before = kept(out)["evaluation"]
    assert before["originals"] is None
    capsys.readouterr()
    assert evaluate(folder, "--copies-of", folder, "--out", out) == 0
    found = kept(out)["evaluation"]
    assert {row["name"]: row["value"] for row in found["measures"]}["near copies"] == 1
    assert found["originals"]["name"] == str(folder)
    assert found["originals"]["images"] == found["originals"]["searched"] == COUNT
    assert {**found, **{name: before[name] for name in ("measures", "originals", "notes")}} == before
    said = capsys.readouterr().out
    assert f"among {COUNT} of the {COUNT} images of {folder}" in said
    assert "evaluation-classifier.json has copies of digits, and is replaced" in said


def test_results_and_samples_are_no_part_of_the_images_trained_on(folder, tmp_path, capsys):
    said = refused(capsys, folder, "--copies-of", folder.parent)
    assert f"in the folder of the real images, {tmp_path}, and counted as some of them" in said
    shutil.copytree(folder, "trained")
    said = refused(capsys, folder, "--copies-of", "trained", "--out", "trained/out")
    assert "trained/out is in the folder of the real images, trained, which it would join" in said
    assert not Path("trained/out").exists()


def test_a_result_does_not_take_the_place_of_another(evaluated, folder, tmp_path, capsys):
    assert evaluate(folder, "--out", "out") == 0
    before = kept(tmp_path / "out")
    shutil.copytree(folder, "others")
    assert "evaluation-classifier.json is there, and of the samples samples" in refused(
        capsys, "others", "--out", "out"
    )
    assert kept(tmp_path / "out") == before
    shutil.copytree(evaluated, "of-model")
    assert "and of the samples of-model" in refused(capsys, folder, "--out", "of-model")

    np.savez("half.npz", digits().images[:900], digits().labels[:900])
    capsys.readouterr()
    weights = str(files("fpdm.evaluation") / "classifiers/digits.safetensors")
    again = ["evaluate", str(folder), "--data", "half.npz", "--features", "classifier", "--weights", weights]
    assert main([*again, "--out", "out"]) == 0
    assert "evaluation-classifier.json was against digits, and is replaced" in capsys.readouterr().out
    (tmp_path / "out/evaluation-classifier.json").write_text("{")
    assert evaluate(folder, "--out", "out") == 0, "what cannot be read is no reason to lose what was measured"
    assert kept(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["{}", "[]", '{"report": {}}', "{"])
def test_a_report_that_is_none_is_named(evaluated, tmp_path, capsys, text):
    shutil.copytree(evaluated, "drawn")
    (tmp_path / "drawn/report.json").write_text(text)
    assert "drawn/report.json is no report of fpdm, or damaged" in refused(capsys, "drawn")


def test_one_network_at_a_time_is_held(model, tmp_path, monkeypatch):
    """Beside the one that draws, the one that only told its size would take as much memory."""
    held, load = weakref.WeakSet(), drawing.load_pipeline

    def loaded(*arguments, **options):
        gc.collect()
        assert not len(held)
        pipe = load(*arguments, **options)
        held.add(pipe.transformer)
        return pipe

    monkeypatch.setattr(drawing, "load_pipeline", loaded)
    assert evaluate(model, "--out", "out", *DRAWING) == 0


def test_a_mistyped_folder_of_samples_is_not_taken_for_a_model(folder, capsys):
    said = refused(capsys, "sampels")
    assert "there is no" in said
    assert "sampels" in said


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: [file.unlink() for file in sorted(path.iterdir())[49:]], ["49 images", "50"]),
        (lambda path: (path / "000007.png").write_bytes(b""), ["000007.png", "cannot be read"]),
        (lambda path: Image.new("L", (9, 9)).save(path / "000007.png"), ["000007.png", "9 x 9", "8 x 8"]),
        (lambda path: Image.new("L", (8, 9)).save(path / "000007.png"), ["000007.png", "8 x 9"]),
        (lambda path: Image.new("RGB", (8, 8), "red").save(path / "000007.png"), ["number 7", "colour", "grey"]),
    ],
)
def test_samples_that_cannot_be_measured(folder, tmp_path, capsys, spoil, words):
    spoil(folder)
    said = refused(capsys, folder, "--out", "out")
    assert all(word in said for word in words), said
    assert not list(tmp_path.glob("out/*"))


def test_an_array_that_is_not_an_archive_is_one_message(tmp_path, capsys):
    np.save(tmp_path / "samples.npy", DIGITS.images[:COUNT])
    assert "samples.npy" in refused(capsys, "samples.npy")


def test_another_request_is_not_mixed_in(evaluated, model, capsys):
    before = sorted(path.name for path in evaluated.iterdir())
    assert "seed was 3, is 4" in refused(capsys, model, "--out", evaluated, *DRAWING, "--seed", "4")
    assert sorted(path.name for path in evaluated.iterdir()) == before
