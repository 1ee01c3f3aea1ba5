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
    select,
    splat,
    store_part,
    store_whole,
)

PIXELS = 1 << 24  # in an image, at most: places are kept as float32, in which larger numbers are no longer all different
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


@vector_function
def _max_column(x, i, window, y, index, to, count):
    """One vector of results from position ``to``: the maximum of what lies i elements into the window's pixels, and where."""
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
    store_part(y, to, best, count)
    store_whole(index, to, where, count)


@kernel(exact=True, reads="x", writes="y index", floats="x y")
def _max_pool2d(x, y, index, size, stride, padding):
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
                _max_column(x, i, window, y, index, to + i, None)
            if rest:
                _max_column(x, block - rest, window, y, index, to + block - rest, rest)


@vector_function
def _max_part(g, index, at, place, x, to, overlap, count):
    """Vectors of a pixel of x, from position ``to``, get those of g at position ``at`` where the maximum was at this place."""
    v = load_wide(g, at, count, WIDTH)
    part = select(load_whole(index, at, v, count) == filled(v, g.dtype.type(place)), v, filled(v, g.dtype.type(0)))
    store_part(x, to, part + load_wide(x, to, count, WIDTH) if overlap else part, count)


@kernel(exact=True, reads="g index", writes="x", floats="g x")
def _max_pool2d_vjp(g, index, x, size, stride, padding):
    """Each pixel of each window of x gets g where ``index`` says so; it is added to what is there if windows overlap.

    One pixel after the other: what is written in the order of memory takes a tenth less time where it is not in the cache.
    """
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
                    to = place * block
                    for i in range(0, block - rest, step):
                        _max_part(g, index, at + i, place, x, to + i, overlap, None)
                    if rest:
                        _max_part(g, index, at + block - rest, place, x, to + block - rest, overlap, rest)


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


@vector_function
def _mean_column(x, i, window, share, y, to, count):
    n, c, _, w = x.shape
    top, bottom, left, right = window
    total = filled(load_wide(x, i, 0, WIDTH), x.dtype.type(0))
    for iy in range(top, bottom):
        for ix in range(left, right):
            total = total + load_wide(x, (iy * w + ix) * n * c + i, count, WIDTH)
    store_part(y, to, total * filled(total, share), count)


@kernel(exact=True, reads="x", writes="y", floats="x y")
def _avg_pool2d(x, y, size, stride, padding):
    out_of_line()
    n, c, h, w = x.shape
    block, step = n * c, WIDTH * lanes(x)
    rest = block % step
    share = x.dtype.type(1 / (size[0] * size[1]))
    x, y = borrowed(x), borrowed(y)
    for oy in range(y.shape[2]):
        for ox in range(y.shape[3]):
            window = _pixels(oy, ox, h, w, size, stride, padding)
            to = (oy * y.shape[3] + ox) * block
            for i in range(0, block - rest, step):
                _mean_column(x, i, window, share, y, to + i, None)
            if rest:
                _mean_column(x, block - rest, window, share, y, to + block - rest, rest)


@vector_function
def _mean_part(g, at, share, x, to, overlap, count):
    v = load_wide(g, at, count, WIDTH)
    part = v * filled(v, share)
    store_part(x, to, part + load_wide(x, to, count, WIDTH) if overlap else part, count)


@kernel(exact=True, reads="g", writes="x", floats="g x")
def _avg_pool2d_vjp(g, x, size, stride, padding):
    """Each pixel of each window of x gets its share of g; pixel after pixel, as above."""
    out_of_line()
    n, c, h, w = x.shape
    block, step = n * c, WIDTH * lanes(g)
    rest = block % step
    share = g.dtype.type(1 / (size[0] * size[1]))
    overlap = stride[0] < size[0] or stride[1] < size[1]
    _clear(x, overlap or size[0] != stride[0] or size[1] != stride[1], g.shape[2:], size, stride, padding)
    g, x = borrowed(g), borrowed(x)
    for oy in range(g.shape[2]):
        for ox in range(g.shape[3]):
            top, bottom, left, right = _pixels(oy, ox, h, w, size, stride, padding)
            at = (oy * g.shape[3] + ox) * block
            for iy in range(top, bottom):
                for ix in range(left, right):
                    to = (iy * w + ix) * block
                    for i in range(0, block - rest, step):
                        _mean_part(g, at + i, share, x, to + i, overlap, None)
                    if rest:
                        _mean_part(g, at + block - rest, share, x, to + block - rest, overlap, rest)


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
def max_pool2d(x, size, stride, padding=(0, 0)):
    """Largest element of each window; the padding never wins, NaN always does.

    Parameters
    ----------
    x : (n, c, h, w) array, float32 or float64, of at most 2**24 pixels
        Fastest where it lies batch innermost (:mod:`mpiml.kernels.layout`).
    size, stride, padding : pairs of int, ``padding <= size / 2``

    Returns
    -------
    y : (n, c, oh, ow) array, batch innermost
    index : (n, c, oh, ow) array of int32, batch innermost
        Place of each maximum in its flattened (h * w) plane; the first one where several are equal.

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
    _max_pool2d(innermost(x), y, index, size, stride, padding)
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
    _avg_pool2d(innermost(x), y, size, stride, padding)
    return y


@public
def avg_pool2d_vjp(g, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``, from ``g`` (n, c, oh, ow)."""
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    _avg_pool2d_vjp(innermost(g), dx, size, stride, padding)
    return dx
