"""The layers of a DiT (Peebles and Xie 2023): embeddings, the adaLN-Zero block, the final layer.

B batch, N tokens, D width, p patch, C channels
x   tokens (B, N, D)
c   conditioning after SiLU (B, D): every modulation starts with SiLU, so it is applied once, outside
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpdm.models.fused import gated, linear, mlp, norm_linear


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed 2D sine-cosine positions, (1, side * side, width), rows first; half of the width for each axis."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()[None]


def timestep_frequencies(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of timesteps `t` (B,), fractional ones too: (B, width) float32, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to vectors (B, D): sinusoidal features, rounded to `dtype`, then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        features = timestep_frequencies(t, self.frequencies).to(dtype)
        return self.fc2(F.silu(self.fc1(features)))


class PatchEmbedder(nn.Module):
    """Images (B, C, H, W) to tokens (B, N, D): one linear map per patch, plus fixed positions."""

    def __init__(self, sample_size: int, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.register_buffer("positions", sincos_positions(width, sample_size // patch_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # One token after the other in memory, too, as blocks return them.
        tokens = self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, N, D)
        # A network that was loaded in half precision has its positions in float32 still, as they are no weights. Under
        # autocast tokens are not of the weights' type, and become float32, and with them all that blocks add to.
        is_cast = tokens.dtype != self.proj.weight.dtype
        return tokens + (self.positions if is_cast else self.positions.to(tokens.dtype))


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, qkv: Tensor) -> Tensor:
        """From `qkv` (B, N, 3D), what the linear layer of that name makes of the tokens."""
        batch, tokens, width = *qkv.shape[:2], qkv.shape[2] // 3
        q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width), self.proj)


class Mlp(nn.Module):
    """The two linear layers of an MLP, which `fused.mlp` applies with GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: attention and MLP, each scaled, shifted and gated by the conditioning.

    `modulation(c)` is apart from `forward` because a fixed point applies one block many times under one c.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaln = nn.Linear(width, 6 * width)

    def modulation(self, c: Tensor) -> Tensor:
        """Shift, scale and gate of attention, then of the MLP (B, 6, 1, D)."""
        return self.adaln(c).view(len(c), 6, 1, -1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        x = gated(x, gate1, self.attn(norm_linear(x, shift1, scale1, self.attn.qkv)))
        return gated(x, gate2, mlp(x, shift2, scale2, self.mlp.fc1, self.mlp.fc2))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p * p * channels)."""

    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.adaln = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(c).unsqueeze(1).chunk(2, dim=-1)
        return norm_linear(x, shift, scale, self.linear)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Patches (B, N, p * p * C) of a square image back to (B, C, H, W)."""
    batch, tokens, size = patches.shape
    side, p = math.isqrt(tokens), patch_size
    grid = patches.view(batch, side, side, p, p, size // (p * p))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * p, side * p)  # b h w p q c -> b c (h p) (w q)
