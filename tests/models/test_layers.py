"""The layers against textbook formulas, written with loops and numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpdm.models.layers import (
    Attention,
    Block,
    FinalLayer,
    PatchEmbedder,
    TimestepEmbedder,
    sincos_positions,
    timestep_frequencies,
    unpatchify,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("width", "side"), [(4, 1), (8, 3), (16, 5)])
def test_positions_are_sines_and_cosines_of_column_then_row(width, side):
    quarter = width // 4
    expected = np.zeros((side * side, width))
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = 10000 ** (-i / quarter)
                expected[row * side + column, i::quarter] = [
                    math.sin(column * frequency), math.cos(column * frequency),
                    math.sin(row * frequency), math.cos(row * frequency),
                ]  # fmt: skip
    positions = sincos_positions(width, side)
    assert positions.dtype == torch.float32
    np.testing.assert_allclose(positions[0].numpy(), expected, atol=1e-6)


def test_timestep_features_are_cosines_then_sines():
    t = [0.0, 0.5, 1.0, 17.25, 999.0]
    expected = [
        [math.cos(s * 10000 ** (-i / 8)) for i in range(8)] + [math.sin(s * 10000 ** (-i / 8)) for i in range(8)]
        for s in t
    ]
    np.testing.assert_allclose(timestep_frequencies(torch.tensor(t), 16).numpy(), expected, atol=1e-4)


def test_whole_timesteps_may_be_integers():
    embed = TimestepEmbedder(8)
    one, other = (embed(torch.tensor(t), torch.float32) for t in ([0, 999], [0.0, 999.0]))
    assert torch.equal(one, other)


def test_timesteps_stay_apart_in_half_precision():
    # bfloat16 holds no 999: features are computed in float32 and only then rounded.
    embed = TimestepEmbedder(8).to(torch.bfloat16)
    one, other = (embed(torch.tensor([t]), torch.bfloat16) for t in (998, 999))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("side", "patch", "channels"), [(1, 1, 1), (2, 2, 3), (3, 1, 2), (2, 4, 2)])
def test_unpatchify_lays_out_rows_columns_and_channels(side, patch, channels):
    patches = torch.randn(2, side * side, patch * patch * channels)
    images = unpatchify(patches, patch)
    assert images.shape == (2, channels, side * patch, side * patch)
    for row in range(side * patch):
        for column in range(side * patch):
            token = (row // patch) * side + column // patch
            within = (row % patch) * patch + column % patch
            start = within * channels
            assert torch.equal(images[:, :, row, column], patches[:, token, start : start + channels])


def test_patches_come_back_where_they_were_taken():
    patch, channels, width = 2, 3, 12
    embed = PatchEmbedder(sample_size=6, patch_size=patch, channels=channels, width=width)
    embed.positions.zero_()
    nn.init.zeros_(embed.proj.bias)
    nn.init.zeros_(embed.proj.weight)
    with torch.no_grad():  # output (row, column, channel) of a patch copies its input (channel, row, column)
        for row, column, channel in np.ndindex(patch, patch, channels):
            embed.proj.weight[(row * patch + column) * channels + channel, channel, row, column] = 1
    x = torch.randn(2, channels, 6, 6)
    torch.testing.assert_close(unpatchify(embed(x), patch), x)


def test_every_token_knows_its_position():
    embed = PatchEmbedder(sample_size=6, patch_size=2, channels=1, width=8)
    tokens = embed(torch.zeros(1, 1, 6, 6)) - embed.proj.bias
    torch.testing.assert_close(tokens, sincos_positions(8, 3))


def test_attention_is_the_textbook_one():
    attention, x = Attention(8, heads=2), torch.randn(3, 5, 8)
    q, k, v = (x @ w.T + b for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(-1) @ v[..., head])
    torch.testing.assert_close(attention(attention.qkv(x)), attention.proj(torch.cat(heads, -1)))


def test_a_block_is_adaln_zero():
    block, x, c = Block(8, heads=2), torch.randn(2, 3, 8), torch.randn(2, 8)
    wanted = torch.zeros_like(x)
    for i in range(2):  # shift, scale and gate of attention, then of the MLP, as vectors of one sample
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.adaln.weight @ c[i] + block.adaln.bias).split(8)
        z = x[i]
        z = z + gate1 * block.attn(block.attn.qkv((F.layer_norm(z, (8,), eps=1e-6) * (1 + scale1) + shift1)[None]))[0]
        h = F.layer_norm(z, (8,), eps=1e-6) * (1 + scale2) + shift2
        h = F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias, approximate="tanh")
        wanted[i] = z + gate2 * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    assert block.mlp.fc1.out_features == 32
    torch.testing.assert_close(block(x, block.modulation(c)), wanted)


def test_the_final_layer_modulates_then_maps():
    final, x, c = FinalLayer(8, patch_size=2, channels=3), torch.randn(2, 5, 8), torch.randn(2, 8)
    shift, scale = final.adaln(c).split(8, dim=1)
    h = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert final(x, c).shape == (2, 5, 12)
    torch.testing.assert_close(final(x, c), h @ final.linear.weight.T + final.linear.bias)
