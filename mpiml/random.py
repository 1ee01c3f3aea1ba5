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


def bits(key, numbers):
    """64 random bits for each of ``numbers``, a function of (key, number) alone: SplitMix64 (Steele et al. 2014).

    For a few bits for each of many samples, where a generator for every sample would take too long.

    Parameters
    ----------
    key : int, 64 bits; see :func:`key`
    numbers : (n,) array of integers

    Returns
    -------
    (n,) uint64 array

    Examples
    --------
    >>> bits(7, np.array([2, 0, 1])) == bits(7, np.array([2, 5, 1]))
    array([ True, False,  True])
    """
    z = np.uint64(key) + numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
