"""What exits and warm starts do to a step: whose gradients change, and that the teacher has none."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState

from fpdm.data import Stream
from fpdm.fixedpoint import FixedIterations, MultiStepJacobianFree, Solve
from fpdm.training.config import GRADIENTS
from fpdm.training.course import Course, differentiated
from fpdm.training.draws import draw
from fpdm.training.loop import Trainer
from tests.networks import randomised
from tests.training.runs import tiny


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate settles precision and device once per process; here each run is to choose anew."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trainer_of(tmp_path):
    def make(**changes):
        name = f"run-{len(list(tmp_path.iterdir()))}"
        trainer = Trainer(tiny(no_grad_max=3, with_grad_max=3, **changes), tmp_path / name)
        randomised(trainer.net).train()
        return trainer

    return make


def batch_of(trainer):
    return examples_of(trainer).batch


def examples_of(trainer):
    stream = Stream(trainer.parts.source, trainer.parts.prepare, batch_size=8, seed=trainer.config.run.seed)
    return trainer.parts.drawing([stream[trainer.step, slot] for slot in range(8)])


def gradients(trainer, course=None):
    """What a step's one part adds to the gradients, by parameter, and its losses."""
    trainer.net.zero_grad()
    values = trainer._backward(*examples_of(trainer), course or trainer.parts.course(trainer.step))
    return {name: p.grad.clone() for name, p in trainer.net.named_parameters()}, values


def exiting(trainer):
    """The first step whose course has an exit."""
    while not trainer.parts.course(trainer.step).solve.exits:
        trainer.step += 1
    return trainer.parts.course(trainer.step)


def changed(one, other, layer):
    return any(not torch.equal(one[name], other[name]) for name in one if name.startswith(layer))


@pytest.mark.parametrize("kind", ["target", "final"])
@pytest.mark.parametrize("method", GRADIENTS)
def test_an_exit_changes_the_gradients_of_the_layers_that_it_passes(method, kind, trainer_of):
    trainer = trainer_of(gradient=method, exit_loss=kind, tolerance=1e-6 if method == "implicit" else 1e-3)
    course = exiting(trainer)
    (exit,) = course.solve.exits
    with_exit, values = gradients(trainer, course)
    without, _ = gradients(trainer, Course(Solve(stopping=course.solve.stopping, gradient=course.solve.gradient)))
    assert values["exit"] > 0
    assert changed(with_exit, without, "post.")
    assert changed(with_exit, without, "core.") is (exit in differentiated(course.solve))


