"""Batch innermost: how images lie in memory while they pass through convolutions and pooling.

To the user images have the shape (n, c, h, w). In memory, what these kernels return is a contiguous (h, w, c, n) array:
one pixel's channel holds the whole batch side by side. So the lanes of a vector are samples, every number of channels
fills them, the edge of an image concerns whole vectors, and a row of a picture is contiguous over (w, c): the inner
dimension of a convolution is read as it lies. NumPy's functions keep the layout of what they get, so a whole network
runs in it; only the first kernel has to convert what it is given.
"""

from numba.extending import overload

from . import aligned
from .jit import kernel
from .public import public
from .simd import lanes, load_part, out_of_line, store_part
from .tile import turn_part


def images(n, c, h, w, dtype):
    """A new (n, c, h, w) array, batch innermost."""
    return aligned.images(n, c, h, w, dtype)


@kernel
def _turned(memory):
    return memory.transpose((3, 2, 0, 1))


@overload(images)
def _images(n, c, h, w, dtype):  # numba compiles a transpose for seconds: here once, for all
    return lambda n, c, h, w, dtype: _turned(aligned.empty(h * w * c * n, dtype).reshape(h, w, c, n))


@kernel(reads="x")
def is_batch_innermost(x):
    """Do the elements of ``x`` (n, c, h, w) lie as those of a contiguous (h, w, c, n) array?"""
    out_of_line()
    n, c, h, w = x.shape
    s, size = x.strides, x.itemsize
    return ((n <= 1 or s[0] == size) and (c <= 1 or s[1] == n * size) and (w <= 1 or s[3] == c * n * size)
            and (h <= 1 or s[2] == w * c * n * size))


@kernel(exact=True, reads="x", writes="y")
def rearrange(x, y):
    """Copy ``x`` (n, c, h, w) of any strides to ``y``, of the same shape but batch innermost."""
    out_of_line()
    n, c, h, w = x.shape
    size, square = x.itemsize, lanes(x)
    by_n, by_c, by_y, by_x = [s // size for s in x.strides]
    if by_n == 1:
        for p in range(h * w):
            for k in range(c):
                here, there = p // w * by_y + p % w * by_x + k * by_c, (p * c + k) * n
                for i in range(0, n, square):
                    store_part(y, there + i, load_part(x, here + i, n - i), n - i)
    elif by_x == 1 or by_c == 1:
        # Squares of samples and of the axis that is contiguous, pixels or channels, turned in registers. A strip is a run
        # of ``length`` elements along that axis, which go ``step`` apart in y; ``others`` is the number of the third axis.
        if by_x == 1:
            length, step = (h * w, c * n) if by_y == w else (w, c * n)  # a whole picture, or row by row
            strips, others, by_other, other_step = h * w // max(length, 1), c, by_c, n
        else:
            length, step, strips, others, by_other, other_step = c, n, h, w, by_x, c * n
        for i in range(0, n, square):
            for strip in range(strips):
                for k in range(others):
                    here, there = i * by_n + strip * by_y + k * by_other, strip * w * c * n + k * other_step + i
                    for p in range(0, length, square):
                        turn_part(x, here + p, by_n, y, there + p * step, step, n - i, length - p)
    else:
        for p in range(h * w):
            for k in range(c):
                for i in range(n):
                    y[i, k, p // w, p % w] = x[i, k, p // w, p % w]


@public
def innermost(x):
    """``x`` (n, c, h, w), copied if it does not lie batch innermost."""
    if is_batch_innermost(x):
        return x
    n, c, h, w = x.shape
    y = images(n, c, h, w, x.dtype)
    rearrange(x, y)
    return y
