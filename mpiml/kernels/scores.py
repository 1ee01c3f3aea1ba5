"""A block of scores: products of some queries with some keys, what becomes of them, and what they weigh.

A block lies in memory of its own, ``s``, with a row of ROOM elements for each query: row r is query i0 + r, column j is key
j0 + j, of ``rows`` queries and ``n`` keys. Other arrays are given as in :mod:`mpiml.kernels.gemm`. What a query does not
see is -infinity, of which the exponential is 0. So the rows are worked on in whole vectors, and ROWS of them equally far:
a loop that is as long as the last one is foreseen by the processor, which is worth more than the few elements saved.

Blocks begin at multiples of QUERIES and of KEYS, both multiples of ROWS. The causal mask is left to whole tiles as far as
possible: what lies above the diagonal is not computed.
"""

from .gemm import ROWS, VECTORS, column_of_tiles
from .jit import kernel
from .polynomial import exp_of_negative, number, vector_function
from .simd import borrowed, first_lanes, lanes, load, load_part, out_of_line, select, splat, store
from .softmax import row_exponentials, row_scale, row_top

QUERIES = 4 * ROWS  # in a block
KEYS = 32 * ROWS  # in a block; a multiple of a tile's width
ROOM = KEYS + 16  # elements from row to row: no power of two, which would crowd the cache


# --- Products -------------------------------------------------------------------------------------------------

@kernel(exact=True, reads="a b", writes="c")
def _product(a, ai, a_row, a_step, b, bi, b_step, b_panel, c, ci, c_row, rows, inner, columns, add):
    """c = a b or c += a b, where the element of b in column j, a multiple of a tile's width, is ``j * b_panel`` further."""
    out_of_line()
    width = VECTORS * lanes(c)
    for j in range(0, columns, width):
        column_of_tiles(a, ai, a_row, a_step, b, bi + j * b_panel, b_step, c, ci + j, c_row, rows, inner,
                        min(width, columns - j), add)


@kernel(exact=True, reads="a panels", writes="s")
def scores(a, ai, a_row, panels, inner, s, i0, rows, j0, n, causal):
    """s = a b for a block of rows from i0 and columns from j0 of the packed ``panels``; causal: up to the diagonal."""
    out_of_line()
    width = VECTORS * lanes(s)
    for j in range(0, n, width):
        first = max(0, j0 + j - i0) // ROWS * ROWS if causal else 0
        if first < rows:
            column_of_tiles(a, ai + first * a_row, a_row, 1, panels, (j0 + j) * inner, width, s, first * ROOM + j, ROOM,
                            rows - first, inner, min(width, n - j), False)


@kernel(exact=True, reads="s panels", writes="out")
def by_query(s, panels, keys, out, oi, o_row, i0, rows, j0, n, columns, causal, add):
    """out = s v, or out += s v, a row for each query of the block; v, (keys, columns), is packed in ``panels``."""
    out_of_line()
    step = VECTORS * lanes(s)
    if not causal or j0 + n <= i0:
        _product(s, 0, ROOM, 1, panels, j0 * step, step, keys, out, oi, o_row, rows, n, columns, add)
        return
    for r in range(0, rows, ROWS):
        m = min(ROWS, rows - r)
        inner = min(n, i0 + r + m - j0)
        if inner > 0:
            _product(s, r * ROOM, ROOM, 1, panels, j0 * step, step, keys, out, oi + r * o_row, o_row, m, inner, columns, add)


@kernel(exact=True, reads="s g", writes="out")
def by_key(s, g, gi, g_row, out, oi, o_row, i0, rows, j0, n, columns, causal):
    """out += s' g, a row for each key of the block."""
    out_of_line()
    whole = min(n, max(0, i0 - j0 + 1)) // ROWS * ROWS if causal else n  # keys that every query of the block sees
    _product(s, 0, 1, ROOM, g, gi, g_row, 1, out, oi, o_row, whole, rows, columns, True)
    for j in range(whole, n, ROWS):
        first = max(0, j0 + j - i0)
        if first < rows:
            _product(s, first * ROOM + j, 1, ROOM, g, gi + first * g_row, g_row, 1, out, oi + j * o_row, o_row,
                     min(ROWS, n - j), rows - first, columns, True)


