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

State = Any
FARTHEST = 1e3  # times |f(z) - z|: a contraction by 0.999 has its solution so far beyond f(z)


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
        return (fz if self.damping == 1 else z.to(fz.dtype).lerp(fz, self.damping)), state


class Pairs(NamedTuple):
    """The last pairs, oldest first: f(z) and g of each (batch, P), and the products of all g with each other."""

    values: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    products: Tensor  # (batch, pairs, pairs)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011): of the affine combinations of the last m + 1 pairs,
    the one with the smallest residual:

        a = argmin |sum_i a_i g_i|^2 + regularisation sum_i a_i^2 |g_i|^2,  sum_i a_i = 1
        z <- sum_i a_i (f(z_i) - (1 - damping) g_i)

    memory          m, at least 1
    damping         in (0, 1]; 1 takes f(z_i) alone
    regularisation  of the system, relative to the square of each residual: at least 0

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
        shares = self._shares(state.products).unsqueeze(2).unbind(1)
        steps = [f if self.damping == 1 else f - (1 - self.damping) * g for f, g in zip(values, residuals, strict=True)]
        # The shares sum to 1; written so, rounding of their sum does no harm.
        following = steps[-1] + sum(
            (share * (step - steps[-1]) for share, step in zip(shares[:-1], steps[:-1], strict=True)), start=0.0
        )
        return settled(following, fz, residual), state  # type: ignore[arg-type]

    def _shares(self, products: Tensor) -> Tensor:
        """The weights a (batch, pairs); the last one alone where the system cannot be solved. With b_i = a_i / c_i:

            [0  c'] [l]   [1]        c_i = 1 / |g_i|
            [c  S ] [b] = [0]        S_ij = G_ij c_i c_j, and S_ii more by the regularisation

        In float64: the products are squares, of which the last ones are far smaller than the first.
        """
        exact = torch.float32 if products.device.type == "mps" else torch.float64
        batch, pairs = products.shape[:2]
        gram = products.to(exact)
        c = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(exact).tiny ** 0.5).rsqrt()
        eye = torch.eye(pairs + 1, dtype=exact, device=products.device)
        system = eye.new_zeros(batch, pairs + 1, pairs + 1)
        system[:, 1:, 1:] = gram * c[:, :, None] * c[:, None, :] + self.regularisation * eye[1:, 1:]
        # Weights do not depend on the scale of all residuals, but how well the system can be solved does.
        system[:, 0, 1:] = system[:, 1:, 0] = c / c.amax(1, keepdim=True)
        with torch.no_grad():
            found, failed = torch.linalg.solve_ex(system, eye[:, :1].expand(batch, -1, 1))
            failed = ((failed != 0) | ~found.isfinite().all(1)[:, 0])[:, None, None]
        if system.requires_grad:
            # Failed systems are taken out before they are solved, since their gradient would not be finite either.
            right = torch.where(failed, eye[:, -1:], eye[:, :1])
            found, _ = torch.linalg.solve_ex(torch.where(failed, eye, system), right)
        shares = torch.where(failed[:, :, 0], eye[-1, 1:], found[:, 1:, 0] * torch.where(failed[:, :, 0], 1, c))
        return (shares / shares.sum(1, keepdim=True)).to(products.dtype)


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

    memory  at least 1; when it is full, all updates are forgotten

    Raises ValueError for a smaller memory.
    """

    memory: int = 8

    def __post_init__(self) -> None:
        check_memory(self.memory)

    def init(self, z: Tensor) -> State:
        return Updates(None, None, (), ())

    def step(self, z: Tensor, fz: Tensor, state: Updates) -> tuple[Tensor, Updates]:
        z_flat = flat(z)
        residual = flat(fz) - z_flat
        # A full memory is begun anew: to forget the oldest update alone would break what the later ones were built on.
        full = len(state.lefts) >= self.memory
        lefts, rights = ((), ()) if full else (state.lefts, state.rights)
        if state.z is not None:
            moved, changed = z_flat - state.z, residual - state.residual  # type: ignore[operator]
            right = transposed(moved, lefts, rights)
            size, left = (right * changed).sum(1, keepdim=True), moved - applied(changed, lefts, rights)
            scale = torch.linalg.vector_norm(right, dim=1) * torch.linalg.vector_norm(changed, dim=1)
            telling = size.abs() > torch.finfo(size.dtype).eps * scale[:, None]  # not lost in rounding
            usable = telling & ((left / size).isfinite().all(1) & right.isfinite().all(1))[:, None]
            # What is not usable is taken out before the division, whose gradient would not be finite either.
            lefts = (*lefts, left.where(usable, 0) / size.where(usable, 1))
            rights = (*rights, right.where(usable, 0))
        following = z_flat - applied(residual, lefts, rights)
        return settled(following, fz, residual), Updates(z_flat, residual, lefts, rights)


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


def settled(following: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
    """`following` (batch, P) in the shape and type of fz; but fz for the samples of which something is not finite, or
    that would go so far beyond f(z) that there is no trusting it. `residual` is f(z) - z (batch, P)."""
    following, plain = following.to(fz.dtype), fz.flatten(1)
    far = torch.linalg.vector_norm((following - plain).float(), dim=1)
    trusted = far <= FARTHEST * torch.linalg.vector_norm(residual.float(), dim=1)  # never of a NaN
    return following.where((trusted & following.isfinite().all(1))[:, None], plain).view_as(fz)


def check_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}; it must lie in (0, 1], where 1 is the plain iteration")


def check_memory(memory: int) -> None:
    if not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory is {memory!r}; it must be an integer of at least 1")
