"""Compiled blocks: the same weights to rounding, under the same names."""

import shutil

import pytest
import torch
import torch._inductor.config

from fpdm.training.loop import Trainer
from tests.training.runs import log_of, tensors_of, tiny

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SAME = {"lr": 1e-4, "lr_schedule": "constant", "warmup": 0, "checkpoint_every": 2, "log_every": 2}
FEW = {"gradient": "unroll", "with_grad_max": 1}  # one graph: each takes a compiler many seconds
ALL = {"exit_loss": "final", "warm_share": 0.5, "validate_every": 2, "sample_every": 2, "sample_budget": 12}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("aot_eager", ALL),
        ("aot_eager", {"network": "dit", "depth": 2}),
        pytest.param(
            "inductor", FEW, marks=pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
        ),
    ],
    ids=["eager", "eager-dit", "inductor"],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_run_learns_what_another_does_and_goes_on_without(backend, changes, tmp_path, monkeypatch):
    if backend != "inductor":
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled_with(self, backend))
    Trainer(tiny(steps=2, compile=True, **SAME, **changes), tmp_path / "run").run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    Trainer(tiny(steps=4, **SAME, **changes), tmp_path / "whole").run()
    assert Trainer(tiny(steps=4, **SAME, **changes), tmp_path / "run").run() == "finished"
    for step in (2, 4):
        one, other = (tensors_of(tmp_path / name, step) for name in ("whole", "run"))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    losses = [[line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("whole", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def compiled_with(module, backend):
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)


def test_without_a_compiler_nothing_is_begun(tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"),
    ):
        Trainer(tiny(steps=2, compile=True, device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
