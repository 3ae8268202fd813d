"""Saving and loading through diffusers, strict about what it loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpdm.keyed import generator
from fpdm.models import DiT, FixedPointDiT

TINY = {"sample_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 8, "num_heads": 2, "num_classes": 3}
NETWORKS = [
    pytest.param(DiT, {"depth": 2, "learned_variance": False}, {}, id="DiT"),
    pytest.param(FixedPointDiT, {}, {"iterations": 2}, id="FixedPointDiT"),
    pytest.param(
        FixedPointDiT,
        {"num_pre": 2, "num_core": 3, "num_post": 2, "num_classes": 0, "time_in_pre_post": True, "input_skip": True},
        {"iterations": 2},
        id="FixedPointDiT with a group",
    ),
    pytest.param(FixedPointDiT, {"injection": "gate"}, {"iterations": 2}, id="FixedPointDiT with a gate"),
]


def saved(folder, network=FixedPointDiT, **settings):
    """A network with random weights, saved in `folder`, and the file of its weights."""
    model = network(**{**TINY, **settings})
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=generator("weights", i))
    model.save_pretrained(folder)
    return model, folder / "diffusion_pytorch_model.safetensors"


def public(config):
    """A configuration without what diffusers keeps for itself."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}], ids=["", "slow"])
@pytest.mark.parametrize(("network", "settings", "how"), NETWORKS)
def test_a_saved_network_comes_back_equal(network, settings, how, options, tmp_path):
    model, _ = saved(tmp_path, network, **settings)
    again = network.from_pretrained(tmp_path, **options)
    x, t = torch.randn(2, 1, 4, 4, generator=generator("x")), torch.tensor([3.0, 700.0])
    assert torch.equal(again(x, t, **how).sample, model(x, t, **how).sample)
    assert public(again.config) == public(model.config)
    assert public(again.config).items() >= {**TINY, **settings}.items()
    assert not again.training


def test_all_settings_are_in_the_file_defaults_too(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "FixedPointDiT"
    assert config.items() >= {**TINY, "num_pre": 1, "num_core": 1, "num_post": 1, "learned_variance": True}.items()
    assert config["time_in_pre_post"] is False
    assert config["input_skip"] is False
    assert config["injection"] == "mlp"


def test_a_network_from_before_there_were_skips_and_gates_has_none(tmp_path):
    model, _ = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["input_skip"], config["injection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(1, 1, 4, 4, generator=generator("x"))
    again = FixedPointDiT.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, 5, iterations=2).sample, model(x, 5, iterations=2).sample)


@pytest.mark.parametrize(("said", "spoil"), [
    ("missing keys: .*core.project.bias",       lambda w: w.pop("core.project.bias")),
    ("unexpected keys: .*pre.1.attn.qkv.bias",  lambda w: w.update({"pre.1.attn.qkv.bias": torch.ones(24)})),
    ("core.project.bias",                       lambda w: w.update({"core.project.bias": torch.ones(9)})),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(said, spoil, tmp_path):
    _, file = saved(tmp_path)
    weights = load_file(file)
    spoil(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        FixedPointDiT.from_pretrained(tmp_path)


def test_misshaped_weights_are_not_drawn_anew_either(tmp_path):
    # diffusers offers this; the images are then noise.
    _, file = saved(tmp_path)
    save_file({**load_file(file), "core.project.bias": torch.ones(9)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mismatched keys: .*core.project.bias"):
        FixedPointDiT.from_pretrained(tmp_path, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    _, file = saved(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises((OSError, ValueError), match=file.name):  # diffusers raises OSError
        FixedPointDiT.from_pretrained(tmp_path)


def test_what_was_loaded_is_told_if_asked(tmp_path):
    saved(tmp_path)
    model, info = FixedPointDiT.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, FixedPointDiT)
    assert info["missing_keys"] == info["unexpected_keys"] == []


@pytest.mark.parametrize(("network", "settings", "how"), NETWORKS)
def test_a_network_that_is_loaded_in_half_precision_computes_as_one_that_was_moved_to_it(
    network, settings, how, tmp_path
):
    model, _ = saved(tmp_path, network, **settings)
    half = network.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    x, t = torch.randn(2, 1, 4, 4, generator=generator("x")), torch.tensor([3.0, 700.0])
    assert torch.equal(half(x, t, **how).sample, model.to(torch.bfloat16)(x, t, **how).sample)


def test_a_network_whose_weights_are_stored_in_8_bits_and_computed_in_32_draws_nearly_the_same(tmp_path):
    model, _ = saved(tmp_path)
    stored = FixedPointDiT.from_pretrained(tmp_path)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    x, t = torch.randn(2, 1, 4, 4, generator=generator("x")), torch.tensor([3.0, 700.0])
    exact, near = (network(x, t, iterations=2).sample for network in (model, stored))
    assert 0 < (near - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_networks_are_offloaded_by_leaves_and_not_by_blocks(kind, tmp_path):
    model, _ = saved(tmp_path)
    x, t = torch.randn(2, 1, 4, 4, generator=generator("x")), torch.tensor([3.0, 700.0])
    exact, cpu = model(x, t, iterations=2).sample, torch.device("cpu")
    options = {"onload_device": cpu, "offload_device": cpu, "offload_type": kind, "num_blocks_per_group": 1}
    if kind == "block_level":
        with pytest.raises(ValueError, match=r"offload_type is 'block_level'; .* by \"leaf_level\" only"):
            model.enable_group_offload(**options)
        return
    model.enable_group_offload(**options)
    torch.testing.assert_close(model(x, t, iterations=2).sample, exact)
