"""The order of training: a permutation in no memory."""

import tracemalloc

import numpy as np
import pytest
import torch

from cond_diffusion.order import permuted, sample_indices


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000, 60_000])
def test_every_place_is_taken_once(size: int):
    found = permuted(torch.arange(size), size, "key")
    assert torch.equal(found.sort().values, torch.arange(size))


def test_a_billion_samples_are_visited_once_each_and_take_no_memory():
    size = 10**9
    draw = torch.Generator().manual_seed(0)
    probes = torch.cat([torch.randint(size, (300_000,), generator=draw), torch.arange(100_000)]).unique()
    tracemalloc.start()
    found = permuted(probes, size, "key")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.unique()) == len(probes)
    assert found.min() >= 0
    assert found.max() < size
    assert peak < 100 * len(probes)  # bytes: a list of all would take eight billion
    # Neighbours end up anywhere: 100,000 places in a row are spread evenly over 100 parts of the set.
    counts = torch.bincount(found[:100_000] // (size // 100), minlength=100).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4 * (2 * 99) ** 0.5


def test_the_order_is_as_good_as_a_shuffle():
    """Over many keys every sample stands everywhere equally often, and so does every pair of neighbours."""
    size, keys = 10, 4000
    orders = torch.stack([permuted(torch.arange(size), size, "epoch", key) for key in range(keys)])
    places = torch.stack([torch.bincount(column, minlength=size) for column in orders.T]).double()
    expected = keys / size
    assert ((places - expected) ** 2 / expected).sum() < 81 + 4 * (2 * 81) ** 0.5
    pairs = np.zeros((size, size))
    np.add.at(pairs, (orders[:, :-1].flatten(), orders[:, 1:].flatten()), 1)
    others = pairs[~np.eye(size, dtype=bool)]
    assert pairs.trace() == 0
    assert ((others - keys / size) ** 2 / (keys / size)).sum() < 89 + 4 * (2 * 89) ** 0.5


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_its_own():
    order = sample_indices(10, seed=0, start=0, count=30)
    epochs = order.reshape(3, 10)
    assert torch.equal(epochs.sort().values, torch.arange(10).expand(3, 10))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], sample_indices(10, seed=1, start=0, count=10))
    assert torch.equal(sample_indices(10, seed=0, start=7, count=6), order[7:13])
