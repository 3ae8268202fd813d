"""What is spent: exactly the plan, or under a tolerance at most that, image by image."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpdm.fixedpoint import Anderson, Broyden, Picard
from fpdm.sampling import REUSE, SCHEDULERS, Guidance, calls_of, cost_of, make_plan
from fpdm.sampling.spending import Purse
from tests.sampling.tiny import CALM, DIT, SOLVERS_TESTED, TEMPLATE, contracting, count_rows, run, tiny

IMAGES = {"indices": range(4), "labels": [0, 1, 2, 0]}
# Many iterations at first, where all images save some, and few later.
SAVING = make_plan(cost_of(CALM), iterations=[9, 3, 3, 3, 3])
EVEN = make_plan(cost_of(CALM), iterations=[6] * 5)
GUIDANCES = (Guidance(), Guidance(3.0), Guidance(3.0, (200, 800)), Guidance(2.0, share=0.5, channels=1))

# A thousand random plans


SIZES_TESTED = [
    {"num_pre": pre, "num_core": core, "num_post": post}
    for pre, core, post in ((1, 1, 1), (2, 1, 1), (1, 3, 2), (0, 3, 0))
]
NETWORKS = [
    *(tiny(hidden_size=8, **size) for size in SIZES_TESTED),
    *(contracting(hidden_size=8, **size) for size in SIZES_TESTED),
    DIT,
]


def random_plan(cost, draw, scheduler):
    calls = calls_of(TEMPLATE, scheduler)
    num_steps = draw.choice(calls[: 4 // calls.step])
    if not cost.per_iteration:
        return make_plan(cost, num_steps=num_steps, calls=calls)
    if draw.random() < 0.3:
        return make_plan(cost, iterations=[draw.randint(1, 4) for _ in range(num_steps)], calls=calls)
    shape = draw.choice(["constant", "rising", "linear:-1.3", "cosine:0.8", [draw.random() + 0.1] * num_steps])
    budget = num_steps * cost.passes(1) + draw.randint(0, 8)
    return make_plan(cost, budget=budget, num_steps=num_steps, allocation=shape, calls=calls)


@pytest.mark.parametrize("seed", range(10))
def test_random_plans_spend_exactly_what_they_planned_and_under_a_tolerance_no_more(seed):
    draw = random.Random(seed)
    for _ in range(100):  # ten times
        model, scheduler = draw.choice(NETWORKS), draw.choice(SCHEDULERS)
        plan, images = random_plan(cost_of(model), draw, scheduler), draw.randint(1, 2)
        tolerance = draw.choice([None, None, 0.3, 0.03, 1e-3])
        how = {
            "scheduler": scheduler,
            "reuse": draw.choice(REUSE),
            "guidance": draw.choice(GUIDANCES),
            "solver": draw.choice(SOLVERS_TESTED),
            "tolerance": tolerance,
        }
        rows, remove = count_rows(model)
        _, report = run(model, plan=plan, indices=range(images), labels=[1] * images, **how)
        remove()
        # Counted by hand, guidance's second half included: the report says what was really done.
        assert sum(rows) == pytest.approx(images * report.total_passes), how
        assert report.planned == plan.planned
        assert report.spent <= report.most <= plan.planned, how
        assert sum(report.passes) == pytest.approx(report.spent)
        if tolerance is None:
            assert report.spent == report.most == plan.planned, how
            assert report.passes == list(plan.passes)
        if how["guidance"].scale == 1:
            assert report.total_passes == report.spent


# Under a tolerance


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
@pytest.mark.parametrize("plan", [SAVING, EVEN], ids=["saving", "even"])
def test_what_an_image_spends_and_shows_does_not_depend_on_its_batch(plan, solver, guidance):
    choices = {"plan": plan, "tolerance": 1e-2, "solver": solver, "guidance": guidance}
    together, report = run(CALM, **IMAGES, **choices)
    alone = [run(CALM, indices=[i], labels=[label], **choices) for i, label in enumerate(IMAGES["labels"])]
    for image, (own, own_report) in zip(together, alone, strict=True):
        torch.testing.assert_close(image, own[0], atol=1e-4, rtol=0)
        assert own_report.spent == own_report.most <= plan.planned
    spent = torch.tensor([own_report.passes for _, own_report in alone])
    assert spent.mean(0).tolist() == pytest.approx(report.passes)
    assert report.most == spent.sum(1).max()


def test_images_differ_in_what_they_need():
    # Otherwise the test above would compare nothing.
    alone = [run(CALM, indices=[i], labels=[label], plan=EVEN, tolerance=1e-2)[1].spent for i, label in
             enumerate(IMAGES["labels"])]  # fmt: skip
    assert len(set(alone)) > 1
    assert max(alone) < EVEN.planned


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0)])
def test_what_is_left_over_is_spent_at_later_timesteps_and_never_before(guidance):
    _, report = run(CALM, **IMAGES, plan=SAVING, tolerance=1e-2, guidance=guidance)
    assert report.passes[0] < SAVING.passes[0]
    assert any(spent > planned for spent, planned in zip(report.passes[1:], SAVING.passes[1:], strict=True))
    assert report.most <= SAVING.planned
    for steps in range(1, 6):
        assert sum(report.passes[:steps]) <= sum(SAVING.passes[:steps])


def test_a_larger_budget_gives_solves_that_did_not_converge_more_and_others_the_same():
    few, enough, more = (
        run(CALM, **IMAGES, plan=make_plan(cost_of(CALM), num_steps=4, iterations=n), tolerance=1e-2)[1]
        for n in (3, 20, 30)
    )
    assert few.spent == few.planned
    assert few.spent < enough.spent < enough.planned
    assert enough.spent == more.spent
    assert all(status == {"converged": 4} for status in enough.status)


def test_the_order_of_a_batch_does_not_matter():
    order = [2, 0, 3, 1]
    choices = {"plan": SAVING, "tolerance": 1e-2, "scheduler": "ddpm", "guidance": Guidance(2.0)}
    images, report = run(CALM, **IMAGES, **choices)
    shuffled, other = run(CALM, indices=order, labels=[IMAGES["labels"][i] for i in order], **choices)
    torch.testing.assert_close(shuffled, images[order], atol=1e-4, rtol=0)
    assert (other.passes, other.running, other.status) == (report.passes, report.running, report.status)


@pytest.mark.parametrize("tolerance", [1e-9, 1e9])
def test_a_tolerance_that_is_never_or_at_once_reached(tolerance):
    images, report = run(CALM, **IMAGES, plan=EVEN, tolerance=tolerance)
    if tolerance < 1:
        torch.testing.assert_close(images, run(CALM, **IMAGES, plan=EVEN)[0], atol=1e-4, rtol=0)
        assert report.spent == EVEN.planned
        assert report.status == [{"iteration_limit": 4}] * 5
    else:
        assert report.passes == [cost_of(CALM).passes(1)] * 5
        assert report.status == [{"converged": 4}] * 5


def test_an_explicit_network_has_nothing_to_stop():
    plan = make_plan(cost_of(DIT), budget=12)
    images, report = run(DIT, plan=plan, tolerance=1e-2)
    assert torch.equal(images, run(DIT, plan=plan)[0])
    assert report.spent == plan.planned


# Pooled


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("tolerance", [0.03, 1e-2, 1e-3])
def test_a_pooled_batch_never_spends_more_in_all_than_was_planned(guidance, tolerance):
    _, report = run(CALM, **IMAGES, plan=EVEN, tolerance=tolerance, pooled=True, guidance=guidance)
    assert report.spent <= report.planned


def test_an_image_of_a_pooled_batch_may_spend_what_others_saved():
    _, report = run(CALM, **IMAGES, plan=SAVING, tolerance=1e-2, pooled=True)
    assert report.spent <= report.planned < report.most


counts = st.lists(st.integers(1, 8), min_size=1, max_size=6)


@given(counts, st.integers(1, 5), st.sampled_from(GUIDANCES), st.booleans(), st.randoms(use_true_random=False))
def test_no_purse_is_ever_overdrawn(plan, images, guidance, pooled, chance):
    purse = Purse(images, 0.1, pooled)
    spent, planned = [0] * (2 * images), [0] * (2 * images)
    for n in plan:
        guided = guidance.scale != 1 and chance.random() < 0.7
        limits = purse.stopping(n, guidance, guided).max_iterations
        assert len(limits) == (2 * images if guided else images)
        assert min(limits) >= 1  # a solve of no iterations would return its start
        used = [chance.randint(1, limit) for limit in limits]
        for place, (mine, due) in enumerate(zip(used, purse.planned(n, guidance, guided), strict=True)):
            spent[place] += mine
            planned[place] += due
        purse.spend(n, guidance, guided, used)
    halves = [(spent[:images], planned[:images]), (spent[images:], planned[images:])]
    for used, due in halves:
        assert sum(used) <= sum(due)
        assert pooled or all(a <= b for a, b in zip(used, due, strict=True))


def test_a_pool_is_shared_out_evenly():
    purse = Purse(3, 0.1, pooled=True)
    purse.spend(5, Guidance(), False, [1, 5, 2])  # 7 are left over
    assert purse.stopping(4, Guidance(), False).max_iterations == (6, 6, 6)
    own = Purse(3, 0.1)
    own.spend(5, Guidance(), False, [1, 5, 2])
    assert own.stopping(4, Guidance(), False).max_iterations == (8, 4, 7)


# One image that diverges


BAD = {"nan": float("nan"), "infinite": float("inf"), "huge": 1e30}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("solver", SOLVERS_TESTED)
def test_an_image_that_is_lost_takes_no_other_along(solver, reuse, value):
    def spoil(noise):
        noise[1] = value
        return noise

    choices = {"solver": solver, "reuse": reuse, "plan": EVEN, "scheduler": "dpm++"}
    clean, report = run(CALM, **IMAGES, **choices)
    images, spoilt = run(CALM, **IMAGES, **choices, spoil=spoil)
    assert torch.equal(images[[0, 2, 3]], clean[[0, 2, 3]])
    assert report.diverged == 0
    if value == 1e30:  # normalised away in the network, clipped in the prediction
        return
    assert not images[1].isfinite().all()
    assert spoilt.diverged == 1
    assert spoilt.status == [{"completed": 3, "diverged": 1}] * 5


def lose_the_second(noise):
    noise[1] = float("nan")
    return noise


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_that_is_lost_under_a_tolerance_takes_no_other_along(scheduler, guidance):
    choices = {"plan": EVEN, "tolerance": 0.03, "guidance": guidance, "scheduler": scheduler, "reuse": "linear"}
    clean, _ = run(CALM, **IMAGES, **choices)
    images, report = run(CALM, **IMAGES, **choices, spoil=lose_the_second)
    torch.testing.assert_close(images[[0, 2, 3]], clean[[0, 2, 3]], atol=1e-4, rtol=0)
    assert not images[1].isfinite().all()
    assert report.diverged == 1
    assert [status["diverged"] for status in report.status] == [1] * len(report.status)
    assert [row[0] for row in report.running] == [4] * len(report.running)  # it ends after one iteration


def test_an_image_that_is_lost_from_a_pooled_batch_leaves_its_iterations_to_the_others():
    images, report = run(CALM, **IMAGES, plan=EVEN, tolerance=1e-3, pooled=True, spoil=lose_the_second)
    assert images[[0, 2, 3]].isfinite().all()
    assert report.spent <= report.planned < report.most
