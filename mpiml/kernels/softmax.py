"""Softmax over the last axis, its logarithm, and the logarithm of its denominator.

exp(x) / sum(exp(x)) is computed as exp(x - top) / sum(exp(x - top)) with the largest ``x`` of the row as ``top``, so
nothing overflows. A row is read in vectors, the last of them masked; its sum depends on the row alone.

The functions raise TypeError for dtypes other than float32 and float64, or several; ValueError for shapes that do not belong
together. ``out`` is an array for the result, of its shape and dtype.
"""

import numpy as np

from . import aligned
from .jit import kernel, vector_function
from .polynomial import exp_of_negative, log
from .public import matrix, output, public, refuse
from .simd import (
    borrowed,
    first_lanes,
    flat,
    fma,
    in_use,
    lanes,
    load,
    load_part,
    maximum,
    reduce_add,
    reduce_max,
    select,
    splat,
    store,
    store_part,
)

_NOTHING = -np.inf  # what the lanes behind the end of a row hold: exp of it is 0


# --- A row of n elements from flat position i -----------------------------------------------------------------
# Two vectors at a time, ``a`` and ``b``: neither has to wait for the other.

@vector_function
def row_top(x, i, n):
    """The largest element."""
    step = lanes(x)
    a = b = splat(x.dtype.type(_NOTHING))
    whole = n - n % step
    even = whole - whole % (2 * step)
    for j in range(i, i + even, 2 * step):
        a = maximum(load(x, j), a)
        b = maximum(load(x, j + step), b)
    if even < whole:
        a = maximum(load(x, i + even), a)
    if whole < n:
        b = maximum(select(first_lanes(b, n - whole), load_part(x, i + whole, n - whole), b), b)
    return reduce_max(maximum(a, b))


@vector_function
def row_exponentials(x, i, n, top, y, k):
    """Write exp(x - top) to ``y`` from position k; return the sum."""
    step = lanes(x)
    tops = splat(top)
    a = b = splat(x.dtype.type(0))
    whole = n - n % step
    even = whole - whole % (2 * step)
    for j in range(0, even, 2 * step):
        left, right = exp_of_negative(load(x, i + j) - tops), exp_of_negative(load(x, i + j + step) - tops)
        store(y, k + j, left)
        store(y, k + j + step, right)
        a, b = a + left, b + right
    if even < whole:
        left = exp_of_negative(load(x, i + even) - tops)
        store(y, k + even, left)
        a = a + left
    if whole < n:
        right = exp_of_negative(load_part(x, i + whole, n - whole) - tops)
        store_part(y, k + whole, right, n - whole)
        b = b + select(first_lanes(b, n - whole), right, splat(x.dtype.type(0)))
    return reduce_add(a + b)


@vector_function
def row_times(x, i, n, factor, y, k):
    """Write the row times a number to ``y`` from position k."""
    step = lanes(x)
    whole = n - n % step
    for j in range(0, whole, step):
        store(y, k + j, load(x, i + j) * splat(factor))
    if whole < n:
        store_part(y, k + whole, load_part(x, i + whole, n - whole) * splat(factor), n - whole)


@vector_function
def row_scale(y, i, n, scale):
    """Multiply by a number."""
    row_times(y, i, n, scale, y, i)


# One row takes its time: a maximum, then the sum of exponentials that depend on it, then a division. So this is done for
# several rows at once, step by step, which keeps the core busy.
BLOCK = 16


