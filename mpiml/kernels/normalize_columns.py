"""Standardising few samples of arrays (n, c, m) that lie in memory as (m, c, n): sums of columns, and what is done with them.

See :mod:`mpiml.kernels.normalize`. A place is a row of k = c * n columns, taken in whole vectors; where their number does
not come out even, the last vector begins earlier and overlaps the one before. Several rows are taken at a time.

Sums of columns have a *slot* for each lane of each vector, more than k where the last one overlaps: with 4 lanes and k = 6

    columns  0 1 2 3 4 5
    slots    0 1 2 3          of columns 0 1 2 3
                    4 5 6 7   of columns 2 3 4 5

so slots are added to without a thought, and at the end those of the last vector that count are moved to their columns.
"""

import numpy as np

from .jit import kernel
from .simd import lanes, load, load_part, out_of_line, splat, store
from .tile import at_least, dot_tile, load_tile, store_tile, tile_fma, tile_subtract, tile_where_positive

TILE = 4  # rows at a time


def _make_sums(size, products):
    """A kernel that adds the rows start, start + parts, ..., ``size`` at a time, to row ``part`` of two sums.

    These are those of g and of g * (x - mean), with ``relu`` where (x - mean) * scale + offset is positive; without
    ``products`` of d = x - mean and of d * d.
    """
    @kernel(exact=True)
    def sums(g, g_step, x, step, start, stop, k, mean, scale, offset, relu, total, product, part):
        out_of_line()
        width = lanes(x)
        parts, slots = total.shape
        one = splat(x.dtype.type(1))
        for p in range(start, stop - (size - 1) * parts, size * parts):
            for slot in range(0, slots, width):
                i, to = min(slot, k - width), part * slots + slot
                d = tile_subtract(load_tile(x, p * step + i, parts * step, None, size, 1), load(mean, i))
                v = load_tile(g, p * g_step + i, parts * g_step, None, size, 1) if products else d
                if relu:
                    v = tile_where_positive(tile_fma(d, load(scale, i), load(offset, i)), v)
                store(total, to, dot_tile(v, one, load(total, to)))
                store(product, to, dot_tile(v, d, load(product, to)))

    return sums


def _make_affine(size, vjp):
    """A kernel for rows of :func:`_make_column_affine`, ``size`` at a time."""
    @kernel(exact=True)
    def affine(g, g_step, x, step, start, stop, k, mean, scale, offset, slope, shift, relu, y, y_step):
        out_of_line()
        width = lanes(x)
        for p in range(start, stop, size):
            for slot in range(0, k, width):
                i = min(slot, k - width)
                d = tile_subtract(load_tile(x, p * step + i, step, None, size, 1), load(mean, i))
                if vjp:
                    v = load_tile(g, p * g_step + i, g_step, None, size, 1)
                    if relu:
                        v = tile_where_positive(tile_fma(d, load(scale, i), load(offset, i)), v)
                    v = tile_fma(v, load(scale, i), tile_fma(d, load(slope, i), load(shift, i)))
                else:
                    v = tile_fma(d, load(scale, i), load(offset, i))
                    if relu:
                        v = at_least(v, splat(x.dtype.type(0)))
                store_tile(v, y, p * y_step + i, y_step, None, 1)

    return affine


@kernel(exact=True)
def _unfold(sums, k):
    """Bring the sums of the last, overlapping vector from its slots to the places of their columns."""
    out_of_line()
    parts, slots = sums.shape
    for part in range(parts):
        for j in range(slots - lanes(sums), k):
            sums[part, j] = sums[part, j + slots - k]


def _make_sum_up(tiles, rest):
    """A kernel that adds all rows, row p to part p % parts of the sums."""
    @kernel(exact=True)
    def sum_up(g, g_step, x, step, m, k, mean, scale, offset, relu, total, product):
        out_of_line()
        parts = len(total)
        for part in range(min(parts, m)):
            whole = part + (m - part + parts - 1) // (parts * TILE) * TILE * parts
            tiles(g, g_step, x, step, part, m, k, mean, scale, offset, relu, total, product, part)
            rest(g, g_step, x, step, whole, m, k, mean, scale, offset, relu, total, product, part)
        _unfold(total, k)
        _unfold(product, k)

    return sum_up


_add_products = _make_sum_up(_make_sums(TILE, True), _make_sums(1, True))
_add_deviations = _make_sum_up(_make_sums(TILE, False), _make_sums(1, False))


