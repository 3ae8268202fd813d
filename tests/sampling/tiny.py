"""Samplings so small that a test can afford many: tiny networks, three timesteps, keyed images."""

import torch

from fpdm.diffusion import make_schedule
from fpdm.fixedpoint import Anderson, Broyden, Picard
from fpdm.models import DiT, FixedPointDiT
from fpdm.models.layers import Block
from fpdm.sampling import cost_of, image_generators, initial_noise, make_plan, sample
from tests.networks import SIZES, randomised

# v rather than epsilon, which is divided by 0.006 at the first timestep: rounding would be all that is compared.
TEMPLATE = make_schedule(prediction_type="v_prediction", clip_sample=True)
SOLVERS_TESTED = (Picard(), Picard(0.7), Anderson(), Broyden())


def tiny(**settings):
    return randomised(FixedPointDiT(**{**SIZES, **settings}))


def contracting(**settings):
    """A network whose iteration converges, at another speed for every image: random ones do not."""
    model = tiny(**settings)
    with torch.no_grad():
        model.core.inject_z.weight *= 0.3
    return model


MODEL, DIT, CALM = tiny(num_core=2), randomised(DiT(**SIZES, depth=3)), contracting()


def run(model=MODEL, *, indices=(0, 1), plan=None, labels=(0, 2), template=TEMPLATE, spoil=None, by=sample, **choices):
    """Images and report of a few keyed images, in three timesteps. `spoil` is handed the noise and returns another.
    `by=course` returns their course instead."""
    plan = plan or make_plan(cost_of(model), iterations=[2, 1, 3])
    generators = image_generators(5, indices)
    noise = initial_noise(model, generators)
    noise = noise if spoil is None else spoil(noise)
    return by(model, template, plan, noise, None if labels is None else torch.tensor(labels), generators, **choices)


def count_blocks(model):
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.modules() if isinstance(m, Block)]
    return calls, lambda: [hook.remove() for hook in hooks]


def count_rows(model):
    """How many images each block call was made for: what is really spent, guidance's second half included."""
    rows = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        for module in model.modules()
        if isinstance(module, Block)
    ]
    return rows, lambda: [hook.remove() for hook in hooks]
