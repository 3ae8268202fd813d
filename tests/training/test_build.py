"""Settings that would have no effect are refused, every method trains, and a run in miniature needs no data."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from fpdm.cli import info
from fpdm.cli.main import main
from fpdm.recipes import RECIPES, recipe
from fpdm.training import dry
from fpdm.training.build import build, open_source
from fpdm.training.config import GRADIENTS, DataConfig
from fpdm.training.dry import dry_run, reduced
from fpdm.training.loop import Trainer
from tests.commands import contents
from tests.data.pictures import number_of, picture
from tests.training.runs import log_of, tensors_of, tiny

DIT = {"network": "dit", "depth": 2}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate settles precision and device once per process; here each run is to choose anew."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"damping": 0.7}, "damping has no effect with gradient sjfb"),
        ({"damping": 0.7, "gradient": "implicit"}, "damping has no effect with gradient implicit"),
        ({"tolerance": 0.1}, "tolerance has no effect with gradient sjfb"),
        ({"tolerance": 0.1, "gradient": "phantom"}, "tolerance has no effect with gradient phantom"),
        ({"exit_weight": 0.5}, "exit_weight has no effect with exit_loss none"),
        ({**DIT, "gradient": "jfb"}, "gradient belongs to a fixed point network"),
        ({**DIT, "exit_loss": "target"}, "exit_loss belongs to a fixed point network"),
        ({**DIT, "warm_share": 0.5}, "warm_share belongs to a fixed point network"),
        ({**DIT, "time_in_pre_post": True}, "time_in_pre_post belongs to a fixed point network"),
        ({**DIT, "input_skip": True}, "input_skip belongs to a fixed point network"),
        ({**DIT, "injection": "gate"}, "injection belongs to a fixed point network"),
        ({"injection": "gate", "input_skip": True}, "input_skip belongs to injection 'mlp'"),
        ({"depth": 2}, "depth belongs to an explicit DiT"),
        ({"conditional": False, "class_dropout": 0.2}, "class_dropout has no effect without conditional"),
        ({"vae": "some/vae"}, "vae has no effect on images"),
        ({"gradient": "phantom", "damping": 0}, "damping"),
        ({"gradient": "implicit", "tolerance": 0}, "tolerance"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Trainer(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"damping": 0.7, "gradient": "phantom"},
        {"tolerance": 0.1, "gradient": "implicit"},
        {"exit_weight": 0.5, "exit_loss": "final"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_where_it_has_one_it_is_taken(changes):
    build(tiny(**changes))


@pytest.fixture
def configured(monkeypatch):
    """Sets what `accelerate launch` would, of its options or its configuration."""
    yield lambda **values: [monkeypatch.setenv(f"ACCELERATE_{name}", value) for name, value in values.items()]
    AcceleratorState._reset_state(reset_partial_state=True)  # other modules are to see nothing of it


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("MIXED_PRECISION", "bf16", "--mixed-precision bf16"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--accumulation"),
        ("DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ],
)
def test_what_accelerate_was_told_otherwise_is_refused(name, value, flag, configured, tmp_path):
    configured(**{name: value})
    with pytest.raises(ValueError, match=f"accelerate was configured or launched with .*: say {flag}"):
        Trainer(tiny(), tmp_path / "run")


def test_what_a_plain_launch_always_says_is_no_contradiction(configured, tmp_path):
    configured(MIXED_PRECISION="no", GRADIENT_ACCUMULATION_STEPS="1", DYNAMO_BACKEND="NO")
    assert Trainer(tiny(mixed_precision="bf16"), tmp_path / "run").accelerator.mixed_precision == "bf16"


def test_training_takes_the_part_that_it_is_told(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = datasets.Features({"image": datasets.Image()})
    parts = {"full": 5, "held_out": 2}
    datasets.DatasetDict({
        name: datasets.Dataset.from_dict({"image": [{"bytes": picture(i), "path": None} for i in range(n)]}, images)
        for name, n in parts.items()
    }).save_to_disk(tmp_path / "a")  # fmt: skip
    for name, n in parts.items():
        source = open_source(DataConfig("datasets", str(tmp_path / "a"), split=name))
        assert [number_of(source.load(i)[0]) for i in range(len(source))] == list(range(n))
    with pytest.raises(ValueError, match=r"unknown split 'train'.* full, held_out"):
        open_source(DataConfig("datasets", str(tmp_path / "a")))


@pytest.mark.parametrize("name", ["no_grad_max", "with_grad_max"])
def test_counts_of_iterations_have_no_effect_on_an_explicit_network(name):
    build(tiny(**DIT, **{name: 3}))  # recipes set them


@pytest.mark.parametrize("num_core", [1, 2])
@pytest.mark.parametrize("method", GRADIENTS)
def test_every_method_trains_with_exits_and_warm_starts(method, num_core, tmp_path):
    """And every parameter has a gradient at every step: none has to be looked for."""
    config = tiny(gradient=method, num_core=num_core, exit_loss="final", warm_share=0.5, steps=6, log_every=6)
    trainer = Trainer(config, tmp_path / "run")
    step, missing = trainer.optimizer.step, []

    def checked(*arguments):
        missing.extend(name for name, p in trainer.net.named_parameters() if p.grad is None)
        return step(*arguments)

    trainer.optimizer.step = checked
    assert trainer.run() == "finished"
    assert not missing
    (line,) = log_of(tmp_path / "run")
    assert line["skipped_steps"] == 0
    assert all(torch.isfinite(value).all() for value in tensors_of(tmp_path / "run", 6).values())


@pytest.mark.parametrize("method", ["implicit", "phantom"])
def test_a_method_learns(method, tmp_path):
    config = tiny(gradient=method, batch_size=16, steps=60, lr=1e-2, log_every=20, exit_loss="target", with_grad_max=1,
                  no_grad_max=8)  # fmt: skip
    Trainer(config, tmp_path / "run").run()
    losses = [line["mse"] for line in log_of(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


# --- in miniature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step_without_data_and_leaves_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(dry, "IMAGES", 2)
    config = recipe(name)
    small, seconds = dry_run(config)
    assert seconds > 0
    kept = ("image_size", "channels", "classes", "conditional")
    assert {key: getattr(small.data, key) for key in kept} == {key: getattr(config.data, key) for key in kept}
    assert small.gradient == config.gradient
    assert contents(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_did_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(info, "print_memory", lambda *arguments: None)  # takes its time, and has tests of its own
    words = ["train", "images", "--dry-run", "--model", "none", "--hidden-size", "16", "--num-heads", "2"]
    more = ["--patch-size", "8", "--image-size", "16", "--exit-loss", "final", "--accumulation", "2"]
    assert main([*words, *more, "--batch-size", "8"]) == 0
    said = capsys.readouterr().out
    assert "one step of 16 random inputs of 16 x 16 x 3, the network 16 wide: done" in said
    assert "a training step, per image" in said
    assert not list(tmp_path.iterdir())


def test_what_a_run_would_be_refused_for_a_miniature_is_too():
    with pytest.raises(ValueError, match="damping has no effect"):
        dry_run(tiny(damping=0.7))


def test_a_miniature_needs_the_tracker_of_the_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard is not installed: pip install 'fpdm\[tensorboard\]'"):
        dry_run(tiny(tracker="tensorboard"))


def test_a_miniature_has_the_shape_of_the_whole():
    config = recipe("imagenet256").with_fields(num_core=2, num_pre=2)
    small = reduced(config)
    assert (small.model.num_core, small.model.num_pre, small.model.num_heads) == (2, 2, 16)
    assert small.model.hidden_size < 1152
