"""The order of the data, and how it reaches the device."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from gearshift.data.pixels import to_pm1
from gearshift.training.feed import Feed, Order

CPU = torch.device("cpu")


def test_every_epoch_visits_every_image_once() -> None:
    order = Order(seed=3, count=10, size=4)
    stream = torch.cat([order.indices(m, 0, 4) for m in range(15)])  # six epochs, some batches across two of them
    epochs = stream.reshape(6, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).expand(6, 10))
    assert len(epochs.unique(dim=0)) == 6


def test_a_micro_batch_does_not_depend_on_what_was_asked_before() -> None:
    forward, backward = Order(3, 10, 4), Order(3, 10, 4)
    first = [forward.indices(m, 0, 4) for m in range(9)]
    for m in reversed(range(9)):
        assert torch.equal(backward.indices(m, 0, 4), first[m])
    assert not torch.equal(torch.cat(first), torch.cat([Order(4, 10, 4).indices(m, 0, 4) for m in range(9)]))


def test_slices_of_processes_make_up_the_whole() -> None:
    order = Order(3, 10, 8)
    for m in range(5):
        assert torch.equal(torch.cat([order.indices(m, 0, 4), order.indices(m, 4, 8)]), order.indices(m, 0, 8))


def test_a_micro_batch_larger_than_the_data_set() -> None:
    index = Order(3, 5, 12).indices(1, 0, 12)  # samples 12..23: the rest of epoch 2, epoch 3, the beginning of epoch 4
    assert torch.equal(index[3:8].sort().values, torch.arange(5))


def make(toy: ModuleType, **changes: object) -> Feed:
    fields = dict(seed=1, size=12, start=0, stop=12, device=CPU, labelled=True) | changes
    return Feed(toy.toy_dataset(), **fields)  # type: ignore[arg-type]


def test_images_and_labels_belong_together(toy: ModuleType) -> None:
    data = toy.toy_dataset()
    batch = make(toy).batch(3)
    index = Order(1, 50, 12).indices(3, 0, 12)
    assert torch.equal(batch.images, to_pm1(data.images_u8[index]))
    assert torch.equal(batch.cond, data.labels[index])
    assert torch.equal(batch.slot, torch.arange(12)) and batch.micro_batch == 3
    assert make(toy, labelled=False).batch(3).cond is None


def test_flips_are_drawn_per_sample_and_do_not_depend_on_the_slice(toy: ModuleType) -> None:
    plain, flipped = make(toy).batch(2).images, make(toy, flip=True).batch(2).images
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    straight = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(m != s for m, s in zip(mirrored, straight, strict=True))
    assert any(mirrored) and any(straight)
    part = make(toy, flip=True, start=6, stop=12).batch(2)
    assert torch.equal(part.images, flipped[6:])
    assert torch.equal(part.slot, torch.arange(6, 12))


@pytest.mark.parametrize("flip", [False, True])
def test_gathering_ahead_gives_the_same_batches(toy: ModuleType, flip: bool) -> None:
    direct, ahead = make(toy, flip=flip), make(toy, flip=flip, resident=False)
    try:
        for m in (5, 6, 7, 8, 2, 3):  # and a step back, as no run does
            a, b = direct.batch(m), ahead.batch(m)
            assert torch.equal(a.images, b.images) and torch.equal(a.cond, b.cond)
    finally:
        ahead.close()


def test_close_ends_the_thread(toy: ModuleType) -> None:
    feed = make(toy, resident=False)
    feed.batch(0)
    feed.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        feed.batch(9)
