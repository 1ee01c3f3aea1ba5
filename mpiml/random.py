"""Random numbers that belong to a name, not to a moment or a rank.

A weight depends only on (seed, its name), a shuffle only on (seed, epoch), a dropout mask only on (seed,
layer, step, sample). Any rank can make any of them, so nothing is broadcast and no generator state exists
that could diverge or would need saving.
"""

import hashlib
import operator

import numpy as np


def key(seed, *names):
    """64-bit integer for ``(seed, *names)``: the same on every rank, machine and Python version.

    Parameters
    ----------
    seed : int
    *names : str or int

    Examples
    --------
    >>> key(0, "0.weight") == key(0, "0.weight"), key(0, "0.weight") == key(1, "0.weight")
    (True, False)
    """
    text = "/".join([str(operator.index(seed)), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed, *names):
    """NumPy generator (Philox, Salmon et al. 2011) whose stream is a function of ``(seed, *names)`` alone."""
    return np.random.Generator(np.random.Philox(key=key(seed, *names)))
