"""Gradient checkpointing: the same gradients, bit for bit, from inputs alone."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fpdm.fixedpoint import (
    Anderson,
    FixedIterations,
    Implicit,
    JacobianFree,
    MultiStepJacobianFree,
    Phantom,
    Picard,
    Solve,
    Unroll,
)
from fpdm.keyed import generator
from fpdm.models import DiT, FixedPointDiT

SIZES = {"sample_size": 8, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
BATCH = 3
TOKENS = 16 * 16 * 4  # bytes of one image's tokens in float32


def network(kind, checkpointing=False, **settings):
    model = kind(**{**SIZES, **settings})
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator("weights", i))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def inputs(batch=BATCH):
    x = torch.randn(batch, 2, 8, 8, generator=generator("x"))
    return x, torch.linspace(0, 990, batch), torch.arange(batch) % 4


def gradients(model, bf16=False, **how):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(*inputs(), **how)
    loss = sum(sample.float().square().mean() for sample in (output.sample, *output.exits.values()))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def saved_bytes(model, batch=BATCH, **how):
    """The storages that autograd keeps for backward, the parameters' own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # which is kept, so that no storage takes another's place

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs(batch), **how)
    assert output.sample.requires_grad
    return sum(size for place, size in sizes.items() if place not in own)


def held_bytes(model, batch=BATCH, **how):
    """What is kept for backward with checkpointing, which has hooks of its own inside: the inputs of its segments, and
    what is saved outside of them."""
    stored = {}

    def kept(function, *args):
        for tensor in torch.utils._pytree.tree_leaves(args):
            if isinstance(tensor, torch.Tensor):
                stored[tensor.untyped_storage().data_ptr()] = tensor
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda none: none):
            return function(*args)

    model.enable_gradient_checkpointing(kept)
    outside = saved_bytes(model, batch, **how)
    return outside + sum(tensor.untyped_storage().nbytes() for tensor in stored.values())


METHODS = [
    Solve(stopping=FixedIterations(3), gradient=Unroll()),
    Solve(stopping=FixedIterations(3), gradient=Unroll(), solver=Picard(0.7)),
    Solve(stopping=FixedIterations(3), gradient=Unroll(), solver=Anderson(2)),
    Solve(stopping=FixedIterations(3), gradient=Unroll(), exits=(1, 2)),
    Solve(stopping=FixedIterations(3), gradient=JacobianFree()),
    Solve(gradient=MultiStepJacobianFree(0, 1)),
    Solve(gradient=MultiStepJacobianFree(2, 3)),
    Solve(gradient=MultiStepJacobianFree(2, 3), exits=(1, 3, 4)),
    Solve(stopping=FixedIterations(3), gradient=Phantom()),
    Solve(stopping=FixedIterations(20), gradient=Implicit()),
]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"num_core": 2}, {"injection": "gate"}], ids=str)
@pytest.mark.parametrize("solve", METHODS, ids=lambda solve: f"{solve.gradient}{solve.solver}{solve.exits}")
def test_gradients_of_a_fixed_point_network_are_the_same(solve, settings, bf16):
    plain, less = (gradients(network(FixedPointDiT, on, **settings), bf16, solve=solve) for on in (False, True))
    for name, gradient in plain.items():
        assert gradient.any()
        assert torch.equal(gradient, less[name]), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_gradients_of_an_explicit_network_are_the_same(bf16):
    plain, less = (gradients(network(DiT, on, depth=3), bf16) for on in (False, True))
    assert all(torch.equal(gradient, less[name]) for name, gradient in plain.items())


def test_the_outer_blocks_see_the_time_alike():
    solve = Solve(gradient=MultiStepJacobianFree(1, 2))
    sizes = {"time_in_pre_post": True, "num_pre": 2, "num_post": 2}
    plain, less = (gradients(network(FixedPointDiT, on, **sizes), solve=solve) for on in (False, True))
    assert all(torch.equal(gradient, less[name]) for name, gradient in plain.items())


@pytest.mark.parametrize("num_core", [1, 3])
def test_an_iteration_stores_the_input_of_each_block_alone(num_core):
    model = network(FixedPointDiT, num_core=num_core)
    few, many = (held_bytes(model, solve=Solve(gradient=MultiStepJacobianFree(2, m))) for m in (1, 4))
    assert many - few == 3 * num_core * BATCH * TOKENS


def test_a_block_stores_its_input_alone():
    few, many = (held_bytes(network(DiT, depth=depth)) for depth in (2, 5))
    assert many - few == 3 * BATCH * TOKENS


@pytest.mark.parametrize("on", [False, True])
def test_iterations_without_gradient_store_nothing(on):
    model = network(FixedPointDiT, on)
    none, many = (saved_bytes(model, solve=Solve(gradient=MultiStepJacobianFree(n, 2))) for n in (1, 9))
    assert none == many


def test_without_checkpointing_an_iteration_stores_more():
    model = network(FixedPointDiT)
    few, many = (saved_bytes(model, solve=Solve(gradient=MultiStepJacobianFree(2, m))) for m in (1, 2))
    assert many - few > 10 * BATCH * TOKENS


@pytest.mark.parametrize(("kind", "settings", "how"), [(DiT, {"depth": 2}, {}), (FixedPointDiT, {}, {"iterations": 3})])
def test_where_there_is_no_gradient_nothing_is_recomputed(kind, settings, how):
    model, calls = network(kind, **settings), []
    plain = model(*inputs(), **how).sample
    with torch.no_grad():
        undifferentiated = model(*inputs(), **how).sample
    torch.testing.assert_close(undifferentiated, plain)

    def counted(function, *args):
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(counted)
    with torch.no_grad():
        assert torch.equal(model(*inputs(), **how).sample, undifferentiated)
    assert calls == []
    assert torch.equal(model(*inputs(), **how).sample, plain)
    assert len(calls) == (2 if kind is DiT else 1 + 3 + 1)


def test_only_iterations_with_gradient_are_recomputed():
    model, calls = network(FixedPointDiT), []

    def counted(function, *args):
        calls.append(function)
        return function(*args)

    model.enable_gradient_checkpointing(counted)
    model(*inputs(), solve=Solve(gradient=MultiStepJacobianFree(5, 2)))
    assert len(calls) == 1 + 2 + 1


def test_it_can_be_asked_for_and_ended():
    model = network(DiT, depth=2)
    assert not model.is_gradient_checkpointing
    before = saved_bytes(model)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert saved_bytes(model) < before
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    assert saved_bytes(model) == before
    assert not network(DiT, depth=2).is_gradient_checkpointing, "of one network, not of its class"


def test_a_network_with_it_can_be_copied_and_saved(tmp_path):
    model = network(FixedPointDiT, checkpointing=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.is_gradient_checkpointing
        assert torch.equal(copied(*inputs(), iterations=1).sample, model(*inputs(), iterations=1).sample)
    model.save_pretrained(tmp_path)
    assert not FixedPointDiT.from_pretrained(tmp_path).is_gradient_checkpointing, "a way to train, not a weight"
