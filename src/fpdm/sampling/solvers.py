"""Solvers by name, as the command line and the kept plans know them."""

from fpdm.fixedpoint import Anderson, Broyden, Picard, Solver
from fpdm.names import unknown

SOLVERS: dict[str, type[Picard] | type[Anderson] | type[Broyden]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
}


def solver_of(solver: str | Solver) -> Solver:
    """The solver of a name, with its defaults ("anderson") or with its first parameter ("anderson:3", "picard:0.7"), or
    the solver itself. Raises ValueError for an unknown name, or a parameter that cannot be."""
    if not isinstance(solver, str):
        if isinstance(solver, type) or not hasattr(solver, "step"):
            raise ValueError(f"solver is {solver!r}; it must be a name, such as 'anderson:2', or a Solver")
        return solver
    name, colon, text = solver.partition(":")
    if name not in SOLVERS:
        raise ValueError(unknown("solver", name, SOLVERS))
    if not colon:
        return SOLVERS[name]()
    try:
        value = float(text) if name == "picard" else int(text)
    except ValueError:
        kind = "number" if name == "picard" else "whole number"
        raise ValueError(f"solver {solver!r}: {text!r} is not a {kind}") from None
    return SOLVERS[name](value)  # type: ignore[arg-type]
