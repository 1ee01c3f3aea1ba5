"""What the core can do: multiply-adds and bytes per second, measured. To be imported after timing."""

import functools

import numpy as np
from timing import seconds
from torch.utils.flop_counter import FlopCounterMode

from mpiml.kernels.jit import kernel
from mpiml.kernels.simd import fma, lanes, load, store


@kernel(exact=True)
def _chains(a, steps):
    """Ten chains of multiply-adds, enough to hide their latency."""
    x, y = load(a, 0), load(a, lanes(a))
    b = c = d = e = f = g = h = i = j = l = y  # noqa: E741
    for _ in range(steps):
        b, c, d, e, f = fma(x, b, y), fma(x, c, y), fma(x, d, y), fma(x, e, y), fma(x, f, y)
        g, h, i, j, l = fma(x, g, x), fma(x, h, x), fma(x, i, x), fma(x, j, x), fma(x, l, x)  # noqa: E741
    store(a, 0, b + c + d + e + f + g + h + i + j + l)


@kernel
def _triad(a, b, s):
    for i in range(a.size):
        a[i] = a[i] + s * b[i]


def peak():
    """Multiply-adds of float32, two operations each, per second."""
    a, steps = np.full(64, 0.5, np.float32), 100_000
    _chains(a, 1)
    return 20 * lanes(a) * steps / min(seconds(lambda: _chains(a, steps), 1) for _ in range(9))


@functools.cache
def bandwidth(size):
    """Bytes that the triad reads and writes per second where they are ``size`` in all."""
    a, b = np.ones((2, max(int(size) // 12, 1024)), np.float32)
    _triad(a, b, np.float32(0.5))
    repeats = max(1, 10**7 // a.nbytes)
    return 3 * a.nbytes / np.median([seconds(lambda: _triad(a, b, np.float32(0.5)), repeats) for _ in range(7)])


def flops(step):
    """Operations in the matrix products and convolutions of a step in PyTorch, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
