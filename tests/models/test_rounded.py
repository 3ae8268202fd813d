"""Networks in 8 bits, of both formats: near the ones that they were made from, and for drawing only."""

import copy
import pickle

import pytest
import torch

from fpdm import DiT, FixedPointDiT, FixedPointDiTPipeline, to_float8, to_int8
from fpdm.diffusion import make_schedule
from fpdm.models.float8 import Float8Linear, float8_missing
from fpdm.models.int8 import BACKEND, Int8Linear
from fpdm.weights import digest
from tests.models.rounding import drawn, inputs, layer, network


def lacks(missing):
    return pytest.mark.skipif(bool(missing), reason=missing or "-")


FORMATS = [
    pytest.param(Int8Linear, to_int8, id="int8", marks=lacks(BACKEND.missing())),
    pytest.param(Float8Linear, to_float8, id="float8", marks=lacks(float8_missing("cpu"))),
]
AGAIN = [pytest.param(form.values[1], id=form.id, marks=form.marks) for form in FORMATS]
BOTH = pytest.mark.parametrize(("kind", "convert"), FORMATS)
TOLERANCE = {Int8Linear: 1e-6, Float8Linear: 1e-2}  # float8's products are returned in bfloat16


@BOTH
@torch.no_grad()
def test_a_token_does_not_see_the_others(kind, convert):
    rounded, x, tolerance = kind(layer()), torch.randn(4, 6, 32), TOLERANCE[kind]
    x[1] *= 1e4
    found = rounded(x)
    for place in ((0, 0), (1, 3), (3, 5)):
        torch.testing.assert_close(found[place], rounded(x[place][None])[0], rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@torch.no_grad()
def test_tokens_of_any_size_and_of_nothing(value, kind, convert):
    plain = layer(bias=False)
    x = torch.full((2, 3, 32), value)
    torch.testing.assert_close(kind(plain)(x), plain(x), rtol=0.05, atol=0.05 * value)


@BOTH
@torch.no_grad()
def test_an_output_without_weights_is_its_bias(kind, convert):
    plain = layer()
    plain.weight[3] = 0
    assert torch.equal(kind(plain)(torch.randn(2, 32))[:, 3], plain.bias[3].expand(2))


@BOTH
@pytest.mark.parametrize(
    ("of", "settings"),
    [
        (FixedPointDiT, {}),
        (FixedPointDiT, {"num_core": 2, "input_skip": True}),
        (FixedPointDiT, {"injection": "gate"}),
        (DiT, {}),
    ],
)
def test_a_network_stays_near_itself_and_iterates_as_often(of, settings, kind, convert):
    model = network(of, **settings)
    before, after = drawn(model), drawn(convert(copy.deepcopy(model)))
    assert 0 < (after - before).norm() < {Int8Linear: 0.1, Float8Linear: 0.2}[kind] * before.norm()
    if of is FixedPointDiT:
        with torch.no_grad():
            assert convert(model)(*inputs(), iterations=4).solution.iterations.tolist() == [4] * 5


@BOTH
@pytest.mark.parametrize(
    ("injection", "layers"), [("mlp", {"core.inject_z", "core.inject_out"}), ("gate", {"core.inject_out"})]
)
def test_what_is_iterated_is_rounded_and_the_rest_is_not(injection, layers, kind, convert):
    model = convert(network(num_core=2, injection=injection))
    rounded = {name for name, module in model.named_modules() if isinstance(module, kind)}
    blocks = ["pre.0", "core.blocks.0", "core.blocks.1", "post.0"]
    expected = {f"{b}.{part}" for b in blocks for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert rounded == expected | layers


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_the_same_and_have_weights_of_their_own(copied, kind, convert):
    model = convert(network())
    assert torch.equal(drawn(copied(model)), drawn(model))
    assert digest(copied(model)) == digest(model) != digest(network())


@BOTH
def test_it_is_not_for_training(kind, convert):
    model = convert(network())
    with pytest.raises(ValueError, match=f"{kind.format} layers have no gradient: train the network"):
        model(*inputs(), iterations=2)


@BOTH
def test_it_cannot_be_saved(kind, convert, tmp_path):
    pipe = FixedPointDiTPipeline(convert(network()), make_schedule())
    with pytest.raises(ValueError, match="8 bits cannot be saved: save the one that it was made from"):
        pipe.save_pretrained(tmp_path / "model")


@BOTH
@pytest.mark.parametrize("again", AGAIN)
def test_it_is_not_rounded_again(again, kind, convert):
    model = convert(network())
    before = drawn(model)
    with pytest.raises(ValueError, match=f"in {kind.format} already: convert the one that it was made from"):
        again(model)
    assert torch.equal(drawn(model), before)
