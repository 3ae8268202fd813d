"""Trees: a tensor, None, or (named) tuples of trees. Contexts and solvers' states are trees of tensors (batch, ...)."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Tree = TypeVar("Tree")


def mapped(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """`tree` with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)  # type: ignore[return-value]
    if isinstance(tree, tuple):
        parts = [mapped(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)  # type: ignore[return-value]
    return tree


def detach(tree: Tree) -> Tree:
    """`tree` with every tensor detached."""
    return mapped(Tensor.detach, tree)


def select(tree: Tree, places: Tensor) -> Tree:
    """The samples at `places` (n,) of every tensor."""
    return mapped(lambda tensor: tensor.index_select(0, places), tree)
