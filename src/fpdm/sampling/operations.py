"""Operations of a sampling: two per multiply-add of convolutions, linear layers and attention, counted by PyTorch as
the network runs. Block passes leave out that a block pass of one network costs more than one of another."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fpdm.models import Denoiser
from fpdm.sampling.budget import Cost, Plan
from fpdm.sampling.sampler import cost_of


@torch.no_grad()
def operations_of(model: Denoiser) -> Cost:
    """The operations of one call of `model` for one image, as `cost_of` tells its block passes."""
    if cost_of(model).per_iteration == 0:
        return Cost(_count(model), 0)
    one, two = _count(model, iterations=1), _count(model, iterations=2)
    return Cost(one - (two - one), two - one)


def total(cost: Cost, plan: Plan) -> int:
    """What a plan costs in all, per image."""
    return sum(cost.passes(iterations) for iterations in plan.iterations)


def _count(model: Denoiser, **counts: int) -> int:
    device = next(model.parameters()).device
    x = torch.zeros(1, model.config.in_channels, model.config.sample_size, model.config.sample_size, device=device)
    # The plain kernel: the counter does not know all of the fused ones.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, 0, torch.zeros(1, dtype=torch.int64, device=device), **counts)
    return counter.get_total_flops()
