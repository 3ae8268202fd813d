"""What a step lacks ends a run with one message, and loses nothing of what was trained."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data._utils import signal_handling

from fpdm.data import BrokenImage
from fpdm.training import checkpoints
from fpdm.training.ema import Ema
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
    assert [line.pop("broken_images") for line in log_of(whole)] == [0, 0, 0]
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


@pytest.mark.parametrize("before", [False, True])
def test_a_reader_that_is_killed_ends_a_run_that_keeps_its_steps(before, whole, tmp_path, monkeypatch):
    """Also where a DataLoader was made before, and with it torch's handler, which would raise anywhere."""
    path = tmp_path / "run"
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if before:
        signal_handling._set_SIGCHLD_handler()
        assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
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


def too_large(trainer):
    torch.empty(2**50)


def on_a_gpu(trainer):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
    )


@pytest.mark.parametrize(("act", "asked"), [(too_large, "4503599627370496 bytes"), (on_a_gpu, "20.00 MiB")])
def test_memory_that_is_not_there_is_one_message_and_costs_no_steps(act, asked, whole, tmp_path, monkeypatch):
    path, backward = tmp_path / "run", Trainer._backward

    def needing(self, *examples):
        found = backward(self, *examples)
        if self.step == 6:
            act(self)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", needing)
        with pytest.raises(Halted, match=f"more memory than there is, {asked} at once") as told:
            Trainer(tiny(), path).run()
    for words in ("--accumulation", "--checkpointing", "--batch-size", "`fpdm info`", "Step 6 is saved"):
        assert words in str(told.value)
    assert_goes_on(whole, path)


def test_an_update_without_memory_is_not_saved(tmp_path, monkeypatch):
    update = Ema.update

    def needing(self, model, step):
        update(self, model, step)
        if step == 7:
            torch.empty(2**50)

    monkeypatch.setattr(Ema, "update", needing)
    with pytest.raises(ValueError, match="--accumulation"):
        Trainer(tiny(), tmp_path / "run").run()
    assert checkpoints.all_steps(tmp_path / "run/checkpoints") == [5]


def test_a_batch_that_was_too_large_does_not_bind_the_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", lambda self, *examples: on_a_gpu(self))
        with pytest.raises(Halted, match="--batch-size"):
            Trainer(tiny(batch_size=16), tmp_path / "run").run()
    assert Trainer(tiny(), tmp_path / "run").run() == "finished"
