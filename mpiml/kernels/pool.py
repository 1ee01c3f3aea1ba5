"""Max and average pooling over windows of an image, beside their vjps.

Images lie batch innermost (:mod:`layout`), so one window is a few vectors above each other: the channels and samples of a
pixel are side by side, and all of them have the same windows.
"""

import numpy as np

from .conv import out_size
from .jit import kernel
from .layout import images, innermost, is_batch_innermost
from .public import check_dtypes, public, refuse
from .simd import lanes, load_part, load_whole, out_of_line, select, splat, store_part, store_whole
from .tile import load_row, store_tile, tile_add, tile_multiply, zero_tile

PIXELS = 1 << 24  # in an image, at most: places are kept as float32, in which larger numbers are no longer all different


@kernel
def _window(i, pixels, size, stride, padding):
    """First and end pixel of window ``i`` along an axis, the padding cut off."""
    first = i * stride - padding
    return max(0, first), min(pixels, first + size)


@kernel(exact=True)
def _better(v, here, best, where):
    """The maximum so far, and where it was, after ``v`` at the place ``here``."""
    larger, number = v > best, v == v  # NaN is not equal to itself, and wins
    return select(number, select(larger, v, best), v), select(number, select(larger, here, where), here)


@kernel(exact=True, reads="x", writes="y index")
def _max_pool(x, y, index, size, stride, padding):
    """Two vectors at a time, ``best`` and ``second``, at places ``where`` and ``beside``: neither waits for the other."""
    out_of_line()
    n, c, h, w = x.shape
    block = n * c
    full = lanes(x)
    for oy in range(y.shape[2]):
        top, bottom = _window(oy, h, size[0], stride[0], padding[0])
        for ox in range(y.shape[3]):
            left, right = _window(ox, w, size[1], stride[1], padding[1])
            to = (oy * y.shape[3] + ox) * block
            for i in range(0, block, 2 * full):
                first, then = i, min(i + full, block)  # the second one may be empty
                best = load_part(x, (top * w + left) * block + first, block - first)
                second = load_part(x, (top * w + left) * block + then, block - then)
                where = splat(x.dtype.type(top * w + left))
                beside = where
                for iy in range(top, bottom):
                    for ix in range(left, right):
                        place = iy * w + ix
                        here = splat(x.dtype.type(place))
                        best, where = _better(load_part(x, place * block + first, block - first), here, best, where)
                        second, beside = _better(load_part(x, place * block + then, block - then), here, second, beside)
                store_part(y, to + first, best, block - first)
                store_whole(index, to + first, where, block - first)
                store_part(y, to + then, second, block - then)
                store_whole(index, to + then, beside, block - then)


@kernel(exact=True, reads="g index", writes="x")
def _max_pool_vjp(g, index, x, size, stride, padding):
    """Each pixel of each window of x gets g where ``index`` says so; it is added to what is there if windows overlap."""
    out_of_line()
    n, c, h, w = x.shape
    block = n * c
    overlap = stride[0] < size[0] or stride[1] < size[1]
    _clear(x, overlap or size[0] != stride[0] or size[1] != stride[1], g.shape[2:], size, stride, padding)
    zero = splat(g.dtype.type(0))
    for oy in range(g.shape[2]):
        top, bottom = _window(oy, h, size[0], stride[0], padding[0])
        for ox in range(g.shape[3]):
            left, right = _window(ox, w, size[1], stride[1], padding[1])
            at = (oy * g.shape[3] + ox) * block
            for i in range(0, block, lanes(g)):
                v = load_part(g, at + i, block - i)
                where = load_whole(index, at + i, v, block - i)
                for iy in range(top, bottom):
                    for ix in range(left, right):
                        place = iy * w + ix
                        part = select(where == splat(g.dtype.type(place)), v, zero)
                        if overlap:
                            part = part + load_part(x, place * block + i, block - i)
                        store_part(x, place * block + i, part, block - i)


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


