"""Plots of a result: which form they have, and what is where in them."""

import matplotlib.pyplot as plt
import pytest

from fpdm.experiments.plots import BESIDE, CURVES, FAR, curves, plot, rows
from tests.experiments.results import MODELS, is_drawn, many_models, point, result_of, two_models


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def names_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def dots_of(axis):
    """(place, x, marker) of what is drawn with a marker, by place."""
    lines = [line for line in axis.lines if line.get_marker() not in ("None", "", None)]
    return sorted((float(line.get_ydata()[0]), float(line.get_xdata()[0]), line.get_marker()) for line in lines)


@pytest.mark.parametrize("models", [MODELS, {"fpdm": "FPDM"}], ids=len)
@pytest.mark.parametrize("real", [0.125, None])
def test_a_plot_is_a_picture(models, real, tmp_path):
    points = [p for p in two_models()["points"] if p["model"] in models]
    plot(result_of(points, models, real=real), tmp_path / "plot.png")
    assert is_drawn(tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_curves_have_a_panel_per_way_with_means_and_ranges_over_trainings():
    figure = curves(two_models())
    ddim, unipc = figure.axes
    assert (ddim.get_title(), unipc.get_title()) == ("DDIM", "UniPC")
    assert names_of(unipc) == ["FPDM (0.25 M)", "DiT (1.23 M)", "real images"]
    fpdm, dit, real = ddim.lines
    assert (list(fpdm.get_xdata()), list(fpdm.get_ydata())) == ([24, 560], [2.0, 1.5])
    assert (list(dit.get_xdata()), list(dit.get_ydata())) == ([24], [7.0])
    assert real.get_ydata()[0] == 0.125
    band = ddim.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 3.0)


@pytest.mark.parametrize("count", [BESIDE, BESIDE - 1, CURVES])
def test_a_legend_of_many_lines_is_beside_them(count):
    figure = curves(many_models(count))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    beside = axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
    assert len(names_of(axis)) == count + 1, "with the real images"
    assert beside == (count + 1 > BESIDE)


def test_no_two_of_the_curves_look_alike():
    (axis,) = curves(many_models(CURVES)).axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.lines}
    assert len(looks) == CURVES + 1


@pytest.mark.parametrize(("count", "panels"), [(CURVES, "curves"), (CURVES + 1, "rows")])
def test_more_lines_than_can_be_told_apart_have_a_row_each(count, panels, tmp_path, monkeypatch):
    forms = []
    for form in (curves, rows):
        monkeypatch.setattr(
            f"fpdm.experiments.plots.{form.__name__}", lambda result, form=form: forms.append(form) or form(result)
        )
    plot(many_models(count), tmp_path / "plot.png")
    assert [form.__name__ for form in forms] == [panels]
    assert is_drawn(tmp_path / "plot.png")


def test_rows_mark_the_lowest_and_what_is_far_from_it():
    result = result_of([
        *(point("fpdm", "DDIM", 24, value, seed) for seed, value in enumerate((1.0, 2.0))),
        point("dit", "DDIM", 24, 3.5), point("dit", "DDIM", 560, 2.0),
    ])  # fmt: skip
    first, second = rows(result).axes
    assert (first.get_title(), second.get_title()) == ("24 block passes", "560 block passes")
    assert [label.get_text() for label in first.get_yticklabels()] == ["FPDM (0.25 M)", "DiT (1.23 M)"]
    assert dots_of(first) == [(0, 1.5, "o"), (1, FAR * 1.5, ">")], "and one that is far is at the edge"
    assert dots_of(second) == [(1, 2.0, "o")], "and a row without points stays empty"
    bars = [list(line.get_xdata()) for line in first.lines if line.get_marker() in ("None", "")]
    assert [1.0, 2.0] in bars
    colours = {line.get_ydata()[0]: line.get_color() for line in first.lines}
    assert colours[0] != colours[1]


def test_rows_say_what_the_dotted_line_is_only_where_there_is_one():
    points = two_models()["points"]
    with_real, without = (rows(result_of(points, real=real)).get_supxlabel() for real in (0.125, None))
    assert "dotted: real images" in with_real
    assert "dotted" not in without
