"""The tables: every training that they ask for can be, and trainings of one name are one training."""

import re
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fpdm.diffusion import make_schedule
from fpdm.experiments import experiment
from fpdm.experiments.catalog import GROUNDS, MODELS, NEAREST, TABLES, ground, table
from fpdm.experiments.experiment import Experiment, operations_of_training
from fpdm.experiments.points import labelled
from fpdm.experiments.table import Table
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training.build import build_model
from fpdm.training.course import make_courses

BY_STEPS = [name for name, wanted in TABLES.items() if wanted.equal == "steps"]


def source_of(config):
    """Stands in for the images, which only one ground has in the package."""
    return SimpleNamespace(channels=config.channels, class_names=[str(number) for number in range(10)])


@pytest.fixture(autouse=True)
def without_images_and_weights(monkeypatch):
    """Sizes and operations are those of networks on torch's meta device, which cost next to nothing."""

    def build(config, source):
        with torch.device("meta"):
            return build_model(config, source)

    monkeypatch.setattr(experiment, "opened", source_of)
    monkeypatch.setattr(experiment, "build_model", build)


@lru_cache
def trainings(name, of):
    """All of a table, each with its config."""
    data = "DATA" if GROUNDS[of].data else None
    whole = Experiment(name, TABLES[name], GROUNDS[of], data, Path("out"), Path("runs"), device="cpu")
    return [(training, training.config) for training in whole.trainings()]


def first(name, of):
    """label -> config of each model's first training."""
    return {t.label: config for t, config in trainings(name, of) if t.seed == GROUNDS[of].seeds[0]}


def parameters(config):
    return sum(weight.numel() for weight in experiment.build_model(config, source_of(config.data)).parameters())


@pytest.mark.parametrize(("name", "of"), [*product(TABLES, GROUNDS)])
def test_all_trainings_of_a_table_can_be(name, of):
    assert {(t.label, t.seed) for t, _ in trainings(name, of)} == {*product(TABLES[name].models, GROUNDS[of].seeds)}
    for training, config in trainings(name, of):
        assert config.run.seed == training.seed
        assert config.data.data == ("DATA" if GROUNDS[of].data else None)
    for config in first(name, of).values():
        model = experiment.build_model(config, source_of(config.data))  # which refuses settings without an effect
        assert type(model).__name__ == ("DiT" if config.model.network == "dit" else "FixedPointDiT")
        if config.model.network == "fpdm":
            make_courses(config.gradient, config.model.num_core)


@pytest.mark.parametrize("of", GROUNDS)
def test_trainings_of_one_name_are_one_training_in_all_tables(of):
    found = {}
    for name in TABLES:
        names = [training.name for training, _ in trainings(name, of)]
        assert len(set(names)) == len(names)
        for training, (_, config) in zip(names, trainings(name, of), strict=True):
            assert found.setdefault(training, config) == config, f"{training} of {name}"


@pytest.mark.parametrize(
    ("name", "of"),
    list(product(BY_STEPS, GROUNDS)),
)
def test_rows_of_a_table_are_trained_differently(name, of):
    for (one, config), (another, other) in combinations(first(name, of).items(), 2):
        assert config != other, f"{one} and {another}"


def test_labels_name_runs_and_files_and_words_of_a_list(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FixedPointDiTPipeline"}')
    for rows in TABLES.values():
        for label, model in rows.models.items():
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", label)
            assert labelled([f"{label}={tmp_path}"]) == {label: str(tmp_path)}
            assert model.title.strip()
            assert "|" not in model.title, "which would end a cell"


def test_a_label_means_one_model_in_all_tables():
    found = {}
    for name, rows in TABLES.items():
        for label, model in rows.models.items():
            assert found.setdefault(label, model.changes) == model.changes, f"{label} of {name}"


@pytest.mark.parametrize("of", ["digits", "fashion-mnist"])
def test_the_nearest_dit_is_the_one_whose_parameters_are_nearest_to_fpdms(of):
    models = first("main", of)
    wanted, nearest = parameters(models["fpdm"]), models[f"dit{NEAREST}"]
    counts = {depth: parameters(nearest.with_fields(depth=depth)) for depth in range(1, 9)}
    assert min(counts, key=lambda depth: abs(counts[depth] - wanted)) == NEAREST
    assert counts[NEAREST] == parameters(nearest)


@pytest.mark.parametrize("of", GROUNDS)
def test_trainings_of_equal_operations_have_them_within_half_a_step(of):
    models = first("operations", of)
    costs = {label: operations_of_training(config) for label, config in models.items()}
    totals = {label: config.optimizer.steps * costs[label] for label, config in models.items()}
    basis = next(iter(totals))
    assert models[basis] == first("main", of)[basis]
    for label, total in totals.items():
        assert abs(total - totals[basis]) <= 0.5 * costs[label], label
    assert len({config.optimizer.steps for config in models.values()}) > 2


@pytest.mark.parametrize("name", TABLES)
def test_every_way_has_a_plan_at_every_budget_for_every_model(name):
    """On networks of the table's shape, but narrow: no cell of the table is left empty."""
    for label, config in first(name, "digits").items():
        small = config.with_fields(hidden_size=8, num_heads=2, patch_size=4)
        pipe = FixedPointDiTPipeline(build_model(small, source_of(config.data)), make_schedule())
        for way, axes in TABLES[name].ways.items():
            axes.check()
            found = set()
            for budget, choices, _ in axes.choices(pipe, 1.0):
                try:
                    found |= {budget} if choices.plan(pipe).planned <= budget else set()
                except ValueError:
                    continue
            assert found == set(axes.budgets), f"{label}, {way}"


def test_names_are_found_and_others_name_the_nearest():
    assert table("main") is TABLES["main"]
    assert ground("fashion-mnist") is GROUNDS["fashion-mnist"]
    with pytest.raises(ValueError, match=r"unknown table 'mein'. Did you mean 'main'\?"):
        table("mein")
    with pytest.raises(ValueError, match=r"unknown ground 'fashion_mnist'. Did you mean 'fashion-mnist'\?"):
        ground("fashion_mnist")


def test_a_table_says_what_its_trainings_have_in_common():
    with pytest.raises(ValueError, match=r"unknown equal 'step'. Did you mean 'steps'\?"):
        Table("?", MODELS, {}, equal="step")
