"""The stream: the image of a step and slot is a function of the seed, whoever asks for it, in whatever order."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpdm.data import ArraySource, BrokenImage, ImagePreparation, Slots, Stream, loader
from fpdm.data.stream import MOST_BROKEN, WINDOW, epoch_order
from fpdm.keyed import generator

COUNT, BATCH = 10, 4


def source(count=COUNT):
    """Images of random pixels whose label is their index."""
    images = np.random.default_rng(0).integers(0, 255, (count, 9, 7), np.uint8)
    return ArraySource(images, np.arange(count), [str(i) for i in range(count)])


def make_stream(data=None, *, seed=0, batch_size=BATCH):
    return Stream(data or source(), ImagePreparation(6, "random", flip=True), batch_size=batch_size, seed=seed)


def labels(stream, positions):
    return [stream[divmod(p, stream.batch_size)].label for p in positions]


class Partly:
    """A source some of whose images cannot be read."""

    class_names, channels, fingerprint = [], 1, "partly"

    def __init__(self, broken, count=COUNT):
        self.whole, self.broken, self.chunks = source(count), broken, (count,)

    def __len__(self):
        return len(self.whole)

    def load(self, index):
        if index in self.broken:
            raise BrokenImage(f"{index}.png: truncated")
        return self.whole.load(index)


def test_every_epoch_is_another_permutation():
    stream = make_stream()
    epochs = [labels(stream, range(e * COUNT, (e + 1) * COUNT)) for e in range(6)]  # batches reach over the ends
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert labels(make_stream(seed=1), range(COUNT)) != epochs[0]
    assert labels(make_stream(), range(COUNT)) == epochs[0]


# Orders

some_chunks = st.lists(st.integers(1, 9), min_size=1, max_size=5 * WINDOW).map(tuple)
keys = st.tuples(st.integers(0, 2**40), st.integers(0, 1000))


def chunk_of(chunks):
    """Which chunk each image lies in."""
    return [chunk for chunk, size in enumerate(chunks) for _ in range(size)]


@given(some_chunks, keys)
def test_an_order_is_a_permutation(chunks, key):
    order = epoch_order(chunks, *key)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(sum(chunks)))


@given(some_chunks, keys)
def test_an_order_is_a_function_of_its_key(chunks, key):
    order = epoch_order(chunks, *key)
    epoch_order.cache_clear()
    assert torch.equal(epoch_order(chunks, *key), order)


@given(st.integers(1, 300), keys)
def test_one_chunk_is_shuffled_as_it_always_was(count, key):
    """Runs that were begun before there were chunks go on with the images they have not seen."""
    seed, epoch = key
    assert torch.equal(epoch_order((count,), *key), torch.randperm(count, generator=generator(seed, "order", epoch)))


def test_the_order_of_one_chunk():
    assert epoch_order((10,), 0, 0).tolist() == [3, 2, 6, 8, 0, 1, 9, 4, 5, 7]


@given(some_chunks, keys)
def test_few_chunks_are_read_at_a_time(chunks, key):
    """From the first image of a chunk to its last, no more than the chunks of one window are met."""
    visited = [chunk_of(chunks)[index] for index in epoch_order(chunks, *key)]
    for chunk in range(len(chunks)):
        first, last = visited.index(chunk), len(visited) - visited[::-1].index(chunk)
        assert len(set(visited[first:last])) <= WINDOW


def test_images_are_mixed_across_the_chunks_of_a_window():
    chunks = (50,) * WINDOW
    visited = [chunk_of(chunks)[index] for index in epoch_order(chunks, 0, 0)]
    assert len(set(visited[:50])) == WINDOW
    changes = sum(one != other for one, other in pairwise(visited))
    assert changes > 0.8 * len(visited)


def test_a_chunk_that_is_left_over_is_mixed_too():
    chunks = (50,) * (WINDOW + 1)
    visited = [chunk_of(chunks)[index] for index in epoch_order(chunks, 0, 0)]
    assert len(set(visited[-50:])) == WINDOW // 2


def test_every_epoch_has_other_windows():
    chunks = (5,) * (4 * WINDOW)
    firsts = [{chunk_of(chunks)[index] for index in epoch_order(chunks, 0, epoch)[: 5 * WINDOW]} for epoch in range(6)]
    assert all(len(first) == WINDOW for first in firsts)
    assert len({frozenset(first) for first in firsts}) == 6


def test_an_item_is_a_function_of_its_key():
    keys = [(step, slot) for step in range(12) for slot in range(BATCH)]
    forwards = {key: item for stream in [make_stream()] for key in keys for item in [stream[key]]}
    for key in reversed(keys):
        item = make_stream()[key]
        assert (item.step, item.slot) == key
        assert torch.equal(item.image, forwards[key].image)
        assert item.label == forwards[key].label
        assert (item.broken, item.failure) == ([], None)


def test_crop_and_flip_differ_from_epoch_to_epoch():
    stream = make_stream(source(1))  # one image: what differs is chance alone
    assert not torch.equal(stream[0, 0].image, stream[0, 1].image)
    assert not torch.equal(stream[0, 0].image, stream[1, 0].image)
    assert not torch.equal(stream[0, 0].image, make_stream(source(1), seed=1)[0, 0].image)


def gather(parts, ranks, workers=0, first=0, last=3, batch_size=12):
    """(step, slot) -> (image, label) of all processes and micro-batches together."""
    found = {}
    for rank in range(ranks):
        slots = Slots(first, last, batch_size, parts, rank, ranks)
        batches = list(loader(make_stream(batch_size=batch_size), slots, workers, pin_memory=False))
        assert len(batches) == len(slots) == (last - first) * parts
        for batch in batches:
            assert len(batch.slots) == batch_size // (parts * ranks)
            for slot, image, label in zip(batch.slots, batch.images, batch.labels, strict=True):
                assert (batch.step, slot) not in found
                found[batch.step, slot] = (image, int(label))
    return found


@pytest.mark.parametrize(("parts", "ranks", "workers"), [(1, 2, 0), (3, 1, 0), (2, 3, 0), (12, 1, 0), (2, 1, 2)])
def test_processes_micro_batches_and_workers_share_out_the_same_batch(parts, ranks, workers):
    whole, shared = gather(1, 1), gather(parts, ranks, workers)
    assert whole.keys() == shared.keys() == {(step, slot) for step in range(3) for slot in range(12)}
    for key, (image, label) in whole.items():
        assert torch.equal(image, shared[key][0])
        assert label == shared[key][1]


def test_workers_keep_the_order():
    batches = [list(loader(make_stream(), Slots(2, 7, BATCH, 2), workers, pin_memory=False)) for workers in (0, 2)]
    assert [batch.step for batch in batches[0]] == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    for one, other in zip(*batches, strict=True):
        assert (one.step, one.slots, one.broken) == (other.step, other.slots, other.broken)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_resumed_run_sees_what_an_unbroken_one_does():
    whole, resumed = gather(1, 1, first=0, last=6), gather(1, 1, first=4, last=6)
    assert all(torch.equal(image, whole[key][0]) for key, (image, _) in resumed.items())


def test_a_batch():
    batch = next(iter(loader(make_stream(), Slots(0, 1, BATCH), 0, pin_memory=False)))
    assert (batch.images.shape, batch.images.dtype) == ((BATCH, 1, 6, 6), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((BATCH,), torch.int64)
    assert -1 <= batch.images.min() < 0 < batch.images.max() <= 1
    assert (batch.step, batch.slots, batch.broken) == (0, [0, 1, 2, 3], [])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_passed_over_and_named(workers):
    slots = Slots(0, 1, COUNT)
    whole = next(iter(loader(make_stream(batch_size=COUNT), slots, 0, pin_memory=False)))
    batch = next(iter(loader(make_stream(Partly({3, 4, 9}), batch_size=COUNT), slots, workers, pin_memory=False)))
    order = whole.labels.tolist()
    taken = [next(n for n in order[i:] + order[:i] if n not in {3, 4, 9}) for i in range(COUNT)]
    assert batch.labels.tolist() == taken  # the next one of the epoch in the place of a broken one
    assert set(batch.broken) == {"3.png: truncated", "4.png: truncated", "9.png: truncated"}


@pytest.mark.parametrize(("count", "named"), [(1, 1), (COUNT, COUNT), (MOST_BROKEN + 50, MOST_BROKEN)])
def test_too_many_broken_files_in_a_row_are_an_error(count, named):
    stream = make_stream(Partly(set(range(count)), count), batch_size=1)
    (batch,) = loader(stream, Slots(0, 1, 1), 0, pin_memory=False)
    assert re.match(f"{named} images in a row cannot be read, the last .*truncated", batch.failure)


@pytest.mark.parametrize(("batch_size", "parts", "ranks", "multiple"), [(10, 4, 1, 4), (10, 1, 3, 3), (8, 2, 3, 6)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch_size, parts, ranks, multiple):
    with pytest.raises(ValueError, match=f"take a multiple of {multiple}"):
        Slots(0, 1, batch_size, parts, 0, ranks)
