"""The sampler: spends what was planned, keeps nothing, treats every image alone, and does what its formulas say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm.sampling import (
    REUSE,
    SCHEDULERS,
    Guidance,
    Stepper,
    cost_of,
    image_generators,
    initial_noise,
    make_plan,
    sampler,
)
from tests.sampling.tiny import CALM, DIT, MODEL, SOLVERS_TESTED, TEMPLATE, count_blocks, run, tiny

# What is spent


sizes = st.fixed_dictionaries({f"num_{part}": st.integers(1, 2) for part in ("pre", "core", "post")})
how = st.fixed_dictionaries(
    {
        "scheduler": st.sampled_from(SCHEDULERS),
        "reuse": st.sampled_from(REUSE),
        "solver": st.sampled_from(SOLVERS_TESTED),
        "guidance": st.sampled_from([Guidance(), Guidance(3.0)]),
    }
)


@settings(max_examples=30)
@given(sizes, st.integers(1, 5), st.integers(0, 20), how)
def test_spent_is_planned_is_the_number_of_block_calls(sizes, num_steps, spare, how):
    model = tiny(**sizes)
    cost, num_steps = cost_of(model), 2 * num_steps - 1 if how["scheduler"] == "heun" else num_steps
    plan = make_plan(cost, budget=num_steps * cost.passes(1) + spare, num_steps=num_steps, allocation="rising")
    calls, remove = count_blocks(model)
    _, report = run(model, plan=plan, indices=[0], labels=[1], **how)
    remove()
    assert report.spent == report.planned == plan.planned == len(calls)  # guidance doubles the batch, not the calls
    assert report.total_passes == len(calls) * (2 if how["guidance"].scale != 1 else 1)
    assert report.asked == plan.asked
    assert report.iterations == list(plan.iterations)
    assert [len(row) for row in report.residuals] == list(plan.iterations)
    assert len(report.timesteps) == num_steps


def test_an_explicit_network_spends_its_depth_at_each_timestep():
    calls, remove = count_blocks(DIT)
    images, report = run(DIT, plan=make_plan(cost_of(DIT), budget=12))
    remove()
    assert report.spent == report.planned == len(calls) == 4 * 3
    assert report.iterations == [None] * 4
    assert report.residuals == []
    assert images.shape == (2, 1, 8, 8)


# Every image by itself


@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(scheduler, scale, reuse):
    choices = {"scheduler": scheduler, "guidance": Guidance(scale), "reuse": reuse}
    together, _ = run(indices=range(64), labels=[i % 3 for i in range(64)], **choices)
    for i in (0, 17, 63):
        alone, _ = run(indices=[i], labels=[i % 3], **choices)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[3], atol=1e-2)  # of the same class


GUIDANCES = {
    "none": Guidance(),
    "interval": Guidance(3.0, (400, 800)),
    "channels and share": Guidance(2.0, channels=1, share=0.5),
}


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("solver", SOLVERS_TESTED)
def test_neither_do_solvers_kinds_of_reuse_and_guidance_look_at_other_images(solver, reuse, guidance):
    # On a network that contracts: accelerated solvers magnify rounding where the iteration goes nowhere.
    plan = make_plan(cost_of(CALM), iterations=[4, 2, 3, 5])
    choices = {"plan": plan, "solver": solver, "reuse": reuse, "guidance": guidance, "scheduler": "ddpm"}
    together, _ = run(CALM, indices=range(9), labels=[i % 3 for i in range(9)], **choices)
    alone, _ = run(CALM, indices=[7], labels=[1], **choices)
    some, _ = run(CALM, indices=[8, 7, 2], labels=[2, 1, 2], **choices)
    torch.testing.assert_close(alone[0], together[7], atol=1e-4, rtol=0)
    torch.testing.assert_close(some, together[[8, 7, 2]], atol=1e-4, rtol=0)


# No state


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_interleaved_samplings_equal_two_separate_ones(scheduler):
    first, second = {"scheduler": scheduler}, {"scheduler": scheduler, "indices": [7, 8, 9], "labels": [1, 1, 0]}
    inner = []
    outer, _ = run(**first, on_step=lambda *_: inner.append(run(**second)[0]))
    assert len(inner) == 3
    assert torch.equal(outer, run(**first)[0])
    assert all(torch.equal(images, run(**second)[0]) for images in inner)


def test_sampling_leaves_nothing_behind():
    def traces(model):
        return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]

    template = copy.deepcopy(TEMPLATE)
    attributes, config = copy.deepcopy(vars(template)), dict(template.config)
    weights, before = {name: w.clone() for name, w in MODEL.state_dict().items()}, traces(MODEL)
    random_state = torch.get_rng_state()
    for scheduler in SCHEDULERS:
        run(scheduler=scheduler, guidance=Guidance(2.0), template=template)
    assert traces(MODEL) == before
    assert all(torch.equal(w, weights[name]) for name, w in MODEL.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(template.config) == config
    assert vars(template).keys() == attributes.keys()
    for name, value in attributes.items():
        same = torch.equal(value, vars(template)[name]) if torch.is_tensor(value) else value == vars(template)[name]
        assert same, name


def test_no_graph_is_built():
    assert not run()[0].requires_grad


# What the formulas say


def manual(scheduler, reuse, scale):
    """The same sampling written out for no and for plain reuse, guidance as two separate evaluations."""
    generators, iterations, labels = image_generators(5, [0, 1]), (2, 1, 3), torch.tensor([0, 2])
    x = initial_noise(MODEL, generators)
    stepper = Stepper(TEMPLATE, scheduler, 3, learned_variance=True)
    starts = {"with": None, "without": None}
    with torch.no_grad():
        for index, (t, n) in enumerate(zip(stepper.timesteps, iterations, strict=True)):
            outputs = {
                "with": MODEL(x, t, labels, iterations=n, init=starts["with"]),
                "without": MODEL(x, t, None, iterations=n, init=starts["without"]),
            }
            if reuse == "plain":
                starts = {key: output.solution.value for key, output in outputs.items()}
            conditional, unconditional = outputs["with"].sample, outputs["without"].sample
            mean = unconditional[:, :1] + scale * (conditional[:, :1] - unconditional[:, :1])
            x = stepper.step(torch.cat([mean, conditional[:, 1:]], dim=1), index, x, generators)
    return x


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("reuse", ["plain", "none"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_reuse_and_guidance_are_what_a_loop_by_hand_does(scheduler, reuse, scale):
    images, _ = run(scheduler=scheduler, reuse=reuse, guidance=Guidance(scale))
    torch.testing.assert_close(images, manual(scheduler, reuse, scale), atol=1e-4, rtol=0)


def test_what_the_loop_by_hand_compares_is_not_all_the_same():
    outcomes = [manual(scheduler, reuse, scale) for scheduler, reuse, scale in (
        ("ddim", "plain", 1.0), ("ddim", "none", 1.0), ("ddpm", "plain", 1.0), ("ddim", "plain", 0.0),
        ("ddim", "plain", 2.5), ("heun", "plain", 1.0),
    )]  # fmt: skip
    for i, one in enumerate(outcomes):
        assert not any(torch.allclose(one, other, atol=1e-2) for other in outcomes[:i])


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (1.5, 4)])
def test_scale_one_evaluates_the_network_once(scale, rows):
    batches = []
    hook = MODEL.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    run(guidance=Guidance(scale))
    hook.remove()
    assert batches == [rows] * 3


def test_without_labels_the_null_class_is_drawn():
    assert torch.equal(run(labels=None)[0], run(labels=(MODEL.null_class, MODEL.null_class))[0])


def test_an_unconditional_model_needs_no_labels():
    assert run(tiny(num_classes=0), labels=None)[0].isfinite().all()


def test_on_step_sees_each_step_and_may_replace_x():
    seen = []

    def on_step(index, t, x):
        seen.append((index, t, x.clone()))
        return torch.zeros_like(x) if index == 1 else None

    images, report = run(on_step=on_step, scheduler="ddim")
    plain = []
    run(on_step=lambda index, t, x: plain.append(x.clone()), scheduler="ddim")
    assert [(index, t) for index, t, _ in seen] == list(enumerate(report.timesteps))
    assert torch.equal(seen[1][2], plain[1])  # what is replaced is what was handed over
    assert not torch.allclose(seen[2][2], plain[2], atol=1e-3)
    assert torch.equal(images, seen[2][2])
    assert torch.equal(run(on_step=lambda *_: torch.full((2, 1, 8, 8), 9.0))[0], torch.full((2, 1, 8, 8), 9.0))


def test_the_residuals_are_the_mean_over_the_images():
    alone = [run(indices=[i], labels=[label])[1].residuals for i, label in enumerate((0, 2))]
    for row, *rows in zip(run()[1].residuals, *alone, strict=True):
        assert row == pytest.approx([(a + b) / 2 for a, b in zip(*rows, strict=True)])
        assert min(row) > 0


def test_keyed_noise_is_standard_normal_and_its_own_for_every_image():
    noise = initial_noise(MODEL, image_generators(0, range(200)))
    assert noise.shape == (200, 1, 8, 8)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 200
    assert torch.equal(initial_noise(MODEL, image_generators(0, [150]))[0], noise[150])
    assert not any(torch.equal(initial_noise(MODEL, image_generators(1, [150]))[0], image) for image in noise)


def test_the_counting_of_operations_is_not_in_the_seconds(monkeypatch):
    """A network is counted when it is first met, which takes longer than a small drawing does."""
    events, counting, clock = [], sampler.operations_of, sampler.time.perf_counter
    monkeypatch.setattr(sampler, "operations_of", lambda model: events.append("counted") or counting(model))
    monkeypatch.setattr(sampler.time, "perf_counter", lambda: events.append("clock") or clock())
    run(MODEL)
    assert events == ["counted", "clock", "clock"]