# --- What becomes of the scores -------------------------------------------------------------------------------

@kernel(exact=True, writes="s")
def add_bias(s, rows, n, bias, bi):
    """Add 0 or -infinity, which stand in ``bias`` from position ``bi``, to the columns of a block."""
    out_of_line()
    step = lanes(s)
    for r in range(rows):
        for j in range(0, n, step):
            store(s, r * ROOM + j, load(s, r * ROOM + j) + load_part(bias, bi + j, n - j))


@vector_function
def _seen(i, j0, n, causal):
    """How many of the n keys from j0 the query i sees."""
    return min(n, max(0, i + 1 - j0)) if causal else n


@vector_function
def _reach(s, i, j0, n, causal):
    """How many elements whole vectors take for the keys that the last of ROWS queries from i sees."""
    step = lanes(s)
    return -(-_seen(i + ROWS - 1, j0, n, causal) // step) * step


@vector_function
def _hide(s, r, seen, reach):
    """-infinity for what a query does not see."""
    step = lanes(s)
    for j in range(seen // step * step, reach, step):
        v = load(s, r * ROOM + j)
        store(s, r * ROOM + j, select(first_lanes(v, seen - j), v, number(v, "-infinity")))


@kernel(exact=True, writes="s out")
def exponentials(s, out, oi, o_row, columns, i0, rows, j0, n, causal, top, total, factor, base):
    """The online softmax: exp(s - top) in place of s, with the largest score so far; scales what the sums hold so far.

    ``top`` and ``total`` are, for each row, this largest score and the sum; ``factor`` and ``base`` are memory to use.
    """
    out_of_line()
    s, out = borrowed(s), borrowed(out)
    for first in range(0, rows, ROWS):
        reach = _reach(s, i0 + first, j0, n, causal)
        for r in range(first, min(rows, first + ROWS)):
            _hide(s, r, _seen(i0 + r, j0, n, causal), reach)
            base[r] = max(top[r], row_top(s, r * ROOM, reach))
    for r in range(0, rows, lanes(s)):
        old, new = load(top, r), load(base, r)
        store(top, r, new)
        new = select(new == number(new, "-infinity"), number(new, "0"), new)  # no key so far
        store(base, r, new)
        store(factor, r, exp_of_negative(old - new))
    for first in range(0, rows, ROWS):
        reach = _reach(s, i0 + first, j0, n, causal)
        for r in range(first, min(rows, first + ROWS)):
            sums = row_exponentials(s, r * ROOM, reach, base[r], s, r * ROOM)
            if j0:
                row_scale(out, oi + r * o_row, columns, factor[r])
                sums += total[r] * factor[r]
            total[r] = sums


@kernel(exact=True, writes="s ds")
def slopes(s, ds, i0, rows, j0, n, causal, logsumexp, delta):
    """In place of scores s their probabilities; in place of gradients ds for these, those for the scores.

    ``logsumexp`` and ``delta`` have a number for each row, see :func:`mpiml.kernels.flash.backward`.
    """
    out_of_line()
    s = borrowed(s)
    step = lanes(s)
    for first in range(0, rows, ROWS):
        reach = _reach(s, i0 + first, j0, n, causal)
        for r in range(first, min(rows, first + ROWS)):
            _hide(s, r, _seen(i0 + r, j0, n, causal), reach)
            lse, mean = splat(logsumexp[r]), splat(delta[r])
            for j in range(r * ROOM, r * ROOM + reach, step):
                v = load(s, j)
                p = exp_of_negative(v - lse)
                slope = p * (load(ds, j) - mean)
                store(ds, j, select(v == number(v, "-infinity"), number(v, "0"), slope))  # whatever stood there
                store(s, j, p)