@kernel(exact=True)
def _add_parts(sums, n, each, out):
    """Sums (n, groups) over the columns of each sample's ``each`` channels, and over the parts of these.

    There are as many parts as lanes, and place p was added to part p % parts as in rows it is to that lane. So parts are added
    up in halves, quarters and so on, in the order in which :func:`simd.reduce_add` adds lanes: the bits are those of rows.
    """
    out_of_line()
    parts, slots = sums.shape
    width = lanes(sums)
    total = np.empty((parts, width), sums.dtype)
    for group in range(out.shape[1]):
        for i in range(0, n, width):
            rest = min(width, n - i)
            for part in range(parts):
                v = splat(sums.dtype.type(0))
                for ch in range(group * each, (group + 1) * each):
                    v = v + load_part(sums, part * slots + ch * n + i, rest)
                store(total, part * width, v)
            half = parts // 2
            while half:
                for part in range(0, half * width, width):
                    store(total, part, load(total, part) + load(total, part + half * width))
                half //= 2
            for lane in range(rest):
                out[i + lane, group] = total[0, lane]


@kernel(exact=True)
def column_moments(x, mean, var):
    """Mean and biased variance, (n, groups), of each sample: bit by bit those of rows (:mod:`mpiml.kernels.normalize_rows`)."""
    n, c, m = x.shape
    k, step, parts = n * c, x.strides[2] // x.itemsize, lanes(x)
    each = c // mean.shape[1]
    count = x.dtype.type(each * m)
    total, square = np.empty((parts, -(-k // parts) * parts), x.dtype), np.empty((parts, -(-k // parts) * parts), x.dtype)
    off, rest = np.zeros(k, x.dtype), np.empty_like(mean)
    for twice in range(2):  # about 0: the mean; then about that: its correction, and the variance
        total[:] = 0
        square[:] = 0
        _add_deviations(x, step, x, step, m, k, off, off, off, False, total, square)
        _add_parts(total, n, each, rest)
        _add_parts(square, n, each, var)
        for i in range(n):
            for group in range(mean.shape[1]):
                rest[i, group] /= count
                if twice:
                    var[i, group] = max(var[i, group] / count - rest[i, group] * rest[i, group], x.dtype.type(0))
                    mean[i, group] += rest[i, group]
                else:
                    mean[i, group] = rest[i, group]
        off = expand(mean, 1, n, c)


@kernel(exact=True)
def column_products(g, x, mean, scale, offset, relu, total, product):
    """Sums of g and of g * (x - mean) for each sample and channel; with ``relu`` where (x - mean) * scale + offset > 0."""
    out_of_line()
    n, c, m = x.shape
    k, width, size = n * c, lanes(x), x.itemsize
    shape = (width, -(-k // width) * width)
    totals, products = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    _add_products(g, g.strides[2] // size, x, x.strides[2] // size, m, k, expand(mean, 1, n, c), expand(scale, 1, n, c),
                  expand(offset, 1, n, c), relu, totals, products)
    _add_parts(totals, n, 1, total)
    _add_parts(products, n, 1, product)


@kernel(exact=True)
def expand(values, samples, n, c):
    """``values`` (blocks of ``samples``, groups) as coefficients (c * n,) of all columns."""
    out_of_line()
    blocks, groups = values.shape
    each = c // groups
    out = np.empty(c * n, values.dtype)
    for ch in range(c):
        for b in range(blocks):
            first = b * samples
            out[ch * n + first:ch * n + min(first + samples, n)] = values[b, ch // each]
    return out


def _make_column_affine(vjp):
    """A kernel for y = (x - mean) * scale + offset, or (vjp) y = g * scale + (x - mean) * slope + shift.

    With ``relu`` y is 0 where that is negative, and (vjp) so is g where (x - mean) * scale + offset is not positive.
    Coefficients are those of blocks of ``samples``.
    """
    tiles, rest = _make_affine(TILE, vjp), _make_affine(1, vjp)

    @kernel(exact=True)
    def affine(g, x, samples, mean, scale, offset, slope, shift, relu, y):
        out_of_line()
        n, c, m = x.shape
        size = x.itemsize
        k, g_step, step, y_step = n * c, g.strides[2] // size, x.strides[2] // size, y.strides[2] // size
        mu, factor, end = expand(mean, samples, n, c), expand(scale, samples, n, c), expand(offset, samples, n, c)
        tilt = expand(slope, samples, n, c) if vjp else end
        term = expand(shift, samples, n, c) if vjp else end
        whole = m // TILE * TILE
        tiles(g, g_step, x, step, 0, whole, k, mu, factor, end, tilt, term, relu, y, y_step)
        rest(g, g_step, x, step, whole, m, k, mu, factor, end, tilt, term, relu, y, y_step)

    return affine


column_affine, column_affine_vjp = _make_column_affine(False), _make_column_affine(True)
