"""What both networks promise. Weights are drawn at random: at initialisation every block is the identity."""

import pytest
import torch
import torch.nn.functional as F

from fpdm.fixedpoint import FixedIterations, MultiStepJacobianFree, Picard, Solve, StochasticJacobianFree, Tolerance
from fpdm.keyed import generator
from fpdm.models import DiT, FixedPointDiT
from fpdm.models.core import GatedCore, MlpCore
from fpdm.models.layers import Block
from fpdm.sampling import operations_of

TINY = {"sample_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 8, "num_heads": 2, "num_classes": 3}


def randomized(model, std=0.3):
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=generator("weights", i))
    return model


def drawn(*shape):
    return torch.randn(shape, generator=generator("drawn", *shape))


def fixed_point_dit(**settings):
    return randomized(FixedPointDiT(**{**TINY, **settings}))


def dit(**settings):
    return randomized(DiT(**{**TINY, "depth": 3, **settings}))


def batch(model, size=3):
    """Noisy images, timesteps and labels, the last of which is the null class."""
    config = model.config
    y = torch.arange(size) % (config.num_classes + 1)
    y[-1] = config.num_classes
    return drawn(size, config.in_channels, config.sample_size, config.sample_size), torch.linspace(0, 990, size), y


def calls_of(modules, method):
    """How often each module runs `method` from now on, as a list that counts."""
    counts = [0] * len(modules)
    for i, module in enumerate(modules):
        original = getattr(module, method)

        def counted(*args, i=i, original=original):
            counts[i] += 1
            return original(*args)

        setattr(module, method, counted)
    return counts


NETWORKS = [pytest.param(fixed_point_dit, {"iterations": 3}, id="FixedPointDiT"), pytest.param(dit, {}, id="DiT")]


# --- sizes


@pytest.mark.parametrize(("network", "name", "count"), [
    (DiT,           "S/2",   32_865_056),
    (DiT,           "B/2",  130_315_808),
    (DiT,           "XL/2", 674_834_720),
    (FixedPointDiT, "S/2",    9_959_072),
    (FixedPointDiT, "B/2",   38_792_480),
    (FixedPointDiT, "XL/2",  86_500_256),
])  # fmt: skip
def test_parameters_are_as_many_as_counted(network, name, count):
    with torch.device("meta"):
        model = network.from_preset(name)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


def test_settings_go_before_the_preset():
    with torch.device("meta"):
        model = FixedPointDiT.from_preset("B/8", sample_size=16, num_heads=4, num_classes=7)
    config = model.config
    assert (config.hidden_size, config.num_heads, config.patch_size, config.num_classes) == (768, 4, 8, 7)


@pytest.mark.parametrize(("name", "nearest"), [("XL/3", "'XL/[248]'"), ("s/2", "'S/2'"), ("B2", "'B/2'")])
def test_an_unknown_preset_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"'{name}'.*Did you mean {nearest}"):
        DiT.from_preset(name)


