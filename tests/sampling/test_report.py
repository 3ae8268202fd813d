"""Reports survive JSON and add up."""

import dataclasses
import json

import pytest

from fpdm.sampling import Report

REPORT = Report(
    images=2, asked=12, planned=11, spent=11, total_passes=22, timesteps=[999, 499], iterations=[2, 1],
    residuals=[[0.5, 0.25], [0.125]], diverged=1, seconds=1.5,
)  # fmt: skip
EXPLICIT = dataclasses.replace(REPORT, asked=None, iterations=[None, None], residuals=[])


@pytest.mark.parametrize("report", [REPORT, EXPLICIT])
def test_a_report_survives_a_file(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.from_dict(json.loads((tmp_path / "report.json").read_text())) == report


def test_the_residual_of_a_timestep_is_its_last():
    assert REPORT.residual == [0.25, 0.125]
    assert EXPLICIT.residual == []


def test_merging_weights_by_images_and_adds_the_time():
    other = dataclasses.replace(REPORT, images=6, residuals=[[0.1, 0.05], [0.525]], seconds=2.0)
    merged = REPORT.merged(other)
    assert merged.images == 8
    assert merged.seconds == 3.5
    assert merged.residuals[0] == pytest.approx([0.2, 0.1])
    assert merged.residuals[1] == pytest.approx([0.425])
    assert merged.diverged == 2
    unchanged = {"images": 2, "seconds": 1.5, "diverged": 1, "residuals": REPORT.residuals}
    assert dataclasses.replace(merged, **unchanged) == REPORT
    assert EXPLICIT.merged(EXPLICIT).residuals == []


def test_merging_in_any_order_is_the_same():
    parts = [dataclasses.replace(REPORT, images=i, residuals=[[i / 7, 0.5], [1 / i]]) for i in (1, 2, 5)]
    a, b, c = parts
    assert a.merged(b).merged(c).residuals[0] == pytest.approx(c.merged(b.merged(a)).residuals[0])
    assert a.merged(b).merged(c).residuals[1] == pytest.approx([3 / 8])  # (1 x 1 + 2 x 1/2 + 5 x 1/5) / 8
