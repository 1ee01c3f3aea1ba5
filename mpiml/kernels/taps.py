"""Which taps of a convolution's kernel meet which pixels: a plan for each axis of an image.

A convolution, and its gradient for the image, are both: go through the pixels of the result; for each, through the taps
whose pixel of the source lies inside the image; sum ``weight[tap] * source[pixel]``. Along one axis the taps of one
result pixel are a run: every so many-th tap, on every so many-th pixel. So an axis is described by an *order*, in which
the taps are stored, a *step* from pixel to pixel, and three numbers for each result pixel: its first tap in that order,
how many there are, and the source pixel that the first one meets. Padding is nowhere: it is a shorter run. For 5 pixels, 3
taps and a padding of 1, say:

    result pixel   first tap   taps   first source pixel
         0             1         2            0               tap 0 would meet the padding
         1             0         3            0
         ...
         4             0         2            3               tap 2 would
"""

import math

import numpy as np

from .jit import kernel

FIRST, COUNT, SOURCE = range(3)


@kernel
def forward_taps(size, k, out, stride, padding, dilation):
    """(order (k,), runs (out, 3), step) of a convolution from ``size`` pixels to ``out``."""
    order, runs = np.arange(k), np.zeros((out, 3), np.int64)
    for o in range(out):
        start = o * stride - padding
        first = max(0, -(start // dilation))  # -(a // b) is -a / b rounded up
        runs[o, FIRST] = first
        runs[o, COUNT] = max(0, min(k, (size - 1 - start) // dilation + 1) - first)
        runs[o, SOURCE] = start + first * dilation
    return order, runs, dilation


@kernel
def backward_taps(size, k, out, stride, padding, dilation):
    """(order (k,), runs (size, 3), step) of its gradient, from ``out`` pixels to ``size``.

    Pixel i receives from output o by tap t where ``i + padding = o * stride + t * dilation``: every ``period``-th tap,
    and as that falls, the outputs rise by ``step``. A stride makes ``period`` kinds of pixels ("phases") that have
    taps of their own; with these stored side by side none is ever multiplied by an inserted zero.
    """
    common = math.gcd(stride, dilation)
    period, step = stride // common, dilation // common
    order, runs = np.empty(k, np.int64), np.zeros((size, 3), np.int64)
    place = 0
    for phase in range(min(period, k)):
        begin = place
        for t in range(phase + (k - 1 - phase) // period * period, -1, -period):
            order[place] = t
            place += 1
        for i in range(size):
            if (i + padding - phase * dilation) % stride == 0:
                # The output that the first tap in order, the phase's last, meets; then those outside are cut off.
                source = (i + padding - order[begin] * dilation) // stride
                first = max(0, -(source // step))
                runs[i, FIRST] = begin + first
                runs[i, COUNT] = max(0, min(place - begin, (out - 1 - source) // step + 1) - first)
                runs[i, SOURCE] = source + first * step
    return order, runs, step
