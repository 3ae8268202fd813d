"""Tables of a result: what stands in each cell, and which is bold."""

import pytest

from fpdm.experiments.rows import compared, values_of
from fpdm.experiments.show import as_text, markdown, write_page
from tests.experiments.results import MODELS, is_drawn, point, result_of, two_models


@pytest.fixture
def result():
    return two_models()


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_table_has_means_and_ranges_of_the_trainings_and_the_lowest_mean_is_bold(result):
    assert cells(markdown(result)) == [
        ["block passes", "24", "560"],
        ["---", "---", "---"],
        ["FPDM (0.25 M)", "**2** (1 to 3)", "1.5"],
        ["DiT (1.23 M)", "6", "**1** (0.5 to 1.5)"],
        ["real images", "0.125", "0.125"],
    ]


def test_a_table_of_one_way_leaves_blank_what_is_not_there(result):
    assert cells(markdown(result, "UniPC"))[2:] == [
        ["FPDM (0.25 M)", "**0.5**", ""],
        ["DiT (1.23 M)", "6", "**1** (0.5 to 1.5)"],
        ["real images", "0.125", "0.125"],
    ]
    assert [row[2] for row in cells(markdown(result, "DDIM"))[2:]] == ["**1.5**", "", "0.125"]


def test_the_table_of_a_single_model_has_a_row_per_way():
    points = [point("fpdm", "DDIM", 24, 2.0), point("fpdm", "DDIM", 24, 4.0, 1), point("fpdm", "UniPC", 24, 2.5)]
    alone = result_of(points, models={"fpdm": "FPDM"})
    assert cells(markdown(alone))[2:] == [
        ["DDIM", "3 (2 to 4)"],
        ["UniPC", "**2.5**"],
        ["real images", "0.125"],
    ]


def test_ways_and_budgets_that_nothing_has_been_measured_of_are_left_out(result, tmp_path):
    part = {**result, "points": [p for p in result["points"] if (p["way"], p["budget"]) == ("UniPC", 24)]}
    part["points"][0]["best"] = True
    assert cells(markdown(part))[0] == ["block passes", "24"]
    assert "## " not in write_page(part, tmp_path).read_text()


def test_equal_means_are_both_bold_and_order_does_not_matter(result):
    tied = result_of([point("fpdm", "DDIM", 24, 2.0), point("dit", "DDIM", 24, 2.0)])
    assert [row[1] for row in cells(markdown(tied))[2:4]] == ["**2**", "**2**"]
    assert markdown({**result, "points": result["points"][::-1]}) == markdown(result)


def test_a_model_of_which_nothing_is_there_has_no_row(result):
    part = {
        **result,
        "points": [p for p in result["points"] if p["model"] == "dit"],
        "trainings": result["trainings"][1:],
    }
    assert [row[0] for row in cells(markdown(part))[2:]] == ["DiT (1.23 M)", "real images"]
    some = {**result, "points": [p for p in result["points"] if p["model"] == "fpdm" or p["way"] == "UniPC"]}
    assert [row[0] for row in cells(markdown(some, "DDIM"))[2:]] == ["FPDM (0.25 M)", "real images"]


def test_a_table_of_nothing_has_a_head():
    assert cells(markdown(result_of([], real=None))) == [["block passes", "24", "560"], ["---"] * 3]


def test_text_is_the_table_in_columns_below_the_question(result):
    question, _, *lines = as_text(result).splitlines()
    assert question == "Which is better?"
    assert len({len(line) for line in lines}) == 1
    starts = [lines[0].index(head) for head in ("block passes", "24", "560")]
    found = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    head, _, *rows = cells(markdown(result).replace("**", ""))
    assert found == [head, *rows]


@pytest.mark.parametrize(
    ("points", "values"),
    [
        ([], {}),
        ([("a", 24, 3.0)], {24: [3.0]}),
        ([("a", 24, 3.0), ("a", 24, 4.0), ("b", 24, 2.0)], {24: [3.0, 4.0]}),
        ([("a", 24, 1.0), ("b", 40, 1.0), ("b", 40, 2.0)], {24: [1.0], 40: [1.0, 2.0]}),
    ],
    ids=["nothing", "one", "most trainings", "at each budget its own"],
)
def test_values_are_of_the_way_with_most_trainings(points, values):
    assert values_of(point("fpdm", *given) for given in points) == values


@pytest.mark.parametrize("best", ["a", "b"])
def test_of_ways_with_as_many_trainings_values_are_of_the_best_when_plans_were_chosen(best):
    points = [point("fpdm", way, 24, value, best=way == best) for way, value in (("a", 1.0), ("b", 2.0))]
    assert values_of(points) == {24: [1.0 if best == "a" else 2.0]}


def test_a_page_has_the_plot_and_the_tables_of_all_ways(result, tmp_path):
    path = write_page(result, tmp_path)
    text = path.read_text("utf-8")
    assert path == tmp_path / "table.md"
    assert text.startswith("# Which is better?\n")
    assert [part in text for part in (markdown(result), markdown(result, "DDIM"), markdown(result, "UniPC"))] == [
        True
    ] * 3
    assert "(plot.png)" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## DDIM", "## UniPC"]
    assert is_drawn(tmp_path / "plot.png")


@pytest.mark.parametrize(("models", "ways"), [({"fpdm": "FPDM"}, ("DDIM", "UniPC")), (MODELS, ("DDIM",))])
def test_a_page_of_one_model_or_one_way_has_one_table(models, ways, tmp_path):
    points = [point(model, way, 24, 1.0) for model in models for way in ways]
    text = write_page(result_of(points, models, ways), tmp_path).read_text("utf-8")
    assert "## " not in text
    assert text.count("block passes") == 1


def test_ways_with_budgets_of_their_own_are_one_table_and_one_line_per_model(tmp_path):
    """As in the table of iterations per timestep, where the number of them makes the budget."""
    ways, budgets = ("DDIM", "UniPC", "DDPM"), (24, 80, 560)
    points = [point(model, way, at, 1.0) for model in MODELS for way, at in zip(ways, budgets, strict=True)]
    result = result_of(points, ways=ways, budgets=budgets)
    text = write_page(result, tmp_path).read_text("utf-8")
    assert "## " not in text
    assert cells(text)[2][1:] == ["24", "80", "560"]
    assert compared(result) == []
    assert compared(result_of([*points, point("dit", "DDIM", 80, 1.0)], ways=ways, budgets=budgets)) == list(ways)
