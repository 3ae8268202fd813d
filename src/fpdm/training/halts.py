"""What ends a run though its weights are sound: images that do not come. Each is told in one message."""

from collections.abc import Iterator

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
