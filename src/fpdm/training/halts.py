"""What ends a run though its weights are sound: images that do not come, memory that is not there. Each is told in one
message."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fpdm.training.draws import Examples


class Halted(ValueError):
    """A step cannot be made. Weights, average and moments are as the step before left them, and worth saving."""


def fetched(batches: Iterator[Examples], parts: int) -> Iterator[list[Examples]]:
    """The parts of one step after the other. Raises Halted for images that cannot be read, or whose reader died."""
    while True:
        try:
            some = [next(batches) for _ in range(parts)]
        except StopIteration:
            return
        except Exception as error:
            if not reader_died(error):
                raise
            raise Halted(
                "a process that reads images has died, perhaps for want of memory (in a container, of shared memory): "
                "try fewer --workers"
            ) from error
        failure = next((batch.failure for batch, _ in some if batch.failure is not None), None)
        if failure is not None:
            raise Halted(failure)
        yield some


def reader_died(error: Exception) -> bool:
    """Whether a DataLoader raised this because one of its workers is no more. Where it pins memory, a thread finds that
    nobody answers any more."""
    said = str(error)
    unanswered = isinstance(error, OSError | EOFError) and "in pin memory thread" in said
    return said.startswith("DataLoader worker") or unanswered


def lacks_memory(error: RuntimeError) -> bool:
    """Whether memory was asked for that is not there, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_needed(kind: type[ValueError]) -> Iterator[None]:
    """Within the context, memory that is not there is told of by an error of this kind, which names the remedies."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what the step holds is room to save in
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        raise kind(
            f"a step needs more memory than there is{f', {asked[1]} at once' if asked else ''}: do it in more parts "
            "with --accumulation, recompute with --checkpointing, or take a smaller --batch-size, which a run with a "
            "checkpoint cannot change. `fpdm info` with the same options counts what a step takes"
        ) from error
