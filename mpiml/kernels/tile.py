"""Tiles: as many registers as a kernel works on at once.

A *row* is a tuple of vectors side by side; a *tile* is such rows one below the other, all their vectors in one tuple, which
the compiler keeps in registers: the accumulators of a matrix product, say. A square of lanes x lanes elements can be turned
round in registers, and so the layout of an array changed at the speed of memory. Positions and strides are in elements, as
in :mod:`mpiml.kernels.simd`.
"""

import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .registers import (
    INT,
    REGISTER,
    Vector,
    emit_call,
    emit_counts,
    emit_fetch,
    emit_load,
    emit_moved,
    emit_pointer,
    emit_splat,
    emit_store,
    llvm_vector,
    optional,
)


@intrinsic(prefer_literal=True)
def load_row(typing, a, i, count, vectors):
    """``vectors`` vectors side by side from position ``i`` of ``a``; of these ``count`` elements, None for all."""
    kind, n = Vector(a.dtype), vectors.literal_value
    row = types.UniTuple(kind, n)

    def code(context, builder, signature, args):
        counts = emit_counts(builder, args[2], count, kind, n)
        return context.make_tuple(builder, row, [
            emit_load(builder, kind, emit_pointer(context, builder, a, args[0], emit_moved(builder, args[1], j * kind.lanes),
                                                  kind),
                  counts[j]) for j in range(n)])

    return row(a, types.intp, optional(count), vectors), code


@intrinsic(prefer_literal=True)
def zero_tile(typing, a, size):
    """A tile of ``size`` vectors of the dtype of the array ``a``, all 0."""
    kind = Vector(a.dtype)
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        return context.make_tuple(builder, tile, [ir.Constant(llvm_vector(kind), None)] * len(tile))

    return tile(a, size), code


