"""All randomness is a pure function of counters.

Nothing here or elsewhere in the package reads torch's global random state. A caller names what it needs random numbers
for and counts where it is, so a run that is killed and resumed draws what the uninterrupted run would have drawn, and
an image does not depend on the batch that it is sampled in.
"""

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor


def generator(purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator whose stream depends on `purpose` and `counters` alone.

    The counters go through a hash because nearby seeds, or sums of counters, would give overlapping or equal streams:
    (seed 1, step 2) must not draw what (seed 2, step 1) draws.
    """
    digest = hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=4)  # 8 bytes a row each; an epoch's is asked for again with every batch
def _permutation(size: int, purpose: str, *counters: int) -> Int64[Tensor, " size"]:
    return torch.randperm(size, generator=generator(purpose, *counters))


def permute_indices(indices: Int64[Tensor, " n"], size: int, purpose: str, *counters: int) -> Int64[Tensor, " n"]:
    """Map indices by a random permutation of 0 .. size - 1, a function of `purpose` and `counters` alone."""
    return _permutation(size, purpose, *counters)[indices]


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> Int64[Tensor, " count"]:
    """Return the samples at positions start .. start + count - 1 of the endless training order.

    Each epoch is a permutation of its own, a function of (seed, epoch), and batches run on across its end: a sample is
    seen exactly once an epoch, and any position can be read at any time.
    """
    parts = []
    while count > 0:
        epoch, place = divmod(start, num_samples)
        here = min(count, num_samples - place)
        parts.append(permute_indices(torch.arange(place, place + here), num_samples, "order", seed, epoch))
        start, count = start + here, count - here
    return torch.cat(parts)
