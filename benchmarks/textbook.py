"""The network as the paper states it, written plainly: what ours is measured against.

    f(z, u, c) = Block(MLP([z ; P u]), c)

In every iteration z and P u are concatenated, and the block computes its modulation. Everything is eager and in
float32, attention is torch's own. The weights are those of a `FixedPointDiT` of the paper's form, whose outputs it
equals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpdm.models import FixedPointDiT
from fpdm.models.layers import timestep_frequencies


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(c)).unsqueeze(1).chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp["fc2"](hidden)


class Textbook(nn.Module):
    """`forward(x, t, y, iterations)`, and with gradient `forward(x, t, y, iterations, of_which_with_gradient)`."""

    def __init__(self, model: FixedPointDiT):
        super().__init__()
        sizes, width, heads = model.config, model.config.hidden_size, model.config.num_heads
        self.patch, self.channels = sizes.patch_size, model.out_channels
        self.patch_embed = nn.Conv2d(sizes.in_channels, width, sizes.patch_size, stride=sizes.patch_size)
        self.register_buffer("positions", model.patch_embed.positions.clone())
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(sizes.num_classes + 1, width)
        self.pre, self.core, self.post = (nn.ModuleList(Block(width, heads) for _ in range(1)) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.inject = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, sizes.patch_size**2 * self.channels)
        self.load_state_dict(weights_of(model))

    def f(self, z: Tensor, u: Tensor, c: Tensor) -> Tensor:
        return self.core[0](self.inject(torch.cat([z, self.project(u)], dim=2)), c)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, iterations: int, with_gradient: int = 0) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions
        label = self.label_embed(y)
        c = self.time_embed(timestep_frequencies(t, 256)) + label
        z = u = self.pre[0](tokens, label)
        with torch.no_grad():
            for _ in range(iterations - with_gradient):
                z = self.f(z, u, c)
        for _ in range(with_gradient):
            z = self.f(z, u, c)
        z = self.post[0](z, label)
        shift, scale = self.adaln(F.silu(label)).unsqueeze(1).chunk(2, dim=2)
        return self.image(self.linear(self.norm(z) * (1 + scale) + shift))

    def image(self, patches: Tensor) -> Tensor:
        batch, tokens, _ = patches.shape
        side, p = int(tokens**0.5), self.patch
        patches = patches.reshape(batch, side, side, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(batch, self.channels, side * p, side * p)


def weights_of(model: FixedPointDiT) -> dict[str, Tensor]:
    """The weights of a network of the paper's form, by the names that they have here."""
    old = {name: value.clone() for name, value in model.state_dict().items()}
    inject_z, inject_u = old.pop("core.inject_z.weight"), old.pop("core.inject_u.weight")
    renamed = {
        "inject.0.weight": torch.cat([inject_z, inject_u], dim=1),
        "inject.0.bias": old.pop("core.inject_u.bias"),
        "positions": model.patch_embed.positions.clone(),
    }
    prefixes = {"core.blocks.": "core.", "core.project.": "project.", "core.inject_out.": "inject.2.",
                "patch_embed.proj.": "patch_embed.", "time_embed.fc1.": "time_embed.0.",
                "time_embed.fc2.": "time_embed.2.", "final.": ""}  # fmt: skip
    for name, value in old.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        renamed[name if prefix is None else prefixes[prefix] + name[len(prefix) :]] = value
    return renamed
