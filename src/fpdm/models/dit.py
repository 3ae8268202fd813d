"""The explicit baseline: a DiT (Peebles and Xie 2023)."""

from diffusers import ConfigMixin, ModelMixin  # noqa: F401  (diffusers finds the loader of a custom model by this name)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fpdm.fixedpoint import Solve
from fpdm.models.denoiser import Denoiser, Output, condition
from fpdm.models.layers import Block


class DiT(Denoiser):
    """A diffusion transformer of `depth` blocks.

    sample_size       height and width of the image or latent; a multiple of patch_size
    in_channels       channels of the image or latent
    hidden_size       width D; a multiple of 4 and of num_heads
    num_classes       0 for an unconditional model; label `num_classes` is the null class
    learned_variance  whether the output has a second half, for the variance (Nichol and Dhariwal 2021)

    Raises ValueError for sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        learned_variance: bool = True,
    ):
        super().__init__()
        self._build(sample_size, patch_size, in_channels, hidden_size, num_heads)
        if depth < 1:
            raise ValueError(f"depth is {depth}; a DiT needs at least one block")
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self._initialize()

    def passes(self, iterations: int | None = None) -> int:
        """Transformer block passes of one evaluation: the depth. Raises ValueError if iterations are given."""
        refuse_iterations(iterations)
        return self.config.depth

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

        Raises ValueError if iterations, a solve or an initial solution are given: there is nothing to solve.
        """
        refuse_iterations(iterations if solve is None and init is None else -1)
        if self._recorder is not None and self._recorder.takes(x):
            return Output(self._recorder.explicit(self, self._predict, self._checked(x, t, y)), None, {})
        return Output(self._predict(x, t, y), None, {})  # (B, C or 2C, H, W)

    def _predict(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> Tensor:
        # fmt: off
        tokens, time, label = self._embed(x, t, y)           # (B, N, D), (B, D), (B, D)
        c = condition(time, label)                           # (B, D)
        tokens = self._run_blocks(self.blocks, tokens, c)    # (B, N, D)
        return self._unembed(tokens, c)                      # (B, C or 2C, H, W)
        # fmt: on


def refuse_iterations(iterations: int | None) -> None:
    if iterations is not None:
        raise ValueError("an explicit DiT has no iterations, solve or init: its cost is its depth. Leave them out")
