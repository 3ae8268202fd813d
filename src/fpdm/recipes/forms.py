"""Forms of a fixed point network, each with the training that suits it. docs/reproduction.md compares them."""

import re
from typing import Any

FORM = re.compile(r"(\d+)\+(\d+)\+(\d+)")


def form(name: str) -> dict[str, Any]:
    """The fields of a config that `--form A+K+B` stands for: A explicit blocks, K in the shared group of the fixed
    point, B explicit ones after it.

    Between explicit blocks the fixed point is trained to be solved, by short solves of random length. Where all blocks
    are shared, it is trained to be followed: a step makes one pass through them, as sampling does at each timestep, and
    half of the steps go on with the solution of a noisier timestep. Both have two changes to the paper's network:
    explicit blocks see the timestep, and the injection has a skip.

    Raises ValueError for another text.
    """
    if not (found := FORM.fullmatch(name)) or not int(found[2]):
        raise ValueError(
            f"form is {name!r}; it must be explicit, shared (at least one) and explicit blocks, like 1+1+1"
        )
    pre, core, post = map(int, found.groups())
    network = {"num_pre": pre, "num_core": core, "num_post": post, "injection": "mlp"}
    changed = {"time_in_pre_post": True, "input_skip": True}
    if pre == post == 0:
        return {**network, **changed, "no_grad_max": 0, "with_grad_max": core, "warm_share": 0.5}
    most = 3 if core == 1 else 6  # a group makes these divided by its blocks
    return {**network, **changed, "no_grad_max": most, "with_grad_max": most, "warm_share": 0.0}
