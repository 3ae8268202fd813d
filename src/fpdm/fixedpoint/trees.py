"""Trees: a tensor, None, or (named) tuples of trees. Contexts and solvers' states are trees of tensors (batch, ...)."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
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


def joined(first: Tree, second: Tree) -> Tree:
    """The samples of one tree, then those of another of the same form."""
    return together(lambda one, other: torch.cat([one, other]), first, second)


def put(tree: Tree, places: Tensor, other: Tree) -> None:
    """Write the samples of `other` into those at `places` (n,) of `tree`, in place."""
    together(lambda one, new: one.index_copy_(0, places, new.to(one.dtype)), tree, other)


def overwrite(tree: Tree, other: Tree) -> None:
    """Write `other` into `tree`, in place."""
    together(lambda one, new: one.copy_(new), tree, other)


def together(function: Callable[[Tensor, Tensor], Tensor], first: Tree, second: Tree) -> Tree:
    """The tree of what `function` makes of each two tensors in the same place."""
    others = iter(leaves(second))
    return mapped(lambda tensor: function(tensor, next(others)), first)


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from leaves(part)
