"""What a step does, and what a run leaves behind."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpdm.names import needs
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training import checkpoints
from fpdm.training.adopt import fields_of
from fpdm.training.draws import draw
from fpdm.training.ema import Ema
from fpdm.training.loop import Trainer, learning_rate
from tests.commands import contents
from tests.data.test_arrays import write_idx
from tests.training.runs import log_of, tiny


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate settles precision and device once per process; here each run is to choose anew."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_draws_do_not_depend_on_how_the_batch_is_shared_out():
    whole = draw(0, 7, [0, 1, 2, 3], (1, 4, 4), 1000, 0.5)
    parts = [draw(0, 7, slots, (1, 4, 4), 1000, 0.5) for slots in ([0, 1], [2], [3])]
    for name in ("noise", "timesteps", "dropped"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(whole.noise, draw(0, 8, [0, 1, 2, 3], (1, 4, 4), 1000, 0.5).noise)


def test_draws_have_the_distributions_they_should():
    draws = draw(0, 0, list(range(4000)), (1, 2, 2), 10, 0.25)
    assert abs(draws.noise.mean()) < 0.03
    assert abs(draws.noise.std() - 1) < 0.03
    assert abs(draws.dropped.float().mean() - 0.25) < 0.03
    assert draws.timesteps.bincount(minlength=10).min() > 300


def test_ema_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(model, 0.5), model.weight.item()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.fill_(step)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    config = tiny(steps=103, warmup=3, lr=3.0, lr_schedule="cosine")
    assert [learning_rate(config, step) for step in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert learning_rate(config, 53) == pytest.approx(1.5)
    assert learning_rate(config, 103) == pytest.approx(0.0)
    assert learning_rate(tiny(steps=103, lr=3.0, lr_schedule="constant"), 99) == 3.0


def test_a_short_run_learns_and_leaves_a_model_that_opens(tmp_path):
    config = tiny(steps=120, batch_size=32, lr=3e-3, log_every=40, sample_every=120, sample_budget=20, hidden_size=32)
    trainer = Trainer(config, tmp_path / "run")
    assert "1,797 images" in trainer.summary()
    assert trainer.run() == "finished"
    losses = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "run/samples/step-00000120.png").is_file()

    pipe = FixedPointDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    assert torch.equal(pipe.scheduler.betas, trainer.parts.schedule.betas)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.class_names == [str(digit) for digit in range(10)]
    averaged = dict(trainer.ema.model.named_parameters())
    for name, weight in pipe.transformer.named_parameters():
        assert torch.equal(weight, averaged[name])
    assert pipe("7", budget=20, seed=0).images[0].size == (8, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "dit", "depth": 2},
        {"conditional": False},
        {"num_core": 2, "num_pre": 2},
        {"num_core": 2, "num_pre": 0, "num_post": 0, "warm_share": 0.5},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True, "learned_variance": False},
        {"prediction_type": "sample", "beta_schedule": "cosine", "min_snr_gamma": 5.0},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_kind_of_model_trains_and_samples(changes, tmp_path):
    config = tiny(steps=2, log_every=1, sample_every=2, sample_budget=12, **changes)
    assert Trainer(config, tmp_path / "run").run() == "finished"
    assert (tmp_path / "run/samples/step-00000002.png").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = tiny(lr=1e30, grad_clip=0.0, warmup=0, log_every=1, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        Trainer(config, tmp_path / "run").run()
    for folder in (tmp_path / "run/checkpoints").iterdir():
        assert all(weight.isfinite().all() for weight in load_file(folder / "weights.safetensors").values())


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    Trainer(tiny(tracker="tensorboard"), tmp_path / "run").run()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    logged = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)


def test_an_extra_that_is_missing_is_named():
    with pytest.raises(ImportError, match=r"fpdm\[tensorboard\]"):
        needs("no_such_module", "tensorboard")


def images_folder(root, classes=("cat", "dog"), size=8):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (size + i, size), (40 * i, 100 * c, 50)).save(root / name / f"{i}.png")
    return root


def folder_config(data, **changes):
    return tiny(source="folder", data=str(data), channels=3, steps=3, log_every=1, **changes)


def test_broken_images_are_passed_over_counted_and_named(tmp_path):
    data = images_folder(tmp_path / "data")
    (data / "cat/broken.png").write_bytes(b"not a picture")
    trainer = Trainer(folder_config(data), tmp_path / "run")
    trainer.run()
    assert len(trainer.broken) == 1
    assert "cat/broken.png" in next(iter(trainer.broken))
    assert log_of(tmp_path / "run")[-1]["broken_images"] == 1


def test_broken_images_among_those_held_out_are_named_too(tmp_path):
    data = images_folder(tmp_path / "data")
    names = {f"dog/broken{i}.png" for i in range(6)}
    for name in names:
        (data / name).write_bytes(b"not a picture")
    trainer = Trainer(folder_config(data, holdout=9, validate_every=1), tmp_path / "run")
    held = {trainer.parts.held.source.names[n] for n in trainer.parts.held.numbers} & names
    trainer.run()
    assert 0 < len(held) < 6
    assert {said.partition(":")[0] for said in trainer.broken} == names


@pytest.mark.parametrize("place", [".", "runs", "cat/deep"])
def test_a_run_among_the_images_that_it_trains_on_is_refused(place, tmp_path, monkeypatch):
    data = images_folder(tmp_path / "photos")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"photos, the folder of the images.*choose another --runs-dir"):
        Trainer(folder_config(data), data / place / "images")
    monkeypatch.chdir(data)
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        Trainer(folder_config("."), f"{place}/images")
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        Trainer(folder_config(data), tmp_path / "link" / place / "images")
    assert contents(tmp_path) == before
    Trainer(folder_config("."), "../runs/images")
    assert (tmp_path / "runs/images/config.json").is_file()


def test_a_run_beside_idx_files_joins_nothing(tmp_path):
    write_idx(tmp_path, 7, "train")
    config = tiny(source="idx", data=str(tmp_path), channels=1, steps=1)
    Trainer(config, tmp_path / "runs/clothes").run()
    assert Trainer(config, tmp_path / "runs/clothes").run() == "already finished"


def test_a_part_of_the_data_is_learnt_and_the_run_goes_on_with_no_other(tmp_path):
    images = {name: write_idx(tmp_path, 7, files) for name, files in (("train", "train"), ("test", "t10k"))}
    config = tiny(source="idx", data=str(tmp_path), channels=1, steps=1, split="test")
    trainer = Trainer(config, tmp_path / "run")
    assert np.array_equal(trainer.parts.source.images, images["test"])
    trainer.run()
    with pytest.raises(ValueError, match="the images are others"):
        Trainer(config.with_fields(split="train", steps=2), tmp_path / "run")


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_a_part_that_the_data_has_not_is_refused(source, tmp_path):
    data = None if source == "digits" else str(images_folder(tmp_path / "images"))
    with pytest.raises(ValueError, match="has no split 'test', only folders of IDX files have"):
        Trainer(tiny(source=source, data=data, split="test"), tmp_path / "run")


def test_fine_tuning_takes_network_and_weights_and_starts_new_classes_anew(tmp_path):
    first = Trainer(folder_config(images_folder(tmp_path / "a"), injection="gate"), tmp_path / "first")
    first.run()
    folder = str(tmp_path / "first/pipeline")
    adopted = fields_of(folder)
    assert (adopted["hidden_size"], adopted["network"], adopted["channels"]) == (16, "fpdm", 3)
    assert (adopted["injection"], adopted["input_skip"]) == ("gate", False)

    data = images_folder(tmp_path / "b", classes=("x", "y", "z"))
    with pytest.warns(UserWarning, match="what it learnt of them is left out"):
        second = Trainer(folder_config(data, init_from=folder, lr=0.5, injection="gate"), tmp_path / "second")
    old, new = dict(first.ema.model.named_parameters()), dict(second.net.named_parameters())
    assert new["label_embed.weight"].shape[0] == 4
    for name in old:
        if name != "label_embed.weight":
            assert torch.equal(old[name], new[name]), name


@pytest.mark.parametrize(
    ("named", "classes", "kept"),
    [
        (True, "abcdefghijkl", True),
        (False, "abcdefghijkl", True),
        (True, "abcdefghijkm", False),
        (False, "abc", False),
    ],
)
def test_fine_tuning_keeps_what_was_learnt_of_the_same_classes_and_tells_where_it_does_not(
    named, classes, kept, tmp_path, recwarn
):
    first = Trainer(folder_config(images_folder(tmp_path / "a", classes="abcdefghijkl")), tmp_path / "first")
    first.run()
    folder = tmp_path / "first/pipeline"
    if not named:
        pipe = FixedPointDiTPipeline.from_pretrained(folder)
        FixedPointDiTPipeline(pipe.transformer, pipe.scheduler).save_pretrained(folder)
    again = folder_config(images_folder(tmp_path / "b", classes=classes), init_from=str(folder), seed=1)
    second = Trainer(again, tmp_path / "second")
    old, new = (model.label_embed.weight for model in (first.ema.model, second.net))
    assert (old.shape == new.shape and torch.equal(old, new)) == kept
    told = [str(warning.message) for warning in recwarn if "what it learnt of them" in str(warning.message)]
    assert len(told) == (0 if kept else 1)


def test_a_grid_that_memory_does_not_suffice_for_is_left_out_and_the_checkpoint_is_there(tmp_path, monkeypatch, capsys):
    def decode(self, *given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FixedPointDiTPipeline, "decode", decode)
    config = tiny(sample_every=5, checkpoint_every=5)
    assert Trainer(config, tmp_path / "run").run() == "finished"
    assert "at step 5, there is not enough memory for a grid of samples" in capsys.readouterr().out
    assert not list((tmp_path / "run/samples").iterdir())


def test_a_step_is_saved_before_its_grid_is_drawn(tmp_path, monkeypatch):
    def decode(self, *given):
        raise KeyError("a failure of another kind")

    monkeypatch.setattr(FixedPointDiTPipeline, "decode", decode)
    with pytest.raises(KeyError):
        Trainer(tiny(sample_every=5, checkpoint_every=5), tmp_path / "run").run()
    assert checkpoints.all_steps(tmp_path / "run/checkpoints") == [5]


def test_fine_tuning_another_network_is_refused_by_name(tmp_path):
    data = images_folder(tmp_path / "a")
    Trainer(folder_config(data), tmp_path / "first").run()
    config = folder_config(data, init_from=str(tmp_path / "first/pipeline"), hidden_size=32)
    with pytest.raises(ValueError, match="hidden_size 16, not 32"):
        Trainer(config, tmp_path / "second")


def test_the_config_is_kept_with_the_run(tmp_path):
    Trainer(tiny(), tmp_path / "run")
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["optimizer"]["batch_size"] == 8
    assert len(kept["data_fingerprint"]) == 64


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared"):
        Trainer(tiny(accumulation=3), tmp_path / "run")