@pytest.mark.parametrize("settings", [
    {"sample_size": 4, "patch_size": 1, "in_channels": 1},
    {"sample_size": 6, "patch_size": 3, "in_channels": 3, "learned_variance": False},
    {"sample_size": 4, "patch_size": 4, "in_channels": 4, "num_classes": 0},
    {"sample_size": 8, "patch_size": 2, "in_channels": 2, "num_classes": 1, "learned_variance": False},
])  # fmt: skip
@pytest.mark.parametrize("middle", [
    {"depth": 1},
    {"depth": 4},
    {"num_pre": 1, "num_core": 1, "num_post": 1},
    {"num_pre": 3, "num_core": 1, "num_post": 2, "time_in_pre_post": True},
    {"num_pre": 1, "num_core": 4, "num_post": 1},
    {"num_pre": 2, "num_core": 2, "num_post": 1, "input_skip": True},
    {"num_pre": 0, "num_core": 3, "num_post": 0, "input_skip": True, "time_in_pre_post": True},
    {"num_pre": 0, "num_core": 1, "num_post": 1},
    {"num_pre": 0, "num_core": 2, "num_post": 0, "injection": "gate"},
])  # fmt: skip
def test_shapes(settings, middle):
    model = dit(**settings, **middle) if "depth" in middle else fixed_point_dit(**settings, **middle)
    how = {} if "depth" in middle else {"iterations": 2}
    x, t, y = batch(model)
    channels = x.shape[1] * (2 if settings.get("learned_variance", True) else 1)
    output = model(x, t, y, **how)
    assert output.sample.shape == (3, channels, *x.shape[2:])
    assert model.out_channels == channels
    assert output.sample.isfinite().all()
    if how:
        assert output.solution.value.shape == (3, (x.shape[2] // settings["patch_size"]) ** 2, 8)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: fixed_point_dit(sample_size=5),            r"2 does not divide the image size 5; .*\[1, 5\]"),
    (lambda: fixed_point_dit(sample_size=0),            "sample_size is 0"),
    (lambda: dit(patch_size=-1),                        "patch_size is -1"),
    (lambda: dit(in_channels=0),                        "in_channels is 0"),
    (lambda: dit(hidden_size=10),                       "hidden_size is 10"),
    (lambda: dit(hidden_size=8, num_heads=3),           r"hidden_size is 8.*num_heads \(3\)"),
    (lambda: dit(hidden_size=8.0),                      "hidden_size is 8.0"),
    (lambda: dit(num_heads=0),                          "num_heads is 0"),
    (lambda: dit(num_classes=-1),                       "num_classes is -1"),
    (lambda: dit(depth=0),                              "depth is 0"),
    (lambda: fixed_point_dit(num_pre=-1),               "num_pre is -1; it must be at least 0"),
    (lambda: fixed_point_dit(num_core=0),               "num_core is 0; it must be at least 1"),
    (lambda: fixed_point_dit(num_post=-2),              "num_post is -2"),
    (lambda: fixed_point_dit(injection="gates"),        "unknown injection 'gates'. Did you mean 'gate'"),
    (lambda: fixed_point_dit(injection="gate", input_skip=True), "a gate always adds to u"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("network", [DiT, FixedPointDiT])
def test_a_misspelt_setting_is_refused(network):
    with pytest.raises(TypeError, match="num_clases"):
        network(**TINY, num_clases=3)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 1, 4, 4), (2, 4, 4)])
@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_images_of_another_shape_are_refused(network, how, shape):
    with pytest.raises(ValueError, match="shape") as error:
        network()(torch.zeros(shape), 0, **how)
    assert str(shape) in str(error.value)
    assert "2, 4, 4" in str(error.value)


# --- initialisation


def test_a_new_network_predicts_zero_and_its_blocks_are_identities():
    model = FixedPointDiT(**TINY)
    x, t, y = batch(model)
    assert not model(x, t, y, iterations=2).sample.any()
    tokens, c = drawn(1, 4, 8), drawn(1, 8)
    for block in (*model.pre, *model.core.blocks, *model.post):
        assert torch.equal(block(tokens, block.modulation(c)), tokens)


def test_the_halves_of_the_injection_begin_as_one_map():
    core = FixedPointDiT(**{**TINY, "hidden_size": 64}).core
    bound = (6 / (128 + 128)) ** 0.5  # Xavier's, of the 2D x 2D map that they are halves of
    for half in (core.inject_z, core.inject_u):
        assert 0.98 * bound < half.weight.abs().max() <= bound
        assert half.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("settings", [{"input_skip": True}, {"injection": "gate"}])
def test_a_new_network_with_a_skip_starts_every_iteration_at_u(settings):
    core = FixedPointDiT(**TINY, **settings).core
    u, c = drawn(2, 4, 8), drawn(2, 8)
    assert torch.equal(core(drawn(2, 4, 8).flip(0), core.prepare(u, c)), u)


def test_parameters_keep_the_order_by_which_optimisers_know_them():
    for injection, order in (
        ("mlp", ["project", "inject_z", "inject_u", "inject_out", "blocks"]),
        ("gate", ["blocks", "inject_out", "adaln"]),
    ):
        core = FixedPointDiT(**TINY, injection=injection).core
        assert list(dict.fromkeys(name.split(".")[0] for name, _ in core.named_parameters())) == order


