"""Seeding and the training order."""

import torch

from cond_diffusion.seeding import generator, permutation, sample_indices


def test_each_epoch_is_a_different_permutation():
    order = sample_indices(10, seed=3, start=0, count=30).reshape(3, 10)
    assert order.sort(dim=1).values.tolist() == [[*range(10)]] * 3
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    assert order.flatten().tolist() != sample_indices(10, seed=4, start=0, count=30).tolist()


def test_any_range_of_the_order_is_computed_independently():
    whole = sample_indices(7, seed=0, start=0, count=100)
    for start, count in ((0, 5), (5, 4), (6, 1), (7, 7), (13, 20), (93, 7)):
        assert torch.equal(sample_indices(7, seed=0, start=start, count=count), whole[start : start + count])


def test_permutations_and_generators_depend_only_on_purpose_and_counters():
    torch.manual_seed(1)
    first = permutation(50, "held out")
    torch.manual_seed(2)
    permutation.cache_clear()
    assert torch.equal(permutation(50, "held out"), first)
    assert not torch.equal(permutation(50, "other"), first)
    draws = [torch.rand(3, generator=generator("a", *counters)).tolist() for counters in ((1, 2), (2, 1), (1, 2))]
    assert draws[0] == draws[2] != draws[1]
