"""What one call of a network costs: block passes, and operations.

Operations are two per multiply-add of convolutions, linear layers and attention, counted by PyTorch as a network of the
same configuration runs on tensors without data. Block passes leave out that a block pass of one network costs more than
one of another.
"""

import inspect
import json
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fpdm.models import Denoiser, DiT
from fpdm.sampling.budget import Cost, Plan


def original(model: Denoiser) -> Denoiser:
    """The network itself, of one that torch.compile has wrapped as a whole."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner  # type: ignore[no-any-return]


def cost_of(model: Denoiser) -> Cost:
    """The block passes of one call of `model`."""
    if isinstance(original(model), DiT):
        return Cost(model.passes(), 0)
    one, two = model.passes(1), model.passes(2)
    return Cost(one - (two - one), two - one)


def operations_of(model: Denoiser) -> Cost:
    """The operations of one call of `model` for one image, as `cost_of` tells its block passes."""
    model = original(model)
    known = inspect.signature(type(model)).parameters  # diffusers keeps in a config what else was in its file
    config = {name: value for name, value in model.config.items() if name in known}
    return _counted(type(model), json.dumps(config, sort_keys=True))  # type: ignore[arg-type]


def total(cost: Cost, plan: Plan) -> int:
    """What a plan costs in all, per image."""
    return sum(cost.passes(iterations) for iterations in plan.iterations)


@lru_cache(maxsize=64)
def _counted(kind: type[Denoiser], config: str) -> Cost:
    with torch.device("meta"):
        model = kind(**json.loads(config))
    if isinstance(model, DiT):
        return Cost(_count(model), 0)
    one, two = _count(model, iterations=1), _count(model, iterations=2)
    return Cost(one - (two - one), two - one)


def _count(model: Denoiser, **counts: Any) -> int:
    shape = (1, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    device = next(model.parameters()).device
    # Within inference mode the counter would see layers, not the products that they are made of.
    with torch.inference_mode(False), torch.no_grad(), Counter() as counter:
        x, y = torch.zeros(shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        model(x, 0, y, **counts)
    return counter.operations


class Counter(TorchDispatchMode):
    """Counts the operations that are run in this thread, by torch's formulas.

    Its own `FlopCounterMode` hooks the modules of all threads. On tensors without data attention is two products, so
    that no kernel need be asked for, which would be asked for in all threads, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += int(count(*args, **kwargs, out_val=out))
        return out
