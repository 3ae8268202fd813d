"""Many calls of one pipeline at once, each under a plan of its own: continuous batching."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fpdm.fixedpoint import Picard
from fpdm.models import Denoiser, DiT, Output
from fpdm.request import Request
from fpdm.sampling import Call, check_shared, original


def check_parts(network: Denoiser) -> None:
    """Raises ValueError for a network whose blocks cannot be called apart from it, or that has nothing to iterate."""
    if hasattr(network, "_hf_hook"):
        raise ValueError("an offloaded network is called as a whole: draw its calls one after the other")
    if original(network) is not network:
        raise ValueError("this network was compiled as a whole: have `compile_repeated_blocks()` compile its blocks")
    if isinstance(network, DiT):
        raise ValueError("a network without iterations gains nothing here: draw its images in batches")


def courses_of(
    pipe: Any, calls: Iterable[Mapping[str, Any] | None], one_by_one: bool
) -> Iterable[Generator[Call, Output, Any] | None]:
    """The courses of a pipeline's calls, None for None. A list is checked before any of it begins, and left without
    None; what comes from an iterator, or is to be checked `one_by_one`, when its turn comes: what it raises is its own.
    """
    if one_by_one or not isinstance(calls, Sequence):
        return map(partial(course_of, pipe), calls)
    there = [call for call in calls if call is not None]
    return [course_of(pipe, numbered(pipe, number, call)) for number, call in enumerate(there)]


def numbered(pipe: Any, number: int, call: Mapping[str, Any]) -> Request:
    """A call of a list, checked. Its number is a note to what is raised."""
    try:
        return shared(pipe, call)
    except Exception as error:
        error.add_note(f"in call {number}")
        raise


def shared(pipe: Any, call: Mapping[str, Any]) -> Request:
    """The request of a call among others, which are all solved by Picard's iteration, those of tuned plans too."""
    asked: Request = pipe.request(**call)
    asked = replace(asked, solver=Picard()) if asked.tuned else asked
    check_shared(asked.solver)
    return asked


def course_of(pipe: Any, call: Mapping[str, Any] | Request | None) -> Generator[Call, Output, Any] | None:
    """The course of a call, which is checked when it begins."""

    def begun(call: Mapping[str, Any] | Request) -> Generator[Call, Output, Any]:
        asked = call if isinstance(call, Request) else shared(pipe, call)
        return (yield from pipe.drawing(asked, alone=False))

    return None if call is None else begun(call)
