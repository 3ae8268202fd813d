"""Pipelines of networks so small that a test can afford many."""

from fpdm import FixedPointDiT, FixedPointDiTPipeline
from fpdm.diffusion import make_schedule
from tests.networks import SIZES, randomised

NAMES = ["cat", "dog", "owl"]


def make_pipeline(network=FixedPointDiT, class_names=NAMES, vae=None, **settings):
    model = randomised(network(**{**SIZES, **settings}))
    pipe = FixedPointDiTPipeline(model, make_schedule(clip_sample=vae is None), vae, class_names=class_names)
    pipe.set_progress_bar_config(disable=True)
    return pipe
