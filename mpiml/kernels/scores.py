"""A block of scores: products of some keys with some queries, what becomes of them, and what they weigh.

A block lies in memory of its own, ``s``, with a row of ROOM elements for each key: row j is key j0 + j, column r is query
i0 + r, of ``n`` keys and ``rows`` queries. So the lanes of a vector are queries, and all that is done along the keys of a
query, the largest score and the sum of exponentials, is done lane by lane. (With queries as rows each row ends in sums
over the lanes of a vector, and in masks: 20 % more time for 128 keys of 32 features.) Other arrays are given as in
:mod:`mpiml.kernels.gemm`.

Blocks begin at multiples of QUERIES and of KEYS, both multiples of ROWS and of a tile's width. The causal mask is left to
whole tiles as far as possible: what lies beyond the diagonal is not computed. Other places that a query does not see are
-infinity, of which the exponential is 0.
"""

from .gemm import ROWS, VECTORS, column_of_tiles
from .jit import kernel, vector_function
from .polynomial import number, two_to_negative
from .simd import at, borrowed, first_lanes, fma, lanes, load, maximum, out_of_line, select, splat, store
from .softmax import row_scale

QUERIES = 8 * ROWS  # in a block
KEYS = 16 * ROWS  # in a block
ROOM = QUERIES + 16  # elements from row to row: no power of two, which would crowd the cache


# --- Products -------------------------------------------------------------------------------------------------

@kernel(exact=True, reads="a panels", writes="s")
def scores(a, ai, a_row, panels, inner, s, i0, rows, j0, n, causal):
    """s = a b for a row of ``a`` from ``ai`` for each key and a column of the packed ``panels`` for each query."""
    out_of_line()
    width = VECTORS * lanes(s)
    half = width // 2
    for c in range(0, rows, width):
        both = min(n, max(0, i0 + c + half - j0)) if causal else n  # keys that queries of both halves of the tile see
        more = min(n, i0 + c + width - j0) if causal and c + half < rows else both
        if both > 0:
            column_of_tiles(a, ai, a_row, 1, panels, c * inner, width, s, c, ROOM, both, inner,
                            width if c + half < rows else half, False)
        if more > both:
            column_of_tiles(a, ai + both * a_row, a_row, 1, panels, c * inner + half, width, s, both * ROOM + c + half, ROOM,
                            more - both, inner, half, False)


@kernel(exact=True, reads="s panels", writes="out")
def by_query(s, panels, keys, out, oi, o_row, i0, rows, j0, n, columns, causal, add):
    """out = s' v, or out += s' v, a row for each query of the block; v, (keys, columns), is packed in ``panels``.

    The tiles of queries that do not see all of the keys are a triangle: it is done in one call, from the last row up, which
    takes 7 % less time for 128 keys than a call for each tile.
    """
    out_of_line()
    width = VECTORS * lanes(s)
    triangle = min(rows, max(0, j0 + n - i0)) // ROWS * ROWS if causal else 0  # queries that do not see all of the keys
    for c in range(0, columns, width):
        count = min(width, columns - c)
        if triangle:
            last = triangle - 1
            column_of_tiles(s, last, -1, ROOM, panels, c * keys + j0 * width, width, out, oi + last * o_row + c, -o_row,
                            triangle, i0 + triangle - j0, count, add, ROWS)
        if triangle < rows:
            column_of_tiles(s, triangle, 1, ROOM, panels, c * keys + j0 * width, width, out, oi + triangle * o_row + c, o_row,
                            rows - triangle, n, count, add)


@kernel(exact=True, reads="s g", writes="out")
def by_key(s, g, gi, g_row, out, oi, o_row, i0, rows, j0, n, columns, causal):
    """out += s g, a row for each key of the block, of which the queries are summed from the last one to the first.

    The first queries to see a key find no sum yet; with a causal mask these are the ones of its own block.
    """
    out_of_line()
    width = VECTORS * lanes(s)
    whole = min(n, max(0, i0 - j0)) if causal else n  # keys that every query of the block sees
    last = rows - 1
    for c in range(0, columns, width):
        count = min(width, columns - c)
        column_of_tiles(s, last, ROOM, -1, g, gi + last * g_row + c, -g_row, out, oi + c, o_row, whole, rows, count, i0 > 0)
        # Of each tile the queries that see its first key, ROWS less than those of the one above it.
        column_of_tiles(s, whole * ROOM + last, ROOM, -1, g, gi + last * g_row + c, -g_row, out, oi + whole * o_row + c, o_row,
                        n - whole, i0 + rows - j0 - whole, count, False, ROWS)


