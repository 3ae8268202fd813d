"""What else may be made of a computation than its values."""

import torch


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or a forward derivative is wanted: with or without `no_grad`."""
    transforms = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return transforms is not None or torch.autograd.forward_ad._current_level >= 0


def can_ask() -> bool:
    """Whether the values of a tensor may decide what is computed next: not where a graph is recorded for others, by
    torch.compile or torch.export, or tensors stand for batches of them."""
    return not (torch.compiler.is_compiling() or is_transformed())
