"""Many calls at once: each returns what it returns alone, and what cannot be drawn so is refused."""

import pytest
import torch

from fpdm import DiT
from tests.pipelines import make_pipeline


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


CALLS = [
    {"class_labels": ["cat", "owl"], "budget": 12, "seed": 1},
    {
        "class_labels": 1,
        "num_images": 3,
        "num_inference_steps": 2,
        "iterations": [1, 3],
        "seed": 2,
        "scheduler": "unipc",
    },
    {"budget": 20, "tolerance": 0.5, "seed": 3, "output_type": "np"},
    {"class_labels": 0, "budget": 12, "guidance_scale": 3.0, "seed": 4, "return_dict": False},
]


@pytest.mark.parametrize("as_list", [True, False])
def test_calls_at_once_return_what_they_return_alone(pipe, as_list):
    calls = [{"output_type": "latent", **call} for call in CALLS]
    found = dict(pipe.continuous(calls if as_list else iter(calls), batch_size=4))
    assert sorted(found) == list(range(len(calls)))
    for number, call in enumerate(calls):
        alone = pipe(**call)
        images, report = found[number] if isinstance(alone, tuple) else (found[number].images, found[number].report)
        torch.testing.assert_close(torch.as_tensor(images), torch.as_tensor(alone[0]), rtol=1e-3, atol=1e-3)
        assert report.spent == (alone[1] if isinstance(alone, tuple) else alone.report).spent


@pytest.mark.parametrize("several", [False, True], ids=["one", "a list"])
def test_calls_at_once_draw_from_generators_as_they_would_alone(pipe, several):
    def generator():
        made = [torch.Generator().manual_seed(n) for n in range(2)]
        return made if several else made[0]

    call = {"class_labels": [0, 1], "budget": 12, "output_type": "latent", "scheduler": "ddpm"}
    ((_, found),) = pipe.continuous([{**call, "generator": generator()}])
    torch.testing.assert_close(found.images, pipe(**call, generator=generator()).images, rtol=1e-3, atol=1e-3)


def test_calls_at_once_draw_from_torchs_own_generator_as_they_would_alone(pipe):
    call = {"class_labels": [0, 1], "budget": 12, "output_type": "latent"}
    torch.manual_seed(4)
    alone = pipe(**call).images
    torch.manual_seed(4)
    ((_, found),) = pipe.continuous([call])
    torch.testing.assert_close(found.images, alone, rtol=1e-3, atol=1e-3)


def test_a_list_of_calls_is_refused_whole_and_an_iterator_when_it_comes_to_it(pipe):
    calls = [{"budget": 12, "output_type": "latent"}, {"budget": 12, "class_labels": "dgo"}]
    with pytest.raises(ValueError, match="dgo"):
        next(pipe.continuous(calls))
    found = pipe.continuous(iter(calls), batch_size=1)
    assert next(found)[0] == 0
    with pytest.raises(ValueError, match="dgo"):
        next(found)


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        ({"batch_size": 0}, {"budget": 12}, "batch_size is 0; it must be at least 1"),
        ({}, {"budget": 12, "solver": "anderson"}, "share Picard steps only"),
    ],
)
def test_calls_that_cannot_be_made_at_once_are_refused(pipe, change, call, message):
    with pytest.raises(ValueError, match=message):
        list(pipe.continuous([call], **change))


def test_what_a_call_raises_tells_its_number(pipe):
    calls = [{"budget": 12}, {"budget": 12, "class_labels": "dgo"}, {"budget": 12, "class_label": 0}]
    for broken, kind in ((calls[:2], ValueError), (calls[::2], TypeError)):
        for given in (broken, iter(broken)):
            with pytest.raises(kind) as raised:
                list(pipe.continuous(given))
            assert raised.value.__notes__ == ["in call 1"]


def test_what_calls_raise_may_be_returned_and_the_others_are_drawn(pipe):
    def cancel(*_):
        raise RuntimeError("the client went away")

    good = {"budget": 12, "seed": 1, "output_type": "latent"}
    calls = [good, {**good, "class_labels": "dgo"}, {**good, "callback_on_step_end": cancel}, {"budgets": 12}, good]
    for given in (calls, iter(calls)):
        found = dict(pipe.continuous(given, batch_size=2, return_exceptions=True))
        assert [type(found[number]).__name__ for number in (1, 2, 3)] == ["ValueError", "RuntimeError", "TypeError"]
        for number in (0, 4):
            torch.testing.assert_close(found[number].images, pipe(**good).images, rtol=1e-3, atol=1e-3)
        assert len(found) == 5


def test_calls_that_are_not_there_yet_do_not_hold_up_those_under_way(pipe):
    finished = []

    def calls():
        yield None
        yield {"budget": 12, "seed": 0}
        while not finished:  # it would never end, if those under way waited
            yield None
        yield {"budget": 12, "seed": 1}

    for number, _ in pipe.continuous(calls()):
        finished.append(number)
    assert finished == [0, 1]


def test_a_list_is_checked_without_drawing_random_numbers(pipe):
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state(), generator.get_state()
    with pytest.raises(ValueError, match="dgo"):
        list(pipe.continuous([{"budget": 12}, {"budget": 12, "generator": generator}, {"class_labels": "dgo"}]))
    with pytest.raises(ValueError, match="share Picard steps only"):
        list(pipe.continuous([{"budget": 12}, {"budget": 12, "solver": "anderson"}]))
    assert all(map(torch.equal, before, (torch.get_rng_state(), generator.get_state())))


def test_an_explicit_network_gains_nothing_from_calls_at_once():
    with pytest.raises(ValueError, match="gains nothing here: draw its images in batches"):
        list(make_pipeline(DiT, depth=2).continuous([{"budget": 12}], return_exceptions=True))


def test_an_offloaded_network_is_not_called_in_parts():
    pipe = make_pipeline()
    pipe.transformer._hf_hook = object()
    with pytest.raises(ValueError, match="an offloaded network is called as a whole"):
        list(pipe.continuous([{"budget": 12}]))


def test_calls_at_once_show_no_bars_and_later_ones_do(capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    list(pipe.continuous([{"budget": 12}]))
    assert capsys.readouterr().err == ""
    assert pipe._progress_bar_config == {"disable": False, "desc": "drawing"}
