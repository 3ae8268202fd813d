"""Networks in 8 bits: near the ones that they were made from, and for drawing only."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fpdm import DiT, FixedPointDiT, FixedPointDiTPipeline, to_int8
from fpdm.diffusion import make_schedule
from fpdm.models import int8
from fpdm.models.int8 import BACKEND, Int8Linear
from fpdm.weights import digest
from tests.networks import randomised

pytestmark = pytest.mark.skipif(bool(BACKEND.missing()), reason=BACKEND.missing() or "-")


class Plain:
    """The backend's arithmetic, in float64: products and sums of integers are exact there."""

    def missing(self):
        return ""

    def pack(self, weight):
        return weight.clone()

    def product(self, q, packed, scale):
        return ((q.double() - 128) @ packed.double().t() * scale.double()).float()


def layer(bias=True, inputs=24, outputs=40):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def network(kind=FixedPointDiT, **settings):
    settings = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_heads": 4, "num_classes": 3, **settings}
    return randomised(kind(**settings))


def inputs(batch=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=g), torch.linspace(10, 900, batch), torch.arange(batch) % 3


@torch.no_grad()
def drawn(model, batch=5):
    return model(*inputs(batch), **({} if isinstance(model, DiT) else {"iterations": 4})).sample


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_is_the_rounded_product_exactly(bias, monkeypatch):
    plain, x = layer(bias), 7 * torch.randn(3, 5, 24)
    found = Int8Linear(plain)(x)
    monkeypatch.setattr(int8, "BACKEND", Plain())
    torch.testing.assert_close(found, Int8Linear(plain)(x), rtol=1e-6, atol=1e-5)
    assert (found - plain(x)).norm() < 0.015 * plain(x).norm()


@torch.no_grad()
def test_a_token_does_not_see_the_others():
    rounded, x = Int8Linear(layer()), torch.randn(4, 6, 24)
    x[1] *= 1e4
    found = rounded(x)
    for place in ((0, 0), (1, 3), (3, 5)):
        torch.testing.assert_close(found[place], rounded(x[place][None])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@torch.no_grad()
def test_tokens_of_any_size_and_of_nothing(value):
    plain = layer(bias=False)
    x = torch.full((2, 3, 24), value)
    torch.testing.assert_close(Int8Linear(plain)(x), plain(x), rtol=0.05, atol=0.05 * value)


@torch.no_grad()
def test_an_output_without_weights_is_its_bias():
    plain = layer()
    plain.weight[3] = 0
    assert torch.equal(Int8Linear(plain)(torch.randn(2, 24))[:, 3], plain.bias[3].expand(2))


@pytest.mark.parametrize(
    ("kind", "settings"), [(FixedPointDiT, {}), (FixedPointDiT, {"num_core": 2, "input_skip": True}), (DiT, {})]
)
def test_a_network_stays_near_itself_and_iterates_as_often(kind, settings):
    model = network(kind, **settings)
    before, after = drawn(model), drawn(to_int8(copy.deepcopy(model)))
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    if kind is FixedPointDiT:
        with torch.no_grad():
            assert to_int8(model)(*inputs(), iterations=4).solution.iterations.tolist() == [4] * 5


def test_what_is_iterated_is_int8_and_the_rest_is_not():
    model = to_int8(network(num_core=2))
    rounded = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    blocks = ["pre.0", "core.blocks.0", "core.blocks.1", "post.0"]
    expected = {f"{b}.{part}" for b in blocks for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert rounded == expected | {"core.inject_z", "core.inject_out"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_the_same_and_have_weights_of_their_own(copied):
    model = to_int8(network())
    assert torch.equal(drawn(copied(model)), drawn(model))
    assert digest(copied(model)) == digest(model) != digest(network())


def test_it_is_not_for_training():
    model = to_int8(network())
    with pytest.raises(ValueError, match="no gradient: train the network"):
        model(*inputs(), iterations=2)


def test_it_cannot_be_saved(tmp_path):
    pipe = FixedPointDiTPipeline(to_int8(network()), make_schedule())
    with pytest.raises(ValueError, match="int8 cannot be saved: save the one that it was made from"):
        pipe.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_refused_before_and_after(dtype):
    with pytest.raises(ValueError, match=f"made from float32 on the CPU, not from {dtype} on cpu"):
        to_int8(network().to(dtype))
    model = to_int8(network()).to(dtype)
    with pytest.raises(ValueError, match="int8 layers take float32 on the CPU, not"):
        drawn(model)


def test_a_machine_without_the_instructions_is_told(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="this CPU has no AVX-512 VNNI instructions: leave the weights in float32"):
        to_int8(network())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this build of torch has no oneDNN"):
        to_int8(network())
