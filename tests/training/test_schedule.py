"""The learning rate, and what is said before it surprises."""

import json

import pytest

from fpdm.training.loop import Trainer
from fpdm.training.schedule import learning_rate, notes
from tests.training.runs import interrupt_at, tiny

COSINE = {"lr_schedule": "cosine", "lr": 1e-3, "warmup": 0}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        Trainer(tiny(**COSINE), tmp_path / "run").run()
    return tmp_path / "run"


def test_a_cosine_whose_length_changes_is_told_of_until_it_is_trained_so(stopped, monkeypatch):
    longer = tiny(**COSINE, steps=16)
    trainer = Trainer(longer, stopped)
    (note,) = trainer.summary().splitlines()[2:]
    assert note.startswith("note: --steps was 10, is 16")
    was, now = learning_rate(tiny(**COSINE), 8), learning_rate(longer, 8)
    assert note.endswith(f"at step 8 it goes from {was:.3g} to {now:.3g}")
    again = Trainer(longer, stopped)
    assert again.notes == trainer.notes
    interrupt_at(monkeypatch, 12)
    again.run()
    assert Trainer(longer, stopped).notes == []


def test_a_cosine_that_is_over_is_not_prolonged(stopped):
    assert Trainer(tiny(**COSINE), stopped).run() == "finished"
    before = (stopped / "config.json").read_text()
    with pytest.raises(ValueError, match=r"came down to 0 .*raise it to 0.0005 at once.*--name.*--init-from") as error:
        Trainer(tiny(**COSINE, steps=20), stopped)
    assert "--steps 20" in str(error.value)
    assert (stopped / "config.json").read_text() == before, "the same command still goes on"
    assert Trainer(tiny(**COSINE), stopped).run() == "already finished"
    assert Trainer(tiny(**COSINE, steps=5), stopped).run() == "already finished"


def test_a_start_that_has_nothing_to_do_leaves_the_cosine_as_it_was_trained(stopped):
    assert Trainer(tiny(**COSINE, steps=8), stopped).run() == "already finished"
    assert Trainer(tiny(**COSINE), stopped).notes == []  # of 10 steps, which it is in the middle of
    assert Trainer(tiny(**COSINE), stopped).run() == "finished"
    assert Trainer(tiny(**COSINE, steps=5), stopped).run() == "already finished"
    with pytest.raises(ValueError, match="all 10 steps are done, and the learning rate came down to 0"):
        Trainer(tiny(**COSINE, steps=12), stopped)


def test_a_run_that_never_saved_may_be_of_any_length(tmp_path):
    Trainer(tiny(**COSINE), tmp_path / "run")
    assert Trainer(tiny(**COSINE, steps=20), tmp_path / "run").notes == []
    assert json.loads((tmp_path / "run/config.json").read_text())["optimizer"]["steps"] == 20


def test_steps_that_change_nothing_are_not_told_of():
    rising = {"lr_schedule": "cosine", "warmup": 50}
    assert notes(tiny(**rising, steps=60), 10, 10) == [], "the rate is still rising"
    assert notes(tiny(**COSINE, steps=10), 8, 5) == [], "more steps were asked for, then fewer, then as many as before"


def test_a_constant_rate_has_no_length():
    assert notes(tiny(lr_schedule="constant", steps=20), 10, 10) == []


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_is_all_warm_up_says_so(schedule):
    settings = {"lr_schedule": schedule, "lr": 1e-3, "warmup": 20}
    (note,) = notes(tiny(**settings, steps=10), 0, None)
    assert "all 10 steps are warm-up, of 20" in note
    assert "beyond 0.0005" in note
    assert "--warmup" in note
    assert notes(tiny(**settings, steps=21), 0, None) == []
