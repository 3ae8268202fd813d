"""How one iteration moves: from the pair (z, f(z)) to the next z.

A solver is a frozen dataclass. The loop in `solve` evaluates f once per iteration and hands the pair over, so every
iteration of every solver costs one evaluation. What a solver remembers is its state: a tree of tensors whose first axis
is the batch, of which every sample has its own part. So samples are independent, and may leave the batch.

    g       f(z) - z, the residual
    m       the memory: earlier pairs that are remembered
    P       elements of one sample

Histories are kept and combined in float32 even where z is of lower precision. A step that cannot be made, because a
system is singular or a value not finite, is a plain one for that sample, f(z), and touches no other.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fpdm.names import unknown

State = Any


class Solver(Protocol):
    """What the loop asks of a solver."""

    def init(self, z: Tensor) -> State:
        """The state before the first iteration from `z` (batch, ...)."""

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        """The next iterate and state, from `z` and `fz` = f(z), both (batch, ...)."""


@dataclass(frozen=True)
class Picard:
    """z <- (1 - damping) z + damping f(z); the damping of Krasnoselskii and Mann, 1 being the plain iteration.

    Raises ValueError unless 0 < damping <= 1.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, z: Tensor) -> State:
        return ()

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        return (fz if self.damping == 1 else z.lerp(fz, self.damping)), state


class Pairs(NamedTuple):
    """The last pairs, oldest first: f(z) and g of each (batch, P), and the products of all g with each other."""

    values: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    products: Tensor  # (batch, pairs, pairs)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011): of the affine combinations of the last m + 1 pairs,
    the one with the smallest residual:

        a = argmin |sum_i a_i g_i|^2 + regularisation tr(G)/(m + 1) |a|^2,  sum_i a_i = 1
        z <- sum_i a_i (f(z_i) - (1 - damping) g_i)

    memory          m, at least 1
    damping         in (0, 1]; 1 takes f(z_i) alone
    regularisation  of the system, relative to the mean square of the residuals: at least 0

    Raises ValueError for values outside these ranges.
    """

    memory: int = 2
    damping: float = 1.0
    regularisation: float = 1e-4

    def __post_init__(self) -> None:
        check_memory(self.memory)
        check_damping(self.damping)
        if not 0 <= self.regularisation < float("inf"):
            raise ValueError(f"regularisation is {self.regularisation}; it must be at least 0, e.g. 1e-4")

    def init(self, z: Tensor) -> State:
        return Pairs((), (), z.new_empty((len(z), 0, 0), dtype=torch.float32))

    def step(self, z: Tensor, fz: Tensor, state: Pairs) -> tuple[Tensor, Pairs]:
        value = flat(fz)
        residual = value - flat(z)
        kept = slice(-self.memory, None) if len(state.residuals) >= self.memory else slice(None)
        residuals = (*state.residuals[kept], residual)
        values = (*state.values[kept], value)
        row = torch.stack([(residual * other).sum(1) for other in residuals], dim=1)  # (batch, pairs)
        products = torch.cat([state.products[:, kept, kept], row[:, :-1, None]], dim=2)
        state = Pairs(values, residuals, torch.cat([products, row[:, None]], dim=1))
        shares = self._shares(state.products)
        following = sum(
            share * (f if self.damping == 1 else f - (1 - self.damping) * g)
            for share, f, g in zip(shares.unsqueeze(2).unbind(1), values, residuals, strict=True)
        )
        return settled(following, value).view_as(fz).to(fz.dtype), state  # type: ignore[arg-type]

    def _shares(self, products: Tensor) -> Tensor:
        """The weights a (batch, pairs): not finite where the system cannot be solved."""
        pairs = products.shape[1]
        scale = products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        # In float64: the products are squares, of which the last ones are far smaller than the first.
        exact = torch.float32 if products.device.type == "mps" else torch.float64
        system = (products / scale[:, None, None]).to(exact)
        system = system + self.regularisation * torch.eye(pairs, dtype=exact, device=products.device)
        ones = system.new_ones(len(products), pairs, 1)
        found, failed = torch.linalg.solve_ex(system, ones)
        shares = found.squeeze(2)
        shares = shares / shares.sum(1, keepdim=True)
        return shares.masked_fill((failed != 0)[:, None], torch.nan).float()


class Updates(NamedTuple):
    """The last iterate and residual (batch, P), or None at first; and the rank-one updates u v' of the inverse."""

    z: Tensor | None
    residual: Tensor | None
    lefts: tuple[Tensor, ...]
    rights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method (Broyden 1965) for g(z) = 0, with the inverse Jacobian as the last `memory` updates of rank
    one of -I, whose first step is the plain one.

    memory  at least 1; the oldest update is forgotten

    Raises ValueError for a smaller memory.
    """

    memory: int = 8

    def __post_init__(self) -> None:
        check_memory(self.memory)

    def init(self, z: Tensor) -> State:
        return Updates(None, None, (), ())

    def step(self, z: Tensor, fz: Tensor, state: Updates) -> tuple[Tensor, Updates]:
        z_flat, value = flat(z), flat(fz)
        residual = value - z_flat
        lefts, rights = state.lefts, state.rights
        if state.z is not None:
            moved, changed = z_flat - state.z, residual - state.residual  # type: ignore[operator]
            right = transposed(moved, lefts, rights)
            size = (right * changed).sum(1, keepdim=True)
            left = (moved - applied(changed, lefts, rights)) / size
            usable = (left.isfinite().all(1) & right.isfinite().all(1))[:, None]
            lefts = (*lefts, left.where(usable, 0))[-self.memory :]
            rights = (*rights, right.where(usable, 0))[-self.memory :]
        following = z_flat - applied(residual, lefts, rights)
        state = Updates(z_flat, residual, lefts, rights)
        return settled(following, value).view_as(fz).to(fz.dtype), state


def applied(x: Tensor, lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """The inverse Jacobian -I + sum u v' times x (batch, P)."""
    out = -x
    for left, right in zip(lefts, rights, strict=True):
        out = out + left * (right * x).sum(1, keepdim=True)
    return out


def transposed(x: Tensor, lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """Its transpose times x (batch, P)."""
    return applied(x, rights, lefts)


def flat(z: Tensor) -> Tensor:
    """(batch, P) float32, or float64 where z is."""
    return z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))


def settled(following: Tensor, value: Tensor) -> Tensor:
    """`following` (batch, P), but `value` for the samples of which something is not finite."""
    return following.where(following.isfinite().all(1)[:, None], value)


def check_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}; it must lie in (0, 1], where 1 is the plain iteration")


def check_memory(memory: int) -> None:
    if not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory is {memory!r}; it must be an integer of at least 1")


SOLVERS: dict[str, type[Picard] | type[Anderson] | type[Broyden]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
}


def solver_of(solver: "str | Solver") -> Solver:
    """The solver of a name with its defaults, or the solver itself. Raises ValueError for an unknown name."""
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(unknown("solver", solver, SOLVERS))
    return SOLVERS[solver]()