@intrinsic
def outer(typing, tile, a, i, stride, row):
    """``tile + column * row``: the step of a matrix product, one fma for each of the tile's vectors.

    The column's elements lie in the array ``a`` at positions i, i + stride, ...
    """
    kind, width = row.dtype, len(row)

    def code(context, builder, signature, args):
        vectors, rows = cgutils.unpack_tuple(builder, args[4]), cgutils.unpack_tuple(builder, args[0])
        first, result = emit_pointer(context, builder, a, args[1], args[2]), []
        for m in range(len(rows) // width):
            step = builder.mul(args[3], ir.Constant(args[3].type, m))  # the same at each call in a loop: computed before it
            x = emit_splat(builder, kind, builder.load(builder.gep(first, [step])))
            result += [emit_call(builder, "fma", kind, x, v, rows[m * width + j]) for j, v in enumerate(vectors)]
        return context.make_tuple(builder, tile, result)

    return tile(tile, a, types.intp, types.intp, row), code


@intrinsic(prefer_literal=True)
def load_tile(typing, a, i, stride, count, size, vectors):
    """A tile of ``size`` vectors in rows of ``vectors``, which lie in ``a`` at positions i, i + stride, ..."""
    kind, width = Vector(a.dtype), vectors.literal_value
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        counts = emit_counts(builder, args[3], count, kind, width)
        position, result = args[1], []
        for _ in range(len(tile) // width):
            result += [emit_load(builder, kind, emit_pointer(
                context, builder, a, args[0], emit_moved(builder, position, j * kind.lanes), kind), counts[j])
                for j in range(width)]
            position = builder.add(position, args[2])
        return context.make_tuple(builder, tile, result)

    return tile(a, types.intp, types.intp, optional(count), size, vectors), code


@intrinsic(prefer_literal=True)
def store_tile(typing, tile, a, i, stride, count, vectors):
    """Write a tile, in rows of ``vectors``, to positions i, i + stride, ... of ``a``; of each row ``count`` elements."""
    kind, width = tile.dtype, vectors.literal_value

    def code(context, builder, signature, args):
        counts = emit_counts(builder, args[4], count, kind, width)
        values = cgutils.unpack_tuple(builder, args[0])
        position = args[2]
        for m in range(len(tile) // width):
            for j in range(width):
                emit_store(builder, kind, values[m * width + j],
                           emit_pointer(context, builder, a, args[1], emit_moved(builder, position, j * kind.lanes), kind),
                           counts[j])
            position = builder.add(position, args[3])
        return context.get_dummy_value()

    return types.none(tile, a, types.intp, types.intp, optional(count), vectors), code


@intrinsic(prefer_literal=True)
def fetch_tile(typing, a, i, stride, size, vectors, near):
    """Have the memory of a tile, laid out as for :func:`load_tile`, brought into the first or second cache meanwhile."""
    kind, width, n, level = Vector(a.dtype), vectors.literal_value, size.literal_value, near.literal_value
    line = max(1, 64 // REGISTER)  # vectors in a line of the cache

    def code(context, builder, signature, args):
        position = args[1]
        for _ in range(n // width):
            for j in range(0, width, line):
                emit_fetch(builder, emit_pointer(context, builder, a, args[0], emit_moved(builder, position, j * kind.lanes)),
                           level)
            position = builder.add(position, args[2])
        return context.get_dummy_value()

    return types.none(a, types.intp, types.intp, size, vectors, near), code


@intrinsic(prefer_literal=True)
def lanewise(typing, tile, a, i, a_row, b, j, b_row, count, columns):
    """``tile + a * b`` lane by lane: the step of a matrix of dot products, each of them over the lanes of a vector.

    The rows of the tile belong to the vectors of ``a`` at positions i, i + a_row, ...; its ``columns`` to those of ``b`` at
    j, j + b_row, ...; ``count`` elements of each take part, None for all.
    """
    kind, width = tile.dtype, columns.literal_value

    def code(context, builder, signature, args):
        acc = list(cgutils.unpack_tuple(builder, args[0]))
        part = None if count is types.none else args[7]

        def vectors(array, value, position, stride, n):
            for _ in range(n):
                yield emit_load(builder, kind, emit_pointer(context, builder, array, value, position, kind), part)
                position = builder.add(position, stride)

        left = list(vectors(a, *args[1:4], len(acc) // width))
        for k, y in enumerate(vectors(b, *args[4:7], width)):  # one at a time: there is no register to spare
            for m, x in enumerate(left):
                acc[m * width + k] = emit_call(builder, "fma", kind, x, y, acc[m * width + k])
        return context.make_tuple(builder, tile, acc)

    return tile(tile, a, types.intp, types.intp, b, types.intp, types.intp, optional(count), columns), code


@intrinsic
def across(typing, tiles):
    """The columns of a tuple of tiles, each tile taken as a row: again a tuple of tiles."""
    tile = tiles.dtype
    turned = types.UniTuple(types.UniTuple(tile.dtype, len(tiles)), len(tile))

    def code(context, builder, signature, args):
        rows = [cgutils.unpack_tuple(builder, row) for row in cgutils.unpack_tuple(builder, args[0])]
        return context.make_tuple(builder, turned, [context.make_tuple(builder, turned.dtype, column)
                                                    for column in zip(*rows, strict=True)])

    return turned(tiles), code


@intrinsic
def at_least(typing, tile, low):
    """The tile, with each element below its lane of ``low`` raised to that; NaN stays NaN."""
    def code(context, builder, signature, args):
        return context.make_tuple(builder, tile, [
            builder.select(builder.fcmp_ordered(">", args[1], v), args[1], v) for v in cgutils.unpack_tuple(builder, args[0])])

    return tile(tile, low), code


def _turned(builder, kind, rows):
    """The columns of the square of vectors ``rows``.

    Each of log2(lanes) rounds exchanges the off-diagonal quarters of blocks of twice the size: of 2 x 2 elements first, of
    the whole square last.
    """
    lanes, half = kind.lanes, 1
    rows = list(rows)
    while half < lanes:
        # A shuffle counts the lanes of its two vectors as one row, so lane m of the second one is lanes + m.
        upper = [m if not m & half else lanes + m - half for m in range(lanes)]
        lower = [m + half if not m & half else lanes + m for m in range(lanes)]
        for m in range(lanes):
            if not m & half:
                pair = rows[m], rows[m + half]
                rows[m], rows[m + half] = (builder.shuffle_vector(*pair, ir.Constant(
                    ir.VectorType(INT, lanes), order)) for order in (upper, lower))
        half *= 2
    return rows


@intrinsic
def turn_part(typing, a, i, a_row, b, j, b_row, rows, columns):
    """Transpose at most lanes x lanes elements, ``rows`` x ``columns`` of which there are: its rows lie in ``a`` from i, in
    ``b`` from j, ``_row`` apart.
    """
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        def part(m, inside, along):
            # How many lanes of row m there are: none where the row is not inside.
            present = builder.icmp_signed("<", ir.Constant(inside.type, m), inside)
            return builder.select(present, along, ir.Constant(along.type, 0))

        def move(whole):
            vectors, position = [], args[1]
            for m in range(kind.lanes):
                vectors.append(emit_load(builder, kind, emit_pointer(context, builder, a, args[0], position, kind),
                                         None if whole else part(m, args[6], args[7])))
                position = builder.add(position, args[2])
            position = args[4]
            for m, vector in enumerate(_turned(builder, kind, vectors)):
                emit_store(builder, kind, vector, emit_pointer(context, builder, b, args[3], position, kind),
                           None if whole else part(m, args[7], args[6]))
                position = builder.add(position, args[5])

        full = ir.Constant(args[6].type, kind.lanes)
        whole = builder.and_(*(builder.icmp_signed(">=", n, full) for n in args[6:]))
        with builder.if_else(whole) as (then, otherwise):  # a square without masks takes a tenth to a half less time
            with then:
                move(True)
            with otherwise:
                move(False)
        return context.get_dummy_value()

    return types.none(a, types.intp, types.intp, b, types.intp, types.intp, types.intp, types.intp), code


# --- Arithmetic on tiles --------------------------------------------------------------------------------------

def _tilewise(name, arguments, build):
    """An instruction on ``arguments`` tiles of one size, vector by vector; a Vector in place of a tile serves all of it."""
    def make(*kinds):
        tiles = [kind for kind in kinds if isinstance(kind, types.UniTuple) and isinstance(kind.dtype, Vector)]
        if not tiles or not all(kind in (tiles[0], tiles[0].dtype) for kind in kinds):
            return None
        tile = tiles[0]

        def code(context, builder, signature, args):
            operands = [cgutils.unpack_tuple(builder, a) if kind == tile else [a] * len(tile)
                        for a, kind in zip(args, kinds, strict=True)]
            vectors = [build(builder, tile.dtype, *each) for each in zip(*operands, strict=True)]
            return context.make_tuple(builder, tile, vectors)

        return tile(*kinds), code

    # As in simd: numba reads the number of arguments from the parameters.
    if arguments == 2:
        def typed(typing, a, b):
            return make(a, b)
    else:
        def typed(typing, a, b, c):
            return make(a, b, c)
    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


tile_add = _tilewise("tile_add", 2, lambda builder, kind, a, b: builder.fadd(a, b))
tile_subtract = _tilewise("tile_subtract", 2, lambda builder, kind, a, b: builder.fsub(a, b))
tile_multiply = _tilewise("tile_multiply", 2, lambda builder, kind, a, b: builder.fmul(a, b))
tile_fma = _tilewise("tile_fma", 3, lambda builder, kind, a, b, c: emit_call(builder, "fma", kind, a, b, c))
tile_fma.__doc__ = "a * b + c, rounded once."
tile_where_positive = _tilewise("tile_where_positive", 2, lambda builder, kind, a, b: builder.select(
    builder.fcmp_ordered(">", a, ir.Constant(a.type, None)), b, ir.Constant(a.type, None)))
tile_where_positive.__doc__ = "``b`` in the lanes where ``a`` is above 0, else 0."


@intrinsic(prefer_literal=True)
def splat_tile(typing, a, i, stride, size):
    """A tile of ``size`` vectors: the elements of ``a`` at positions i, i + stride, ..., each in all lanes of one."""
    kind = Vector(a.dtype)
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        position, result = args[1], []
        for _ in range(len(tile)):
            result.append(emit_splat(builder, kind, builder.load(emit_pointer(context, builder, a, args[0], position))))
            position = builder.add(position, args[2])
        return context.make_tuple(builder, tile, result)

    return tile(a, types.intp, types.intp, size), code


@intrinsic
def dot_tile(typing, a, b, v):
    """``v`` plus the products of the vectors of the tiles ``a`` and ``b``, one fma each, in order; ``b`` may be a Vector."""
    if not isinstance(v, Vector) or b not in (a, v):
        return None

    def code(context, builder, signature, args):
        result, tile = args[2], cgutils.unpack_tuple(builder, args[0])
        others = cgutils.unpack_tuple(builder, args[1]) if b == a else [args[1]] * len(tile)
        for x, y in zip(tile, others, strict=True):
            result = emit_call(builder, "fma", v, x, y, result)
        return result

    return v(a, b, v), code


@intrinsic
def sums_of_rows(typing, tile):
    """A vector whose lane m is the sum of the lanes of the tile's vector m.

    Sums are taken within each 16 bytes first, where shuffles are quick: two vectors' halves, side by side, are added to
    their other halves, which leaves one vector for two. Then the 16 bytes are added up. A sum's order is that of its lanes
    alone, so it is the same in a tile of any size.
    """
    kind = tile.dtype
    lanes, quarter = kind.lanes, 128 // kind.dtype.bitwidth

    def shuffle(builder, a, b, order):
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), order))

    def code(context, builder, signature, args):
        vectors, part = cgutils.unpack_tuple(builder, args[0]), quarter
        while part > 1:
            # A shuffle counts the lanes of its two vectors as one row; q is where 16 bytes of it begin.
            low = [q + of + i for q in range(0, lanes, quarter) for of in (0, lanes)
                   for i in range(quarter) if i % part < part // 2]
            high = [i + part // 2 for i in low]
            vectors = [builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high))
                       for a, b in itertools.zip_longest(vectors[::2], vectors[1::2], fillvalue=vectors[0])]
            part //= 2
        size = lanes
        while size > quarter:
            size //= 2
            vectors = [builder.fadd(*(shuffle(builder, v, v, list(range(start, start + size))) for start in (0, size)))
                       for v in vectors]
        while size < lanes:
            vectors = [shuffle(builder, a, b, list(range(2 * size)))
                       for a, b in itertools.zip_longest(vectors[::2], vectors[1::2], fillvalue=vectors[0])]
            size *= 2
        return vectors[0]

    return kind(tile), code


@intrinsic(prefer_literal=True)
def spread(typing, v, size):
    """A tile of ``size`` vectors: the vector m has lane m of ``v`` in all its lanes."""
    tile = types.UniTuple(v, size.literal_value)

    def code(context, builder, signature, args):
        return context.make_tuple(builder, tile, [
            builder.shuffle_vector(args[0], args[0], ir.Constant(ir.VectorType(INT, v.lanes), [m] * v.lanes))
            for m in range(len(tile))])

    return tile(v, size), code


@intrinsic
def store_first(typing, tile, a, i):
    """Write the first lane of each of a tile's vectors to the positions from ``i`` of ``a``."""
    def code(context, builder, signature, args):
        for m, vector in enumerate(cgutils.unpack_tuple(builder, args[0])):
            builder.store(builder.extract_element(vector, ir.Constant(INT, 0)),
                          emit_pointer(context, builder, a, args[1], emit_moved(builder, args[2], m)))
        return context.get_dummy_value()

    return types.none(tile, a, types.intp), code
