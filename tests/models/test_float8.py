"""Float8 alone: its arithmetic, which a CPU does as a GPU does. What it shares with int8 is in test_rounded."""

import copy

import pytest
import torch

from fpdm import to_float8
from fpdm.models import float8
from fpdm.models.float8 import Float8Linear, float8_missing
from tests.models.rounding import drawn, layer, network

pytestmark = pytest.mark.skipif(bool(float8_missing("cpu")), reason=float8_missing("cpu") or "-")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_is_the_product_of_rounded_numbers(bias, device):
    plain, x = layer(bias).to(device), 7 * torch.randn(3, 5, 32, device=device)
    rounded = Float8Linear(plain)
    r = x.abs().amax(-1, keepdim=True) / 448
    product = r * ((x / r).to(torch.float8_e4m3fn).double() @ (rounded.weight.double() * rounded.scale[:, None]).t())
    expected = product if plain.bias is None else product + plain.bias
    assert (rounded(x) - expected).norm() < 0.005 * expected.norm()  # of bfloat16
    assert (rounded(x) - plain(x)).norm() < 0.06 * plain(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_stays_near_itself_in_both_precisions(dtype):
    model = network().to(dtype)
    before, after = drawn(model), drawn(to_float8(copy.deepcopy(model)))
    assert after.dtype == dtype
    assert 0 < (after - before).norm() < 0.2 * before.norm()


def test_sizes_that_do_not_fit_are_refused_before_anything_is_changed():
    model = network(hidden_size=40)
    with pytest.raises(ValueError, match=r"multiples of 16, not \(40, 40\): try int8"):
        to_float8(model)
    assert not any(isinstance(module, Float8Linear) for module in model.modules())


def test_a_device_that_cannot_is_told(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such thing\nstack")

    float8_missing.cache_clear()
    monkeypatch.setattr(float8.torch, "_scaled_mm", refuse)
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, and cpu says: no such thing$"):
        to_float8(network())
    float8_missing.cache_clear()
