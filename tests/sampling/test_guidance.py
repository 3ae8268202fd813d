"""Guidance: where, on which channels, and for how many iterations."""

import math

import pytest
import torch

from fpdm.sampling import REUSE, Guidance, Stepper, cost_of, make_plan
from tests.sampling.tiny import CALM, MODEL, TEMPLATE, contracting, count_rows, run

FOUR = contracting(in_channels=4)


def calls_of(model, **choices):
    """Images, report, and per call of the network the timestep, the rows, and the iterations of every row."""
    calls = []
    hook = model.register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[1], len(inputs[0]), output.solution.iterations.tolist()))
    )
    images, report = run(model, **choices)
    hook.remove()
    return images, report, calls


@pytest.mark.parametrize("interval", [(0, math.inf), (300, 800), (0, 0), (1000, math.inf), (499, 799), (799, 799)])
def test_outside_the_interval_the_network_is_evaluated_once(interval):
    plan = make_plan(cost_of(CALM), iterations=[3, 1, 2, 2, 4])  # at 999, 799, 599, 399, 199
    rows, remove = count_rows(CALM)
    _, report, calls = calls_of(CALM, plan=plan, guidance=Guidance(2.0, interval))
    remove()
    inside = [interval[0] <= t <= interval[1] for t in report.timesteps]
    assert [(t, count) for t, count, _ in calls] == [
        (t, 4 if twice else 2) for t, twice in zip(report.timesteps, inside, strict=True)
    ]
    assert report.spent == plan.planned
    assert report.total_passes == plan.planned + sum(p for p, twice in zip(plan.passes, inside, strict=True) if twice)
    assert sum(rows) == 2 * report.total_passes


def test_an_interval_that_no_timestep_is_in_is_no_guidance():
    assert torch.equal(run(guidance=Guidance(5.0, (1, 2)))[0], run()[0])


@pytest.mark.parametrize("reuse", REUSE)
def test_guidance_that_is_nowhere_is_exactly_none(reuse):
    images, report = run(guidance=Guidance(3.0, (2000, 3000)), reuse=reuse)
    plain, alone = run(reuse=reuse)
    assert torch.equal(images, plain)
    assert report.total_passes == alone.total_passes == alone.spent


@pytest.mark.parametrize("choices", [{"interval": (0, 500)}, {"channels": 1}, {"share": 0.3}])
def test_what_goes_with_a_scale_is_refused_without_one(choices):
    with pytest.raises(ValueError, match="no guidance at guidance_scale 1"):
        Guidance(1.0, **choices)


def test_channels_that_are_not_guided_are_the_conditional_ones():
    # In one step the image is the prediction's x0, channel by channel.
    plan = make_plan(cost_of(FOUR), iterations=[3])
    none, some, every = (
        run(FOUR, plan=plan, guidance=guidance)[0]
        for guidance in (Guidance(), Guidance(4.0, channels=3), Guidance(4.0))
    )
    torch.testing.assert_close(some[:, :3], every[:, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(some[:, 3:], none[:, 3:], atol=1e-5, rtol=0)
    assert not torch.allclose(some[:, :3], none[:, :3], atol=1e-3)
    assert not torch.allclose(every[:, 3:], none[:, 3:], atol=1e-3)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0, -1.0])
def test_the_variance_is_never_guided(channels, scale):
    output = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))  # 4 channels and their variances
    conditional, unconditional = output.chunk(2)
    moved, guided = Guidance(scale, channels=channels).combined(output, 4), channels or 4
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(moved[:, :guided], expected[:, :guided])
    assert torch.equal(moved[:, guided:], conditional[:, guided:])


@pytest.mark.parametrize(
    ("share", "second"), [(1.0, (6, 1, 3)), (0.5, (3, 1, 2)), (0.01, (1, 1, 1)), (0.34, (2, 1, 1))]
)
def test_the_unconditional_half_has_its_share_of_the_iterations(share, second):
    plan = make_plan(cost_of(MODEL), iterations=[6, 1, 3])
    rows, remove = count_rows(MODEL)
    _, report, calls = calls_of(MODEL, plan=plan, guidance=Guidance(2.0, share=share))
    remove()
    assert [iterations for *_, iterations in calls] == [[n, n, m, m] for n, m in zip((6, 1, 3), second, strict=True)]
    assert report.spent == plan.planned
    assert report.total_passes == plan.planned + sum(cost_of(MODEL).passes(n) for n in second)
    assert sum(rows) == 2 * report.total_passes
    assert [len(row) for row in report.residuals] == [6, 1, 3]
    assert report.running == [[2] * 6, [2], [2] * 3]


def test_a_share_is_what_two_separate_evaluations_with_other_iterations_give():
    seen = {}
    plan = make_plan(cost_of(MODEL), iterations=[5])
    images, _ = run(plan=plan, guidance=Guidance(2.5, share=0.4), spoil=lambda noise: seen.setdefault("x", noise))
    stepper = Stepper(TEMPLATE, None, 1, learned_variance=True)
    with torch.no_grad():
        conditional = MODEL(seen["x"], 999, torch.tensor([0, 2]), iterations=5).sample
        unconditional = MODEL(seen["x"], 999, None, iterations=2).sample
    mean = unconditional[:, :1] + 2.5 * (conditional[:, :1] - unconditional[:, :1])
    expected = stepper.step(torch.cat([mean, conditional[:, 1:]], dim=1), 0, seen["x"], [])
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"scale": math.nan}, "guidance_scale is nan"),
        ({"scale": math.inf}, "guidance_scale is inf"),
        ({"interval": (5, 4)}, "the lower one first"),
        ({"interval": (-1, 4)}, "two timesteps"),
        ({"interval": (0, math.nan)}, "two timesteps"),
        ({"interval": (math.nan, 4)}, "two timesteps"),
        ({"interval": (0, 1, 2)}, "two timesteps"),
        ({"channels": 0}, "at least 1, or None"),
        ({"channels": -3}, "at least 1, or None"),
        ({"share": 0.0}, r"in \(0, 1\]"),
        ({"share": 1.01}, r"in \(0, 1\]"),
        ({"share": -0.5}, r"in \(0, 1\]"),
        ({"share": math.nan}, r"in \(0, 1\]"),
    ],
)
def test_values_outside_their_ranges_are_refused(choices, text):
    with pytest.raises(ValueError, match=text):
        Guidance(**choices)
