"""A run that was stopped and gone on with equals one that was not: bit for bit on the CPU, the log too."""

import json
import shutil

import pytest
import torch
from filelock import FileLock

from fpdm.training import checkpoints
from fpdm.training.loop import Trainer
from fpdm.training.saving import Saver
from tests.training.runs import interrupt_at, log_of, tensors_of, tiny


def assert_same_run(one, other, step):
    first, second = tensors_of(one, step), tensors_of(other, step)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert log_of(one) == log_of(other)
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert Trainer(tiny(), path).run() == "finished"
    return path


@pytest.mark.parametrize("step", range(1, 10))
def test_stopped_at_any_step(step, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert Trainer(tiny(), tmp_path / "run").run() == "interrupted"
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    assert Trainer(tiny(), tmp_path / "run").run() == "finished"
    assert_same_run(uninterrupted, tmp_path / "run", 10)


def test_killed_between_checkpoints(uninterrupted, tmp_path, monkeypatch):
    """Without a chance to save: the log is cut back to the last checkpoint, and what was done since is done again."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", die_at(8, Trainer._log))
        with pytest.raises(SystemExit):
            Trainer(tiny(), path).run()
    with (path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # written after the checkpoint of step 5, and torn
    assert Trainer(tiny(), path).run() == "finished"
    assert_same_run(uninterrupted, path, 10)


def die_at(step, method):
    def dying(self, *args):
        if self.step == step:
            raise SystemExit("killed")
        return method(self, *args)

    return dying


def test_torn_while_a_checkpoint_is_written(uninterrupted, tmp_path, monkeypatch):
    path, real = tmp_path / "run", checkpoints.save_file
    with monkeypatch.context() as patch:

        def torn(tensors, file):
            if "step-00000010" in str(file) and file.name.startswith("optimizer"):
                file.write_bytes(b"half a fi")
                raise SystemExit("killed")
            real(tensors, file)

        patch.setattr(checkpoints, "save_file", torn)
        with pytest.raises(SystemExit):
            Trainer(tiny(), path).run()
    assert checkpoints.all_steps(path / "checkpoints") == [5]
    assert Trainer(tiny(), path).run() == "finished"
    assert_same_run(uninterrupted, path, 10)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, uninterrupted, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        Trainer(tiny(), path).run()
    damaged = path / "checkpoints/step-00000007" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert Trainer(tiny(), path).run() == "finished"
    assert "step-00000007 is damaged" in capsys.readouterr().out
    assert_same_run(uninterrupted, path, 10)
    for folder in (path / "checkpoints").iterdir():
        (folder / name).write_bytes(b"{")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        Trainer(tiny(), path).run()


def test_a_model_of_an_earlier_stop_does_not_pass_for_the_finished_one(uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        Trainer(tiny(), path).run()
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "export", lambda self: 1 / 0)  # killed after the last checkpoint, before the model
        with pytest.raises(ZeroDivisionError):
            Trainer(tiny(), path).run()
    assert Trainer(tiny(), path).run() == "already finished"
    assert_same_run(uninterrupted, path, 10)


@pytest.mark.parametrize("changes", [{"workers": 2}, {"log_every": 4, "checkpoint_every": 3}])
def test_what_may_change_changes_nothing(changes, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(tiny(), tmp_path / "run").run()
    Trainer(tiny(**changes), tmp_path / "run").run()
    assert_same_run(uninterrupted, tmp_path / "run", 10)


def test_a_line_of_the_log_is_the_mean_of_its_steps_where_the_interval_changed(tmp_path, monkeypatch):
    Trainer(tiny(log_every=1), tmp_path / "each").run()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        Trainer(tiny(log_every=4), tmp_path / "run").run()
    Trainer(tiny(log_every=5), tmp_path / "run").run()
    losses = [entry["loss"] for entry in log_of(tmp_path / "each")]
    logged = {entry["step"]: entry["loss"] for entry in log_of(tmp_path / "run")}
    assert logged == pytest.approx({4: sum(losses[:4]) / 4, 10: sum(losses[4:]) / 6}, rel=1e-5)


def test_more_steps_can_be_asked_for(tmp_path):
    constant = {"lr_schedule": "constant"}  # a cosine depends on the number of steps
    Trainer(tiny(**constant), tmp_path / "whole").run()
    Trainer(tiny(steps=5, **constant), tmp_path / "run").run()
    assert Trainer(tiny(steps=5, **constant), tmp_path / "run").run() == "already finished"
    assert Trainer(tiny(**constant), tmp_path / "run").run() == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "run", 10)


def test_the_last_line_is_of_the_last_steps_and_joins_those_that_are_asked_for_later(tmp_path):
    constant = {"lr_schedule": "constant"}
    Trainer(tiny(log_every=1, **constant), tmp_path / "each").run()
    losses = [entry["loss"] for entry in log_of(tmp_path / "each")]
    assert not any("partial" in entry for entry in log_of(tmp_path / "each"))
    for steps in (6, 7):
        Trainer(tiny(steps=steps, **constant), tmp_path / "run").run()
        before = log_of(tmp_path / "run")
        assert [(line["step"], line.get("partial", False)) for line in before] == [(4, False), (steps, True)]
        assert before[-1]["loss"] == pytest.approx(sum(losses[4:steps]) / (steps - 4), rel=1e-5)
        assert Trainer(tiny(steps=steps, **constant), tmp_path / "run").run() == "already finished"
        assert log_of(tmp_path / "run") == before


def test_a_run_shorter_than_a_line_has_one(tmp_path):
    Trainer(tiny(steps=2, log_every=50), tmp_path / "run").run()
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2]


def test_accumulation_changes_rounding_only(uninterrupted, tmp_path):
    Trainer(tiny(accumulation=4), tmp_path / "run").run()
    whole, parts = tensors_of(uninterrupted, 10), tensors_of(tmp_path / "run", 10)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=2e-3, atol=2e-4)


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    Trainer(tiny(seed=1), tmp_path / "run").run()
    assert log_of(tmp_path / "run") != log_of(uninterrupted)


@pytest.mark.parametrize(
    ("changes", "named"), [({"lr": 0.5}, "lr"), ({"hidden_size": 32}, "hidden_size"), ({"seed": 3}, "seed")]
)
def test_another_config_is_refused_by_name(changes, named, uninterrupted):
    with pytest.raises(ValueError, match=f"another run: {named} was"):
        Trainer(tiny(**changes), uninterrupted)


def test_other_data_is_refused(uninterrupted, tmp_path):
    path = shutil.copytree(uninterrupted, tmp_path / "run")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "data_fingerprint": "other"}))
    with pytest.raises(ValueError, match="the images are others"):
        Trainer(tiny(), path)


def test_a_run_without_a_checkpoint_takes_another_config_and_keeps_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Trainer(tiny(log_every=1, sample_every=2, sample_budget=12, tracker="tensorboard"), path).run()
    assert log_of(path)
    assert list((path / "samples").iterdir())
    Trainer(tiny(lr=0.5), path)
    assert json.loads((path / "config.json").read_text())["optimizer"]["lr"] == 0.5
    left = {file.name for file in path.rglob("*")}
    assert left == {"config.json", ".lock", "checkpoints", "samples"}


def test_a_model_whose_checkpoints_were_removed_is_not_begun_anew(uninterrupted, tmp_path):
    path = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(ValueError, match="another run: lr was"):
        Trainer(tiny(lr=0.5), path)


def test_a_folder_that_is_held_is_not_cleared(tmp_path):
    Trainer(tiny(), tmp_path / "run").dir.append_log({"step": 1})
    path = shutil.copytree(tmp_path / "run", tmp_path / "held")
    with FileLock(path / ".lock"), pytest.raises(ValueError, match="another command is at work"):
        Trainer(tiny(lr=0.5), path)
    assert log_of(path) == [{"step": 1}]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a run"):
        Trainer(tiny(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": "implicit", "exit_loss": "final", "warm_share": 0.5, "tolerance": 0.1},
        {"exit_loss": "target", "warm_share": 0.5, "holdout": 20, "validate_every": 3},
        {"gradient": "phantom", "damping": 0.7, "exit_loss": "final", "accumulation": 2, "checkpointing": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_stopped_with_exits_and_warm_starts(changes, tmp_path, monkeypatch):
    config = tiny(log_every=2, **changes)
    Trainer(config, tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert Trainer(config, tmp_path / "run").run() == "interrupted"
    assert Trainer(config, tmp_path / "run").run() == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "run", 10)
    assert any("exit" in line for line in log_of(tmp_path / "run"))


def test_a_run_stops_a_minute_before_its_time_is_up_and_goes_on(uninterrupted, tmp_path, monkeypatch):
    path, now = tmp_path / "run", {"seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr("fpdm.training.loop.time.monotonic", lambda: now["seconds"])
        one_step = Trainer._one_step

        def slow(self, batches):
            one_step(self, batches)
            now["seconds"] += 50

        patch.setattr(Trainer, "_one_step", slow)
        trainer = Trainer(tiny(time_limit=6), path)
        assert trainer.run() == "interrupted"
    assert (trainer.step, now["seconds"]) == (6, 300)  # another step would end in the last minute
    assert checkpoints.all_steps(path / "checkpoints") == [5, 6]
    assert Trainer(tiny(time_limit=6), path).run() == "finished"
    assert_same_run(uninterrupted, path, 10)


def test_a_time_limit_that_comes_with_the_last_step_is_none(tmp_path, monkeypatch):
    assert Trainer(tiny(steps=1, time_limit=1), tmp_path / "run").run() == "finished"
