"""Random numbers as a pure function of a purpose and counters.

The package never uses torch's global random state. A resumed run therefore draws the same random numbers as an
uninterrupted one, and an image does not depend on the batch that it is sampled in.
"""

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor


def generator(purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by a hash of `purpose` and `counters`.

    Without the hash, nearby seeds or sums of counters could give overlapping streams, for example for
    (seed 1, step 2) and (seed 2, step 1).
    """
    digest = hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=4)  # 8 bytes per element; the permutation of an epoch is used by all its batches
def permutation(size: int, purpose: str, *counters: int) -> Int64[Tensor, " size"]:
    """Return a random permutation of 0 .. size - 1 that is a function of `purpose` and `counters`."""
    return torch.randperm(size, generator=generator(purpose, *counters))


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> Int64[Tensor, " count"]:
    """Return the dataset indices at positions start .. start + count - 1 of the endless training order.

    Each epoch is a permutation that is a function of (seed, epoch). Batches continue across the end of an epoch, so
    each sample occurs exactly once per epoch.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, num_samples)
        length = min(count, num_samples - offset)
        parts.append(permutation(num_samples, "order", seed, epoch)[offset : offset + length])
        start, count = start + length, count - length
    return torch.cat(parts)