@kernel(exact=True, reads="x", writes="y")
def _avg_pool(x, y, size, stride, padding):
    out_of_line()
    n, c, h, w = x.shape
    block = n * c
    share = splat(x.dtype.type(1 / (size[0] * size[1])))
    for oy in range(y.shape[2]):
        top, bottom = _window(oy, h, size[0], stride[0], padding[0])
        for ox in range(y.shape[3]):
            left, right = _window(ox, w, size[1], stride[1], padding[1])
            for i in range(0, block, 4 * lanes(x)):
                total = zero_tile(x, 4)
                for iy in range(top, bottom):
                    for ix in range(left, right):
                        total = tile_add(total, load_row(x, (iy * w + ix) * block + i, block - i, 4))
                store_tile(tile_multiply(total, share), y, (oy * y.shape[3] + ox) * block + i, 0, block - i, 4)


@kernel(exact=True, reads="g", writes="x")
def _avg_pool_vjp(g, x, size, stride, padding):
    out_of_line()
    n, c, h, w = x.shape
    block = n * c
    share = splat(g.dtype.type(1 / (size[0] * size[1])))
    overlap = stride[0] < size[0] or stride[1] < size[1]
    _clear(x, overlap or size[0] != stride[0] or size[1] != stride[1], g.shape[2:], size, stride, padding)
    for oy in range(g.shape[2]):
        top, bottom = _window(oy, h, size[0], stride[0], padding[0])
        for ox in range(g.shape[3]):
            left, right = _window(ox, w, size[1], stride[1], padding[1])
            for i in range(0, block, 4 * lanes(g)):
                part = tile_multiply(load_row(g, (oy * g.shape[3] + ox) * block + i, block - i, 4), share)
                for iy in range(top, bottom):
                    for ix in range(left, right):
                        at = (iy * w + ix) * block + i
                        total = tile_add(part, load_row(x, at, block - i, 4)) if overlap else part
                        store_tile(total, x, at, 0, block - i, 4)


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
    check_dtypes("max_pool2d", x)
    n, c, oh, ow = _out_shape(x, size, stride, padding)
    if 2 * padding[0] > size[0] or 2 * padding[1] > size[1]:
        refuse("max_pool2d with windows of {} takes a padding of half of that at most, not {}", size, padding)
    if x.shape[2] * x.shape[3] > PIXELS:
        refuse("max_pool2d takes images of at most 2**24 pixels, not of shape {}", x.shape)
    y, index = images(n, c, oh, ow, x.dtype), images(n, c, oh, ow, np.int32)
    _max_pool(innermost(x), y, index, size, stride, padding)
    return y, index


@public
def max_pool2d_vjp(g, index, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``: each element of ``g`` goes to where its maximum came from.

    ``index`` is what :func:`max_pool2d` returned with the same ``size``, ``stride`` and ``padding``; one of another shape
    than ``g`` is a ValueError.
    """
    check_dtypes("max_pool2d_vjp", g)
    if g.shape != index.shape:
        refuse("max_pool2d_vjp takes a gradient and an index of one shape, not {} and {}", g.shape, index.shape)
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    if not is_batch_innermost(index):
        index = np.ascontiguousarray(index.transpose((2, 3, 1, 0))).transpose((3, 2, 0, 1))
    _max_pool_vjp(innermost(g), index, dx, size, stride, padding)
    return dx


@public
def avg_pool2d(x, size, stride, padding=(0, 0)):
    """Mean of each window of ``x`` (n, c, h, w), zeros of the padding included (as PyTorch's default).

    Shapes, layout and errors as for :func:`max_pool2d`.
    """
    check_dtypes("avg_pool2d", x)
    n, c, oh, ow = _out_shape(x, size, stride, padding)
    y = images(n, c, oh, ow, x.dtype)
    _avg_pool(innermost(x), y, size, stride, padding)
    return y


@public
def avg_pool2d_vjp(g, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``, from ``g`` (n, c, oh, ow)."""
    check_dtypes("avg_pool2d_vjp", g)
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    _avg_pool_vjp(innermost(g), dx, size, stride, padding)
    return dx
