"""Messages that name the nearest right name, or the extra that is missing."""

import difflib
import importlib.util
from collections.abc import Iterable

MOST_LISTED = 20


INJECTIONS = ("mlp", "gate")  # of fixed point networks: see `fpdm.models.core`
# What a call of the pipeline may say of its plan beside the budget: if any, no tuned plan is taken.
PLANNED = ("num_inference_steps", "iterations", "allocation", "reuse", "solver", "tolerance", "scheduler")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The text of an error about an unknown `name`: the nearest known name, and all of them where they are few.

    >>> unknown("recipe", "digitz", ["digits", "images"])
    "unknown recipe 'digitz'. Did you mean 'digits'? Known: digits, images"
    """
    known = list(known)
    near = nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    listed = f" Known: {', '.join(known)}" if len(known) <= MOST_LISTED or not near else ""
    return f"unknown {kind} {name!r}.{hint}{listed}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` begins, or else the most similar one, if any is similar."""
    known = list(known)
    begun = [option for option in known if name and option.startswith(name)]
    return next(iter(begun or difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def needs(module: str, extra: str) -> None:
    """Raises ImportError, naming the extra of this package to install, if `module` is not there."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed: pip install 'fpdm[{extra}]'")
