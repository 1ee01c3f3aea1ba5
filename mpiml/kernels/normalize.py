"""Standardising to mean 0 and variance 1: the one kernel under layer, group and batch normalisation.

An array is seen as (n, c, m). For each of the c channels, a block of ``samples`` consecutive entries of n is
standardised over (samples, m) together:

============  ==========================  ===========
layer norm    (rows, 1, features)         samples = 1
group norm    (n, groups, c / groups * m) samples = 1
batch norm    (n, c, m)                   samples = the batch, or less
============  ==========================  ===========
"""

import numpy as np

from .jit import kernel


@kernel
def _standardize(x, samples, eps, y, mean, var):
    n, c, m = x.shape
    t = x.dtype.type
    for b in range(mean.shape[0]):
        first, end = b * samples, min((b + 1) * samples, n)
        count = t((end - first) * m)
        for ch in range(c):
            total = t(0)
            for i in range(first, end):
                for j in range(m):
                    total += x[i, ch, j]
            mu = total / count
            total = t(0)
            for i in range(first, end):
                for j in range(m):
                    d = x[i, ch, j] - mu
                    total += d * d
            mean[b, ch] = mu
            var[b, ch] = total / count
            scale = t(1) / np.sqrt(var[b, ch] + t(eps))
            for i in range(first, end):
                for j in range(m):
                    y[i, ch, j] = (x[i, ch, j] - mu) * scale


@kernel
def _standardize_vjp(g, y, samples, eps, var, out):
    n, c, m = g.shape
    t = g.dtype.type
    for b in range(var.shape[0]):
        first, end = b * samples, min((b + 1) * samples, n)
        count = t((end - first) * m)
        for ch in range(c):
            sum_g, sum_gy = t(0), t(0)
            for i in range(first, end):
                for j in range(m):
                    sum_g += g[i, ch, j]
                    sum_gy += g[i, ch, j] * y[i, ch, j]
            scale = t(1) / np.sqrt(var[b, ch] + t(eps))
            mean_g, mean_gy = sum_g / count, sum_gy / count
            for i in range(first, end):
                for j in range(m):
                    out[i, ch, j] = scale * (g[i, ch, j] - mean_g - y[i, ch, j] * mean_gy)


def standardize(x, samples=1, eps=1e-5):
    """``(x - mean) / sqrt(var + eps)`` in blocks, as the table above.

    Parameters
    ----------
    x : (n, c, m) array, float32 or float64
    samples : int
        Consecutive entries of the first axis that share their statistics; the last block may be smaller.
    eps : float

    Returns
    -------
    y : (n, c, m) array
    mean, var : (blocks, c) arrays
        The biased statistics of each block, ``blocks = ceil(n / samples)``.
    """
    x = np.ascontiguousarray(x)
    blocks = -(-len(x) // samples) if x.size else 0
    y = np.empty(x.shape, x.dtype)
    mean = np.empty((blocks, x.shape[1]), x.dtype)
    var = np.empty((blocks, x.shape[1]), x.dtype)
    _standardize(x, samples, eps, y, mean, var)
    return y, mean, var


def standardize_vjp(g, y, var, samples=1, eps=1e-5):
    """Gradient for x of ``y, _, var = standardize(x, samples, eps)`` (Ioffe and Szegedy 2015)."""
    out = np.empty(y.shape, y.dtype)
    _standardize_vjp(np.ascontiguousarray(g), y, samples, eps, var, out)
    return out
