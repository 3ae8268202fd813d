"""The fixed point network (Bai and Melas-Kyriazi 2024): pre blocks, one implicit layer, post blocks.

u   tokens after the pre blocks (B, N, D)
z   the iterate (B, N, D)
c   conditioning of the implicit layer, from t and y (B, D)
"""

from functools import partial

from diffusers import ConfigMixin, ModelMixin  # noqa: F401  (diffusers finds the loader of a custom model by this name)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fpdm.fixedpoint import FixedIterations, Solve
from fpdm.models.core import Context, make_core
from fpdm.models.denoiser import Denoiser, Output, condition
from fpdm.models.layers import Block


class FixedPointDiT(Denoiser):
    """A diffusion transformer whose middle is one implicit layer, solved by fixed point iteration.

    sample_size          height and width of the image or latent; a multiple of patch_size
    in_channels          channels of the image or latent
    hidden_size          width D; a multiple of 4 and of num_heads
    num_pre, num_post    explicit blocks before and after the implicit layer; the paper has 1 or more. With none, all
                         passes are of shared blocks
    num_core             blocks in the shared group, K, at least 1; the paper has 1
    num_classes          0 for an unconditional model; label `num_classes` is the null class
    learned_variance     whether the output has a second half, for the variance (Nichol and Dhariwal 2021)
    time_in_pre_post     whether pre and post blocks and the final layer see t as well as y
    injection            how the iterate comes into the shared blocks: "mlp", as in the paper, or "gate": see `core`
    input_skip           whether u is added to what the MLP returns; the paper has no such thing. A gate has its own

    Raises ValueError for sizes that do not fit together, and an unknown injection.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        num_heads: int = 6,
        num_pre: int = 1,
        num_core: int = 1,
        num_post: int = 1,
        num_classes: int = 1000,
        learned_variance: bool = True,
        time_in_pre_post: bool = False,
        input_skip: bool = False,
        injection: str = "mlp",
    ):
        super().__init__()
        self._build(sample_size, patch_size, in_channels, hidden_size, num_heads)
        for name, count, least in (("num_pre", num_pre, 0), ("num_core", num_core, 1), ("num_post", num_post, 0)):
            if count < least:
                raise ValueError(f"{name} is {count}; it must be at least {least}")
        self.pre = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_pre))
        self.core = make_core(injection, hidden_size, num_heads, num_core, input_skip)
        self.post = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_post))
        self._initialize()
        self.core.initialize()

    def passes(self, iterations: int | None = None) -> int:
        """Transformer block passes of one evaluation with `iterations` >= 1: pre + K iterations + post."""
        if iterations is None:
            raise ValueError("the cost of a fixed point network depends on its iterations: say how many")
        return self.config.num_pre + self.config.num_core * iterations + self.config.num_post

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor | None = None,
        *,
        iterations: int | None = None,
        solve: Solve | None = None,
        init: Tensor | None = None,
    ) -> Output:
        """Predict from `x` (B, C, H, W), `t` (B,) or one number in [0, 1000), `y` (B,) int64 or None for no class.

        `iterations` is short for `solve=Solve(stopping=FixedIterations(iterations))`: one of the two is needed. `init`
        (B, N, D) is where z starts, `solution.value` of another call for instance; without it z starts at u.
        Raises ValueError if both or neither of iterations and solve are given, or for a misshaped x or init.
        """
        solve = _one_of(iterations, solve)
        if self._recorder is not None and self._recorder.takes(x, solve):
            return Output(*self._recorder.solved(self, self._checked(x, t, y), solve, partial(_start, init)), {})
        u, context, c = self.encode(x, t, y)
        z = _start(init, u)  # (B, N, D)
        solution = solve(self.core, z, context)  # (B, N, D)
        exits = {k: self.decode(z, c) for k, z in solution.kept.items()}
        return Output(self.decode(solution.value, c), solution, exits)

    def encode(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, Context, Tensor]:
        """What comes before the fixed point: u (B, N, D), the context of the solve, and the conditioning (B, D) of
        `decode`."""
        # fmt: off
        tokens, time, label = self._embed(x, t, y)                     # (B, N, D), (B, D), (B, D)
        c = condition(time, label)                                     # (B, D)
        c_outer = c if self.config.time_in_pre_post else condition(label)
        u = self._run_blocks(self.pre, tokens, c_outer)                # (B, N, D)
        return u, self.core.prepare(u, c), c_outer
        # fmt: on

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """What comes after it: the prediction (B, C or 2C, H, W) from a solution (B, N, D) and conditioning (B, D)."""
        return self._unembed(self._run_blocks(self.post, z, c), c)


def _one_of(iterations: int | None, solve: Solve | None) -> Solve:
    if (iterations is None) == (solve is None):
        raise ValueError("a fixed point network needs one of `iterations` (a number) and `solve` (a Solve)")
    return solve or Solve(stopping=FixedIterations(iterations))  # type: ignore[arg-type]


def _start(init: Tensor | None, u: Tensor) -> Tensor:
    """Where z starts."""
    if init is None:
        return u
    if init.shape != u.shape:
        raise ValueError(f"init has shape {tuple(init.shape)}; a solution of this batch has {tuple(u.shape)}")
    return init.to(u.dtype)
