"""Max and average pooling over windows of an image, beside their vjps.

Images lie batch innermost (:mod:`layout`), so one window is a few vectors above each other: the channels and samples of a
pixel are side by side, and all of them have the same windows.
"""

import numpy as np

from .conv import out_size
from .jit import kernel, vector_function
from .layout import images, innermost, is_batch_innermost
from .public import public, refuse
from .simd import (
    borrowed,
    filled,
    lanes,
    load_whole,
    load_wide,
    out_of_line,
    prefetch,
    select,
    splat,
    store_part,
    store_whole,
)

PIXELS = 1 << 24  # in an image, at most: places are kept as float32, in which larger numbers are no longer all different
NOWHERE = -1  # the place of a maximum that relu made 0: its gradient goes to none
WIDTH = 4  # vectors at a time, whose comparisons do not wait for each other


@kernel
def _window(i, pixels, size, stride, padding):
    """First and end pixel of window ``i`` along an axis, the padding cut off."""
    first = i * stride - padding
    return max(0, first), min(pixels, first + size)


@vector_function
def _pixels(oy, ox, h, w, size, stride, padding):
    """The pixels of a window: the first and the end row, the first and the end column."""
    return *_window(oy, h, size[0], stride[0], padding[0]), *_window(ox, w, size[1], stride[1], padding[1])


# --- What a window and a pixel compute ------------------------------------------------------------------------

@vector_function
def _largest(x, i, window, size, relu, y, index, to, count):
    """A wide vector of results from position ``to``: the maximum of what is i elements into the window's pixels, and where."""
    n, c, _, w = x.shape
    top, bottom, left, right = window
    best = load_wide(x, (top * w + left) * n * c + i, count, WIDTH)
    where = filled(best, x.dtype.type(top * w + left))
    for iy in range(top, bottom):
        for ix in range(left + (iy == top), right):
            v = load_wide(x, (iy * w + ix) * n * c + i, count, WIDTH)
            here = filled(best, x.dtype.type(iy * w + ix))
            larger, number = v > best, v == v  # NaN is not equal to itself, and wins
            best, where = select(number, select(larger, v, best), v), select(number, select(larger, here, where), here)
    if relu:
        zero = filled(best, x.dtype.type(0))
        best, where = select(zero > best, zero, best), select(best > zero, where, filled(best, x.dtype.type(NOWHERE)))
    store_part(y, to, best, count)
    store_whole(index, to, where, count)


@vector_function
def _mean(x, i, window, size, relu, y, index, to, count):
    n, c, _, w = x.shape
    top, bottom, left, right = window
    total = filled(load_wide(x, i, 0, WIDTH), x.dtype.type(0))
    for iy in range(top, bottom):
        for ix in range(left, right):
            total = total + load_wide(x, (iy * w + ix) * n * c + i, count, WIDTH)
    store_part(y, to, total * filled(total, x.dtype.type(1 / (size[0] * size[1]))), count)


@vector_function
def _where_largest(g, index, at, place, size, count):
    """A wide vector of g at position ``at`` for the pixel number ``place`` of its windows: 0 unless the maximum was there."""
    v = load_wide(g, at, count, WIDTH)
    return select(load_whole(index, at, v, count) == filled(v, g.dtype.type(place)), v, filled(v, g.dtype.type(0)))


@vector_function
def _equal_share(g, index, at, place, size, count):
    v = load_wide(g, at, count, WIDTH)
    return v * filled(v, g.dtype.type(1 / (size[0] * size[1])))


# --- The loops over windows -----------------------------------------------------------------------------------

def _make_pooling(reduce, name):
    """A kernel that writes what ``reduce`` makes of each window, one wide vector after the other."""
    @kernel(exact=True, reads="x", writes="y index", floats="x y", name=name)
    def pooling(x, y, index, size, stride, padding, relu):
        out_of_line()
        n, c, h, w = x.shape
        block, step = n * c, WIDTH * lanes(x)
        rest = block % step
        x, y, index = borrowed(x), borrowed(y), borrowed(index)
        for oy in range(y.shape[2]):
            for ox in range(y.shape[3]):
                window = _pixels(oy, ox, h, w, size, stride, padding)
                to = (oy * y.shape[3] + ox) * block
                for i in range(0, block - rest, step):
                    reduce(x, i, window, size, relu, y, index, to + i, None)
                if rest:
                    reduce(x, block - rest, window, size, relu, y, index, to + block - rest, rest)

    return pooling


