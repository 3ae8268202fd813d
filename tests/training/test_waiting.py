"""How long a training waits for its data: it is measured and told, and workers take it off the steps."""

import json
import os
from types import SimpleNamespace

import pytest

from fpdm.training import clock as clocks
from fpdm.training import draws
from fpdm.training.clock import Clock, advice
from fpdm.training.loop import Trainer
from tests.training.runs import tiny


def shares(path):
    return [json.loads(line)["share_waiting_for_data"] for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_lap_has_the_steps_seconds_and_waits_since_the_last(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    clock = Clock(5)

    def pass_by(seconds):
        now[0] += seconds

    pass_by(1)
    with clock.waiting():
        pass_by(2)
    with clock.waiting():
        pass_by(4)
    assert clock.lap(9) == (4, 7.0, 6.0)
    pass_by(3)
    assert clock.lap(10) == (1, 3.0, 0.0)
    assert clock.total == 10.0


def test_images_that_come_slowly_are_seen_in_the_log_and_in_the_bar(tmp_path, capsys, monkeypatch):
    now, one_step = [0.0], Trainer._one_step
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def stepped(self, batches):  # in a second
        now[0] += 1
        one_step(self, batches)

    monkeypatch.setattr(Trainer, "_one_step", stepped)
    said = {}
    for name, seconds in (("quick", 0.01), ("slow", 0.5)):
        trainer = Trainer(tiny(log_every=2), tmp_path / name)

        def loaded(index, load=trainer.parts.source.load, seconds=seconds):
            now[0] += seconds
            return load(index)

        object.__setattr__(trainer.parts.source, "load", loaded)
        trainer.run()
        said[name] = capsys.readouterr().err
    assert "waiting" not in said["quick"]
    assert "80% of the time waiting for images: try --workers 2" in said["slow"]
    assert shares(tmp_path / "quick") == pytest.approx([0.08 / 1.08] * 5, abs=0.001)  # eight images a step
    assert shares(tmp_path / "slow") == pytest.approx([4 / 5] * 5, abs=0.001)


@pytest.mark.parametrize(("share", "workers", "said"), [
    (0.19, 0, ""),
    (0.2, 0, ", 20% of the time waiting for images: try --workers 2"),
    (0.567, 3, ", 57% of the time waiting for images: try --workers 6"),
])  # fmt: skip
def test_the_advice_is_more_workers(share, workers, said):
    assert advice(share, workers) == said


def test_workers_draw_what_is_random(tmp_path, monkeypatch):
    here, draw = os.getpid(), draws.draw

    def elsewhere(*args):
        assert os.getpid() != here
        return draw(*args)

    monkeypatch.setattr(draws, "draw", elsewhere)
    assert Trainer(tiny(workers=1), tmp_path / "run").run() == "finished"
    with pytest.raises(AssertionError):
        Trainer(tiny(workers=0), tmp_path / "other").run()
