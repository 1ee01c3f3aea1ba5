"""The matrix product: one register tile, moved over the result.

The ladder, float32, 128 x 784 times 784 x 128 on one core whose peak is 117 billion operations per second (AMD Zen 4;
``python benchmarks/ladder.py`` climbs it on yours):

1. 1.8, three nested loops as in a textbook, the inner one a dot product: every addition waits for the one before it.
2. 35, the loop over columns innermost: vector instructions, but each of them loads and stores a piece of the result.
3. 27, a vector of the result kept in a register while the inner dimension passes by: waiting for additions again.
   68, a tile of 2 x 2 such vectors. Each step loads a row of ``b`` and a column of ``a`` and adds their outer product.
   114, a tile of ROWS x VECTORS = 8 x 2: as many independent multiply-adds as hide each other's latency, and few loads.
4. What is left are edges (a masked vector, tiles of 4, 2 and 1 rows) and, for matrices larger than the cache, blocks:
   a block of ``b`` is copied to where its rows are consecutive and stay in cache. (Goto and van de Geijn 2008, "Anatomy
   of high-performance matrix multiplication".)
5. In training, matrices are in no near cache when they are met: of 1024 x 512 times 512 x 128 that left 81 % of the peak.
   While a tile is computed, the lines that the next one and the next panel will need are fetched: 92 %.

Every element of the result is ``((0 + a[i,0] b[0,j]) + a[i,1] b[1,j]) + ...``, each step rounded once, whatever the
tile or the block it falls into: its bits are a function of its row, its column and nothing else.

What is where, in elements from the first one of each array (``start`` holds what the sums begin with, if they do not begin
with 0: c itself to add to it, or with ``s_row = 0`` one row, a bias, for all):

    a[i, k] at ai + i * a_row + k * a_step            c[i, j] at ci + i * c_row + j
    b[k, j] at bi + k * b_step + j * b_column         start[i, j] at si + i * s_row + j

So a transpose is a matter of two strides; a tile needs ``b_column = 1``. From the outside in, the functions are

    gemm             c = a b        blocks of OUTER columns of b, packed unless b is small
    product          of a block     BLOCK rows of c, and INNER of a packed b, at a time
    column_of_tiles  of a panel     all rows, one tile wide
    tiles            of one size    ROWS x VECTORS registers, and smaller ones for what is left
"""

import numpy as np
from numba.extending import register_jitable

from .jit import kernel, vector_function
from .registers import REGISTER
from .simd import at, flat, lanes, out_of_line, prefetch, splat
from .tile import at_least, fetch_tile, load_row, load_tile, outer, store_tile, turn_part, zero_tile

# The registers of AVX-512 and NEON (32) and of AVX2 (16) hold these tiles and one row and column besides.
ROWS, VECTORS = {64: (8, 2), 32: (6, 2), 16: (6, 4)}[REGISTER]
BLOCK = 16 * ROWS  # rows of the result that are done with before the next
# A panel of INNER rows, one tile wide, takes 32 KiB with AVX-512 in either dtype (first cache); the block of OUTER columns
# 512 KiB in float32 (half of a second cache of 1 MiB), as does a b that is read where it lies.
INNER = 256  # rows of a packed block of b
OUTER = 512  # its columns
DIRECT = 1 << 19  # bytes of b up to which it is read where it lies, as it is if one block of rows is all there is
# Bytes between the rows of a transposed ``a`` from which on its blocks are copied to where these are near each other, 0 for
# never. A step of a tile of AVX2 takes 6 cycles, less than to find another page: 82 % of the peak instead of 57 to 72 for the
# gradient of a weight. With AVX-512 a step takes 16, and what is fetched ahead arrives in time.
FAR = {64: 0, 32: 512, 16: 512}[REGISTER]