def test_the_skip_adds_no_parameters():
    with_skip, without = fixed_point_dit(input_skip=True).state_dict(), fixed_point_dit().state_dict()
    assert {key: weight.shape for key, weight in with_skip.items()} == {k: w.shape for k, w in without.items()}


# --- what goes in


@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_one_timestep_stands_for_all(network, how):
    model = network()
    x, _, y = batch(model)
    for t in (250, 250.5, torch.tensor(250.5)):
        vector = torch.full((3,), float(t))
        assert torch.equal(model(x, t, y, **how).sample, model(x, vector, y, **how).sample)


@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_time_and_class_matter_and_time_may_be_fractional(network, how):
    model = network()
    x, _, _ = batch(model)
    plain, later, other = (model(x, t, y, **how).sample for t, y in (
        (250, torch.tensor([0, 1, 2])), (250.5, torch.tensor([0, 1, 2])), (250, torch.tensor([1, 2, 3])),
    ))  # fmt: skip
    for different in (later, other):
        assert ((plain - different).abs().flatten(1).amax(1) > 1e-4).all()


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_no_label_is_the_null_class(network, how, classes):
    model = network(num_classes=classes)
    x, t, _ = batch(model)
    assert model.null_class == classes
    assert model.label_embed.num_embeddings == classes + 1  # an unconditional network has the null class alone
    assert torch.equal(model(x, t, **how).sample, model(x, t, torch.full((3,), classes), **how).sample)


@pytest.mark.parametrize("time_in_pre_post", [True, False])
def test_whether_the_outer_blocks_see_the_time(time_in_pre_post):
    model = fixed_point_dit(time_in_pre_post=time_in_pre_post)
    x, _, y = batch(model)
    # Without an iteration the implicit layer, which always sees the time, is left out.
    same = torch.equal(model(x, 10, y, iterations=0).sample, model(x, 900, y, iterations=0).sample)
    assert same == (not time_in_pre_post)


@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_a_sample_does_not_depend_on_its_batch(network, how):
    model = network()
    x, t, y = batch(model)
    together = model(x, t, y, **how).sample
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], **how).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("network", "how"), NETWORKS)
def test_interleaved_calls_equal_separate_ones(network, how):
    model, alone = network(), network()
    x, t, y = batch(model)
    first, other = model(x, t, y, **how), model(-x, 3, None, **how)
    again = model(x, t, y, **how)
    assert torch.equal(first.sample, again.sample)
    assert torch.equal(other.sample, alone(-x, 3, None, **how).sample)
    assert model.state_dict().keys() == alone.state_dict().keys()


@pytest.mark.parametrize(
    "how", [{"iterations": 2}, {"solve": Solve(stopping=FixedIterations(2))}, {"init": torch.zeros(3, 4, 8)}]
)
def test_an_explicit_network_has_nothing_to_solve(how):
    model = dit()
    with pytest.raises(ValueError, match="no iterations"):
        model(*batch(model), **how)
    with pytest.raises(ValueError, match="no iterations"):
        model.passes(2)


@pytest.mark.parametrize("how", [{}, {"iterations": 2, "solve": Solve()}])
def test_a_fixed_point_network_needs_to_know_how_to_solve(how):
    model = fixed_point_dit()
    with pytest.raises(ValueError, match="one of `iterations`"):
        model(*batch(model), **how)


