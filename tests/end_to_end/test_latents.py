"""From images to latents to a model that draws images: trained on latents, which are decoded wherever one looks."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fpdm import FixedPointDiTPipeline
from fpdm.cli.main import main
from fpdm.data import LatentPreparation, encoding
from fpdm.imaging import grid
from fpdm.training.config import SOURCES
from fpdm.training.loop import Trainer
from fpdm.weights import digest
from tests.commands import refusal
from tests.data.test_latents import SIDE, SIZE, encode, flip_a_byte, save_autoencoder, save_images
from tests.training.runs import interrupt_at, log_of, tensors_of, tiny

COUNT = 24
STEPS = 4


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def latents(images, vae, tmp_path_factory):
    """A command's latents, with mirrored ones, in three shards."""
    out = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SHARD", 10)
        words = ["latents", images, "--vae", vae, "--out", out, "--image-size", SIZE, "--flip", "--device", "cpu"]
        assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="module")
def unlike(images, other, tmp_path_factory):
    """Latents of another autoencoder, without mirrored ones."""
    out = tmp_path_factory.mktemp("unlike")
    assert encode(images, other, out) == []
    return out


def config(data, **changes):
    settings = {"source": "latents", "channels": 4, "image_size": SIDE, "steps": STEPS, "checkpoint_every": 2,
                "batch_size": 4, "sample_every": 100, "log_every": 2}  # fmt: skip
    return tiny(data=str(data), **{**settings, **changes})


