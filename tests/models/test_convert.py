"""Weights in the paper's layout: files made by the published code, and one made here from a textbook network."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fpdm import FixedPointDiTPipeline
from fpdm.diffusion import make_schedule
from fpdm.keyed import generator
from fpdm.models import DiT, FixedPointDiT
from fpdm.models.convert import iterations_per_call, load_paper_file
from fpdm.models.layers import sincos_positions

PARITY = Path(__file__).parents[2].parent / "shared" / "data" / "parity"
PARITY_FILES = ("dit-depth3", "fpdm-pre1-post1-iters5", "fpdm-pre3-post1-iters4-timecond", "fpdm-reuse-two-calls")

D, CLASSES = 8, 3
CONFIG = {
    "input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": D, "depth": 3, "num_heads": 2,
    "num_classes": CLASSES, "learn_sigma": True,
}  # fmt: skip
FIXED_POINT = {
    "fixed_point": True, "fixed_point_pre_depth": 2, "fixed_point_post_depth": 1,
    "fixed_point_with_grad_min_iters": 3, "fixed_point_with_grad_max_iters": 3,
}  # fmt: skip
CASES = {
    "dit": CONFIG,
    "fpdm": {**CONFIG, **FIXED_POINT, "fixed_point_pre_post_timestep_conditioning": False},
    "fpdm with time": {**CONFIG, **FIXED_POINT, "fixed_point_pre_post_timestep_conditioning": True},
}


# --- the published code's layout, restated


def shapes(config):
    """Name and shape of every linear map and table, as the published code names them."""
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    block["adaLN_modulation.1"] = (6 * D, D)
    linear = {"x_embedder.proj": (D, 1, 2, 2), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    linear |= {"final_layer.linear": (8, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    if config.get("fixed_point"):
        linear |= {"block_pre_projection": (D, D), "block_fixed_point_projection_fc1": (2 * D, 2 * D)}
        linear["block_fixed_point_projection_fc2"] = (D, 2 * D)
    for name in blocks(config):
        linear |= {f"{name}.{layer}": shape for layer, shape in block.items()}
    found = {f"{name}.weight": shape for name, shape in linear.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return {**found, "y_embedder.embedding_table.weight": (CLASSES + 1, D)}


def blocks(config):
    if not config.get("fixed_point"):
        return [f"blocks.{i}" for i in range(config["depth"])]
    return ["blocks_pre.0", "blocks_pre.1", "block_fixed_point", "blocks_post.0"]


def weights(config):
    draw = generator("paper")
    found = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes(config).items()}
    return {**found, "pos_embed": sincos_positions(D, 2)}


def textbook(w, config, x, t, y, iterations):
    """The network of a file, straight from its weights: prediction (B, 2, 4, 4)."""

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(h, shift, scale):
        return F.layer_norm(h, (D,), eps=1e-6) * (1 + scale) + shift

    def block(name, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(
            6, -1
        )
        q, k, v = (
            part.view(len(h), -1, 2, D // 2).transpose(1, 2)
            for part in linear(f"{name}.attn.qkv", norm(h, shift1, scale1)).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2) / (D // 2) ** 0.5).softmax(-1)
        h = h + gate1 * linear(f"{name}.attn.proj", (scores @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(h, shift2, scale2)), approximate="tanh")
        return h + gate2 * linear(f"{name}.mlp.fc2", inner)

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    label = w["y_embedder.embedding_table.weight"][y]
    outer = label if config.get("fixed_point_pre_post_timestep_conditioning") is False else time + label
    if config.get("fixed_point"):
        for name in ("blocks_pre.0", "blocks_pre.1"):
            h = block(name, h, outer)
        z, u = h, h
        for _ in range(iterations):
            joined = torch.cat([z, linear("block_pre_projection", u)], -1)
            inner = F.gelu(linear("block_fixed_point_projection_fc1", joined), approximate="tanh")
            z = block("block_fixed_point", linear("block_fixed_point_projection_fc2", inner), time + label)
        h = block("blocks_post.0", z, outer)
    else:
        for name in blocks(config):
            h = block(name, h, outer)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(outer))[:, None].chunk(2, -1)
    patches = linear("final_layer.linear", norm(h, shift, scale)).view(len(x), 2, 2, 2, 2, 2)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 2, 4, 4)


def written(path, weights, metadata):
    """A file with `weights` under `model.`, and what the published calls leave beside them."""
    content = {f"model.{name}": weight.clone() for name, weight in weights.items()}
    save_file({**content, "call0.x": torch.zeros(1)}, path, metadata=metadata)
    return path


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_a_checkpoint_of_weights_alone_draws_images(tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file(weights(CONFIG), path, {"config": json.dumps(CONFIG)})
    pipe = FixedPointDiTPipeline(load_paper_file(path), make_schedule())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([2], budget=3 * 5, guidance_scale=1.5, guidance_channels=1, seed=0, output_type="pt").images
    assert images.shape == (1, 1, 4, 4)
    assert images.isfinite().all()


def test_a_file_becomes_the_network_it_was_made_from(case, tmp_path):
    w = weights(case)
    model = load_paper_file(written(tmp_path / "weights.safetensors", w, {"config": json.dumps(case)}))
    assert isinstance(model, FixedPointDiT if case.get("fixed_point") else DiT)
    assert not model.training
    n = iterations_per_call(case)
    x, t = torch.randn(3, 1, 4, 4, generator=generator("x")), torch.tensor([0.0, 400.0, 999.0])
    y = torch.tensor([0, 2, CLASSES])
    output = model(x, t, y, iterations=n)
    torch.testing.assert_close(output.sample, textbook(w, case, x, t, y, n), atol=1e-5, rtol=1e-5)


def test_the_two_halves_of_the_injection_are_not_swapped(tmp_path):
    case = CASES["fpdm"]
    w = weights(case)
    model = load_paper_file(written(tmp_path / "weights.safetensors", w, {"config": json.dumps(case)}))
    whole = w["block_fixed_point_projection_fc1.weight"]  # acts on [z ; P u]
    assert torch.equal(model.core.inject_z.weight, whole[:, :D])
    assert torch.equal(model.core.inject_u.weight, whole[:, D:])


# --- what the published code computed


@pytest.mark.parametrize("name", PARITY_FILES)
def test_parity_with_the_published_code(name):
    path = PARITY / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no parity files in {PARITY}")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        config, calls = (json.loads(file.metadata()[key]) for key in ("config", "calls"))
    model, init = load_paper_file(path), None
    for i, timestep in enumerate(calls):
        x, t, y, wanted = (tensors[f"call{i}.{part}"] for part in ("x", "t", "y", "out"))
        assert (t == timestep).all()
        with torch.no_grad():
            output = model(x, t, y, iterations=iterations_per_call(config), init=init)
        torch.testing.assert_close(output.sample, wanted, atol=1e-5, rtol=0)
        if config.get("fixed_point_reuse_solution"):
            init = output.solution.value


# --- what is refused


# fmt: off
WRONG_WEIGHTS = [
    ("missing: final_layer.linear.bias",            lambda w: w.pop("final_layer.linear.bias")),
    ("missing: block_pre_projection.bias, final",   lambda w: (w.pop("final_layer.linear.bias"),
                                                               w.pop("block_pre_projection.bias"))),
    ("extra: blocks_pre.2.mlp.fc1.bias",            lambda w: w.update({"blocks_pre.2.mlp.fc1.bias": torch.ones(2)})),
    (r"misshaped: t_embedder.mlp.2.bias \(5,\), not \(8,\)",
                                                    lambda w: w.update({"t_embedder.mlp.2.bias": torch.ones(5)})),
    (r"embedding_table.weight \(3, 8\), not \(4, 8\)",
                                                    lambda w: w.update({"y_embedder.embedding_table.weight":
                                                                        torch.ones(3, 8)})),
    ("missing: pos_embed",                        lambda w: w.pop("pos_embed")),
    (r"pos_embed is not",                   lambda w: w["pos_embed"].mul_(2)),
    (r"pos_embed \(1, 9, 8\)",                   lambda w: w.update({"pos_embed": sincos_positions(8, 3)})),
]
# fmt: on


@pytest.mark.parametrize(("said", "spoil"), WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_listed(said, spoil, tmp_path):
    case = CASES["fpdm"]
    w = weights(case)
    spoil(w)
    with pytest.raises(ValueError, match=said):
        load_paper_file(written(tmp_path / "weights.safetensors", w, {"config": json.dumps(case)}))


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    case = CASES["dit"]
    w = weights(case) | {"stray": torch.ones(1), "final_layer.linear.bias": torch.ones(1)}
    del w["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"missing: blocks.1.mlp.fc1.bias; extra: stray; misshaped: final_layer.lin"):
        load_paper_file(written(tmp_path / "weights.safetensors", w, {"config": json.dumps(case)}))


@pytest.mark.parametrize(("metadata", "said"), [
    (None,                                                          "no 'config' in its metadata"),
    ({"format": "pt"},                                              "no 'config' in its metadata"),
    ({"config": "{not json"},                                       "weights.safetensors"),
    ({"config": json.dumps({**CONFIG, "patch_size": 3})},           "patch size 3"),
    ({"config": json.dumps({"depth": 3, "patch_size": 2})},         "lacks.*input_size.*hidden_size"),
])  # fmt: skip
def test_a_configuration_that_is_no_use_is_refused(metadata, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load_paper_file(written(tmp_path / "weights.safetensors", weights(CONFIG), metadata))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = written(tmp_path / "weights.safetensors", weights(CONFIG), {"config": json.dumps(CONFIG)})
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"weights.safetensors is not a readable safetensors file"):
        load_paper_file(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_paper_file(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_read(dtype, tmp_path):
    case = CASES["fpdm"]
    w = {name: weight.to(dtype) for name, weight in weights(case).items()}
    model = load_paper_file(written(tmp_path / "weights.safetensors", w, {"config": json.dumps(case)}))
    assert torch.equal(model.core.project.weight, w["block_pre_projection.weight"].float())


@pytest.mark.parametrize(("config", "n"), [
    ({},                                                                    None),
    ({"fixed_point": False, "fixed_point_with_grad_min_iters": 4},          None),
    ({"fixed_point": True, "fixed_point_with_grad_min_iters": 4},           4),
    ({"fixed_point": True, "fixed_point_with_grad_min_iters": 4,
                           "fixed_point_no_grad_min_iters": 3},             7),
])  # fmt: skip
def test_iterations_of_both_phases_are_counted(config, n):
    assert iterations_per_call(config) == n
