"""Everything random is a function of a key, never of what was drawn before.

A key is a tuple of integers and words, e.g. `(seed, "noise", step, sample)`. Two draws with the same key are equal
whatever the batch size, the number of processes or the point at which a run was resumed.
"""

import hashlib
import operator

import torch

Key = int | str


def seed_of(*key: Key) -> int:
    """A 63-bit seed for `key`. Hashing keeps (1, 23) and (12, 3) apart, which adding or joining digits would not."""
    key = tuple(part if isinstance(part, str) else operator.index(part) for part in key)  # 3 and np.int64(3) alike
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: Key) -> torch.Generator:
    """A fresh CPU generator for `key`. It lives on the CPU so that the device does not change what is drawn."""
    return torch.Generator().manual_seed(seed_of(*key))
