"""What a step lacks ends a run with one message, and loses nothing of what was trained."""

import multiprocessing
import os
import signal

import pytest
from torch._utils import ExceptionWrapper

from fpdm.data import BrokenImage
from fpdm.training import checkpoints
from fpdm.training.halts import Halted, reader_died
from fpdm.training.loop import Trainer
from tests.training.runs import log_of, tensors_of, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert Trainer(tiny(), path).run() == "finished"
    return path


def before_step(monkeypatch, step, act):
    """Call `act` with the trainer once `step` steps are done."""
    one_step = Trainer._one_step

    def acting(self, batches):
        one_step(self, batches)
        if self.step + 1 == step:
            act(self)

    monkeypatch.setattr(Trainer, "_one_step", acting)


def unreadable(trainer):
    def load(index):
        raise BrokenImage(f"{index}.png: it is gone")

    object.__setattr__(trainer.parts.source, "load", load)


def assert_goes_on(whole, path, **changes):
    """That the run ends as one that nothing happened to."""
    assert Trainer(tiny(**changes), path).run() == "finished"
    one, other = tensors_of(whole, 10), tensors_of(path, 10)
    assert all((one[key] == other[key]).all() for key in one)
    assert [line.pop("broken_images") for line in log_of(whole)] == [0, 0]
    names = ("step", "loss", "grad_norm", "lr")
    logs = [[{name: line[name] for name in names} for line in log_of(run)] for run in (whole, path)]
    assert logs[0] == logs[1]


def test_images_that_vanish_end_a_run_that_keeps_its_steps(whole, tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 7, unreadable)
        with pytest.raises(
            Halted, match=r"100 images in a row cannot be read, the last \d+.png: it is gone. Step 7 is s"
        ):
            Trainer(tiny(), path).run()
    assert checkpoints.all_steps(path / "checkpoints") == [5, 7]
    assert (path / "pipeline/model_index.json").is_file()
    assert_goes_on(whole, path)


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path):
    trainer = Trainer(tiny(), tmp_path / "run")
    unreadable(trainer)
    with pytest.raises(Halted, match=r"it is gone$"):
        trainer.run()
    assert not checkpoints.all_steps(tmp_path / "run/checkpoints")
    assert not (tmp_path / "run/pipeline").exists()


def test_a_reader_that_is_killed_ends_a_run_that_keeps_its_steps(whole, tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:

        def kill(trainer):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet known to be

        before_step(patch, 2, kill)
        with pytest.raises(
            Halted, match=r"has died, perhaps for want of memory.*fewer --workers. Step . is saved"
        ) as told:
            Trainer(tiny(workers=1), path).run()
    (step,) = (step for step in checkpoints.all_steps(path / "checkpoints") if step % 5)
    assert f"Step {step} is saved" in str(told.value)
    assert_goes_on(whole, path, workers=0)


@pytest.mark.parametrize(
    ("kind", "where", "died"),
    [
        (ConnectionRefusedError, "in pin memory thread for device 0", True),
        (EOFError, "in pin memory thread for device 0", True),
        (RuntimeError, "in pin memory thread for device 0", False),
        (RuntimeError, "in DataLoader worker process 0", False),
        (OSError, "in DataLoader worker process 0", False),
    ],
)
def test_a_dead_reader_is_told_from_one_that_met_an_error(kind, where, died):
    try:
        raise kind("ill")
    except kind:
        wrapped = ExceptionWrapper(where=where)
    with pytest.raises(kind) as error:
        wrapped.reraise()
    assert reader_died(error.value) is died
