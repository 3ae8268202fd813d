"""Runs that are killed outright, again and again, and one that its queue ends: they end as one that was left alone."""

import os
import random
import signal
from functools import partial

import pytest

from fpdm.files import read_json
from fpdm.training import checkpoints
from fpdm.training.loop import Trainer
from tests.commands import wait_for
from tests.processes import Program, command, start
from tests.training.runs import log_of, tensors_of, tiny

STEPS = 40
SETTINGS = {
    "steps": STEPS, "checkpoint_every": 4, "log_every": 3, "keep_checkpoints": 2, "holdout": 20, "validate_every": 7,
    "exit_loss": "final", "warm_share": 0.5, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(tiny(**SETTINGS), path).run()
    return path


def train(path, hang=None):
    """Train; in the middle of the first checkpoint, once a file whose name begins with `hang` is written, hang."""
    import time

    import torch

    from fpdm.training import checkpoints
    from fpdm.training.loop import Trainer
    from tests.training.runs import tiny

    torch.set_num_threads(1)
    save = checkpoints.save_file

    def hanging(tensors, file):
        save(tensors, file)
        if hang is not None and file.name.startswith(hang):
            file.with_name("hanging").touch()
            time.sleep(600)

    checkpoints.save_file = hanging
    Trainer(tiny(**SETTINGS), path).run()


def assert_same(one, other):
    first, second = tensors_of(one, STEPS), tensors_of(other, STEPS)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert log_of(one) == log_of(other)
    states = [read_json(path / f"checkpoints/step-{STEPS:08d}/state.json") for path in (one, other)]
    assert states[0] == states[1]
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


def killed_once(condition, path, said, hang=None):
    """Train until `condition`, and kill."""
    process = start(train, str(path), hang, said=said)
    wait_for(lambda: not process.is_alive() or condition())
    if hang is None:
        process.join(random.uniform(0, 0.15))  # somewhere in a step, a look or a checkpoint
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, said.read_text()


def test_killed_four_times_anywhere_and_twice_in_a_checkpoint(whole, tmp_path):
    path, said = tmp_path / "run", tmp_path / "said"
    checkpointed, log = path / "checkpoints", path / "log.jsonl"

    def lines():
        return log.read_text().count("\n") if log.is_file() else 0

    random.seed(0)
    for _ in range(4):
        wanted = lines() + 1
        killed_once(partial(lambda wanted: lines() >= wanted, wanted), path, said)
    for name in ("weights", "optimizer"):
        before = checkpoints.all_steps(checkpointed)
        killed_once(lambda: list(checkpointed.glob(".step-*.writing/hanging")), path, said, name)
        assert checkpoints.all_steps(checkpointed) == before
    process = start(train, str(path), said=said)
    process.join(120)
    assert process.exitcode == 0, said.read_text()
    assert_same(whole, path)
    assert sorted(file.name for file in checkpointed.iterdir()) == ["step-00000036", "step-00000040"]


WORDS = [
    "train", "digits", "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4", "--batch-size", "8",
    "--log-every", "1", "--checkpoint-every", "50", "--no-grad-max", "2", "--with-grad-max", "2",
    "--lr-schedule", "constant",
]  # fmt: skip


def test_sigterm_saves_and_ends_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "runs/digits"
    words = [*WORDS, "--steps", "100000", "--runs-dir", str(tmp_path / "runs")]
    reached = []
    for _ in range(2):
        lines = 3 + (reached[-1] if reached else 0)
        process = start(command, words, said=tmp_path / "said")
        wait_for(lambda lines=lines: (path / "log.jsonl").is_file() and len(log_of(path)) >= lines)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 130
        assert f"Saved at step {checkpoints.all_steps(path / 'checkpoints')[-1]}" in (tmp_path / "said").read_text()
        reached.append(checkpoints.all_steps(path / "checkpoints")[-1])
        assert [line["step"] for line in log_of(path)] == list(range(1, reached[-1] + 1))
    assert reached[1] >= reached[0] + 3


def test_a_time_limit_saves_and_ends_and_the_same_command_goes_on(tmp_path):
    words = [*WORDS, "--steps", "3", "--time-limit", "1", "--runs-dir", str(tmp_path)]  # of which a minute is left
    said = []
    for _ in range(3):
        process = start(command, words, said=tmp_path / "said")
        process.join(60)
        said.append((process.exitcode, checkpoints.all_steps(tmp_path / "digits/checkpoints")[-1]))
    assert said == [(130, 1), (130, 2), (0, 3)]


def test_a_signal_to_all_processes_of_a_group_saves_and_ends_the_run(tmp_path):
    """As launchers and queues send it: workers must not be gone before the step that waits for them."""
    words = [*WORDS, "--runs-dir", str(tmp_path), "--steps", "100000", "--workers", "2"]
    with Program(words, tmp_path / "said", leads=True) as process:
        log = tmp_path / "digits/log.jsonl"
        wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.ended()
    assert process.returncode == 130
    assert "Saved at step" in said
