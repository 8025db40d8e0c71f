"""Seeds of random generators, from what the numbers are for."""

import hashlib

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """One 63-bit seed from numbers and names, such as a run's seed, a step and an image; similar parts give unrelated
    seeds. Names may hold bytes that are not UTF-8, as file names do."""
    data = " ".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """torch's generator, on the CPU, seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """NumPy's generator, seeded by `seed_of`."""
    return np.random.default_rng(seed_of(*parts))
