"""The estimate of memory: near what a real step takes, and of the shape that theory gives it."""

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from fpdm.fixedpoint import MultiStepJacobianFree, Solve
from fpdm.recipes import recipe
from fpdm.recipes.forms import form
from fpdm.training.memory import Live, network, solves, stand_in, training_memory

BENCHMARK = Path(__file__).parents[2] / "benchmarks/memory.py"
TINY = {"hidden_size": 32, "num_heads": 2, "batch_size": 8, "classes": 10}
FLOAT = 4


def tiny(**changes):
    return recipe("digits").with_fields(**form("1+1+1")).with_fields(**{**TINY, **changes})


@cache
def estimate(n=0, m=1, **changes):
    config = tiny(**changes)
    solve = None if config.model.network == "dit" else Solve(gradient=MultiStepJacobianFree(n, m))
    return training_memory(config, stand_in(config.data), solve)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def any_precision():
    """accelerate settles on one for the whole process, until told otherwise."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "dit", "depth": 3},
        {"network": "dit", "depth": 3, "checkpointing": True},
        {},
        {"checkpointing": True},
        {"mixed_precision": "bf16", "num_core": 2},
        {"exit_loss": "target", "accumulation": 2},
        {"gradient": "phantom"},
        {"gradient": "unroll"},
        {"injection": "gate"},
    ],
    ids=str,
)
def test_a_real_step_takes_what_was_estimated(changes, benchmark, any_precision, monkeypatch):
    config = tiny(**{"no_grad_max": 2, "with_grad_max": 2, **changes})
    *_, draw = solves(config, network(config, stand_in(config.data)))
    case = benchmark.Case({}, draw)
    monkeypatch.setattr(type(case), "config", config)
    real = benchmark.measure(case, "cpu")["peak"]
    found = training_memory(config, stand_in(config.data), case.solve).peak
    assert found == pytest.approx(real, rel=0.05)


def test_weights_gradients_moments_and_average_are_counted_by_hand():
    config = tiny()
    model = network(config, stand_in(config.data))
    weights = FLOAT * sum(parameter.numel() for parameter in model.parameters())
    memory = estimate()
    positions = FLOAT * 16 * 32
    assert memory.gradients == weights
    assert memory.parameters == memory.ema == weights + positions
    assert memory.optimizer == 2 * weights + FLOAT * len(list(model.parameters()))  # and a step count of each


def test_activations_grow_with_the_batch_in_a_straight_line():
    one, two, three = (estimate(1, 2, batch_size=batch).activations for batch in (8, 16, 24))
    assert three - two == two - one > 0


def test_iterations_without_gradient_add_nothing():
    none, one, many = (estimate(n, 2) for n in (0, 1, 4))
    assert many.activations == one.activations
    assert many.peak == pytest.approx(one.peak, rel=1e-3)  # counters
    tokens = FLOAT * 8 * 16 * 32
    assert one.activations - none.activations == tokens  # without any z is u, which is stored anyway


def test_one_shared_block_at_a_time_is_computed_again():
    shape = {"num_pre": 0, "num_core": 4, "num_post": 0, "batch_size": 64}
    plain, less = (estimate(0, 1, checkpointing=on, **shape).peak for on in (False, True))
    assert less < 0.7 * plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_iterations_with_gradient_add_the_same_each(checkpointing):
    one, two, three = (estimate(1, m, checkpointing=checkpointing).activations for m in (1, 2, 3))
    tokens = FLOAT * 8 * 16 * 32
    assert three - two == two - one
    assert (two - one == tokens) if checkpointing else (two - one > 10 * tokens)


@pytest.mark.parametrize("changes", [{"network": "dit", "depth": 4}, {}])
def test_checkpointing_stores_less(changes):
    plain, less = (estimate(1, 3, checkpointing=on, **changes) for on in (False, True))
    assert less.activations < plain.activations / 2
    assert less.peak < plain.peak
    assert replace(less, activations=0, peak=0) == replace(plain, activations=0, peak=0)


def test_half_precision_stores_less():
    full, half = estimate(1, 3), estimate(1, 3, mixed_precision="bf16")
    assert 0.5 * full.activations < half.activations < 0.9 * full.activations


def test_parts_of_a_batch_need_less_but_hold_gradients_beside_activations():
    whole, half = estimate(1, 2, batch_size=16), estimate(1, 2, batch_size=8)
    parts = estimate(1, 2, batch_size=16, accumulation=2)
    assert parts.activations == half.activations
    assert half.peak + 0.9 * half.gradients < parts.peak < whole.peak


def test_an_exit_stores_another_decoding():
    config = tiny(exit_loss="target", with_grad_max=3)
    solve = solves(config, network(config, stand_in(config.data)))["most"]
    with_exit, without = (
        training_memory(config, stand_in(config.data), some) for some in (solve, replace(solve, exits=()))
    )
    assert with_exit.activations > without.activations


def test_a_network_of_any_size_is_counted_without_being_made():
    sizes = {"hidden_size": 16384, "num_heads": 128, "depth": 2, "image_size": 64, "batch_size": 1024}
    config = tiny(network="dit", **sizes)
    memory = training_memory(config, stand_in(config.data), None)
    assert memory.parameters > 3e10
    assert memory.peak > 1e12


def test_the_mean_and_the_largest_draw():
    def counts(**changes):
        config = tiny(**changes)
        found = solves(config, network(config, stand_in(config.data)))
        return {name: None if solve is None else solve.gradient for name, solve in found.items()}

    ten = {"no_grad_max": 10, "with_grad_max": 12}
    assert counts(**ten) == {"mean": MultiStepJacobianFree(5, 7), "most": MultiStepJacobianFree(10, 12)}
    assert counts(**ten, num_core=2) == {"mean": MultiStepJacobianFree(3, 4), "most": MultiStepJacobianFree(5, 6)}
    assert counts(**ten, gradient="multistep") == {"every": MultiStepJacobianFree(10, 12)}
    assert counts(**ten, gradient="implicit") == {"every": MultiStepJacobianFree(10, 1)}
    assert counts(network="dit", depth=2) == {"every": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 9, "accumulation": 2}, "batch_size 9 cannot be shared"),
        ({"image_size": 9}, "does not divide the image size 9"),
        ({"hidden_size": None}, "the size of the network is open"),
    ],
)
def test_what_training_would_refuse_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        estimate(**changes)


def test_storages_are_counted_once_and_while_they_live():
    with Live() as live:
        a = torch.zeros(1000)
        views = a[10:], a.view(10, 100).T, a.detach()
        assert live.now == 4000
        b = a + 1
        assert live.now == live.peak == 8000
        del a
        assert live.now == 8000, "its views live"
        del views, b
        assert (live.now, live.peak) == (0, 8000)


def test_it_is_what_torchs_own_tracker_finds():
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker").MemTracker()
    model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))), torch.zeros(256, 64)
    tracker.track_external(model, x)
    live = Live()
    held = live.add([*model.parameters(), x])
    with tracker, live:
        model(x).square().sum().backward()
    (theirs,) = tracker.get_tracker_snapshot("peak").values()
    assert held < live.peak == theirs["Total"]


def test_the_benchmark_goes_on_where_it_stopped_without_taking_one_case_for_another(benchmark):
    cases = [*benchmark.compared(), *benchmark.counted()]
    labels = {benchmark.label({**case.fields, "draw": case.draw}) for case in cases}
    assert len(labels) == len(cases)
