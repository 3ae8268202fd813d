"""Operations are those that a hand counts: two per multiply-add."""

import pytest
import torch

from fpdm.models import DiT, FixedPointDiT
from fpdm.sampling import Cost, cost_of, make_plan, operations_of, total
from fpdm.sampling.operations import _count, _counted
from tests.networks import SIZES, randomised

N, D, P, C = 4, 16, 4, 1  # tokens, width, patch, channels of the image; the output has twice as many
EMBED = 2 * N * D * C * P * P + 2 * (256 * D + D * D)  # patches; the timestep's MLP on 256 frequencies
MODULATION = 2 * D * 6 * D
BLOCK = 2 * N * (D * 3 * D + D * D + 2 * D * 4 * D) + 2 * 2 * N * N * D  # linear maps; queries by keys, and by values
FINAL = 2 * D * 2 * D + 2 * N * D * P * P * 2 * C
INJECTION = 2 * N * D * D + 2 * N * D * 2 * D  # of u, once per solve
ITERATION = 2 * N * D * 2 * D + 2 * N * 2 * D * D  # of z, and what both are mapped to, before the blocks


@pytest.mark.parametrize("depth", [1, 3])
def test_an_explicit_network_by_hand(depth):
    cost = operations_of(randomised(DiT(**SIZES, depth=depth)))
    assert cost == Cost(EMBED + depth * (MODULATION + BLOCK) + FINAL, 0)


@pytest.mark.parametrize(("pre", "core", "post"), [(1, 1, 1), (1, 2, 1), (3, 1, 2), (0, 3, 0)])
@pytest.mark.parametrize("time_in_pre_post", [False, True])
def test_a_fixed_point_network_by_hand(pre, core, post, time_in_pre_post):
    counts = {"num_pre": pre, "num_core": core, "num_post": post, "time_in_pre_post": time_in_pre_post}
    cost = operations_of(randomised(FixedPointDiT(**SIZES, **counts)))
    outer = EMBED + (pre + post) * (MODULATION + BLOCK) + FINAL
    assert cost == Cost(outer + core * MODULATION + INJECTION, ITERATION + core * BLOCK)


def test_heads_cost_nothing_and_tokens_cost_by_the_square_in_attention():
    wide = operations_of(randomised(DiT(**{**SIZES, "num_heads": 4}, depth=1)))
    assert wide == operations_of(randomised(DiT(**SIZES, depth=1)))
    larger = operations_of(randomised(DiT(**{**SIZES, "sample_size": 16}, depth=1)))
    n = 16
    block = 2 * n * (D * 3 * D + D * D + 2 * D * 4 * D) + 2 * 2 * n * n * D
    embed = 2 * n * D * C * P * P + 2 * (256 * D + D * D)
    assert larger.fixed == embed + MODULATION + block + 2 * D * 2 * D + 2 * n * D * P * P * 2 * C


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_they_are_linear_in_the_iterations(iterations):
    with torch.device("meta"):
        model = FixedPointDiT(**SIZES)
    assert _count(model, iterations=iterations) == operations_of(model).passes(iterations)


def test_a_plans_total_is_the_sum_over_its_timesteps():
    model = randomised(FixedPointDiT(**SIZES))
    cost = operations_of(model)
    plan = make_plan(cost_of(model), iterations=[3, 1, 4])
    assert total(cost, plan) == 3 * cost.fixed + 8 * cost.per_iteration
    explicit = randomised(DiT(**SIZES, depth=2))
    plan = make_plan(cost_of(explicit), budget=10)
    assert total(operations_of(explicit), plan) == 5 * operations_of(explicit).fixed


@pytest.mark.parametrize("kind", [FixedPointDiT, DiT])
def test_counting_changes_nothing_for_other_threads(kind, monkeypatch):
    """Neither which kernels attention may take, nor hooks of modules: another thread may be drawing."""
    modules, seen = torch.nn.modules.module, []

    def looking(model, *given, **options):
        hooks = modules._global_forward_hooks, modules._global_forward_pre_hooks
        seen.append([flags(), *map(len, hooks)])
        return forward(model, *given, **options)

    def flags():
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    forward, before = kind.forward, flags()
    monkeypatch.setattr(kind, "forward", looking)
    _counted.cache_clear()
    operations_of(randomised(kind(**SIZES)))
    assert seen == [[before, 0, 0]] * len(seen) != []
    assert flags() == before


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_where_it_is_counted_does_not_matter(context):
    model = randomised(FixedPointDiT(**SIZES))
    plain = operations_of(model)
    _counted.cache_clear()
    with context():
        assert operations_of(model) == plain


def test_counting_leaves_the_network_as_it_was():
    model = randomised(FixedPointDiT(**SIZES)).train()
    weights, state = {name: w.clone() for name, w in model.state_dict().items()}, torch.get_rng_state()
    operations_of(model)
    assert model.training
    assert all(torch.equal(w, weights[name]) and w.grad is None for name, w in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_format_does_not_matter():
    model = randomised(FixedPointDiT(**SIZES))
    assert operations_of(model.to(torch.bfloat16)) == operations_of(model.float())