@pytest.fixture(scope="module")
def run(latents, tmp_path_factory):
    """A run that was let alone, on all there is: mirrored latents, images held out, sample grids."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert Trainer(config(latents, **ALL), path).run() == "finished"
    return path


ALL = {"flip": True, "holdout": 4, "validate_every": 2, "sample_every": 2, "sample_budget": 6}


def test_the_model_carries_its_autoencoder_and_clips_nothing(run, vae):
    pipe = FixedPointDiTPipeline.from_pretrained(run / "pipeline")
    assert digest(pipe.vae) == digest(AutoencoderKL.from_pretrained(vae))
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.5, 0.1)
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.class_names == ["cat", "owl"]
    assert (pipe.transformer.config.sample_size, pipe.transformer.config.in_channels) == (SIDE, 4)


def test_grids_of_samples_are_decoded(run):
    for step in (2, 4):
        with Image.open(run / f"samples/step-{step:08d}.png") as shown:
            assert shown.size == grid([Image.new("RGB", (SIZE, SIZE))] * 40, columns=10).size
            assert shown.mode == "RGB"
            assert np.asarray(shown).std() > 5


def test_the_network_is_given_scaled_draws_and_held_out_latents_too(latents, run, tmp_path):
    parts = Trainer(config(latents, **ALL), tmp_path / "run").parts
    assert parts.prepare == LatentPreparation(0.5, 0.1, flip=True)
    assert (len(parts.source), len(parts.held)) == (COUNT - 4, 4)
    assert not any(p.requires_grad for p in parts.vae.parameters())
    assert any("validation" in line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_run_by_commands_draws_images_of_twice_the_side_for_each_halving(blocks, images, tmp_path):
    more = {"block_out_channels": (8,) * blocks, "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks}  # fmt: skip
    side = SIDE * 2 ** (blocks - 1)
    encode(images, save_autoencoder(tmp_path / "vae", **more), tmp_path / "latents", side)
    (tmp_path / "vae").rename(tmp_path / "moved")
    train = [
        "train", "images", "--data", "latents", "--vae", "moved", "--image-size", SIDE, "--channels", 4, "--no-flip",
        "--hidden-size", 16, "--num-heads", 2, "--patch-size", 4, "--steps", 1, "--batch-size", 4, "--workers", 0,
        "--with-grad-max", 1, "--no-grad-max", 0, "--device", "cpu",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main([str(word) for word in train]) == 0
        shutil.rmtree("moved")
        shutil.rmtree("latents")  # the model is whole without
        assert main(["sample", "runs/images", "--budget", "6", "--num-images", "3", "--out", "out", "--npz"]) == 0
    for i in range(3):
        with Image.open(tmp_path / f"out/{i:06d}.png") as image:
            assert (image.size, image.mode) == ((side, side), "RGB")
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (3, side, side, 3)


@pytest.mark.parametrize("source", SOURCES)
def test_latents_are_found_out_or_named_and_no_other_kind_of_data(source, latents, tmp_path):
    wanted = config(latents, source=source, steps=1)
    if source in ("auto", "latents"):
        assert Trainer(wanted, tmp_path / "run").run() == "finished"
        return
    with pytest.raises(ValueError, match=r"channels is|needs data|latents"):  # whose folder has that in its name
        Trainer(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Refused


def refused(message, *arguments, path, **changes):
    with pytest.raises(ValueError, match=message) as raised:
        Trainer(config(*arguments, **changes), path)
    assert not path.exists()
    return str(raised.value)


def test_what_does_not_fit_the_latents_is_refused(latents, unlike, other, tmp_path):
    path = tmp_path / "run"
    refused(r"image_size is 16, and the latents in .* are \(8, 8\)", latents, path=path, image_size=16)
    refused("channels is 3, and these images have 4", latents, path=path, channels=3)
    refused("no mirrored latents: make them with `fpdm latents --flip`", unlike, path=path, flip=True)
    said = refused("another autoencoder than the one that made the latents", latents, path=path, vae=other)
    assert other in said
    refused("--vae", latents, path=path, vae=str(tmp_path / "nowhere"))
    refused("has 2 classes, and this recipe is for 3", latents, path=path, classes=3)


def test_an_autoencoder_that_is_gone_is_asked_for_and_taken_wherever_it_is(images, vae, tmp_path):
    moved, out = shutil.copytree(vae, tmp_path / "vae"), tmp_path / "latents"
    encode(images, str(moved), out)
    moved.rename(tmp_path / "elsewhere")
    said = refused("say where it is with --vae", out, path=tmp_path / "run")
    assert str(moved) in said
    assert Trainer(config(out, vae=str(tmp_path / "elsewhere")), tmp_path / "run").run() == "finished"


SCALE = "only weights are compared: training scales by the index, the model folder by the autoencoder named"


@pytest.mark.parametrize("changed", ["scaling_factor", "shift_factor"])
def test_a_model_undoes_the_scale_and_shift_that_it_was_trained_with(changed, latents, vae, tmp_path):
    folder = shutil.copytree(vae, tmp_path / "vae")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, changed: 0.25}))
    try:
        parts = Trainer(config(latents, vae=str(folder)), tmp_path / "run").parts
    except ValueError:
        return
    trained = (parts.prepare.scale, parts.prepare.shift)
    assert trained == (parts.vae.config.scaling_factor, parts.vae.config.shift_factor)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("imagenet256", "has 2 classes, and this recipe is for 1000"),
        ("ffhq256", "has 2 classes, and this recipe is for 0: --no-conditional learns all as one"),
        ("ffhq256 --no-conditional", "image_size is 32, and the latents in"),
        ("imagenet256 --classes 2", "image_size is 32, and the latents in"),
        ("images --channels 4 --image-size 16", "image_size is 16, and the latents in"),
    ],
)
def test_recipes_are_for_their_own_data(recipe, message, latents, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--hidden-size", 16, "--num-heads", 2, "--holdout", 0]
    assert message in refusal(capsys, ["train", *recipe.split(), "--data", latents, *small])
    assert not list(tmp_path.iterdir())


def test_latents_that_are_not_complete_are_refused(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "latents")
    (copy / "latents.json").unlink()
    for source in ("auto", "latents"):
        refused("is not complete: run the same `fpdm latents` again", copy, path=tmp_path / "run", source=source)


def test_latents_cannot_be_cropped_anew(latents, tmp_path):
    refused("crop random has no effect on latents", latents, path=tmp_path / "run", crop="random")
    refused("split 'test' has no effect on latents", latents, path=tmp_path / "run", split="test")


def test_a_damaged_shard_is_named_before_training_starts(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "latents")
    flip_a_byte(copy / "latents-00002.safetensors")
    with pytest.raises(ValueError, match=r"latents-00002\.safetensors is damaged"):
        Trainer(config(copy, steps=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Fine-tuned


def test_a_model_is_fine_tuned_on_latents_of_its_own_autoencoder_alone(run, latents, unlike, images, tmp_path):
    model, path = str(run / "pipeline"), tmp_path / "run"
    fine = Trainer(config(latents, init_from=model), path)
    old = FixedPointDiTPipeline.from_pretrained(model).transformer.state_dict()
    assert all(torch.equal(weight, old[name]) for name, weight in fine.net.state_dict().items())
    for data, changes in (
        (unlike, {}),
        (images, {"source": "folder", "channels": 3}),
        ("digits", {"source": "digits", "channels": 1, "data": None}),
    ):
        settings = {**config(data).to_dict()["data"], **changes, "init_from": model}
        with pytest.raises(ValueError, match=r"has an autoencoder of its own.*leave --init-from out"):
            Trainer(config(latents).with_fields(**settings), tmp_path / "other")


def test_a_model_of_pixels_is_not_fine_tuned_on_latents(latents, tmp_path):
    assert Trainer(tiny(steps=1), tmp_path / "pixels").run() == "finished"
    model = str(tmp_path / "pixels/pipeline")
    refused("has no autoencoder, so its weights mean something else", latents, path=tmp_path / "run", init_from=model)


# Gone on with


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_stopped_is_as_one_that_was_not(step, run, latents, tmp_path, monkeypatch):
    moved, path = shutil.copytree(latents, tmp_path / "moved"), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert Trainer(config(latents, **ALL), path).run() == "interrupted"
    assert FixedPointDiTPipeline.from_pretrained(path / "pipeline").vae is not None
    assert Trainer(config(moved, **ALL), path).run() == "finished"
    one, two = tensors_of(run, STEPS), tensors_of(path, STEPS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log_of(run) == log_of(path)


def test_a_run_does_not_go_on_with_other_latents(latents, unlike, tmp_path):
    path = tmp_path / "run"
    assert Trainer(config(latents, steps=1), path).run() == "finished"
    with pytest.raises(ValueError, match="belongs to another run: the images are others"):
        Trainer(config(unlike), path)


# Before there are any


def test_a_dry_run_of_imagenet_names_its_sizes_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--no-grad-max", "1", "--with-grad-max", "1", "--mixed-precision", "no", "--device", "cpu"]
    assert main(["train", "imagenet256", "--dry-run", *quick]) == 0
    said = capsys.readouterr().out
    assert "86.50 M parameters" in said
    assert "32 x 32 x 4 in patches of 2: 256 tokens; 1000 classes" in said
    assert "one step of 8 random inputs of 32 x 32 x 4, the network 128 wide: done, saved and exported" in said
    assert not list(tmp_path.iterdir())