def make_tiles(size, vectors, masked):
    """A function for a column of tiles of the result, of ``size`` rows of ``vectors`` vectors; ``masked``: of ``columns``.

    It is made a part of its caller: to hand over some forty numbers in a call costs 100 cycles, of 512 that a tile of an
    inner dimension of 32 takes. (An array counts as several, its shape and strides among them.)
    """
    registers = size * vectors

    @vector_function
    def tiles(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, rows, inner, less, columns, started,
              relu):
        count = columns if masked else None
        for _ in range(rows // size):
            fetch_tile(c, ci + size * c_row, c_row, registers, vectors, 3)  # the next one
            acc = load_tile(start, si, s_row, count, registers, vectors) if started else zero_tile(c, registers)
            i, j = ai, bi
            # The next tile's part of a lies beside this one's, where a is transposed, or else behind it, if rows have no gaps.
            ahead, step = ai + size * a_row, a_step if a_row == 1 else size
            for _ in range(inner):
                prefetch(a, ahead)
                fetch_tile(b, j + vectors * lanes(c), 0, vectors, vectors, 2)  # of the next panel, where b is not packed
                ahead += step
                acc = outer(acc, a, i, a_row, load_row(b, j, count, vectors))
                i += a_step
                j += b_step
            if relu:
                acc = at_least(acc, splat(c.dtype.type(0)))
            store_tile(acc, c, ci, c_row, count, vectors)
            inner -= less
            ai += size * a_row
            si += size * s_row
            ci += size * c_row

    return tiles


_full = make_tiles(ROWS, VECTORS, False)
_edge = make_tiles(ROWS, VECTORS, True)
_narrow = make_tiles(ROWS, 1, True)
_four, _two, _one = (make_tiles(size, VECTORS, True) for size in (4, 2, 1))


@kernel(exact=True, reads="a b start", writes="c")
def _column_of_tiles(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, rows, inner, less, columns, started,
                     relu):
    """Whole tiles as long as there are rows, then one of 4, of 2 and of 1: a tile's size is fixed when it is compiled.

    The inner dimension of each whole tile is ``less`` shorter than that of the one above it.
    """
    out_of_line()
    if rows >= ROWS:
        whole = rows // ROWS * ROWS
        if columns == VECTORS * lanes(c):
            _full(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, whole, inner, less, columns, started,
                  relu)
        elif columns <= lanes(c):
            _narrow(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, whole, inner, less, columns, started,
                    relu)
        else:
            _edge(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, whole, inner, less, columns, started,
                  relu)
        ai += whole * a_row
        si += whole * s_row
        ci += whole * c_row
        rows -= whole
        inner -= whole // ROWS * less
    if rows >= 4:
        _four(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, 4, inner, 0, columns, started, relu)
        ai += 4 * a_row
        si += 4 * s_row
        ci += 4 * c_row
        rows -= 4
    if rows >= 2:
        _two(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, 2, inner, 0, columns, started, relu)
        ai += 2 * a_row
        si += 2 * s_row
        ci += 2 * c_row
        rows -= 2
    if rows:
        _one(a, ai, a_row, a_step, b, bi, b_step, start, si, s_row, c, ci, c_row, 1, inner, 0, columns, started, relu)


@register_jitable(inline="always")  # by numba: a call takes attention and Winograd's convolution 1 to 4 % more
def column_of_tiles(a, ai, a_row, a_step, b, bi, b_step, c, ci, c_row, rows, inner, columns, add, less=0):
    """``rows`` x ``columns`` elements of ``c``, at most one tile wide; arguments are flat positions and strides.

    Of a triangle each tile of ROWS rows is given an inner dimension ``less`` shorter than that of the one above it.
    """
    _column_of_tiles(flat(a), ai, a_row, a_step, flat(b), bi, b_step, flat(c), ci, c_row, flat(c), ci, c_row, rows, inner,
                     less, columns, add, False)


@kernel(exact=True, reads="a")
def transpose(a, ai, a_row, rows, columns, c, ci, c_row):
    """Copy ``rows`` x ``columns`` elements of ``a``, each row contiguous, to as many columns of ``c``."""
    out_of_line()
    square = lanes(a)
    for i in range(0, rows, square):
        for j in range(0, columns, square):
            turn_part(a, ai + i * a_row + j, a_row, c, ci + j * c_row + i, c_row, rows - i, columns - j)


@kernel(exact=True, reads="a")
def copy_rows(a, ai, a_row, rows, columns, c, ci, c_row):
    """Copy ``rows`` x ``columns`` elements of ``a``, each row contiguous, to rows of ``c`` that are ``c_row`` apart."""
    out_of_line()
    width = VECTORS * lanes(a)
    for _ in range(rows):
        for j in range(0, columns, width):
            n = columns - j
            if n >= width:
                store_tile(load_row(a, ai + j, None, VECTORS), c, ci + j, 0, None, VECTORS)
            else:
                store_tile(load_row(a, ai + j, n, VECTORS), c, ci + j, 0, n, VECTORS)
        ai += a_row
        ci += c_row


@kernel(exact=True, reads="b")
def pack_at(b, bi, b_step, b_column, inner, columns, panel, at_panel):
    """Copy ``inner`` x ``columns`` elements of ``b`` to panels of one tile's width, in which a row follows a row."""
    out_of_line()
    width = VECTORS * lanes(b)
    for j in range(0, columns, width):
        here, to, n = bi + j * b_column, at_panel + j * inner, min(width, columns - j)
        if b_column == 1:
            copy_rows(b, here, b_step, inner, n, panel, to, width)
        elif b_step == 1:
            transpose(b, here, b_column, n, inner, panel, to, width)
        else:
            for k in range(inner):
                for m in range(n):
                    panel[to + k * width + m] = at(b, here + k * b_step + m * b_column)


@register_jitable
def whole_tiles(columns, c):
    """``columns`` rounded up to tiles of the dtype of the array ``c``."""
    width = VECTORS * lanes(c)
    return -(-columns // width) * width


@register_jitable
def pack(b, bi, b_step, b_column, inner, columns, panels):
    """Copy ``b`` for :func:`packed_product`, in blocks of INNER rows, to ``panels`` (inner * whole_tiles(columns),)."""
    for k in range(0, inner, INNER):
        pack_at(flat(b), bi + k * b_step, b_step, b_column, min(INNER, inner - k), columns, panels,
                k * whole_tiles(columns, panels))


@kernel(exact=True, reads="a b start", writes="c")
def _product(a, ai, a_row, a_step, b, bi, b_step, packed, start, si, s_row, c, ci, c_row, rows, inner, columns, started,
             relu):
    """c = start + a b, for a ``b`` as it lies or ``packed``: of each block of its rows on c is what the next begins with."""
    out_of_line()
    width, room = VECTORS * lanes(c), BLOCK + lanes(c)
    far = a_row == 1 and 0 < FAR <= a_step * c.itemsize and columns > 2 * width
    near = np.empty(INNER * room if far else 0, c.dtype)
    most = INNER if packed or far else max(inner, 1)
    for i in range(0, rows, BLOCK):
        m = min(BLOCK, rows - i)
        for k in range(0, max(inner, 1), most):
            depth = min(most, inner - k)
            x, xi, x_step = a, ai + i * a_row + k * a_step, a_step
            if far:
                copy_rows(a, xi, a_step, depth, m, near, 0, room)
                x, xi, x_step = flat(near), 0, room
            for j in range(0, columns, width):
                here = ci + i * c_row + j
                s, sj, step = (c, here, c_row) if k else (start, si + i * s_row + j, s_row)
                panel, b_next = (k * whole_tiles(columns, c) + j * depth, width) if packed else (k * b_step + j, b_step)
                _column_of_tiles(x, xi, a_row, x_step, b, bi + panel, b_next, s, sj, step, c, here, c_row, m, depth, 0,
                                 min(width, columns - j), started or k > 0, relu and k + depth == inner)


@register_jitable
def packed_product(a, ai, a_row, a_step, panels, c, ci, c_row, rows, inner, columns, add):
    """c = a b or c += a b, with the ``panels`` to which :func:`pack` copied ``b``."""
    _product(flat(a), ai, a_row, a_step, flat(panels), 0, 0, True, flat(c), ci, c_row, flat(c), ci, c_row, rows, inner, columns,
             add, False)


@kernel(exact=True, reads="a b start", writes="c")
def _gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, start, si, s_row, c, ci, c_row, rows, inner, columns, started, relu):
    """c = a b, or with ``started`` start + a b; then max(., 0) with ``relu``."""
    out_of_line()
    if b_column == 1 and (rows <= BLOCK or inner * columns * c.itemsize <= DIRECT):
        _product(a, ai, a_row, a_step, b, bi, b_step, False, start, si, s_row, c, ci, c_row, rows, inner, columns, started,
                 relu)
        return
    panels = np.empty(inner * whole_tiles(min(columns, OUTER), c), c.dtype)
    for j in range(0, columns, OUTER):
        n = min(OUTER, columns - j)
        pack(b, bi + j * b_column, b_step, b_column, inner, n, panels)
        _product(a, ai, a_row, a_step, flat(panels), 0, 0, True, start, si + j, s_row, c, ci + j, c_row, rows, inner, n,
                 started, relu)


@register_jitable
def gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, c, ci, c_row, rows, inner, columns, add):
    """c = a b, or c += a b: ``c[i, j]`` at flat position ``ci + i * c_row + j``, ``a`` and ``b`` of any strides."""
    _gemm(flat(a), ai, a_row, a_step, flat(b), bi, b_step, b_column, flat(c), ci, c_row, flat(c), ci, c_row, rows, inner,
          columns, add, False)


@register_jitable
def affine(a, ai, a_row, a_step, b, bi, b_step, b_column, row, c, ci, c_row, rows, inner, columns, relu):
    """c = row + a b, the contiguous ``row`` added to each of c's unless it is empty, then max(., 0) with ``relu``."""
    _gemm(flat(a), ai, a_row, a_step, flat(b), bi, b_step, b_column, flat(row), 0, 0, flat(c), ci, c_row, rows, inner, columns,
          row.size > 0, relu)
