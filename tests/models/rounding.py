"""What the tests of 8 bits share: a layer, networks, and what they draw."""

import torch
from torch import nn

from fpdm import DiT, FixedPointDiT
from tests.networks import SIZES, randomised


def layer(bias=True, inputs=32, outputs=48):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def network(kind=FixedPointDiT, **settings):
    return randomised(kind(**{**SIZES, "patch_size": 2, "hidden_size": 32, "num_heads": 4, **settings}))


def inputs(batch=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=g), torch.linspace(10, 900, batch), torch.arange(batch) % 3


@torch.no_grad()
def drawn(model, batch=5):
    device = next(model.parameters()).device
    solves = {} if isinstance(model, DiT) else {"iterations": 4}
    return model(*(value.to(device) for value in inputs(batch)), **solves).sample.cpu()