@vector_function
def pitch(n, x):
    """How far apart the rows of a block lie: whole vectors of the dtype of ``x``."""
    return -(-n // lanes(x)) * lanes(x)


@kernel(exact=True)
def block_exponentials(x, at, y, to, rows, n, tops, totals):
    """Write exp(x - top) of rows from position ``at`` to ``y`` from ``to``, a :func:`pitch` apart; the rows' tops and sums."""
    x, y = borrowed(x), borrowed(y)
    for i in range(rows):
        tops[i] = row_top(x, at + i * n, n)
    for i in range(rows):
        totals[i] = row_exponentials(x, at + i * n, n, tops[i], y, to + i * pitch(n, x))


@vector_function
def block_rows(n):
    """How many rows of n are done at once: what two passes over them need stays in the first cache, 8 KiB of float32."""
    return max(1, min(BLOCK, 2048 // n))


@vector_function
def in_place(n, x):
    """Whether exponentials are written where the result will be: where rows are whole vectors, or too long for a block.

    The stores then wait for memory while the next exponentials are computed. Other rows cross cache lines, and are put
    together in the first cache: 30 us instead of 36 for 1024 rows of 65.
    """
    return n % lanes(x) == 0 or block_rows(n) == 1


@vector_function
def workspace(n, x, elsewhere):
    """For blocks of rows of n: their number, room for exponentials that are not written ``elsewhere``, tops and sums."""
    rows = block_rows(n)
    room = aligned.empty(0 if elsewhere else rows * pitch(n, x), x.dtype)
    return rows, room, np.ones(BLOCK, x.dtype), np.ones(BLOCK, x.dtype)


@vector_function
def log_totals(totals):
    """Logarithms in place of the sums, in whole vectors; what becomes of the places of no row is read by nobody."""
    for i in range(0, totals.size, lanes(totals)):
        store(totals, i, log(load(totals, i)))


# --- Softmax --------------------------------------------------------------------------------------------------

@kernel(exact=True, reads="x", writes="y", floats="x y")
def _softmax(x, y):
    rows, n = x.shape
    block, scratch, tops, totals = workspace(n, x, in_place(n, x))
    x, y, e = borrowed(x), flat(y), flat(y) if in_place(n, x) else flat(scratch)
    for first in range(0, rows, block):
        m = min(block, rows - first)
        to = first * n if in_place(n, x) else 0
        block_exponentials(x, first * n, e, to, m, n, tops, totals)
        for i in range(m):
            row_times(e, to + i * pitch(n, x), n, x.dtype.type(1) / totals[i], y, (first + i) * n)
    in_use(scratch)


@kernel(exact=True, reads="x", writes="y", floats="x y")
def _log_softmax(x, y):
    rows, n = x.shape
    step = lanes(x)
    whole = n - n % step
    block, scratch, tops, totals = workspace(n, x, False)
    for first in range(0, rows, block):
        m = min(block, rows - first)
        block_exponentials(x, first * n, scratch, 0, m, n, tops, totals)
        log_totals(totals)
        for i in range(m):
            at = (first + i) * n
            top, log_total = splat(tops[i]), splat(totals[i])
            for j in range(at, at + whole, step):
                store(y, j, load(x, j) - top - log_total)
            if whole < n:
                store_part(y, at + whole, load_part(x, at + whole, n - whole) - top - log_total, n - whole)


@vector_function
def _softmax_slope(g, y, total):
    return y * (g - total)


@vector_function
def _log_softmax_slope(g, y, total):
    return g - exp_of_negative(y) * total


def _make_vjp(name, slope, weighted):
    """The kernel of a vjp: ``slope`` of g, y and the row's sum of g, or of g * y where it is ``weighted``."""
    @kernel(exact=True, reads="g y", writes="out", floats="g y out", name=name)
    def vjp(g, y, out):
        rows, n = g.shape
        step = lanes(g)
        whole = n - n % step
        left = n - whole
        for i in range(rows):
            at = i * n
            last_g, last_y = load_part(g, at + whole, left), load_part(y, at + whole, left)
            total = last_g * last_y if weighted else last_g
            for j in range(at, at + whole, step):
                total = fma(load(g, j), load(y, j), total) if weighted else total + load(g, j)
            sums = splat(reduce_add(total))
            for j in range(at, at + whole, step):
                store(out, j, slope(load(g, j), load(y, j), sums))
            store_part(out, at + whole, slope(last_g, last_y, sums), left)

    return vjp


_softmax_vjp = _make_vjp("softmax_vjp", _softmax_slope, True)
_log_softmax_vjp = _make_vjp("log_softmax_vjp", _log_softmax_slope, False)


@public
def _by_rows(run, x, out):
    """``run(x, y)`` for the rows of arrays (..., n); the result in ``out``, if there is one."""
    y = output(out, x.shape, x.dtype)
    whole = np.ascontiguousarray(y)
    run(matrix(np.ascontiguousarray(x)), matrix(whole))
    if out is not None:
        y[...] = whole
    return y


@public
def _by_rows_vjp(run, g, y, out):
    """``run(g, y, result)``, in the same way."""
    if g.shape != y.shape:
        refuse("a gradient of shape {} for a result of shape {}", g.shape, y.shape)
    result = output(out, g.shape, g.dtype)
    whole = np.ascontiguousarray(result)
    run(matrix(np.ascontiguousarray(g)), matrix(np.ascontiguousarray(y)), matrix(whole))
    if out is not None:
        result[...] = whole
    return result


@public
def softmax(x, out=None):
    """exp(x) / sum(exp(x)) over the last axis of ``x`` (..., classes), float32 or float64, without overflow."""
    return _by_rows(_softmax, x, out)


@public
def softmax_vjp(g, y, out=None):
    """Gradient for x of ``y = softmax(x)``."""
    return _by_rows_vjp(_softmax_vjp, g, y, out)


@public
def log_softmax(x, out=None):
    """x - log(sum(exp(x))) over the last axis of ``x`` (..., classes), float32 or float64, without overflow."""
    return _by_rows(_log_softmax, x, out)


@public
def log_softmax_vjp(g, y, out=None):
    """Gradient for x of ``y = log_softmax(x)``."""
    return _by_rows_vjp(_log_softmax_vjp, g, y, out)


@kernel(exact=True, reads="x", floats="x y")
def _logsumexp(x, y):
    rows, n = x.shape
    block, scratch, tops, totals = workspace(n, x, False)
    for first in range(0, rows, block):
        m = min(block, rows - first)
        block_exponentials(x, first * n, scratch, 0, m, n, tops, totals)
        log_totals(totals)
        for i in range(m):
            y[first + i] = tops[i] + totals[i]


@public
def logsumexp(x):
    """log(sum(exp(x))) over the last axis of ``x`` (..., n), float32 or float64, without overflow: an array (...)."""
    if x.shape[-1] == 0:
        refuse("logsumexp takes at least one number in each row, not an input of shape {}", x.shape)
    y = np.empty(x.shape[:-1], x.dtype)
    _logsumexp(matrix(np.ascontiguousarray(x)), y.reshape(-1))
    return y


@kernel(exact=True, reads="g x y", writes="p", floats="x g y p")
def _logsumexp_vjp(g, x, y, p):
    """p becomes the softmax of rows x, each times its element of g; of y only the dtype is looked at."""
    _softmax(x, p)
    n = p.shape[1]
    for i in range(len(p)):
        row_scale(p, i * n, n, g[i])


@public
def logsumexp_vjp(g, x, y):
    """Gradient for x of ``y = logsumexp(x)``: softmax(x), weighted with ``g`` (...)."""
    if g.shape != y.shape or x.shape[:-1] != y.shape:
        refuse("gradients of shape {} for results of shape {} of an input of shape {}", g.shape, y.shape, x.shape)
    p = np.empty(x.shape, x.dtype)
    _logsumexp_vjp(np.ascontiguousarray(g).reshape(-1), matrix(np.ascontiguousarray(x)), np.ascontiguousarray(y).reshape(-1),
                   matrix(p))
    return p