@pytest.mark.parametrize("kind", ["target", "final"])
@pytest.mark.parametrize("method", ["sjfb", "phantom", "unroll"])
def test_the_exit_is_taught_by_its_target_or_by_the_final_prediction_as_a_constant(method, kind, trainer_of):
    trainer = trainer_of(gradient=method, exit_loss=kind, exit_weight=0.7)
    course, batch, net = exiting(trainer), batch_of(trainer), copy.deepcopy(trainer.net)
    found, values = gradients(trainer, course)

    chance = draw(0, trainer.step, batch.slots, (1, 8, 8), 1000, 0.1)
    labels = batch.labels.masked_fill(chance.dropped, 10)
    x0, noise, t, loss = batch.images, chance.noise, chance.timesteps, trainer.parts.loss
    x_t = loss.noisy(x0, noise, t)
    with torch.no_grad():
        constant = copy.deepcopy(net)(x_t, t, labels, solve=course.solve).sample
    output = net(x_t, t, labels, solve=course.solve)
    (early,) = output.exits.values()
    final, exit = loss(output.sample, x0, noise, t), loss(early, x0, noise, t, constant if kind == "final" else None)
    (final.total.mean() + 0.7 * exit.total.mean()).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert values["exit"].item() == pytest.approx(exit.total.mean().item(), rel=1e-5)
    wanted = final.total.mean() + 0.7 * exit.total.mean()
    assert values["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_teacher_gets_no_gradient(trainer_of):
    loss = trainer_of().parts.loss
    x0, noise, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    teacher, student = (torch.randn(2, 2, 8, 8, requires_grad=True) for _ in range(2))
    loss(student, x0, noise, t, teacher).total.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_a_final_prediction_that_the_exit_equals_teaches_it_nothing(trainer_of):
    loss = trainer_of().parts.loss
    x0, noise, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    output = torch.randn(2, 2, 8, 8)
    assert loss(output, x0, noise, t, output).mse.eq(0).all()
    assert loss(output, x0, noise, t).mse.gt(0).all()


def test_an_exit_in_parts_weighs_what_it_does_in_one(trainer_of):
    """Of a batch in halves, the mean of the halves' exit losses is the whole's."""
    whole, parts = (trainer_of(exit_loss="target", accumulation=n, lr=0.0) for n in (1, 2))
    for trainer in (whole, parts):
        exiting(trainer)
        stream = Stream(trainer.parts.source, trainer.parts.prepare, batch_size=8, seed=0)
        keys = [(trainer.step, slot) for slot in range(8)]
        size = 8 // trainer.config.optimizer.accumulation
        trainer._one_step(
            [trainer.parts.drawing([stream[key] for key in keys[i : i + size]]) for i in range(0, 8, size)]
        )
    one, two = (trainer.meters.means(trainer.meters.sums) for trainer in (whole, parts))
    assert one == pytest.approx(two, rel=1e-4)


def recorded(trainer, monkeypatch):
    """What the network is called with, and whether under autograd, in the order of the calls."""
    calls, forward = [], trainer.net.forward

    def noting(x, t, y, **more):
        output = forward(x, t, y, **more)
        calls.append({"x": x, "t": t, "grad": torch.is_grad_enabled(), "value": output.solution.value, **more})
        return output

    monkeypatch.setattr(trainer.net, "forward", noting)
    return calls


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_warm_step_iterates_at_a_noisier_timestep_and_goes_on_from_there(method, trainer_of, monkeypatch):
    trainer = trainer_of(gradient=method, warm_share=1.0)
    calls, course = recorded(trainer, monkeypatch), trainer.parts.course(0)
    gradients(trainer, course)
    warm, step = calls
    chance, batch = draw(0, 0, list(range(8)), (1, 8, 8), 1000, 0.1, warm=True), batch_of(trainer)
    loss = trainer.parts.loss
    assert (warm["grad"], step["grad"]) == (False, True)
    assert warm["t"].tolist() == chance.later.tolist()
    assert step["t"].tolist() == chance.timesteps.tolist()
    assert torch.equal(step["x"], loss.noisy(batch.images, chance.noise, chance.timesteps))
    assert torch.equal(warm["x"], loss.noisier(step["x"], chance.timesteps, chance.later, chance.fresh))
    assert step["init"] is warm["value"]
    assert not step["init"].requires_grad
    assert "init" not in warm


def test_a_cold_step_asks_once(trainer_of, monkeypatch):
    trainer = trainer_of()
    calls = recorded(trainer, monkeypatch)
    gradients(trainer)
    assert [call["t"].tolist() for call in calls] == [draw(0, 0, list(range(8)), (1, 1, 1), 1000, 0).timesteps.tolist()]


def test_a_warm_start_changes_the_gradients_as_its_solution_says(trainer_of, monkeypatch):
    trainer = trainer_of(warm_share=1.0)
    course = trainer.parts.course(0)
    calls = recorded(trainer, monkeypatch)
    warm, _ = gradients(trainer, course)
    monkeypatch.undo()
    init = calls[0]["value"]
    cold, _ = gradients(trainer, Course(course.solve))
    assert changed(warm, cold, "core.")

    # the same gradients, with the solution as a constant
    trainer.net.zero_grad()
    output = trainer.net(calls[1]["x"], calls[1]["t"], labels_of(trainer), solve=course.solve, init=init.clone())
    chance = draw(0, 0, list(range(8)), (1, 8, 8), 1000, 0.1, warm=True)
    trainer.parts.loss(output.sample, batch_of(trainer).images, chance.noise, chance.timesteps).total.mean().backward()
    for name, parameter in trainer.net.named_parameters():
        torch.testing.assert_close(warm[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_warm_start_in_half_precision_takes_no_gradient_away(trainer_of):
    """Autocast keeps the casts of the weights that the iterations without gradient were made with."""
    trainer = trainer_of(warm_share=1.0, mixed_precision="bf16")
    found, _ = gradients(trainer)  # which has one of each parameter
    trainer.accelerator.native_amp = False
    whole, _ = gradients(trainer)
    for name, gradient in whole.items():
        if gradient.norm() > 1e-6:
            assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), 0) > 0.9, name


def labels_of(trainer):
    chance = draw(0, trainer.step, list(range(8)), (1, 8, 8), 1000, 0.1)
    return batch_of(trainer).labels.masked_fill(chance.dropped, 10)


def test_the_cost_of_a_course_counts_its_warm_start(trainer_of):
    parts = trainer_of().parts
    solve = Solve(stopping=FixedIterations(0), gradient=MultiStepJacobianFree(0, 2))
    cold, warm = (parts.operations(Course(solve, warm)) for warm in (None, Solve(stopping=FixedIterations(3))))
    assert warm > cold


def test_every_implicit_step_has_an_exit_that_is_an_earlier_iterate(trainer_of):
    trainer = trainer_of(gradient="implicit", exit_loss="target")
    trainer.net.core.inject_z.weight.data.mul_(0.1)  # so that it converges soon
    batch = batch_of(trainer)
    t = torch.arange(8) * 100
    for step in range(40):
        with torch.no_grad():
            output = trainer.net(batch.images, t, batch.labels, solve=trainer.parts.course(step).solve)
        (exit,) = output.exits.values()
        assert not torch.equal(exit, output.sample)
