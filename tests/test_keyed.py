"""Keys: one key one draw, other keys other draws, today and after the next change."""

import itertools

import numpy as np
import pytest
import torch

from fpdm.keyed import generator, seed_of


def test_seeds_do_not_change():
    # Every saved run and every image of a seed depends on these. A change here is a change of all of them.
    assert seed_of("image", 0, 0) == 2298491793083444657
    assert seed_of(1, 23) == 2684959644521947731


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 23), (12, 3)), ((1, 2), (2, 1)), ((1,), ("1",)), (("a", "b"), ("ab",)), ((0, "a"), ("a", 0)), ((1,), (1, 0))],
)
def test_keys_that_only_look_alike_are_apart(one, other):
    assert seed_of(*one) != seed_of(*other)


@pytest.mark.parametrize("seven", [np.int64(7), np.uint8(7), torch.tensor(7)])
def test_an_integer_is_an_integer_whoever_made_it(seven):
    assert seed_of("image", seven) == seed_of("image", 7)


def test_what_is_no_integer_is_no_key():
    with pytest.raises(TypeError):
        seed_of("image", 7.5)


def test_neighbouring_keys_never_meet():
    keys = list(itertools.product(range(20), ("noise", "image"), range(20), range(20)))
    assert len({seed_of(*key) for key in keys}) == len(keys)


def test_seeds_fit_torch():
    seeds = [seed_of(i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all of the range is used


def test_a_generator_starts_anew_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (torch.randn(100, generator=generator(3, "noise", 7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(100, generator=generator(3, "noise", 8)))
    assert torch.equal(torch.get_rng_state(), before)
    assert generator(0).device.type == "cpu"


def test_neighbouring_keys_draw_independently():
    draws = torch.stack([torch.randn(400, generator=generator(0, i)) for i in range(50)])
    correlations = torch.corrcoef(draws) - torch.eye(50)
    assert correlations.abs().max() < 5 / 400**0.5
