"""`fpdm replay`: the images, timesteps and losses of a step that was trained."""

import shutil

import numpy as np
import pytest
from PIL import Image

from fpdm.cli.main import main
from fpdm.data import digits
from fpdm.data.stream import epoch_order
from fpdm.imaging import grid
from fpdm.training.draws import draw
from fpdm.training.loop import Trainer
from fpdm.training.replay import replay
from tests.commands import contents, refusal
from tests.training.runs import log_of, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    Trainer(tiny(log_every=1, checkpoint_every=1, accumulation=2, exit_loss="target", lr=1e-2), path).run()
    return path


def real(step):
    """The images of a step and their labels, straight from the data."""
    source = digits()
    order = epoch_order(source.chunks, 0, 0)[8 * step : 8 * step + 8].tolist()
    return [source.load(index) for index in order]


@pytest.mark.parametrize("step", [0, 4, 9])
def test_a_step_shows_its_images_classes_and_timesteps(step, run):
    found = replay(run, step)
    wanted = real(step)
    assert [row.slot for row in found.rows] == list(range(8))
    assert [row.label for row in found.rows] == [label for _, label in wanted]
    assert [row.timestep for row in found.rows] == draw(0, step, list(range(8)), (1,), 1000, 0).timesteps.tolist()
    for image, (original, _) in zip(found.images, wanted, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(original))


def test_with_the_weights_of_the_step_the_losses_are_those_that_were_logged(run):
    for step in (0, 3, 9):
        found, line = replay(run, step), log_of(run)[step]
        assert found.weights == (step or None)
        assert np.mean([row.mse for row in found.rows]) == pytest.approx(line["mse"], rel=1e-4)
        without_exit = np.mean([row.loss for row in found.rows])
        assert without_exit == pytest.approx(line["mse"] + line["vlb"], rel=1e-4)


def test_no_weights_of_later_steps_are_used(tmp_path):
    Trainer(tiny(checkpoint_every=4), tmp_path / "run").run()
    assert [replay(tmp_path / "run", step).weights for step in (0, 3, 4, 7, 8, 9)] == [None, None, 4, 4, 8, 8]


def test_the_command_prints_the_worst_first_and_changes_nothing_but_its_picture(run, capsys):
    before = contents(run)
    assert main(["replay", str(run), "--step", "4"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if len(line.split()) == 5 and line.split()[0].isdigit()]
    losses = [float(row[3]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert sorted(int(row[0]) for row in rows) == list(range(8))
    assert "of the checkpoint of step 4" in said
    after = contents(run)
    assert {path.name for path in after.keys() - before.keys()} == {"replay-4.png"}
    assert all(after[path] == before[path] for path in before)
    wanted = grid([image for image, _ in real(4)], columns=10)
    assert np.array_equal(np.asarray(Image.open(run / "replay-4.png")), np.asarray(wanted))
    (run / "replay-4.png").unlink()


def test_held_out_images_are_in_no_step(tmp_path):
    trainer = Trainer(tiny(holdout=800, steps=200), tmp_path / "run")
    kept = {trainer.parts.held.load(i)[0].tobytes() for i in range(800)}
    for step in (0, 77, 199):
        assert not kept & {image.tobytes() for image in replay(tmp_path / "run", step).images}


@pytest.mark.parametrize("changes", [{"gradient": "implicit", "warm_share": 1.0}, {"network": "dit", "depth": 2}])
def test_every_kind_of_run_can_be_replayed(changes, tmp_path):
    Trainer(tiny(steps=2, **changes), tmp_path / "run").run()
    assert len(replay(tmp_path / "run", 1).rows) == 8


def reds(folder, shift=0):
    (folder / "cat").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i + shift, 0, 0)).save(folder / f"cat/{i}.png")
    return folder


def test_a_fine_tuned_run_has_the_weights_of_its_model_at_the_start(run, tmp_path):
    model = shutil.copytree(run / "pipeline", tmp_path / "model")
    settings = {"log_every": 1, "checkpoint_every": 2, "ema": 0.0, "init_from": str(model), "steps": 3}
    Trainer(tiny(**settings), tmp_path / "run").run()
    lines, found = log_of(tmp_path / "run"), replay(tmp_path / "run", 0)
    assert found.weights is None
    assert np.mean([row.mse for row in found.rows]) == pytest.approx(lines[0]["mse"], rel=1e-4)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=r"began with the model .*before its oldest checkpoint: put the model back"):
        replay(tmp_path / "run", 0)
    assert replay(tmp_path / "run", 2).weights == 2


def test_other_images_than_the_runs_are_refused(tmp_path):
    data, other = reds(tmp_path / "data"), reds(tmp_path / "other", shift=1)
    Trainer(tiny(source="folder", data=str(data), channels=3, steps=1), tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"the images in .*other are not those of the run"):
        replay(tmp_path / "run", 0, str(other))


def test_weights_that_are_older_than_the_step_are_said_to_be(tmp_path, capsys):
    Trainer(tiny(checkpoint_every=4, steps=8), tmp_path / "run").run()
    said = {}
    for step in (0, 3, 4, 6):
        assert main(["replay", str(tmp_path / "run"), "--step", str(step)]) == 0
        said[step] = capsys.readouterr().out.splitlines()[0]
    assert "at the start, 3 steps older: the losses are not the run's own;" in said[3]
    assert "of the checkpoint of step 4, 2 steps older:" in said[6]
    assert not any("older" in said[step] for step in (0, 4))


def test_broken_images_are_named(tmp_path):
    data = reds(tmp_path / "data") / "cat"
    (data / "5.png").write_bytes(b"broken")
    Trainer(tiny(source="folder", data=str(data.parent), channels=3, steps=1), tmp_path / "run").run()
    assert ["5.png" in name for name in replay(tmp_path / "run", 0).broken] == [True]
    moved = data.parent.rename(tmp_path / "moved")
    assert len(replay(tmp_path / "run", 0, str(moved)).rows) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--step", 10], "step 10 is none of this run's, 0 to 9"),
        (["{run}", "--step", -1], "step -1 is none of this run's"),
        (["{tmp}", "--step", 0], "is not a run: it has no config.json"),
        (["{tmp}/nowhere", "--step", 0], "is not a run"),
        (["{run}", "--step", "first"], "first"),
        (["{run}"], "--step"),
    ],
)
def test_refused(words, message, run, tmp_path, capsys):
    before = contents(run)
    said = refusal(capsys, ["replay", *(str(word).format(run=run, tmp=tmp_path) for word in words)])
    assert message in said
    assert contents(run) == before
    assert not list(tmp_path.iterdir())