# --- What becomes of the scores -------------------------------------------------------------------------------

@kernel(exact=True, writes="s")
def hide(s, rows, n, bias, bi):
    """-infinity for keys whose element in ``bias``, from position ``bi``, is not 0."""
    out_of_line()
    for j in range(n):
        if at(bias, bi + j) != 0:
            for r in range(0, rows, lanes(s)):
                store(s, j * ROOM + r, splat(at(bias, bi + j)))


@vector_function
def _seen(s, i, j0, n, causal):
    """Of n keys from j0: how many all queries of a vector from i see, and how many there are to the end of their tiles."""
    if not causal:
        return n, n
    return min(n, max(0, i + 1 - j0)), min(n, max(0, i - j0 + lanes(s) + ROWS - 1) // ROWS * ROWS)


@kernel(exact=True, writes="s out")
def exponentials(s, out, oi, o_row, columns, i0, rows, j0, n, causal, top, total, factor):
    """The online softmax: 2**(s - top) in place of s, with the largest score so far; scales what the sums hold so far.

    ``top`` and ``total`` are, for each query, this largest score and the sum; ``factor`` is memory to use.
    """
    out_of_line()
    s, out = borrowed(s), borrowed(out)
    for r in range(0, rows, lanes(s)):
        whole, reach = _seen(s, i0 + r, j0, n, causal)
        old = load(top, r)
        a = b = old
        for j in range(0, whole - 1, 2):  # two at a time: neither has to wait for the other
            a = maximum(load(s, j * ROOM + r), a)
            b = maximum(load(s, j * ROOM + r + ROOM), b)
        if whole % 2:
            a = maximum(load(s, (whole - 1) * ROOM + r), a)
        for j in range(whole, reach):
            v = load(s, j * ROOM + r)
            v = select(first_lanes(v, j0 + j - i0 - r), number(v, "-infinity"), v)
            store(s, j * ROOM + r, v)
            a = maximum(v, a)
        a = maximum(a, b)
        store(top, r, a)
        base = select(a == number(a, "-infinity"), number(a, "0"), a)  # no key so far
        scale = two_to_negative(old - base)
        store(factor, r, scale)
        sums = splat(s.dtype.type(0))
        for j in range(reach):
            v = two_to_negative(load(s, j * ROOM + r) - base)
            store(s, j * ROOM + r, v)
            sums = sums + v
        store(total, r, load(total, r) * scale + sums)
    if j0:
        for r in range(rows):
            row_scale(out, oi + r * o_row, columns, factor[r])


@kernel(exact=True, writes="s ds")
def slopes(s, ds, i0, rows, j0, n, causal, logsumexp, scale, shift):
    """In place of scores s their probabilities p; in place of the gradients ds for these, p * (ds * scale + shift).

    ``logsumexp`` and ``shift`` have a number for each query, see :func:`mpiml.kernels.flash.backward`.
    """
    out_of_line()
    s, ds = borrowed(s), borrowed(ds)
    factor = splat(s.dtype.type(scale))
    for r in range(0, rows, lanes(s)):
        whole, reach = _seen(s, i0 + r, j0, n, causal)
        top, mean = load(logsumexp, r), load(shift, r)
        for j in range(whole):
            p = two_to_negative(load(s, j * ROOM + r) - top)
            store(s, j * ROOM + r, p)
            store(ds, j * ROOM + r, p * fma(load(ds, j * ROOM + r), factor, mean))
        for j in range(whole, reach):
            p = two_to_negative(load(s, j * ROOM + r) - top)
            slope = p * fma(load(ds, j * ROOM + r), factor, mean)
            unseen, zero = first_lanes(p, j0 + j - i0 - r), number(p, "0")
            store(s, j * ROOM + r, select(unseen, zero, p))
            store(ds, j * ROOM + r, select(unseen, zero, slope))
