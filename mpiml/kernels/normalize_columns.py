"""Standardising arrays (n, c, m) that lie in memory as (m, c, n): sums of columns, and what is done with them.

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
from .simd import first_lanes, fma, lanes, load, load_part, out_of_line, reduce_add, select, splat, store, store_part
from .tile import at_least, dot_tile, load_tile, store_tile, tile_fma, tile_subtract, tile_where_positive

ROWS = 8  # of which means are taken at once
TILE = 4  # rows of anything else


def _make_moments(size):
    """A kernel that adds the rows from ``start`` to ``stop``, ``size`` at a time, to the columns' means and squares about them.

    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    @kernel(exact=True)
    def moments(x, step, start, stop, k, mean, square):
        width, t = lanes(x), x.dtype.type
        zero, one, share = splat(t(0)), splat(t(1)), splat(t(1) / t(size))
        for p in range(start, stop, size):
            part, both = splat(t(size) / t(p + size)), splat(t(p) * t(size) / t(p + size))
            for slot in range(0, len(mean), width):
                tile = load_tile(x, p * step + min(slot, k - width), step, None, size, 1)
                mu = dot_tile(tile, one, zero) * share
                d = tile_subtract(tile, mu)
                off = mu - load(mean, slot)
                store(mean, slot, fma(off, part, load(mean, slot)))
                store(square, slot, fma(off * off, both, dot_tile(d, d, load(square, slot))))

    return moments


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


_moments, _moments_of_one = _make_moments(ROWS), _make_moments(1)


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
    """Add up the parts of each sample's columns, each of ``each`` channels, as the lanes of a row are."""
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
def _add_columns(sums, n, each, samples, out):
    """Add up the columns of each block of ``samples`` samples and ``each`` channels."""
    out_of_line()
    for b in range(len(out)):
        first, end = b * samples, min((b + 1) * samples, n)
        for group in range(out.shape[1]):
            total = splat(sums.dtype.type(0))
            for ch in range(group * each, (group + 1) * each):
                for i in range(ch * n + first, ch * n + end, lanes(sums)):
                    total = total + load_part(sums, i, ch * n + end - i)
            out[b, group] = reduce_add(total)


@kernel(exact=True)
def _sample_moments(x, step, mean, var):
    """For groups of channels of each sample on its own, as :func:`mpiml.kernels.normalize_rows.row_moments`, bit by bit."""
    out_of_line()
    n, c, m = x.shape
    k, parts = n * c, lanes(x)
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
        off = expand(mean, n, c, 1)


@kernel(exact=True)
def column_moments(x, samples, groups, mean, var):
    """Mean and biased variance, (blocks, groups), of x (n, c, m).

    Each column's mean and squares about it first; then the mean of these means, and to the squares about the columns'
    means is added what these differ from it (Chan, Golub and LeVeque 1983).
    """
    n, c, m = x.shape
    k, step, width, t = n * c, x.strides[2] // x.itemsize, lanes(x), x.dtype.type
    if samples == 1:
        _sample_moments(x, step, mean, var)
        return
    each = c // groups
    mu, square = np.zeros((1, -(-k // width) * width), x.dtype), np.zeros((1, -(-k // width) * width), x.dtype)
    _moments(x, step, 0, m // ROWS * ROWS, k, mu.reshape(-1), square.reshape(-1))
    _moments_of_one(x, step, m // ROWS * ROWS, m, k, mu.reshape(-1), square.reshape(-1))
    _unfold(mu, k)
    _unfold(square, k)
    _add_columns(square, n, each, samples, var)
    for b in range(len(mean)):  # the columns' means, less one of them, which is that much more exact
        first, end = b * samples, min((b + 1) * samples, n)
        count = t((end - first) * each)
        for group in range(groups):
            base = mu[0, group * each * n + first]
            total = splat(t(0))
            for ch in range(group * each, (group + 1) * each):
                for i in range(ch * n + first, ch * n + end, width):
                    rest = min(width, ch * n + end - i)
                    d = load_part(mu, i, rest) - splat(base)
                    total = total + select(first_lanes(d, rest), d, splat(t(0)))
            off = reduce_add(total) / count
            total = splat(t(0))
            for ch in range(group * each, (group + 1) * each):
                for i in range(ch * n + first, ch * n + end, width):
                    rest = min(width, ch * n + end - i)
                    d = (load_part(mu, i, rest) - splat(base)) - splat(off)
                    d = select(first_lanes(d, rest), d, splat(t(0)))
                    total = fma(d, d, total)
            mean[b, group] = base + off
            var[b, group] = (var[b, group] / t(m) + reduce_add(total)) / count


@kernel(exact=True)
def column_products(g, x, samples, mean, scale, offset, relu, total, product):
    """Sums of g and of g * (x - mean) for each block and channel; with ``relu`` where (x - mean) * scale + offset > 0."""
    out_of_line()
    n, c, m = x.shape
    k, width, size = n * c, lanes(x), x.itemsize
    shape = (width if samples == 1 else 1, -(-k // width) * width)
    totals, products = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    _add_products(g, g.strides[2] // size, x, x.strides[2] // size, m, k, expand(mean, n, c, samples),
                  expand(scale, n, c, samples), expand(offset, n, c, samples), relu, totals, products)
    if samples == 1:
        _add_parts(totals, n, 1, total)
        _add_parts(products, n, 1, product)
    else:
        _add_columns(totals, n, 1, samples, total)
        _add_columns(products, n, 1, samples, product)


@kernel(exact=True)
def expand(values, n, c, samples):
    """``values`` (blocks, groups) as coefficients (c * n,) of all columns."""
    out_of_line()
    blocks, groups = values.shape
    each = c // groups
    out = np.empty(c * n, values.dtype)
    for ch in range(c):
        for b in range(blocks):
            value = values[b, ch // each]
            if samples == 1:
                out[ch * n + b] = value
            else:
                end = ch * n + min((b + 1) * samples, n)
                for i in range(ch * n + b * samples, end, lanes(out)):
                    store_part(out, i, splat(value), min(lanes(out), end - i))
    return out


def _make_column_affine(vjp):
    """A kernel for y = (x - mean) * scale + offset, or (vjp) y = g * scale + (x - mean) * slope + shift.

    With ``relu`` y is 0 where that is negative, and (vjp) so is g where (x - mean) * scale + offset is not positive.
    """
    tiles, rest = _make_affine(TILE, vjp), _make_affine(1, vjp)

    @kernel(exact=True)
    def affine(g, x, samples, mean, scale, offset, slope, shift, relu, y):
        out_of_line()
        n, c, m = x.shape
        size = x.itemsize
        k, g_step, step, y_step = n * c, g.strides[2] // size, x.strides[2] // size, y.strides[2] // size
        mu, factor = expand(mean, n, c, samples), expand(scale, n, c, samples)
        end = expand(offset, n, c, samples)
        tilt = expand(slope, n, c, samples) if vjp else end
        term = expand(shift, n, c, samples) if vjp else end
        whole = m // TILE * TILE
        tiles(g, g_step, x, step, 0, whole, k, mu, factor, end, tilt, term, relu, y, y_step)
        rest(g, g_step, x, step, whole, m, k, mu, factor, end, tilt, term, relu, y, y_step)

    return affine


column_affine, column_affine_vjp = _make_column_affine(False), _make_column_affine(True)
