"""Reports survive JSON and add up."""

import dataclasses
import json

import pytest
import torch

from fpdm.fixedpoint import Solution, Status
from fpdm.sampling import Guidance, Purse, Report, cost_of, make_plan
from fpdm.sampling.report import report_of
from tests.sampling.tiny import CALM, DIT, MODEL, run

REPORT = Report(
    images=2, asked=12, planned=11, spent=11.0, most=11, total_passes=22.0, operations=2.2e6,
    timesteps=[999, 499], iterations=[2, 1], passes=[6.0, 5.0], residuals=[[0.5, 0.25], [0.125]],
    running=[[2, 2], [2]],
    status=[{"completed": 1, "diverged": 1}, {"completed": 2}], diverged=1, seconds=1.5,
)  # fmt: skip
EXPLICIT = dataclasses.replace(REPORT, asked=None, iterations=[None, None], residuals=[], running=[], status=[])


@pytest.mark.parametrize("report", [REPORT, EXPLICIT])
def test_a_report_survives_a_file(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.from_dict(json.loads((tmp_path / "report.json").read_text())) == report


def test_the_residual_of_a_timestep_is_the_mean_of_the_last_of_each_image():
    nan, report = float("nan"), None
    residuals = [[0.1, 0.3, 0.5, 0.5], [nan, 0.02, 0.01, 0.01]]  # the second half is the unconditional one
    report = fabricated([1, 2, 2, 2], [Status.CONVERGED] * 4, residuals)
    assert report.residual == pytest.approx([(0.1 + 0.02) / 2])
    assert report.residuals == [pytest.approx([0.2, 0.06])]  # the one that has stopped counts with its last


def test_merging_weights_by_images_and_adds_the_time():
    other = dataclasses.replace(REPORT, images=6, residuals=[[0.1, 0.05], [0.525]], running=[[6, 6], [6]], seconds=2.0)
    merged = REPORT.merged(other)
    assert merged.images == 8
    assert merged.seconds == 3.5
    # At the first timestep one of either's images diverged, which is in no mean.
    assert merged.residuals[0] == pytest.approx([(REPORT.residuals[0][k] + 5 * (0.1, 0.05)[k]) / 6 for k in (0, 1)])
    assert merged.residuals[1] == pytest.approx([0.425])
    assert merged.diverged == 2
    assert merged.running == [[8, 8], [8]]
    assert merged.status == [{"completed": 2, "diverged": 2}, {"completed": 4}]
    same = ("images", "seconds", "diverged", "residuals", "running", "status")
    unchanged = {name: getattr(REPORT, name) for name in same}
    assert dataclasses.replace(merged, **unchanged) == REPORT
    assert EXPLICIT.merged(EXPLICIT).residuals == []


def test_merging_in_any_order_is_the_same():
    parts = [
        dataclasses.replace(REPORT, images=i, residuals=[[i / 7, 0.5], [1 / i]], running=[[i, i], [i]])
        for i in (1, 2, 5)
    ]
    a, b, c = parts
    assert a.merged(b).merged(c).residuals[0] == pytest.approx(c.merged(b.merged(a)).residuals[0])
    assert a.merged(b).merged(c).residuals[1] == pytest.approx([3 / 8])  # (1 x 1 + 2 x 1/2 + 5 x 1/5) / 8


def test_the_images_of_a_report_that_stopped_first_stay_at_their_last_residual():
    # Of two images one diverged, and one made a second iteration; of six, four made it, and three a third.
    short = dataclasses.replace(REPORT, residuals=[[0.4, 0.1], [0.2]], running=[[2, 1], [2]])
    long = dataclasses.replace(
        REPORT, images=6, spent=9.0, most=12, passes=[5.0, 4.0], total_passes=18.0, operations=1.8e6,
        residuals=[[0.8, 0.2, 0.05], [0.6]], running=[[6, 4, 3], [6]],
        status=[{"converged": 6}, {"completed": 6}],
    )  # fmt: skip
    for merged in (short.merged(long), long.merged(short)):
        assert merged.residuals[0] == pytest.approx([(0.4 + 0.8 * 6) / 7, (0.1 + 0.2 * 6) / 7, (0.1 + 0.05 * 6) / 7])
        assert merged.residuals[1] == pytest.approx([0.5])
        assert merged.running == [[8, 5, 3], [8]]
        assert merged.residual == [merged.residuals[0][-1], merged.residuals[1][-1]]
        assert merged.status == [{"completed": 1, "diverged": 1, "converged": 6}, {"completed": 8}]
        assert (merged.spent, merged.most, merged.total_passes, merged.operations) == (9.5, 12, 19.0, 1.9e6)
        assert merged.passes == [5.25, 4.25]


def test_a_report_of_another_version_is_refused():
    for values in (REPORT.to_dict() | {"extra": 1}, {"images": 2}):
        with pytest.raises(ValueError, match="not a report of this version"):
            Report.from_dict(values)


# Of real samplings


UNEVEN = make_plan(cost_of(CALM), iterations=[9, 3, 3, 3, 3])


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0, (200, 900)), Guidance(3.0, share=0.5)])
@pytest.mark.parametrize("tolerance", [None, 0.1, 3e-3])
def test_a_report_counts_every_image_at_every_timestep(tolerance, guidance, tmp_path):
    _, report = run(CALM, indices=range(4), labels=[0, 1, 2, 0], plan=UNEVEN, tolerance=tolerance, guidance=guidance)
    assert [sum(status.values()) for status in report.status] == [4] * 5
    assert all(row == sorted(row, reverse=True) and row[0] == 4 for row in report.running)
    cost = cost_of(CALM)
    for passes, running in zip(report.passes, report.running, strict=True):
        assert passes == pytest.approx(cost.fixed + cost.per_iteration * sum(running) / 4)
    assert sum(report.passes) == pytest.approx(report.spent)
    if tolerance is None:
        assert report.status == [{"completed": 4}] * 5
    else:
        assert all(set(status) <= {"converged", "iteration_limit"} for status in report.status)
    report.save(tmp_path / "report.json")
    assert Report.from_dict(json.loads((tmp_path / "report.json").read_text())) == report


