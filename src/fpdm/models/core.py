"""The layer whose fixed point is sought: blocks, and how the iterate comes in.

u   tokens after the pre blocks (B, N, D)
z   the iterate (B, N, D)
c   conditioning, from t and y, after SiLU (B, D)
P   projection of u, D -> D
W   of the injection: W_z and W_u, D -> 2D, in the MLP, D -> D in the gated one
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpdm.models.fused import gated, gelu_linear, linear, norm_linear
from fpdm.models.layers import Block
from fpdm.names import INJECTIONS, unknown


class Context(NamedTuple):
    """All that is constant while z is iterated: computed once per solve, with gradient."""

    injected: tuple[Tensor, ...]  # what the injection has of u and c
    modulations: tuple[Tensor, ...]  # of each block of the group (B, 6, 1, D)


class FixedPointCore(nn.Module):
    """f(z, u, c) = Block_K(... Block_1(injection(z, u, c), c) ..., c), split at what does not depend on z.

    The order in which its parts are built matters: by it a seed gives them weights, and an optimiser knows them.
    """

    blocks: nn.ModuleList
    gradient_checkpointing = False  # diffusers sets this, and the function
    _gradient_checkpointing_func: Callable[..., Any]

    def prepare(self, u: Tensor, c: Tensor) -> Context:
        """The context of a solve, from `u` (B, N, D) and `c` (B, D)."""
        modulations = tuple(block.modulation(c) for block in self.blocks)  # type: ignore[operator]
        return Context(self.prepare_injection(u, c), modulations)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """One application of f to `z` (B, N, D)."""
        # Asked at every call: of a solve's iterations only the last ones may have a gradient.
        stored = torch.is_grad_enabled() and self.gradient_checkpointing
        for index in range(len(self.blocks)):
            if stored:  # the input of each part only
                z = self._gradient_checkpointing_func(self.part, index, z, context)
            else:
                z = self.part(index, z, context)
        return z

    def part(self, index: int, z: Tensor, context: Context) -> Tensor:
        """Block number `index` of `z` (B, N, D), before the first one the injection."""
        if index == 0:
            z = self.inject(z, *context.injected)
        return self.blocks[index](z, context.modulations[index])  # type: ignore[no-any-return]

    @abstractmethod
    def prepare_injection(self, u: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """What `inject` takes beside z."""

    @abstractmethod
    def inject(self, z: Tensor, *injected: Tensor) -> Tensor:
        """What the blocks begin with (B, N, D)."""

    def initialize(self) -> None:
        """Weights that do not start as those of a DiT do."""


class MlpCore(FixedPointCore):
    """The paper's injection: MLP([z ; P u]).

    The first linear map of the MLP acts on a concatenation, W [z ; P u] + b = W_z z + (W_u P u + b): two maps, of which
    the second belongs to the context.

    With `input_skip` u is added to what the MLP returns, which starts at zero: the blocks' residual stream begins at u,
    as it does in an explicit network, and the MLP has to learn only what the iterate adds to that. Without it, all that
    is known of the image passes through the MLP anew at every iteration.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_core: int, input_skip: bool = False):
        super().__init__()
        self.input_skip = input_skip
        self.project = nn.Linear(hidden_size, hidden_size)  # P
        self.inject_z = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # W_z
        self.inject_u = nn.Linear(hidden_size, 2 * hidden_size)  # W_u, b
        self.inject_out = nn.Linear(2 * hidden_size, hidden_size)
        self.blocks = shared_blocks(hidden_size, num_heads, num_core)

    def initialize(self) -> None:
        for half in (self.inject_z, self.inject_u):  # halves of one 2D x 2D map: Xavier's bound of the whole
            nn.init.xavier_uniform_(half.weight, gain=(3 / 4) ** 0.5)
        if self.input_skip:
            nn.init.zeros_(self.inject_out.weight)

    def prepare_injection(self, u: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """W_u P u + b (B, N, 2D), and u where it is added."""
        of_u = self.inject_u(self.project(u))
        return (of_u, u) if self.input_skip else (of_u,)

    def inject(self, z: Tensor, of_u: Tensor, *skip: Tensor) -> Tensor:  # type: ignore[override]
        # As precise as it came: under autocast z is float32, and blocks add to it as an explicit network's do.
        z = gelu_linear(linear(z, self.inject_z) + of_u, self.inject_out).to(z.dtype)
        return sum(skip, z)


class GatedCore(FixedPointCore):
    """u + gate W(LayerNorm(z) (1 + scale) + shift): gate, scale and shift are from c, as in a branch of an adaLN-Zero
    block.

    W is all that acts on tokens, a quarter of the MLP's operations at each iteration. The blocks begin with u, to which
    the iterate adds what the gate lets through. The gate starts at zero, and sees the timestep: how far a solution of
    the last one is of use depends on the noise.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_core: int):
        super().__init__()
        self.blocks = shared_blocks(hidden_size, num_heads, num_core)
        self.inject_out = nn.Linear(hidden_size, hidden_size)  # W
        self.adaln = nn.Linear(hidden_size, 3 * hidden_size)

    def initialize(self) -> None:
        nn.init.zeros_(self.adaln.weight)

    def prepare_injection(self, u: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """u, and shift, scale and gate (B, 3, 1, D)."""
        return u, self.adaln(c).view(len(c), 3, 1, -1)

    def inject(self, z: Tensor, u: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        shift, scale, gate = modulation.unbind(1)
        return gated(u, gate, norm_linear(z, shift, scale, self.inject_out))


def shared_blocks(hidden_size: int, num_heads: int, num_core: int) -> nn.ModuleList:
    return nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_core))


def make_core(injection: str, hidden_size: int, num_heads: int, num_core: int, input_skip: bool) -> FixedPointCore:
    """Raises ValueError for an unknown injection, and for a skip beside a gate, which has its own."""
    if injection not in INJECTIONS:
        raise ValueError(unknown("injection", injection, INJECTIONS))
    if injection == "mlp":
        return MlpCore(hidden_size, num_heads, num_core, input_skip)
    if input_skip:
        raise ValueError("input_skip belongs to injection 'mlp'; a gate always adds to u: leave it out")
    return GatedCore(hidden_size, num_heads, num_core)
