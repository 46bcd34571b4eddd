"""All randomness is a pure function of counters.

Nothing here or elsewhere in the package reads torch's global random state. Whoever needs noise names what it is for
and counts where it is, so a run that is killed and resumed draws what the uninterrupted run would have drawn, and a
picture does not depend on the batch that it was drawn in.
"""

import hashlib

import torch


def generator(purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator whose stream depends on `purpose` and `counters` alone.

    The counters go through a hash because nearby seeds, or sums of counters, would give overlapping or equal streams:
    (seed 1, step 2) must not draw what (seed 2, step 1) draws.
    """
    digest = hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
