"""Products with the transposed Jacobian of f, for which gradients of parameters would be computed in vain.

torch's own operations are spared by autograd; an operation with a backward pass of its own asks `only_of_inputs`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Not a context variable: backward passes on CUDA run in a thread of their own.
_depth = 0


@contextmanager
def without_parameters() -> Iterator[None]:
    """Gradients of inputs only are wanted of the backward passes inside."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def only_of_inputs() -> bool:
    """Whether the backward pass that is running is to leave gradients of parameters out."""
    return _depth > 0
