"""Solvers by name and first parameter."""

import re

import pytest

from fpdm.fixedpoint import Anderson, Broyden, Picard
from fpdm.sampling import solver_of


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("picard", Picard()),
        ("picard:0.7", Picard(0.7)),
        ("picard:1", Picard(1.0)),
        ("anderson", Anderson()),
        ("anderson:3", Anderson(3)),
        ("broyden", Broyden()),
        ("broyden:4", Broyden(4)),
    ],
)
def test_a_name_means_its_solver(name, solver):
    assert solver_of(name) == solver
    assert type(solver_of(name)) is type(solver)


def test_a_solver_means_itself():
    solver = Anderson(5, damping=0.5)
    assert solver_of(solver) is solver


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("andersen", "unknown solver 'andersen'. Did you mean 'anderson'?"),
        ("broyd:3", "unknown solver 'broyd'. Did you mean 'broyden'?"),
        ("Picard", "Did you mean 'picard'?"),
        ("", "unknown solver ''. Known: picard, anderson, broyden"),
        (":3", "unknown solver ''"),
        ("newton", "Known: picard, anderson, broyden"),
        ("anderson:x", "solver 'anderson:x': 'x' is not a whole number"),
        ("anderson:", "solver 'anderson:': '' is not a whole number"),
        ("anderson:2.5", "'2.5' is not a whole number"),
        ("anderson:2:3", "'2:3' is not a whole number"),
        ("picard:half", "'half' is not a number"),
        ("picard:2", "damping is 2.0"),
        ("picard:0", "damping is 0.0"),
        ("picard:nan", "damping is nan"),
        ("anderson:0", "memory is 0; it must be an integer of at least 1"),
        ("broyden:-1", "memory is -1"),
    ],
)
def test_what_is_no_solver_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solver_of(name)
