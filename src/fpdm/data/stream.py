"""The endless, ordered stream of training images: which image is used at which step is a function, not a state.

Position p = step * batch_size + slot runs through the data set in an order that is shuffled anew each epoch, keyed by
(seed, epoch); crop and flip are keyed by (seed, step, slot). So a resumed run, and one on other devices or with other
workers, sees the same images. A source in several chunks is read a few of them at a time.
"""

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from fpdm.data.sources import BrokenImage, Source
from fpdm.keyed import generator
from fpdm.signals import handled_by

Prepare = Callable[[Any, torch.Generator], Tensor]
WINDOW = 8  # chunks whose images are mixed
MOST_BROKEN = 100  # unreadable images in a row after which a data set is given up


class Batch(NamedTuple):
    """Part of a step's batch.

    step     of the training
    slots    places in the step's whole batch
    images   (B, C, H, W) float32 in [-1, 1]
    labels   (B,) int64
    broken   unreadable files met
    failure  why there are no images: a message to be raised by the main process, where it is one line
    """

    step: int
    slots: list[int]
    images: Tensor
    labels: Tensor
    broken: list[str]
    failure: str | None


class Item(NamedTuple):
    """One image of a batch: see `Batch`."""

    step: int
    slot: int
    image: Tensor
    label: int
    broken: list[str]
    failure: str | None = None


@lru_cache(maxsize=2)  # the end of one epoch and the start of the next
def epoch_order(chunks: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    """The order (N,) in which an epoch goes through the N images in `chunks`: the chunks are shuffled and shared out to
    windows of at most `WINDOW`, about equal in number, and the images of a window are shuffled."""
    ends, chance = list(accumulate(chunks)), generator(seed, "order", epoch)
    shuffled = torch.randperm(len(chunks), generator=generator(seed, "chunks", epoch))
    parts = []
    for window in shuffled.tensor_split(-(-len(chunks) // WINDOW)):
        images = torch.cat([torch.arange(ends[i] - chunks[i], ends[i]) for i in window.tolist()])
        parts.append(images[torch.randperm(len(images), generator=chance)])
    return torch.cat(parts)


class Stream(Dataset):
    """Training images by (step, slot). Unreadable files are passed over for the next one, and named.

    prepare  makes what the network takes, (C, H, W) float32, from what the source loads and a generator of the slot's
             own: see `ImagePreparation`
    """

    def __init__(self, source: Source, prepare: Prepare, *, batch_size: int, seed: int):
        self.source, self.prepare, self.batch_size, self.seed = source, prepare, batch_size, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        step, slot = key
        epoch, place = divmod(step * self.batch_size + slot, len(self.source))
        order, broken = epoch_order(self.source.chunks, self.seed, epoch), []
        while True:
            try:
                image, label = self.source.load(int(order[place]))
                break
            except BrokenImage as error:
                broken.append(str(error))
                place = (place + 1) % len(order)  # neighbours in a source are often broken together
                if len(broken) >= min(MOST_BROKEN, len(self.source)):
                    failure = f"{len(broken)} images in a row cannot be read, the last {error}"
                    return Item(step, slot, torch.zeros(()), 0, broken, failure)
        chance = generator(self.seed, "augment", step, slot)
        return Item(step, slot, self.prepare(image, chance), label, broken)


class Slots(Sampler[list[tuple[int, int]]]):
    """The (step, slot) keys of this process's share of each batch, in `parts` micro-batches per step."""

    def __init__(self, first: int, last: int, batch_size: int, parts: int = 1, rank: int = 0, ranks: int = 1):
        if batch_size % (parts * ranks):
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by {ranks} processes in {parts} parts: "
                f"take a multiple of {parts * ranks}"
            )
        self.steps, self.parts, self.rank, self.ranks = range(first, last), parts, rank, ranks
        self.size = batch_size // (parts * ranks)

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for part in range(self.parts):
                first = (part * self.ranks + self.rank) * self.size
                yield [(step, slot) for slot in range(first, first + self.size)]


def collate(items: list[Item]) -> Batch:
    failure = next((item.failure for item in items if item.failure is not None), None)
    images = torch.stack([item.image for item in items]) if failure is None else torch.empty(0)
    labels = torch.tensor([item.label for item in items])
    broken = [name for item in items for name in item.broken]
    return Batch(items[0].step, [item.slot for item in items], images, labels, broken, failure)


def loader(
    stream: Stream, slots: Slots, workers: int, pin_memory: bool, collate: Callable[[list[Item]], Any] = collate
) -> DataLoader:
    """A DataLoader over the stream. With `workers` 0, images are made in the process itself."""
    return DataLoader(
        stream,
        batch_sampler=slots,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        prefetch_factor=4 if workers else None,
    )


def begun(batches: DataLoader) -> Iterator[Any]:
    """An iterator over the batches, which raises RuntimeError where the images of a worker that died are missed.

    torch would have the process raise as soon as a worker dies, wherever it is: in the midst of a step, or of a
    checkpoint.
    """
    died = getattr(signal, "SIGCHLD", None)  # Windows has no such signal
    if died is None or current_thread() is not main_thread():
        return iter(batches)
    usual = signal.getsignal(died) or signal.SIG_DFL
    if getattr(usual, "__module__", None) == signal_handling.__name__:  # of a DataLoader that was made before
        usual = signal.SIG_DFL
        signal.signal(died, usual)
    with handled_by(usual, died):
        return iter(batches)


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # A launcher or queue signals every process. The main one ends its step first, and its workers with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
