"""Models inside the package: found by name, by every command and from Python, and how they get there."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import ship

from fpdm import FixedPointDiT, FixedPointDiTPipeline, files
from fpdm.cli.main import main
from fpdm.drawing import load_pipeline
from fpdm.evaluation.extractors.classifier import Classifier
from fpdm.evaluation.result import significant
from fpdm.experiments.sweep import all_points
from fpdm.files import read_json
from fpdm.recipes import recipe
from fpdm.sampling import TunedPlan, add_plans
from fpdm.weights import digest
from tests.commands import contents, refusal
from tests.experiments.sweeps import save_pipeline


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The folder of the models inside the package, with one in it, "tiny"; and commands run elsewhere."""
    folder = tmp_path / "package"
    save_pipeline(folder / "tiny")
    monkeypatch.setattr(files, "SHIPPED", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_model_is_found_by_its_name(inside):
    assert files.model_folder("tiny") == str(inside / "tiny")
    pipe = FixedPointDiTPipeline.from_pretrained("tiny")
    assert len(pipe([3], budget=8, seed=0).images) == 1
    assert files.model_folder("tiny/") == str(inside / "tiny"), "as a shell completes it"
    assert digest(FixedPointDiT.from_pretrained("tiny", subfolder="transformer")) == digest(pipe.transformer)
    config = FixedPointDiT.load_config("tiny", subfolder="transformer")
    assert config["hidden_size"] == pipe.transformer.config.hidden_size


def test_a_folder_of_the_name_goes_before_if_it_holds_a_model(inside):
    Path("tiny").mkdir()
    Path("tiny/data.txt").write_text("of one's own")
    assert files.model_folder("tiny") == str(inside / "tiny")
    shutil.copytree(inside / "tiny", "mine/pipeline")
    shutil.copytree("mine", "tiny", dirs_exist_ok=True)
    assert files.model_folder("tiny") == str(Path("tiny/pipeline"))


def test_samples_are_drawn_from_it_by_name(inside):
    assert main(["sample", "tiny", "--budget", "8", "--num-images", "2", "--device", "cpu", "--out", "samples"]) == 0
    assert sorted(path.name for path in Path("samples").glob("0*.png")) == ["000000.png", "000001.png"]


def test_a_name_that_is_none_is_answered_with_those_there_are(inside, capsys):
    message = refusal(capsys, ["sample", "tiney", "--budget", "8", "--out", "samples"])
    assert "there is no folder tiney" in message
    assert "Models inside the package: tiny" in message


def test_its_files_stay_as_they_are(inside, capsys):
    before = contents(inside)
    assert "copy" in refusal(capsys, ["tune", "tiny", "--data", "digits", "--budget", "8", "--out", "tuned"])
    assert contents(inside) == before


def trained(folder, **changes):
    """A run of the digits as training leaves it, with plans for 8 and 12 block passes."""
    save_pipeline(folder / "pipeline")
    plans = [
        TunedPlan(8, (2, 2), "unipc", "plain", "picard", {}),
        TunedPlan(12, (1, 1, 1, 1), "ddim", "plain", "picard", {}),
    ]
    add_plans(folder / "pipeline", plans)
    config = recipe("digits").with_fields(steps=100, batch_size=3, **changes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def shipped(tmp_path, monkeypatch, run, **limits):
    settings = {"SAMPLES": 60, "SPLIT": "train", "RECIPE": {"fashion-mnist": "digits"}, "SHIPPED": tmp_path / "shipped"}
    for name, value in {**settings, **limits}.items():
        monkeypatch.setattr(ship, name, value)
    words = ["ship", str(run), "--name", "fashion-mnist", "--data", "digits", "--out", str(tmp_path / "sweep")]
    monkeypatch.setattr("sys.argv", words)
    ship.main()
    return tmp_path / "shipped/fashion-mnist"


def test_shipping_stores_half_precision_and_a_card_of_what_was_measured(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", warmup=7)
    folder = shipped(tmp_path, monkeypatch, run)
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    original = FixedPointDiTPipeline.from_pretrained(run / "pipeline").transformer.state_dict()
    assert all(torch.equal(weights[name], original[name].half()) for name in weights)
    assert FixedPointDiTPipeline.from_pretrained(folder).class_names[9] == "ankle boot"
    card = (folder / "README.md").read_text()
    points = sorted(all_points(tmp_path / "sweep"), key=lambda point: point["budget"])
    for point, plan in zip(
        points, ("2 timesteps x 2 iterations, unipc", "4 timesteps x 1 iteration, ddim"), strict=True
    ):
        value = significant(point["evaluation"]["measures"][0]["value"])
        assert f"| {point['budget']} | {plan} | {value} (" in card
    for fact in ("MIT", "Apache-2.0", "fpdm train digits --steps 100 --batch-size 3 --warmup 7 --data DIR",
                 "100 steps of 3 images", "60 samples against the train images"):  # fmt: skip
        assert fact in card


def test_what_is_measured_are_the_stored_weights(tmp_path, monkeypatch):
    folder = shipped(tmp_path, monkeypatch, trained(tmp_path / "run"))
    digests = set(read_json(tmp_path / "sweep/sweep.json")["models"].values())
    assert digests == {digest(load_pipeline(str(folder), "cpu", "float32").transformer)}


def test_a_model_without_tuned_plans_is_not_shipped(tmp_path, monkeypatch):
    run = trained(tmp_path / "run")
    (run / "pipeline/plans.json").unlink()
    with pytest.raises(SystemExit, match="fpdm tune"):
        shipped(tmp_path, monkeypatch, run)


@pytest.mark.parametrize(("limit", "said"), [("MOST_PARAMETERS", "parameters"), ("MOST_BYTES", "bytes")])
def test_what_is_too_large_is_not_shipped(limit, said, tmp_path, monkeypatch):
    run = trained(tmp_path / "run")
    with pytest.raises(SystemExit, match=said):
        shipped(tmp_path, monkeypatch, run, **{limit: 100})
    assert not (tmp_path / "shipped/fashion-mnist").exists()


# --- the model that is inside the package


@pytest.fixture(scope="module")
def clothes():
    return FixedPointDiTPipeline.from_pretrained("fashion-mnist")


def test_the_clothes_inside_the_package_are_small_and_tell_what_they_are(clothes):
    folder = files.SHIPPED / "fashion-mnist"
    assert sum(weight.numel() for weight in clothes.transformer.parameters()) <= ship.MOST_PARAMETERS
    assert ship.size_of(folder) <= ship.MOST_BYTES
    assert ship.unguided_budgets(clothes) == [24, 40, 80]
    card = (folder / "README.md").read_text()
    for fact in (
        "MIT licence",
        "Apache-2.0",
        "fpdm train fashion_mnist --steps",
        "FD-classifier",
        "against the test images",
    ):
        assert fact in card


def test_the_clothes_inside_the_package_are_of_their_classes(clothes, monkeypatch):
    """By a classifier that names 91% of real ones rightly."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it asked the network"))
    names = [str(i) for i in range(10)]
    source = SimpleNamespace(channels=1, class_names=names)
    path = Path(files.__file__).parent / "evaluation/classifiers/fashion_mnist.safetensors"
    classifier = Classifier.load(path, source, 28, "cpu")
    labels = torch.arange(10).repeat_interleave(6)
    for budget, least in ((24, 0.75), (80, 0.75)):
        images = clothes(labels.tolist(), **clothes.tuned(budget), seed=0).images
        pixels = torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[:, None]
        right = (classifier.classify(classifier.features(pixels)) == labels).double().mean()
        assert right >= least
