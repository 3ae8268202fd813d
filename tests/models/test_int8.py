"""Int8 alone: its arithmetic is exact, what it needs is asked for. What it shares with float8 is in test_rounded."""

import pytest
import torch

from fpdm import to_int8
from fpdm.models import int8
from fpdm.models.int8 import BACKEND, Int8Linear
from tests.models.rounding import drawn, layer, network

pytestmark = pytest.mark.skipif(bool(BACKEND.missing()), reason=BACKEND.missing() or "-")


class Plain:
    """The backend's arithmetic, in float64: products and sums of integers are exact there."""

    def missing(self):
        return ""

    def pack(self, weight):
        return weight.clone()

    def product(self, q, packed, scale):
        return ((q.double() - 128) @ packed.double().t() * scale.double()).float()


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_is_the_rounded_product_exactly(bias, monkeypatch):
    plain, x = layer(bias), 7 * torch.randn(3, 5, 32)
    found = Int8Linear(plain)(x)
    monkeypatch.setattr(int8, "BACKEND", Plain())
    torch.testing.assert_close(found, Int8Linear(plain)(x), rtol=1e-6, atol=1e-5)
    assert (found - plain(x)).norm() < 0.015 * plain(x).norm()


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
