"""How models compare: ratios of distances, from a small result made up by hand."""

import pytest

from fpdm.experiments.comparison import best, choices, ratio, ratios

EXPLICIT = ["dit", "dit-deep"]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture
def compared():
    """Two fixed point networks and two explicit ones, with distances by seed."""
    values = {
        ("fpdm", 24): (1.0, 4.0), ("fpdm-large", 24): (3.0, 8.0), ("dit", 24): (2.0, 4.0), ("dit-deep", 24): (4.0, 8.0),
        ("fpdm", 80): (3.0,), ("fpdm-large", 80): (1.5, 1.5), ("dit", 80): (2.0, 9.0),
    }  # fmt: skip
    # Operations of a pass: what fpdm takes at 24 is half-way between what dit takes at 24 and at 80.
    costs = {"fpdm": (80 / 24) ** 0.5, "fpdm-large": 2}
    points = [
        {
            "model": model,
            "way": "UniPC",
            "budget": budget,
            "seed": seed,
            "best": True,
            "measures": {"FD": [value]},
            "operations": budget * costs.get(model, 1),
            "plan": f"{budget // 3} timesteps x 2 iterations, {budget} block passes",
        }
        for (model, budget), of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    points += [{**points[0], "way": "DDIM", "best": False, "measures": {"FD": [100.0]}}]
    names = {"fpdm": "FPDM", "fpdm-large": "large FPDM", "dit": "DiT", "dit-deep": "deep DiT", "fpdm-later": "later"}
    flags = {"dit": " --network dit --depth 2", "dit-deep": " --network dit --depth 4"}
    trainings = [
        {"model": model, "command": f"fpdm train digits{flags.get(model, '')}", "parameters": of, "operations": 10 * of}
        for model, of in (("fpdm", 3), ("fpdm-large", 6), ("dit", 4), ("dit-deep", 8))
    ]
    ground = {"recipe": "some_digits"}
    return {"ground": ground, "models": names, "budgets": [24, 80], "trainings": trainings, "points": points}


def test_ratios_compare_trainings_of_one_seed_and_are_bold_where_all_are_below_one(compared):
    assert cells(ratios(compared, ["fpdm"], EXPLICIT)) == [
        ["ratio of distances", "24", "80"],
        ["---", "---", "---"],
        ["FPDM / DiT", "0.71 (0.50 to 1.00)", "1.50"],
        ["FPDM / deep DiT", "**0.35** (0.25 to 0.50)", ""],
    ]
    pairs = [row[0] for row in cells(ratios(compared, ["fpdm", "fpdm-large"], EXPLICIT))[2:]]
    assert pairs == ["FPDM / DiT", "FPDM / deep DiT", "large FPDM / DiT", "large FPDM / deep DiT"]


def test_one_way_of_drawing_can_be_compared(compared):
    assert best(compared, "UniPC") == best(compared)
    assert ratios(compared, ["fpdm"], EXPLICIT, "UniPC") == ratios(compared, ["fpdm"], EXPLICIT)
    with_ddim = cells(ratios(compared, ["fpdm"], EXPLICIT, "DDIM"))
    assert with_ddim[0] == ["ratio of distances"], "nothing to compare was measured with it, at any budget"


def test_the_best_of_either_kind_are_compared(compared):
    assert cells(best(compared)) == [
        ["block passes", "24", "80"],
        ["---", "---", "---"],
        ["best DiT", "DiT: 3", "DiT: 5.5"],
        ["best FPDM", "FPDM: 2.5", "large FPDM: 1.5"],
        ["FPDM relative to DiT", "0.71 (0.50 to 1.00)", "**0.35** (0.17 to 0.75)"],
        ["at as many operations", "**0.58** (0.50 to 0.67)", ""],
    ]


def test_a_choice_is_beside_the_best_explicit_network_on_both_data_and_with_what_it_costs(compared):
    elsewhere = {
        **compared,
        "ground": {"recipe": "clothes"},
        "points": [p for p in compared["points"] if not p["seed"]],
    }
    fewer = {**compared, "points": [p for p in compared["points"] if p["model"] != "fpdm"]}
    heads, _, first, second = cells(
        choices(compared, fewer, elsewhere, [(24, "fpdm"), (80, "fpdm-large")], way="UniPC")
    )
    assert heads[3:8] == [
        "some-digits, equal steps",
        "also equal operations of samples",
        "some-digits, equal training operations",
        "clothes, equal steps",
        "beside, at equal steps",
    ]
    assert first[:3] == ["24", "FPDM", "8 x 2"]
    assert first[3:] == ["0.71 (0.50 to 1.00)", "**0.58** (0.50 to 0.67)", "", "0.50", "DiT", "0.75", "0.75"]
    assert second[3:7] == ["**0.35** (0.17 to 0.75)", "", "**0.35** (0.17 to 0.75)", "0.75"]


@pytest.mark.parametrize(
    ("own", "its", "text"),
    [
        ({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}, "**0.50** (0.50 to 0.50)"),
        ({0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0}, "0.87 (0.50 to 1.50)"),
        ({0: 1.0}, {0: 2.0, 1: 2.0}, "0.50"),
        ({2: 1.0}, {0: 2.0, 1: 2.0}, ""),
    ],
    ids=["in every one", "in one", "of a single one", "of none"],
)
def test_a_ratio_is_bold_where_it_is_below_one_in_every_one_of_several_trainings(own, its, text):
    assert ratio(own, its) == text
