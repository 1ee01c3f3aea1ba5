"""Dropout, whose mask is a function of (key, sample, element): the same wherever and in whichever order it is computed."""

import numpy as np

from .jit import kernel
from .public import public

_BLOCKS = 64  # of the generator's 128 bits that are made at once, each of them enough for 4 elements


@kernel
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 -> 128 bits."""
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = ((p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & mask,
                          (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & mask)
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@kernel(reads="x", floats="x out")
def _dropout(x, p, key, first, out):
    """Rows of samples. The generator counts in (elements // 4, 0, the sample's number in two halves)."""
    samples, size = x.shape
    mask = np.uint64(0xFFFFFFFF)
    scale = x.dtype.type(1 / (1 - p))
    zero = x.dtype.type(0)
    threshold = np.uint32(p * 2.0**32)  # 32 random bits are below it with probability p
    k0, k1 = key & mask, key >> np.uint64(32)
    bits = np.empty((4, _BLOCKS), np.uint32)
    for s in range(samples):
        sample = np.uint64(first + s)
        low, high = sample & mask, sample >> np.uint64(32)
        for start in range(0, size, 4 * _BLOCKS):
            # Loops without branches, one after the other, become vector instructions.
            for block in range(_BLOCKS):
                r0, r1, r2, r3 = _philox(np.uint64(start // 4 + block), np.uint64(0), low, high, k0, k1)
                bits[0, block] = r0
                bits[1, block] = r1
                bits[2, block] = r2
                bits[3, block] = r3
            whole = min(4 * _BLOCKS, size - start)
            for i in range(whole // 4):
                for j in range(4):
                    at = start + 4 * i + j
                    out[s, at] = x[s, at] * scale if bits[j, i] >= threshold else zero
            for i in range(whole // 4 * 4, whole):
                out[s, start + i] = x[s, start + i] * scale if bits[i % 4, i // 4] >= threshold else zero


@public
def dropout(x, p, key, first=0):
    """``x`` with each element set to 0 with probability ``p``, the others divided by 1 - p.

    Parameters
    ----------
    x : (n, ...) array, float32 or float64
        The result lies in memory in the same order.
    p : float in [0, 1)
    key : int, 64 bits; a function of (seed, layer, step), see :func:`mpiml.random.key`
    first : int
        Number of ``x[0]`` in the global batch. The mask of a sample is a function of (key, its number,
        element) alone, so it is the same on whichever rank the sample is computed. The operation is linear
        with a diagonal matrix, hence its own vjp: ``dropout(g, p, key, first)``.

    Returns
    -------
    array of the shape and dtype of x

    Raises
    ------
    TypeError
        Other dtypes than float32 and float64.
    """
    out = np.empty_like(x)
    rows = np.ascontiguousarray(x).reshape((len(x), x.size // max(len(x), 1)))
    result = np.empty(rows.shape, x.dtype)
    _dropout(rows, float(p), np.uint64(key), first, result)
    out[...] = result.reshape(x.shape)
    return out
