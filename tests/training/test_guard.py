"""Steps without a usable gradient: they change nothing, are counted, and too many of them end or set back a run."""

import json
import math
import signal

import pytest
import torch

from fpdm.files import read_json
from fpdm.training import loop
from fpdm.training.draws import draw
from fpdm.training.guard import EXPLODED, MEMORY, Diverged, Guard
from fpdm.training.loop import Trainer
from fpdm.training.meters import Meters
from tests.training.runs import interrupt_at, log_of, tensors_of, tiny

CPU = torch.device("cpu")


def judged(norms):
    guard = Guard(CPU, 5)
    return [bool(guard.judge(torch.tensor(norm), step)) for step, norm in enumerate(norms)], guard


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_of_no_use_from_the_first_step_on(norm):
    verdicts, guard = judged([norm, 1.0, norm])
    assert verdicts == [True, False, True]
    assert guard.skipped() == 2
    assert guard.numbers.isfinite().all()


def test_a_norm_is_exploded_where_it_is_far_above_the_mean_of_those_before():
    usual = [1.0, 3.0] * (MEMORY // 2)
    verdicts, _ = judged([*usual, 2 * EXPLODED * 1.01, 2 * EXPLODED * 0.9])
    assert verdicts == [False] * MEMORY + [True, False]
    verdicts, _ = judged([*usual[1:], 1e6])  # nothing to compare with yet
    assert not any(verdicts)


def test_what_was_left_out_does_not_move_the_mean():
    one, other = judged([1.0] * MEMORY + [math.nan, 1e9, 1e9])[1], judged([1.0] * MEMORY)[1]
    assert torch.equal(one.numbers[:2], other.numbers[:2])


def test_the_mean_follows_norms_that_fall():
    _, guard = judged([100.0] * MEMORY + [1.0] * 10 * MEMORY)
    assert guard.judge(torch.tensor(1.1 * EXPLODED), 0)


def test_useless_steps_in_a_row_are_counted_from_their_first():
    _, guard = judged([1.0, math.nan, 1.0, math.nan, math.inf, math.nan])
    assert guard.run_of_bad_steps() == (3, 3)
    assert guard.skipped() == 4
    guard.judge(torch.tensor(1.0), 6)
    assert guard.run_of_bad_steps()[0] == 0
    assert guard.skipped() == 4


def test_a_guard_goes_on_from_its_state_bit_for_bit():
    norms = torch.rand(50, dtype=torch.float64).tolist()
    _, whole = judged(norms)
    _, half = judged(norms[:25])
    resumed = Guard(CPU, 5)
    resumed.restore(json.loads(json.dumps(half.state())))
    for step, norm in enumerate(norms[25:]):
        resumed.judge(torch.tensor(norm), 25 + step)
    assert torch.equal(resumed.numbers, whole.numbers)


def test_steps_beyond_what_float32_counts_are_told_apart():
    guard = Guard(CPU, 5)
    guard.judge(torch.tensor(math.nan), 2**24 + 1)
    resumed = Guard(CPU, 5)
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert resumed.run_of_bad_steps() == (1, 2**24 + 1)


def test_meters_are_means_of_the_steps_that_count():
    meters, one, none = Meters(("loss", "exit"), CPU), torch.tensor(1.0), torch.tensor(0.0)
    meters.add({"loss": torch.tensor(2.0), "exit": torch.tensor(5.0)}, one)
    meters.add({"loss": torch.tensor(math.nan)}, none)
    meters.add({"loss": torch.tensor(math.inf), "exit": torch.tensor(math.inf)}, none)
    meters.add({"loss": torch.tensor(4.0)}, one)
    assert meters.means(meters.sums) == {"loss": 3.0, "exit": 5.0}
    assert Meters(("loss",), CPU).means(torch.zeros(2, 1)) == {}


# --- in a run -------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, steps, value=math.nan):
    """Have the gradients of some steps multiplied by `value`."""
    backward = Trainer._backward

    def spoiled(self, batch, draws, course):
        found = backward(self, batch, draws, course)
        if steps(self.step):
            for parameter in self.net.parameters():
                parameter.grad.mul_(value)
        return found

    monkeypatch.setattr(Trainer, "_backward", spoiled)


def by_step(path, steps):
    return [tensors_of(path, step) for step in steps]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_useless_step_changes_neither_weights_nor_moments(value, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step in (0, 4), value)
    Trainer(tiny(checkpoint_every=1, log_every=1, steps=6, keep_checkpoints=9), tmp_path / "run").run()
    first, fourth, fifth, sixth = by_step(tmp_path / "run", (1, 4, 5, 6))
    assert fourth.keys() == fifth.keys()
    assert all(torch.equal(fourth[key], fifth[key]) for key in fourth if not key.startswith("ema/"))
    counts = [{float(v) for k, v in some.items() if k.endswith("/step")} for some in (first, fourth, fifth, sixth)]
    assert counts == [{0.0}, {3.0}, {3.0}, {4.0}]
    assert all(v.eq(0).all() for k, v in first.items() if k.startswith("optimizer/"))
    assert any(not torch.equal(fifth[key], sixth[key]) for key in fifth)

    share = 1 - min(0.999, 6 / 15)  # the average goes on towards weights that stay
    for key in (key for key in fourth if key.startswith("ema/")):
        wanted = fourth[key].lerp(fourth["weights/" + key.removeprefix("ema/")], share)
        torch.testing.assert_close(fifth[key], wanted)

    lines = log_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [1, 1, 1, 1, 2, 2]
    assert [("loss" in line, "grad_norm" in line) for line in lines] == [(step not in (0, 4),) * 2 for step in range(6)]


def test_an_exploding_gradient_is_left_out_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fpdm.training.guard.MEMORY", 3)
    spoil(monkeypatch, lambda step: step == 4, 1e6)
    Trainer(tiny(checkpoint_every=1, log_every=6, steps=6), tmp_path / "run").run()
    fourth, fifth = by_step(tmp_path / "run", (4, 5))
    assert all(torch.equal(fourth[key], fifth[key]) for key in fourth if not key.startswith("ema/"))
    (line,) = log_of(tmp_path / "run")
    assert line["skipped_steps"] == 1
    assert line["grad_norm"] < 1e4


def test_a_run_with_useless_steps_is_resumed_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step in (1, 5, 6))
    Trainer(tiny(), tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)  # between two useless ones
        Trainer(tiny(), tmp_path / "run").run()
    Trainer(tiny(), tmp_path / "run").run()
    one, other = (tensors_of(tmp_path / name, 10) for name in ("whole", "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run")
    one, other = (read_json(tmp_path / name / "checkpoints/step-00000010/state.json") for name in ("whole", "run"))
    assert one["guard"] == pytest.approx(other["guard"], rel=1e-6)
    assert one["meters"] == other["meters"]


def test_too_many_in_a_row_end_the_run_and_say_what_to_do(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 6)
    path = tmp_path / "run"
    with pytest.raises(Diverged) as error:
        Trainer(tiny(skips=4), path).run()
    said = str(error.value)
    timesteps = sorted(draw(0, 6, list(range(8)), (1,), 1000, 0.0).timesteps.tolist())
    for words in (
        "4 steps in a row", "step 6", f"timesteps {timesteps[0]} to {timesteps[-1]}", f"fpdm replay {path} --step 6",
        "--on-divergence rollback", "--lr", "--warmup", "--grad-clip", "--mixed-precision no",
    ):  # fmt: skip
        assert words in said
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["step-00000005"]
    assert all(value.isfinite().all() for value in tensors_of(path, 5).values())


def test_fewer_in_a_row_do_not(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step in (1, 2, 3, 6, 7, 8))
    assert Trainer(tiny(skips=4), tmp_path / "run").run() == "finished"
    assert log_of(tmp_path / "run")[-1]["skipped_steps"] == 6


def rates_at(monkeypatch):
    """The learning rates that steps are made with, by step, in the order they are made."""
    rates, one_step = [], Trainer._one_step

    def noting(self, batches):
        one_step(self, batches)
        rates.append((self.step, self.optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(Trainer, "_one_step", noting)
    return rates


def test_rolling_back_goes_on_from_the_checkpoint_at_half_the_rate(tmp_path, monkeypatch, capsys):
    spoiled = {6, 7, 8, 9}
    spoil(monkeypatch, lambda step: step in spoiled)
    steps = {"skips": 4, "lr_schedule": "constant", "warmup": 0, "on_divergence": "rollback", "lr": 1e-3}
    rates, restore = rates_at(monkeypatch), loop.Saver.restore

    def cured(self, *most):
        restore(self, *most)
        if rates:
            spoiled.clear()

    monkeypatch.setattr(loop.Saver, "restore", cured)
    path = tmp_path / "run"
    assert Trainer(tiny(**steps), path).run() == "finished"
    assert rates == [*((step, 1e-3) for step in range(10)), *((step, 5e-4) for step in range(5, 10))]
    assert "0.5 of the learning rate" in capsys.readouterr().out
    assert [line["step"] for line in log_of(path)] == [4, 5, 8, 10]
    assert log_of(path)[1]["rollback"] == 1
    assert log_of(path)[-1]["skipped_steps"] == 0

    rates.clear()  # whoever goes on keeps the rate
    assert Trainer(tiny(**{**steps, "steps": 12}), path).run() == "finished"
    assert rates == [(10, 5e-4), (11, 5e-4)]


def test_a_kill_after_a_rollback_goes_on_from_there(tmp_path, monkeypatch):
    spoiled = {6, 7, 8, 9}
    spoil(monkeypatch, lambda step: step in spoiled)
    config = tiny(skips=4, checkpoint_every=1, on_divergence="rollback", lr_schedule="constant", warmup=0, lr=1e-3)
    one_step = Trainer._one_step

    def killed(self, batches):
        if self.rollbacks:
            raise KeyError("killed")
        one_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", killed)
        with pytest.raises(KeyError):
            Trainer(config, tmp_path / "run").run()
    spoiled.clear()
    rates = rates_at(monkeypatch)
    assert Trainer(config, tmp_path / "run").run() == "finished"
    assert rates == [(step, 5e-4) for step in range(6, 10)]
    assert [line["rollback"] for line in log_of(tmp_path / "run") if "rollback" in line] == [1]


def test_rolling_back_gives_up_after_three_times(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 6)
    rates = rates_at(monkeypatch)
    config = tiny(skips=2, on_divergence="rollback", warmup=0, lr_schedule="constant", lr=1e-3)
    with pytest.raises(FloatingPointError, match="3 rollbacks did not help: start anew under another --name"):
        Trainer(config, tmp_path / "run").run()
    assert [rate for step, rate in rates if step == 7] == [1e-3, 5e-4, 2.5e-4, 1.25e-4]


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: True)
    with pytest.raises(FloatingPointError, match="No checkpoint is from before: start anew"):
        Trainer(tiny(on_divergence="rollback", checkpoint_every=100), tmp_path / "run").run()


def test_a_row_of_useless_steps_longer_than_all_checkpoints_is_rolled_back(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 3)
    rates = rates_at(monkeypatch)
    config = tiny(
        skips=6, on_divergence="rollback", checkpoint_every=1, keep_checkpoints=2, warmup=0, lr_schedule="constant"
    )
    with pytest.raises(FloatingPointError, match="3 rollbacks"):
        Trainer(config, tmp_path / "run").run()
    assert [step for step, _ in rates].count(4) == 4, "each began at the last sound one, of step 3"


def test_an_interruption_after_a_rollback_goes_on_from_there(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 6)
    config = tiny(skips=3, on_divergence="rollback", warmup=0, lr_schedule="constant", lr=1e-3)
    one_step, rolled = Trainer._one_step, []

    def pressed(self, batches):
        one_step(self, batches)
        if self.rollbacks == 2 and not rolled:
            rolled.append(self.step)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one_step", pressed)
    path = tmp_path / "run"
    assert Trainer(config, path).run() == "interrupted"
    rates = rates_at(monkeypatch)
    with pytest.raises(FloatingPointError, match="3 rollbacks"):
        Trainer(config, path).run()
    assert rates[0] == (rolled[0] + 1, 2.5e-4)