@pytest.mark.parametrize("tolerance", [None, 0.1, 1e-2])
@pytest.mark.parametrize("model", [CALM, MODEL, DIT])
def test_reports_of_two_batches_merge_into_that_of_both(model, tolerance):
    explicit = model is DIT
    plan = make_plan(cost_of(model), num_steps=3, **({} if explicit else {"iterations": 5}))
    parts = [([0, 1, 2], [0, 1, 2]), ([3], [0]), ([0, 1, 2, 3], [0, 1, 2, 0])]
    first, second, both = (
        run(model, indices=indices, labels=labels, plan=plan, tolerance=tolerance)[1] for indices, labels in parts
    )
    merged = first.merged(second)
    assert merged.seconds == first.seconds + second.seconds
    for name in ("images", "asked", "planned", "most", "timesteps", "iterations", "running", "status", "diverged"):
        assert getattr(merged, name) == getattr(both, name), name
    assert (merged.spent, merged.total_passes) == pytest.approx((both.spent, both.total_passes))
    assert merged.passes == pytest.approx(both.passes)
    for mine, theirs in zip(merged.residuals, both.residuals, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def fabricated(iterations, status, residuals):
    """The report of two images at one guided timestep, from what its solve is said to have done."""
    plan, cost = make_plan(cost_of(CALM), iterations=[4]), cost_of(CALM)
    solution = Solution(torch.zeros(4, 1), torch.tensor(residuals), torch.tensor(iterations), torch.tensor(status), {})
    return report_of(plan, cost, cost, [999], [solution], torch.zeros(2, 1, 8, 8), [True], Purse(2, 0.01), 1.0)


def test_an_iteration_that_only_the_unconditional_half_made_is_none_of_the_images():
    nan, done = float("nan"), [Status.CONVERGED] * 4
    report = fabricated([1, 1, 2, 2], done, [[0.1, 0.3, 0.5, 0.5], [nan, nan, 0.01, 0.01]])
    assert report.running == [[2]]
    assert report.residuals == [[pytest.approx(0.2)]]


def test_reports_merge_whichever_half_of_guidance_took_longer():
    nan, done = float("nan"), [Status.CONVERGED] * 4
    report = fabricated([1, 1, 2, 2], done, [[0.1, 0.3, 0.5, 0.5], [nan, nan, 0.01, 0.01]])
    assert report.merged(report).images == 4


def test_an_image_whose_unconditional_solve_diverged_is_counted():
    # The guided prediction is made of both: the image may show nothing.
    report = fabricated([1] * 4, [0, 0, Status.DIVERGED, 0], [[0.1] * 4])
    assert report.diverged == 1
