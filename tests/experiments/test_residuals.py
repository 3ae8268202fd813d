"""How fast iterates converge: by timestep and iteration, of networks of which that is known."""

import torch

from fpdm.data import BrokenImage, digits
from fpdm.diffusion import for_sampling, make_schedule
from fpdm.experiments.residuals import ITERATIONS, TIMESTEPS, residuals_by_timestep
from fpdm.models import FixedPointDiT
from fpdm.pipeline import FixedPointDiTPipeline

SIZES = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8, "num_heads": 2, "num_classes": 10}


def residuals_of(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FixedPointDiT(**{**SIZES, **changes})
        if "input_skip" not in changes:
            torch.nn.init.eye_(model.core.inject_out.weight[:, :8])
    found = residuals_by_timestep(FixedPointDiTPipeline(model, make_schedule()), digits())
    assert (found["images"], found["timesteps"]) == (64, list(TIMESTEPS))
    residuals = torch.tensor(found["residuals"])
    assert residuals.shape == (len(TIMESTEPS), ITERATIONS)
    return residuals


def test_a_network_whose_iterations_do_nothing_yet_is_solved_at_once():
    assert not residuals_of(input_skip=True).any()  # f(z) = u, where solves start


def test_a_contraction_converges_at_every_timestep():
    residuals = residuals_of()
    assert (residuals[:, 0] > 0.01).all()
    assert (residuals[:, -1] < 0.1 * residuals[:, 0]).all()


def test_they_do_not_depend_on_the_scheduler_that_a_model_is_saved_with():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FixedPointDiT(**SIZES)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    schedule = make_schedule()
    one, other = (
        torch.tensor(residuals_by_timestep(FixedPointDiTPipeline(model, scheduler), digits())["residuals"])
        for scheduler in (schedule, for_sampling(schedule))
    )
    torch.testing.assert_close(other, one)
    assert not torch.allclose(one, one.flip(0), rtol=0.01), "by timestep"


def test_images_that_cannot_be_read_are_left_out(monkeypatch):
    source = digits()
    load = type(source).load

    def half(self, index):
        if index % 2:
            raise BrokenImage(f"{index}.png")
        return load(self, index)

    monkeypatch.setattr(type(source), "load", half)
    found = residuals_by_timestep(FixedPointDiTPipeline(FixedPointDiT(**SIZES), make_schedule()), source)
    assert 0 < found["images"] < 64


def test_twice_the_same():
    assert torch.equal(residuals_of(), residuals_of())