def _make_gradient(part, name):
    """A kernel that gives each pixel of each window its ``part`` of g; it is added to what is there if windows overlap.

    One pixel after the other: what is written in the order of memory takes a tenth less time where it is not in the cache,
    and a third less if it is also asked for while the window before it is written.
    """
    @kernel(exact=True, reads="g index", writes="x", floats="g x", name=name)
    def gradient(g, index, x, size, stride, padding):
        out_of_line()
        n, c, h, w = x.shape
        block, step = n * c, WIDTH * lanes(g)
        rest = block % step
        overlap = stride[0] < size[0] or stride[1] < size[1]
        _clear(x, overlap or size[0] != stride[0] or size[1] != stride[1], g.shape[2:], size, stride, padding)
        g, index, x = borrowed(g), borrowed(index), borrowed(x)
        for oy in range(g.shape[2]):
            for ox in range(g.shape[3]):
                top, bottom, left, right = _pixels(oy, ox, h, w, size, stride, padding)
                at = (oy * g.shape[3] + ox) * block
                for iy in range(top, bottom):
                    for ix in range(left, right):
                        place = iy * w + ix
                        to, ahead = place * block, (place + size[1]) * block
                        for i in range(0, block - rest, step):
                            for line in range(i, i + step, lanes(g)):
                                prefetch(x, ahead + line)
                            v = part(g, index, at + i, place, size, None)
                            store_part(x, to + i, v + load_wide(x, to + i, None, WIDTH) if overlap else v, None)
                        if rest:
                            i = block - rest
                            v = part(g, index, at + i, place, size, rest)
                            store_part(x, to + i, v + load_wide(x, to + i, rest, WIDTH) if overlap else v, rest)

    return gradient


@kernel(exact=True, writes="x")
def _clear(x, everything, windows, size, stride, padding):
    """Zeros, where no window will write: behind the last one, or everywhere."""
    out_of_line()
    n, c, h, w = x.shape
    block = n * c
    bottom, right = windows[0] * stride[0] - padding[0], windows[1] * stride[1] - padding[1]
    for place in range(h * w):
        if everything or place // w >= bottom or place % w >= right:
            for i in range(0, block, lanes(x)):
                store_part(x, place * block + i, splat(x.dtype.type(0)), block - i)


_max_pool2d, _avg_pool2d = _make_pooling(_largest, "max_pool2d"), _make_pooling(_mean, "avg_pool2d")
_max_pool2d_vjp = _make_gradient(_where_largest, "max_pool2d_vjp")
_avg_pool2d_vjp = _make_gradient(_equal_share, "avg_pool2d_vjp")


@public
def _out_shape(x, size, stride, padding):
    if x.ndim != 4:
        refuse("pooling takes images of shape (n, c, h, w), not {}", x.shape)
    n, c, h, w = x.shape
    oh, ow = out_size(h, size[0], stride[0], padding[0]), out_size(w, size[1], stride[1], padding[1])
    if oh < 1 or ow < 1:
        refuse("a window of {} with a padding of {} finds no place in images of shape {}", size, padding, x.shape)
    return n, c, oh, ow


@public
def max_pool2d(x, size, stride, padding=(0, 0), relu=False):
    """Largest element of each window; the padding never wins, NaN always does.

    A relu before it is the same as one behind it, which has fewer numbers to look at.

    Parameters
    ----------
    x : (n, c, h, w) array, float32 or float64, of at most 2**24 pixels
        Fastest where it lies batch innermost (:mod:`mpiml.kernels.layout`).
    size, stride, padding : pairs of int, ``padding <= size / 2``
    relu : bool
        ``max(., 0)`` of the result; NaN stays NaN.

    Returns
    -------
    y : (n, c, oh, ow) array, batch innermost
    index : (n, c, oh, ow) array of int32, batch innermost
        Place of each maximum in its flattened (h * w) plane; the first one where several are equal. With ``relu``, -1 where
        that has no gradient: for all that is not above 0.

    Raises
    ------
    TypeError
        Other dtypes than float32 and float64.
    ValueError
        Windows that find no place in the images, or too many pixels.
    """
    n, c, oh, ow = _out_shape(x, size, stride, padding)
    if 2 * padding[0] > size[0] or 2 * padding[1] > size[1]:
        refuse("max_pool2d with windows of {} takes a padding of half of that at most, not {}", size, padding)
    if x.shape[2] * x.shape[3] > PIXELS:
        refuse("max_pool2d takes images of at most 2**24 pixels, not of shape {}", x.shape)
    y, index = images(n, c, oh, ow, x.dtype), images(n, c, oh, ow, np.int32)
    _max_pool2d(innermost(x), y, index, size, stride, padding, relu)
    return y, index


@public
def max_pool2d_vjp(g, index, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``: each element of ``g`` goes to where its maximum came from.

    ``index`` is what :func:`max_pool2d` returned with the same ``size``, ``stride`` and ``padding``; one of another shape
    than ``g`` is a ValueError.
    """
    if g.shape != index.shape:
        refuse("max_pool2d_vjp takes a gradient and an index of one shape, not {} and {}", g.shape, index.shape)
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    if not is_batch_innermost(index):
        index = np.ascontiguousarray(index.transpose((2, 3, 1, 0))).transpose((3, 2, 0, 1))
    _max_pool2d_vjp(innermost(g), index, dx, size, stride, padding)
    return dx


@public
def avg_pool2d(x, size, stride, padding=(0, 0)):
    """Mean of each window of ``x`` (n, c, h, w), zeros of the padding included (as PyTorch's default).

    Shapes, layout and errors as for :func:`max_pool2d`.
    """
    n, c, oh, ow = _out_shape(x, size, stride, padding)
    y = images(n, c, oh, ow, x.dtype)
    _avg_pool2d(innermost(x), y, np.empty((0, 0, 0, 0), np.int32), size, stride, padding, False)
    return y


@public
def avg_pool2d_vjp(g, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``, from ``g`` (n, c, oh, ow)."""
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    _avg_pool2d_vjp(innermost(g), np.empty((0, 0, 0, 0), np.int32), dx, size, stride, padding)
    return dx
