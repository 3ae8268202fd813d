"""Models inside the package: found by name, by every command and from Python, and how they get there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import ship

from fpdm import FixedPointDiTPipeline, files
from fpdm.cli.main import main
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


RESULT = {
    "real": {"FD-fake": 0.125},
    "ground": {"split": "test"},
    "made_with": {"threads": 1, "hardware": "a machine"},
    "trainings": [{"model": "small", "seed": 0, "command": "fpdm train x --data DATA", "steps": 7, "batch_size": 3,
                   "seconds": 5400.0}],
    "points": [
        {"model": "small", "seed": 0, "best": best, "budget": budget, "plan": f"{budget // 4} timesteps, passes",
         "scheduler": "unipc", "samples": 5000, "measures": {"FD-fake": [value, value - 1, value + 1]}}
        for budget, value, best in ((80, 2.5, True), (24, 7.5, True), (24, 6.5, False))
    ],
}  # fmt: skip


def shipped(tmp_path, monkeypatch, run, **limits):
    for name, value in limits.items():
        monkeypatch.setattr(ship, name, value)
    monkeypatch.setattr(ship, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    words = ["ship", run, "--name", "fashion-mnist", "--result", str(tmp_path / "result.json"), "--model", "small"]
    monkeypatch.setattr("sys.argv", words)
    ship.main()
    return tmp_path / "shipped/fashion-mnist"


def test_shipping_stores_half_precision_and_a_card_of_the_numbers(tmp_path, monkeypatch):
    run = save_pipeline(tmp_path / "run")
    folder = shipped(tmp_path, monkeypatch, run)
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    original = FixedPointDiTPipeline.from_pretrained(run).transformer.state_dict()
    assert all(torch.equal(weights[name], original[name].half()) for name in weights)
    card = (folder / "README.md").read_text()
    assert "| 24 | 6 timesteps, unipc | 7.5 (6.5 to 8.5) |\n| 80 | 20 timesteps, unipc | 2.5 (1.5 to 3.5) |" in card
    assert "6.5 (5.5" not in card  # which was not the best when plans were chosen
    for fact in ("MIT", "Apache-2.0", "fpdm train x --data DATA", "7 steps of 3 images", "1.5 hours", "a machine"):
        assert fact in card


@pytest.mark.parametrize(("limit", "said"), [("MOST_PARAMETERS", "parameters"), ("MOST_BYTES", "bytes")])
def test_what_is_too_large_is_not_shipped(limit, said, tmp_path, monkeypatch):
    run = save_pipeline(tmp_path / "run")
    with pytest.raises(SystemExit, match=said):
        shipped(tmp_path, monkeypatch, run, **{limit: 100})
    assert not (tmp_path / "shipped/fashion-mnist").exists()
