"""Compiled blocks: the same weights to rounding, under the same names."""

import shutil

import pytest
import torch

from fpdm.training.loop import Trainer
from tests.training.runs import log_of, tensors_of, tiny

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
# torch's own, while it compiles
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_learns_what_one_that_is_not_does_and_goes_on_without(tmp_path):
    torch._dynamo.reset()
    same = {"lr": 1e-4, "lr_schedule": "constant", "warmup": 0, "checkpoint_every": 3, "log_every": 3}
    Trainer(tiny(steps=3, compile=True, **same), tmp_path / "run").run()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    Trainer(tiny(steps=6, **same), tmp_path / "whole").run()
    assert compiled > 0
    assert Trainer(tiny(steps=6, **same), tmp_path / "run").run() == "finished"
    for step in (3, 6):
        one, other = (tensors_of(tmp_path / name, step) for name in ("whole", "run"))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "run"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
