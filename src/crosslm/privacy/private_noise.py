"""The Gaussian noise of a private upload, from keys that are drawn of the operating system's entropy.

PyTorch's generator will not do: on the CPU it heeds 32 bits of a seed, few enough to try them all against an upload,
and noise that was found can be taken off.
"""

import random

import numpy as np
import torch
from torch import Tensor

KEY_BITS = 128


def fresh_generator(secret: random.Random) -> np.random.Generator:
    """A generator with a key of its own: Philox (Salmon et al. 2011) with 128 bits of the secret."""
    return np.random.Generator(np.random.Philox(key=secret.getrandbits(KEY_BITS)))


def gaussian(generator: np.random.Generator, like: Tensor) -> Tensor:
    """``N(0, 1)`` in the shape of ``like``, on its device and of its type."""
    return torch.from_numpy(generator.standard_normal(tuple(like.shape), dtype=np.float32)).to(like)
