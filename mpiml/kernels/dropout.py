"""Dropout, whose mask is a function of (key, sample, element): the same wherever and in whichever order it is computed."""

import numpy as np

from .jit import kernel
from .public import public
from .simd import lanes, load_part, splat, store_part

_BLOCKS = 64  # of the generator's 128 bits that are made at once, each of them enough for 4 elements


@kernel
def _philox(counters, blocks, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 bits from each counter (4, i).

    All counters go through a round before the next one: a loop without a loop in it becomes vector instructions, which take
    a fifth of the time.
    """
    half = np.uint64(32)
    for _ in range(10):
        for i in range(blocks):
            p0 = np.uint64(0xD2511F53) * np.uint64(counters[0, i])
            p1 = np.uint64(0xCD9E8D57) * np.uint64(counters[2, i])
            counters[0, i] = np.uint32(p1 >> half) ^ counters[1, i] ^ k0
            counters[1, i] = np.uint32(p1)
            counters[2, i] = np.uint32(p0 >> half) ^ counters[3, i] ^ k1
            counters[3, i] = np.uint32(p0)
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))


@kernel(reads="x", floats="x out")
def _dropout(x, p, key, first, out):
    """Contiguous rows of samples. The generator counts in (elements // 4, 0, the sample's number in two halves)."""
    samples, size = x.shape
    scale = splat(x.dtype.type(1 / (1 - p)))
    zero = x.dtype.type(0)
    threshold = np.uint32(p * 2.0**32)  # 32 random bits are below it with probability p
    bits, in_order = np.empty((4, _BLOCKS), np.uint32), np.empty((_BLOCKS, 4), np.uint32)
    random = in_order.reshape(-1)
    for s in range(samples):
        sample = np.uint64(first + s)
        for start in range(0, size, 4 * _BLOCKS):
            row = out[s, start:start + 4 * _BLOCKS]
            blocks = (row.size + 3) // 4
            for i in range(blocks):
                bits[0, i] = start // 4 + i
                bits[1, i] = 0
                bits[2, i] = sample
                bits[3, i] = sample >> np.uint64(32)
            _philox(bits, blocks, np.uint32(key), np.uint32(key >> np.uint64(32)))
            for i in range(blocks):
                in_order[i, 0], in_order[i, 1], in_order[i, 2], in_order[i, 3] = bits[0, i], bits[1, i], bits[2, i], bits[3, i]
            # Two passes, since the compiler makes vectors of the second one, but not of a loop over x, of any strides.
            for i in range(0, row.size, lanes(x)):
                at, left = s * size + start + i, row.size - i
                store_part(out, at, load_part(x, at, left) * scale, left)
            for i in range(row.size):
                if random[i] < threshold:
                    row[i] = zero


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
    result = np.ascontiguousarray(out)  # out itself, if x lies in C order
    _dropout(rows, float(p), np.uint64(key), first, result.reshape(rows.shape))
    if not out.flags.c_contiguous:
        out[...] = result
    return out
