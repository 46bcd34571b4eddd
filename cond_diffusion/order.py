"""The order in which training visits the samples of a set: endless, shuffled anew each epoch, and never stored.

A permutation of a billion samples as a list takes 8 GB. A Feistel network (Luby and Rackoff 1988) computes any place of
one from a key in a few rounds, and in no memory; what it sends outside the set walks on until it is inside again (Black
and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", cycle walking).
"""

import hashlib
from math import isqrt

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

ROUNDS = 8


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> Int64[Tensor, " count"]:
    """Say which samples stand at positions start .. start + count - 1 of the endless training order.

    Every epoch is a fresh permutation, a function of (seed, epoch) alone, and batches run on across its end: each
    sample is seen exactly once an epoch, and any position can be reached without walking there.
    """
    parts = []
    while count > 0:
        epoch, place = divmod(start, num_samples)
        here = min(count, num_samples - place)
        parts.append(permuted(torch.arange(place, place + here), num_samples, "order", seed, epoch))
        start, count = start + here, count - here
    return torch.cat(parts)


def permuted(places: Int64[Tensor, " n"], size: int, *key: object) -> Int64[Tensor, " n"]:
    """Send each of `places` to its own place in a pseudo-random permutation of 0 .. size - 1 that `key` chooses."""
    side = np.uint64(isqrt(size - 1) + 1)  # side x side is the smallest square that holds them all
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    found = places.numpy().astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        found[outside] = _feistel(found[outside], side, np.frombuffer(digest, np.uint64))
        outside = outside[found[outside] >= size]
    return torch.from_numpy(found.astype(np.int64))


def _feistel(x: npt.NDArray[np.uint64], side: np.uint64, round_keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Permute 0 .. side^2 - 1: each round adds to one of two digits a hash of the other, which can be taken back."""
    left, right = x // side, x % side
    for round_key in round_keys:
        left, right = right, (left + _hash(right + round_key)) % side
    return left * side + right


def _hash(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64 bits, and keep half of them so that a sum cannot overflow (SplitMix64, Steele et al. 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(32)
