"""Compiled networks: the same outputs and the same plan, and one graph of each kind whatever they are asked for."""

import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from fpdm import DiT, FixedPointDiT, FixedPointDiTPipeline, Solve, Tolerance, to_int8
from fpdm.diffusion import make_schedule
from fpdm.fixedpoint import MultiStepJacobianFree, Unroll
from fpdm.models.int8 import BACKEND
from tests.networks import SIZES, randomised

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def network(kind=FixedPointDiT, **settings):
    return randomised(kind(**SIZES, **settings))


def inputs(batch):
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, 8, 8, generator=g), torch.linspace(10, 900, batch), torch.arange(batch) % 3


def noted(kept, tensor):
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", [{}, {"input_skip": True}, {"injection": "gate"}], ids=str)
@torch.no_grad()
def test_neither_batch_nor_iterations_nor_stopping_compile_again(settings):
    plain, compiled = (network(num_core=2, **settings) for _ in range(2))
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled(*inputs(4), iterations=3)
    assert graphs() == 2  # the core, and what pre and post blocks share
    for batch in (1, 7, 2):
        for solve in (Solve(stopping=Tolerance(0.3, 6)), None):
            how = {"solve": solve} if solve else {"iterations": batch}
            found, wanted = compiled(*inputs(batch), **how), plain(*inputs(batch), **how)
            torch.testing.assert_close(found.sample, wanted.sample, rtol=1e-4, atol=1e-4)
            assert torch.equal(found.solution.iterations, wanted.solution.iterations)
    assert graphs() == 2


@pytest.mark.parametrize("settings", [{}, {"input_skip": True}, {"injection": "gate"}], ids=str)
def test_training_that_unrolls_compiles_no_more_where_solves_start_at_what_is_added(settings):
    compiled = network(num_core=2, **settings)
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled(*inputs(4), solve=Solve(gradient=Unroll(3))).sample.sum().backward()
    assert graphs() == 2


def test_checkpointing_inside_compiled_blocks_gives_the_same_gradients():
    plain, compiled = (network(num_core=2) for _ in range(2))
    compiled.enable_gradient_checkpointing()
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    stored = {plain: 0, compiled: 0}
    for model in stored:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, kept), lambda tensor: tensor):
            output = model(*inputs(3), solve=Solve(gradient=MultiStepJacobianFree(1, 2)))
        stored[model] = sum(storage.nbytes() for storage in kept.values())
        output.sample.square().mean().backward()
    assert stored[compiled] < 0.7 * stored[plain]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_plans_and_batches_of_a_pipeline_compile_once_and_are_spent_as_planned():
    pipes = [FixedPointDiTPipeline(network(), make_schedule()) for _ in range(2)]
    pipes[1].transformer.compile_repeated_blocks(backend="aot_eager")
    made = []
    for batch, how in (
        (3, {"budget": 40}), (1, {"num_inference_steps": 3, "iterations": [4, 1, 2]}),
        (2, {"budget": 24, "guidance_scale": 2.0}), (5, {"budget": 30, "tolerance": 0.1, "reuse": "linear"}),
    ):  # fmt: skip
        one, other = (pipe([0] * batch, seed=1, output_type="pt", **how) for pipe in pipes)
        torch.testing.assert_close(other.images, one.images, rtol=1e-3, atol=1e-3)
        assert other.report.spent == one.report.spent
        made.append(graphs())
    assert made == [2] * 4


@torch.no_grad()
def test_an_explicit_network_has_one_graph():
    plain, compiled = network(DiT, depth=3), network(DiT, depth=3)
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for batch in (3, 1):
        torch.testing.assert_close(compiled(*inputs(batch)).sample, plain(*inputs(batch)).sample)
    assert graphs() == 1


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("kind", "injection"), [("float32", "mlp"), ("int8", "mlp"), ("bfloat16", "gate")])
@torch.no_grad()
def test_compiled_code_equals_the_plain_one(kind, injection):
    if kind == "int8" and BACKEND.missing():
        pytest.skip(BACKEND.missing())
    models = [network(injection=injection) for _ in range(2)]
    models = [to_int8(m) for m in models] if kind == "int8" else [m.to(getattr(torch, kind)) for m in models]
    models[1].compile_repeated_blocks()
    for batch in (3, 1):
        plain, compiled = (m(*inputs(batch), iterations=3).sample.float() for m in models)
        tolerance = 1e-4 if kind == "float32" else 0.05  # roundings that fall to the other side
        assert (plain - compiled).norm() <= tolerance * plain.norm()
    assert graphs() == 2


def test_names_of_weights_stay_as_they_are():
    model = network()
    names = list(model.state_dict())
    model.compile_repeated_blocks(backend="aot_eager")
    assert list(model.state_dict()) == names
