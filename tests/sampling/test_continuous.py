"""Courses that share their passes: each comes to what it would come to alone, and is begun when there is room."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm.fixedpoint import Anderson, Picard
from fpdm.sampling import REUSE, Guidance, continuous, cost_of, course, make_plan
from tests.sampling.tiny import CALM, DIT, MODEL, count_rows, run, tiny

GUIDED = Guidance(3.0, (200, 800), share=0.5)


def request(index=0, images=1, iterations=(2, 1, 3), model=CALM, **choices):
    """Keyword arguments of `run`."""
    indices, labels = list(range(index, index + images)), [(index + i) % 3 for i in range(images)]
    return {"indices": indices, "labels": labels, "plan": make_plan(cost_of(model), iterations=iterations), **choices}


def together(requests, most, model=CALM):
    found = list(continuous((run(model, by=course, **request) for request in requests), most))
    assert sorted(number for number, _ in found) == list(range(len(requests)))
    return found


def assert_same(one, other):
    (images, report), (others, alone) = one, other
    torch.testing.assert_close(images, others, rtol=1e-3, atol=1e-4)
    same = ("planned", "spent", "most", "total_passes", "operations", "timesteps", "iterations", "running", "status")
    assert {name: getattr(report, name) for name in same} == {name: getattr(alone, name) for name in same}
    for row, right in zip(report.residuals, alone.residuals, strict=True):
        assert row == pytest.approx(right, rel=1e-2, abs=1e-5)


requests = st.builds(
    request,
    st.integers(0, 9),
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    tolerance=st.sampled_from([None, 0.3, 0.02]),
    reuse=st.sampled_from(REUSE),
    scheduler=st.sampled_from(["ddpm", "ddim", "unipc"]),
    guidance=st.sampled_from([Guidance(), GUIDED]),
)


@settings(max_examples=25)
@given(st.lists(requests, min_size=1, max_size=6), st.integers(1, 8))
def test_every_course_comes_to_what_it_comes_to_alone(requests, most):
    for number, found in together(requests, most):
        assert_same(found, run(CALM, **requests[number]))


@pytest.mark.parametrize("model", [MODEL, tiny(injection="gate")], ids=["group", "gate"])
def test_groups_of_blocks_and_networks_of_the_other_kind(model):
    for number, found in together(pair := [request(0, 2, model=model), request(4, 1, (4, 4), model)], 8, model):
        assert_same(found, run(model, **pair[number]))


@pytest.mark.parametrize("most", [1, 3, 5])
def test_the_batch_is_no_larger_than_asked_and_courses_begin_when_there_is_room(most):
    begun, ended = [], []

    def courses():
        for number in range(8):
            begun.append((number, len(ended)))
            yield run(CALM, by=course, **request(number, iterations=(1 + number % 3, 2)))

    rows, remove = count_rows(CALM)
    for number, _ in continuous(courses(), most):
        ended.append(number)
    remove()
    assert max(rows) == most
    assert begun[:most] == [(number, 0) for number in range(most)]
    assert all(number - done <= most for number, done in begun)
    assert sum(rows) == sum(2 * 2 + 1 + number % 3 + 2 for number in range(8))  # every evaluation was of use


@pytest.mark.parametrize("images", [(7, 8), (*[1] * 7, 8), (8, 1, 8, 1), (3, 3, 3, 3, 3)])
def test_calls_of_several_images_wait_until_they_fit(images):
    rows, remove = count_rows(CALM)
    together([request(10 * number, n, (1 + number % 3, 2)) for number, n in enumerate(images)], 8)
    remove()
    assert max(rows) <= 8


def test_calls_that_grow_under_guidance_wait_until_they_fit():
    late = Guidance(3.0, (0, 500))  # at the last timesteps only
    rows, remove = count_rows(CALM)
    asked = [request(number, iterations=(2, 1 + number % 2, 2), guidance=late) for number in range(8)]
    for number, found in together(asked, 8):
        assert_same(found, run(CALM, **asked[number]))
    remove()
    assert 8 in rows


def test_a_call_that_is_larger_than_the_batch_is_alone_in_it():
    rows, remove = count_rows(CALM)
    together([request(0, 1), request(1, 5), request(6, 1)], 3)
    remove()
    assert max(rows) == 5


def test_samples_that_finish_early_are_not_iterated_on():
    early, late = request(0, iterations=(1,)), request(1, iterations=(6,))
    rows, remove = count_rows(CALM)
    found = together([early, late], 2)
    remove()
    assert [number for number, _ in found] == [0, 1]
    assert rows.count(2) == 2  # pre blocks of both, and one iteration
    assert sum(rows) == (2 + 1) + (2 + 6)


def test_a_call_larger_than_the_batch_is_made_alone():
    big, small = request(0, 5), request(7)
    for number, found in together([small, big, small], 2):
        assert_same(found, run(CALM, **[small, big, small][number]))


@pytest.mark.parametrize("tolerances", [(None, None), (None, 0.02), (0.02, None), (0.02, 0.02)])
def test_one_that_diverges_is_told_and_leaves_the_others_alone(tolerances):
    def spoil(noise):
        return noise * torch.inf

    broken, good = request(0, spoil=spoil, tolerance=tolerances[0]), request(1, tolerance=tolerances[1])
    found = dict(together([broken, good, good], 3))
    alone = run(CALM, **broken)[1]
    assert found[0][1].diverged == 1
    assert (found[0][1].status, found[0][1].spent, found[0][1].running) == (alone.status, alone.spent, alone.running)
    for number in (1, 2):
        assert_same(found[number], run(CALM, **good))


@pytest.mark.parametrize("where", ["course", "source"])
def test_a_course_that_fails_lets_those_under_way_finish_and_no_other_begin(where):
    begun = []

    def fail(*_):
        raise RuntimeError("no more")

    def courses():
        for number in range(5):
            begun.append(number)
            if number == 1 and where == "source":
                fail()
            on_step = fail if number == 1 else None
            yield run(CALM, by=course, **request(number, on_step=on_step))

    found = {}

    def collect():
        for number, result in continuous(courses(), 3):
            found[number] = result

    with pytest.raises(RuntimeError, match="no more"):
        collect()
    expected = [0, 2] if where == "course" else [0]
    assert sorted(found) == expected
    assert begun == list(range(3 if where == "course" else 2))
    for number in expected:
        assert_same(found[number], run(CALM, **request(number)))


def test_what_cannot_share_is_refused():
    with pytest.raises(ValueError, match="gains nothing here: draw its images in batches"):
        list(continuous([run(DIT, by=course, plan=make_plan(cost_of(DIT), num_steps=2))], 4))
    for solver in (Anderson(), Picard(0.5)):
        with pytest.raises(ValueError, match="samples at different iterations share Picard steps only"):
            list(continuous([run(CALM, by=course, **request(solver=solver))], 4))


def test_nothing_to_draw_is_nothing():
    assert list(continuous([], 4)) == []
