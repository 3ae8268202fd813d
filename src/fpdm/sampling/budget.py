"""From a budget of transformer block passes to iterations per timestep: integers, exact, made before anything runs.

    T    model calls (timesteps)
    n_t  iterations at timestep t, in sampling order (noise to image), each at least 1
    cost = sum over t of (pre + K n_t + post) block passes per image

Guidance's second evaluation of the network is not part of the budget; reports name it beside.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

from fpdm.names import unknown

# Of weights that go from 1 - slope / 2 to 1 + slope / 2 in sampling order, as a straight line or half a cosine.
SHAPES = ("linear", "cosine")
ALLOCATIONS = ("constant", "rising", "falling", *SHAPES)
EVERY_CALL = range(1, 1001)
DEFAULT_BUDGET = 160


@dataclass(frozen=True)
class Cost:
    """Block passes of one model call: `fixed` + `per_iteration` n. A network without iterations has per_iteration 0."""

    fixed: int
    per_iteration: int

    def passes(self, iterations: int | None) -> int:
        return self.fixed + self.per_iteration * (iterations or 0)

    @property
    def usual_iterations(self) -> int:
        """At a timestep, where nobody asks for others. Few, for solves can be short where reuse carries the solution
        on: two, or one if there are no blocks outside the fixed point, where another timestep costs no more than
        another iteration (docs/reproduction.md)."""
        return 2 if self.fixed else 1


@dataclass(frozen=True)
class Plan:
    """What a sampling will spend, in sampling order (noise to image).

    iterations  per timestep; None at every timestep of a network without iterations
    passes      block passes per timestep
    asked       the budget asked for, None where none was
    """

    iterations: tuple[int | None, ...]
    passes: tuple[int, ...]
    asked: int | None = None

    @property
    def num_steps(self) -> int:
        return len(self.passes)

    def first(self, count: int) -> "Plan":
        """The plan of its first `count` timesteps alone."""
        return Plan(self.iterations[:count], self.passes[:count], self.asked)

    @property
    def planned(self) -> int:
        """Block passes in all; below `asked` only by what no whole iteration fits into."""
        return sum(self.passes)

    def __str__(self) -> str:
        steps = f"{self.num_steps} timestep{'s' * (self.num_steps > 1)}"
        if self.iterations[0] is None:
            return f"{steps}, {self.planned} block passes"
        low, high = min(self.iterations), max(self.iterations)  # type: ignore[type-var]
        iterations = f"{low}" if low == high else f"{low} to {high}"
        plural = "" if iterations == "1" else "s"
        return f"{steps} x {iterations} iteration{plural}, {self.planned} block passes"


def make_plan(
    cost: Cost,
    *,
    budget: int | None = None,
    num_steps: int | None = None,
    iterations: int | Sequence[int] | None = None,
    allocation: str | Sequence[float] = "constant",
    calls: range = EVERY_CALL,
) -> Plan:
    """The plan that follows from any sensible choice of budget, timesteps and iterations.

    budget      block passes per image
    num_steps   timesteps T; with a budget and more timesteps, fewer iterations each (smoothing)
    iterations  at every timestep, or a list with one entry per timestep; with a budget alone it settles how many
                timesteps there are, and what is left over goes to them as further iterations
    allocation  how iterations are shared out over the timesteps, in sampling order (noise to image): "constant";
                "linear:S" or "cosine:S", weights from 1 - S/2 to 1 + S/2, S between -2 and 2; "rising" for "linear:1",
                "falling" for "linear:-1"; or a weight per timestep
    calls       the numbers of timesteps that the noise schedule and the scheduler have room for: see `calls_of`

    Raises ValueError where the choices contradict each other or the budget is too small, naming the smallest possible.
    """
    budget, num_steps = positive("budget", budget), positive("the number of timesteps", num_steps)
    allocation, iterations = listed(allocation), listed(iterations)
    if not isinstance(allocation, Sequence):
        raise ValueError(f"allocation is {allocation!r}; it must be a name, like 'linear:1', or a weight per timestep")
    if cost.per_iteration == 0:
        _refuse_allocation(allocation, "an explicit DiT")
        return _explicit_plan(cost, budget, num_steps, iterations, calls)
    if isinstance(iterations, Sequence):
        _refuse_allocation(allocation, "a list of iterations")
        return _listed_plan(cost, budget, num_steps, list(iterations), calls)

    iterations = positive("iterations", iterations)
    if num_steps is None:
        budget = asked = DEFAULT_BUDGET if budget is None else budget
        num_steps = fitting(_steps_for(cost, budget, iterations), calls)
    else:
        budget, asked = _budget_for(cost, budget, num_steps, iterations), budget
    check_calls(num_steps, calls)
    smallest = num_steps * cost.passes(1)
    if budget < smallest:
        raise ValueError(
            f"a budget of {budget} block passes is too small: {num_steps} timesteps need at least {smallest} "
            f"({cost.fixed} outside the fixed point and {cost.per_iteration} for one iteration, at each). "
            + f"Raise it to {smallest}"
            + (f", or take at most {counted(most, 'timestep')}" if (most := budget // cost.passes(1)) in calls else "")
        )
    total = (budget - num_steps * cost.fixed) // cost.per_iteration
    shares = apportion(total, _weights(allocation, num_steps))
    return Plan(shares, tuple(cost.passes(n) for n in shares), asked)


def _steps_for(cost: Cost, budget: int, iterations: int | None) -> int:
    """As many timesteps of `iterations` as fit into the budget."""
    least = cost.passes(iterations or 1)
    if budget < least:
        count = counted(iterations or 1, "iteration")
        raise ValueError(f"a budget of {budget} block passes is too small: one timestep with {count} needs {least}")
    return max(1, budget // cost.passes(iterations or cost.usual_iterations))


def listed(values: Any) -> Any:
    """NumPy's and torch's arrays and numbers as Python's; others as they are."""
    return values.tolist() if hasattr(values, "tolist") else values


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def fitting(num_steps: int, calls: range) -> int:
    """The largest of the numbers of timesteps that may be, up to this one; the smallest where all are larger."""
    return calls[max(0, min(len(calls), 1 + (num_steps - calls.start) // calls.step) - 1)]


def _budget_for(cost: Cost, budget: int | None, num_steps: int, iterations: int | None) -> int:
    """The budget, or what the timesteps and iterations cost where none is given; the two must not contradict."""
    constant = num_steps * cost.passes(iterations or cost.usual_iterations)
    if budget is not None and iterations is not None and constant != budget:
        raise ValueError(
            f"{num_steps} timesteps of {iterations} iterations cost {constant} block passes, not {budget}: "
            "leave the budget, the timesteps or the iterations out"
        )
    return constant if budget is None else budget


def apportion(total: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Integers of at least 1 that sum to `total` and are as proportional to `weights` as that allows.

    Shares below 1 are raised to 1 first, the rest is shared out by largest remainder, so rising weights give rising
    shares; equal weights are spread evenly. Needs total >= len(weights) and positive weights.
    """
    if len(set(weights)) == 1:  # largest remainders would tie: spread what is left over evenly instead
        count = len(weights)
        return tuple((i + 1) * total // count - i * total // count for i in range(count))
    free = set(range(len(weights)))
    while True:
        left, whole = total - (len(weights) - len(free)), sum(weights[i] for i in free)
        small = {i for i in free if left * weights[i] < whole}
        if not small:
            break
        free -= small
    quotas = {i: left * weights[i] / whole for i in free}
    shares = [int(quotas[i]) if i in free else 1 for i in range(len(weights))]
    # Among equal remainders the larger weight comes first, so that falling weights mirror rising ones.
    by_remainder = sorted(free, key=lambda i: (int(quotas[i]) - quotas[i], -weights[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def positive(name: str, value: Any) -> int | None:
    """`value` as a Python integer of at least 1 (NumPy's are taken too), or None."""
    if value is None:
        return None
    try:
        whole = operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    return whole


def _refuse_allocation(allocation: str | Sequence[float], what: str) -> None:
    """A plan without anything to share out: the allocation must at least be a known one, and the default."""
    if isinstance(allocation, str):
        check_allocation(allocation)
    if allocation != "constant":
        raise ValueError(f"{what} leaves nothing to share out over the timesteps: leave the allocation out")


def check_allocation(name: str) -> None:
    """Raises ValueError for what is not the name of an allocation."""
    _shaped(name, 1)


def _weights(allocation: str | Sequence[float], count: int) -> list[Fraction]:
    if isinstance(allocation, str):
        return _shaped(allocation, count)
    if len(allocation) != count:
        raise ValueError(f"{len(allocation)} weights for {count} timesteps: give one per timestep")
    if not all(isinstance(weight, Real) and 0 < weight < float("inf") for weight in allocation):
        raise ValueError(f"weights must be positive and finite, not {list(allocation)}")
    return [Fraction(float(weight)) for weight in allocation]


def _shaped(allocation: str, count: int) -> list[Fraction]:
    """The weights of a named shape: exact fractions, but for a cosine."""
    given, colon, text = allocation.partition(":")
    shape, default = {"rising": ("linear", "1"), "falling": ("linear", "-1")}.get(given, (given, "1"))
    if shape not in ALLOCATIONS or (colon and given not in SHAPES):
        raise ValueError(unknown("allocation", allocation, [*ALLOCATIONS[:3], *(f"{name}:SLOPE" for name in SHAPES)]))
    try:
        slope = Fraction(text if colon else default)
    except (ZeroDivisionError, ValueError):
        slope = Fraction(2)
    if not -2 < slope < 2:
        raise ValueError(f"the slope in {allocation!r} must be a number between -2 and 2, both left out")
    if shape == "constant" or count == 1:
        return [Fraction(1)] * count
    places = [Fraction(i, count - 1) for i in range(count)]
    if shape == "cosine":  # exactly symmetric, so that falling mirrors rising
        half = [Fraction((1 - math.cos(math.pi * place)) / 2) for place in places[: count // 2]]
        places = [*half, *[Fraction(1, 2)] * (count % 2), *(1 - place for place in reversed(half))]
    return [1 + slope * (place - Fraction(1, 2)) for place in places]


def _listed_plan(cost: Cost, budget: int | None, num_steps: int | None, iterations: list[int], calls: range) -> Plan:
    if not iterations:
        raise ValueError("iterations is an empty list: give one number per timestep")
    iterations = [positive("iterations", n) or 0 for n in iterations]
    if num_steps not in (None, len(iterations)):
        raise ValueError(f"{len(iterations)} iteration counts for {num_steps} timesteps: give one per timestep")
    check_calls(len(iterations), calls)
    plan = Plan(tuple(iterations), tuple(cost.passes(n) for n in iterations), budget)
    if budget is not None and not 0 <= budget - plan.planned < cost.per_iteration:  # a whole iteration would fit
        raise ValueError(f"these iterations cost {plan.planned} block passes, not {budget}: leave the budget out")
    return plan


def _explicit_plan(
    cost: Cost,
    budget: int | None,
    num_steps: int | None,
    iterations: int | Sequence[int] | None,
    calls: range,
) -> Plan:
    if iterations is not None:
        raise ValueError("an explicit DiT has no iterations: give a budget or a number of timesteps")
    if num_steps is None:
        budget = DEFAULT_BUDGET if budget is None else budget
        num_steps = fitting(budget // cost.fixed, calls)
    smallest = num_steps * cost.fixed
    if budget is not None and budget < smallest:
        raise ValueError(f"a budget of {budget} block passes is too small: the smallest possible is {smallest}")
    if budget is not None and num_steps < fitting(budget // cost.fixed, calls):
        raise ValueError(
            f"{num_steps} timesteps of an explicit DiT cost {smallest} block passes, not {budget}: leave one out"
        )
    check_calls(num_steps, calls)
    return Plan((None,) * num_steps, (cost.fixed,) * num_steps, budget)


def check_calls(num_steps: int, calls: range) -> None:
    """Raises ValueError for a number of timesteps that the noise schedule and the scheduler have no room for."""
    if not calls.start <= num_steps <= calls[-1]:
        raise ValueError(f"{num_steps} timesteps; the noise schedule has room for {calls.start} to {calls[-1]}")
    if num_steps not in calls:
        raise ValueError(
            f"{num_steps} timesteps; each counts a call of the network, of which heun makes two at all timesteps but "
            f"{'one' if calls.start == 1 else 'two'}: take {num_steps - 1} or {num_steps + 1}"
        )