@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 4, 4), (3, 2, 4, 4)])
def test_a_misshaped_init_is_refused(shape):
    model = fixed_point_dit()
    with pytest.raises(ValueError, match="init has shape") as error:
        model(*batch(model), iterations=1, init=torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "(3, 4, 8)" in str(error.value)


# --- the fixed point


@pytest.mark.parametrize("n", [0, 1, 5])
def test_iterations_are_short_for_a_solve(n):
    model = fixed_point_dit()
    ways = {"iterations": n}, {"solve": Solve(stopping=FixedIterations(n))}
    short, spelt = (model(*batch(model), **how) for how in ways)
    assert torch.equal(short.sample, spelt.sample)
    assert torch.equal(short.solution.value, spelt.solution.value)
    assert short.solution.iterations.tolist() == [n] * 3


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 0), (0, 2)])
def test_a_solve_goes_on_from_where_another_ended(n, m):
    model = fixed_point_dit(num_core=2)
    inputs = batch(model)
    begun = model(*inputs, iterations=n)
    assert torch.equal(
        model(*inputs, iterations=m, init=begun.solution.value).sample, model(*inputs, iterations=n + m).sample
    )


def test_a_solve_to_tolerance_finds_the_fixed_point():
    model = randomized(FixedPointDiT(**TINY), std=0.1)
    inputs = batch(model)
    found = model(*inputs, solve=Solve(stopping=Tolerance(1e-6, 200)))
    more = model(*inputs, iterations=1, init=found.solution.value)
    torch.testing.assert_close(found.sample, more.sample, atol=1e-5, rtol=1e-4)
    far = model(*inputs, solve=Solve(stopping=Tolerance(1e-6, 300), solver=Picard(0.5)), init=drawn(3, 4, 8))
    torch.testing.assert_close(found.sample, far.sample, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize(("num_pre", "num_core", "num_post"), [(1, 1, 1), (2, 3, 1), (1, 2, 4), (0, 3, 0), (0, 1, 2)])
def test_passes_are_what_is_run_and_the_context_is_computed_once(num_pre, num_core, num_post, n):
    model = fixed_point_dit(num_pre=num_pre, num_core=num_core, num_post=num_post)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    runs = calls_of(blocks, "forward")
    modulations = calls_of([block.adaln for block in blocks], "forward")
    prepared = calls_of([model.core], "prepare")
    model(*batch(model), iterations=n)
    assert sum(runs) == model.passes(n) == num_pre + num_core * n + num_post
    assert modulations == [1] * len(blocks)
    assert prepared == [1]


def test_passes_of_an_explicit_network_are_its_depth():
    model = dit(depth=5)
    runs = calls_of(list(model.blocks), "forward")
    model(*batch(model))
    assert sum(runs) == model.passes() == 5


def test_passes_of_a_fixed_point_network_depend_on_the_iterations():
    with pytest.raises(ValueError, match="iterations"):
        fixed_point_dit().passes()


@pytest.mark.parametrize("input_skip", [False, True])
@pytest.mark.parametrize("num_core", [1, 3])
def test_the_core_is_the_textbook_one(num_core, input_skip):
    core = randomized(MlpCore(hidden_size=8, num_heads=2, num_core=num_core, input_skip=input_skip))
    z, u, c = drawn(2, 4, 8), drawn(2, 4, 8).flip(0), drawn(2, 8)
    # f(z, u, c) = Block_K( ... Block_1( MLP([z ; P u]), c) ..., c), with the first layer of the MLP in one piece
    joined = torch.nn.Linear(16, 16)
    joined.weight.data, joined.bias = torch.cat([core.inject_z.weight, core.inject_u.weight], dim=1), core.inject_u.bias
    wanted = core.inject_out(F.gelu(joined(torch.cat([z, core.project(u)], dim=-1)), approximate="tanh"))
    wanted = wanted + u if input_skip else wanted  # ours: the blocks see u + MLP([z ; P u])
    for block in core.blocks:
        wanted = block(wanted, block.modulation(c))
    torch.testing.assert_close(core(z, core.prepare(u, c)), wanted)


@pytest.mark.parametrize("num_core", [1, 3])
def test_a_gated_core_begins_with_u_and_what_its_gate_lets_through(num_core):
    core = randomized(GatedCore(hidden_size=8, num_heads=2, num_core=num_core))
    z, u, c = drawn(2, 4, 8), drawn(2, 4, 8).flip(0), drawn(2, 8)
    shift, scale, gate = core.adaln(c)[:, None].chunk(3, dim=-1)
    wanted = u + gate * core.inject_out(F.layer_norm(z, (8,), eps=1e-6) * (1 + scale) + shift)
    for block in core.blocks:
        wanted = block(wanted, block.modulation(c))
    torch.testing.assert_close(core(z, core.prepare(u, c)), wanted)


def test_a_gate_has_a_quarter_of_the_operations_of_the_mlp_at_every_iteration():
    gate, mlp, two_blocks = (
        operations_of(FixedPointDiT(**{**TINY, "hidden_size": 64}, **settings)).per_iteration
        for settings in ({"injection": "gate"}, {"injection": "mlp"}, {"injection": "gate", "num_core": 2})
    )
    block = two_blocks - gate
    assert (gate - block) * 4 == mlp - block


@pytest.mark.parametrize("settings", [{}, {"input_skip": True}, {"injection": "gate"}], ids=str)
@pytest.mark.parametrize("outer", [0, 1])
@pytest.mark.parametrize("num_core", [1, 2])
@pytest.mark.parametrize("step", range(3))
def test_every_parameter_gets_a_gradient(num_core, step, outer, settings):
    model = fixed_point_dit(num_pre=outer, num_core=num_core, num_post=outer, **settings)
    gradient = StochasticJacobianFree((0, 3), (1, 3)).draw(generator("step", step))
    model(*batch(model, 4), solve=Solve(gradient=gradient)).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_with_a_skip_the_pre_blocks_are_trained_through_it_too():
    model = fixed_point_dit(input_skip=True)
    torch.nn.init.zeros_(model.core.project.weight)
    solve = Solve(gradient=MultiStepJacobianFree(0, 2))
    model(*batch(model), solve=solve).sample.square().mean().backward()
    assert all(p.grad.any() for p in model.pre.parameters())


def test_the_pre_blocks_are_trained_through_the_injection_alone():
    # z starts at u, yet is detached: with P = 0 nothing of the gradient is left for the pre blocks.
    model = fixed_point_dit()
    torch.nn.init.zeros_(model.core.project.weight)
    solve = Solve(gradient=MultiStepJacobianFree(0, 2))
    model(*batch(model), solve=solve).sample.square().mean().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.pre.parameters())
    assert model.core.inject_z.weight.grad.any()


