"""Configs: complete, checked, comparable."""

import dataclasses

import pytest

from fpdm.recipes import RECIPES, recipe
from fpdm.training.adopt import fields_of
from fpdm.training.config import CHANGEABLE, Config, differences, field_names, groups


def test_field_names_are_unique_so_that_each_has_its_own_flag():
    names = [name for _, name in field_names()]
    assert len(names) == len(set(names))
    assert set(names) >= CHANGEABLE


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_frozen_and_documented(name):
    config = recipe(name)
    assert f"fpdm train {name}" in (RECIPES[name].__doc__ or "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0  # type: ignore[misc]


def test_every_field_has_a_help_text():
    for cls in groups().values():
        assert all(f.metadata["help"] for f in dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batchsize": 3}, ["batchsize", "batch_size"]),
        ({"batch_size": 0}, ["batch_size", "0", "at least 1"]),
        ({"batch_size": 2.5}, ["batch_size", "int"]),
        ({"flip": 1}, ["flip", "bool"]),
        ({"steps": True}, ["steps", "int"]),
        ({"class_dropout": 1.5}, ["class_dropout", "at least 0, at most 1"]),
        ({"beta2": 1}, ["beta2", "at least 0, below 1"]),
        ({"beta2": -0.1}, ["beta2", "at least 0, below 1"]),
        ({"network": "unet"}, ["network", "fpdm, dit"]),
        ({"crop": "centre"}, ["crop", "'center'"]),
        ({"lr": "fast"}, ["lr", "float"]),
    ],
)
def test_a_bad_field_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=next(iter(changes))) as error:
        Config().with_fields(**changes)
    assert all(word in str(error.value) for word in words)


def test_an_integer_is_taken_where_a_float_is_meant_and_none_where_it_may_be():
    config = Config().with_fields(lr=1, min_snr_gamma=5, model=None)
    assert (config.optimizer.lr, config.diffusion.min_snr_gamma, config.model.model) == (1, 5, None)


def test_an_explicit_network_takes_nothing_from_a_recipe_that_only_a_fixed_point_one_has():
    looped = Config().with_fields(time_in_pre_post=True, input_skip=True, num_post=3, gradient="phantom", damping=0.7)
    assert looped.with_fields(network="dit", depth=4) == Config().with_fields(network="dit", depth=4)
    assert looped.with_fields(network="fpdm") == looped
    asked = looped.with_fields(network="dit", input_skip=True)  # refused when it is built: it was meant to do something
    assert asked.model.input_skip


def test_a_gate_takes_nothing_from_a_recipe_that_only_an_mlp_has():
    mlp = Config().with_fields(input_skip=True)
    assert not mlp.with_fields(injection="gate").model.input_skip
    assert mlp.with_fields(injection="gate", input_skip=True).model.input_skip  # refused when it is built
    assert mlp.with_fields(injection="mlp").model.input_skip


def test_differences_name_what_makes_another_run_and_nothing_else():
    old = Config()
    same = old.with_fields(steps=7, workers=3, log_every=1, device="cpu", data="elsewhere")
    assert differences(old.to_dict(), same.to_dict()) == {}
    other = old.with_fields(lr=0.5, hidden_size=64)
    assert differences(old.to_dict(), other.to_dict()) == {"lr": (1e-4, 0.5), "hidden_size": (None, 64)}


def test_fine_tuning_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="not a model folder"):
        fields_of(str(tmp_path))
    assert fields_of("organisation/model") == {}


def test_settings_of_fixed_points_do_not_tell_runs_of_explicit_networks_apart():
    explicit = {"network": "dit", "depth": 2, "hidden_size": 64, "num_heads": 2, "model": None}
    old, new = (Config().with_fields(**explicit, no_grad_max=n).to_dict() for n in (3, 6))
    assert differences(old, new) == {}
    assert differences({**old, "model": {**old["model"], "depth": 3}}, new) == {"depth": (3, 2)}
    looped = Config().with_fields(hidden_size=64, num_heads=2, model=None).to_dict()
    assert {"network", "no_grad_max"} <= set(differences(looped, new))