def test_exits_are_the_outputs_of_shorter_solves():
    model = fixed_point_dit()
    inputs = batch(model)
    output = model(*inputs, solve=Solve(stopping=FixedIterations(4), exits=(1, 3, 4)))
    assert output.exits.keys() == {1, 3, 4}
    for k, sample in output.exits.items():
        assert torch.equal(sample, model(*inputs, iterations=k).sample)
    assert torch.equal(output.exits[4], output.sample)


def test_a_network_without_exits_asked_for_has_none():
    model, explicit = fixed_point_dit(), dit()
    assert model(*batch(model), iterations=2).exits == {}
    output = explicit(*batch(explicit))
    assert (output.exits, output.solution) == ({}, None)


def test_half_precision_comes_out_as_it_went_in():
    model = fixed_point_dit().to(torch.bfloat16)
    x, t, y = batch(model)
    output = model(x, t, y, solve=Solve(stopping=FixedIterations(3), solver=Picard(0.5)), init=torch.zeros(3, 4, 8))
    assert output.sample.dtype == output.solution.value.dtype == torch.bfloat16
    full = fixed_point_dit()(
        x, t, y, solve=Solve(stopping=FixedIterations(3), solver=Picard(0.5)), init=torch.zeros(3, 4, 8)
    )
    assert F.cosine_similarity(output.sample.float().flatten(), full.sample.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("network", [DiT, FixedPointDiT])
def test_what_blocks_add_to_is_float32_under_autocast_and_as_the_weights_are_else(network):
    model, iterations = (dit(), {}) if network is DiT else (fixed_point_dit(), {"iterations": 3})
    seen = set()
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.register_forward_hook(lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(2, 2, 4, 4), 5.0, **iterations)
    assert seen == {torch.float32}
    seen.clear()
    model.bfloat16()(torch.zeros(2, 2, 4, 4), 5.0, **iterations)
    assert seen == {torch.bfloat16}
