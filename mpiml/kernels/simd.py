"""SIMD vectors as values: what a register holds, for kernels that say themselves what their registers do.

Numba has no type for a vector register. This file adds one, :class:`Vector`, and the few instructions that the
kernels are made of, each a line or two of LLVM's intermediate language. In a kernel they read like NumPy:

    v = load(x, i)                     # lanes(x) consecutive elements of x, from flat position i
    store(y, i, maximum(v, v * slope)) # operators work lane by lane

A *row* is a tuple of vectors side by side; a *tile* is a tuple of rows, which the compiler keeps in registers: the
accumulators of a matrix product. Arrays are addressed by flat position in elements from their first element, so a
kernel that goes by strides computes positions from ``a.strides[d] // a.itemsize``.

No instruction here may be reordered or fused by the compiler, so a lane's result does not depend on where in an
array, or in which lane, it is computed. The number of lanes is that of the widest registers of this CPU; LLVM
turns what a CPU lacks into what it has.
"""

import operator

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import populate_array

_INT = ir.IntType(32)


def _register_bytes():
    """Width of this CPU's widest vector registers in bytes: which ones does LLVM take for 64 bytes?"""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu = config.CPU_NAME or llvm.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = "" if config.CPU_NAME else llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly("""
        define void @probe(ptr %p) {
            %x = load <16 x float>, ptr %p
            %y = fadd <16 x float> %x, %x
            store <16 x float> %y, ptr %p
            ret void
        }"""))
    return 64 if "zmm" in assembly else 32 if "ymm" in assembly else 16


REGISTER = _register_bytes()


class Vector(types.Type):
    """Numba's type for a register of floats."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = REGISTER * 8 // dtype.bitwidth
        super().__init__(f"Vector({dtype}, {self.lanes})")


class Mask(types.Type):
    """One truth value a lane."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(f"Mask({lanes})")


def _float(dtype):
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def _llvm(vector):
    return ir.VectorType(_float(vector.dtype), vector.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _llvm(kind))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


# --- What the instructions below are made of ------------------------------------------------------------------

def _call(builder, name, kind, *args):
    """LLVM's function ``name`` for vectors of a kind, whose arguments are all of that kind."""
    suffix = f"v{kind.lanes}f{kind.dtype.bitwidth}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_llvm(kind), [a.type for a in args]), f"llvm.{name}.{suffix}")
    return builder.call(function, args)


def _pointer(context, builder, array, value, position, dtype=None):
    """Address of an array's element by its flat position; with ``dtype`` of a vector there."""
    data = context.make_array(array)(context, builder, value).data
    address = builder.gep(data, [position])
    return builder.bitcast(address, _llvm(dtype).as_pointer()) if dtype else address


def _moved(builder, position, elements):
    return builder.add(position, ir.Constant(position.type, elements)) if elements else position


def _splat(builder, kind, value):
    llvm_kind = ir.VectorType(value.type, kind.lanes)
    one = builder.insert_element(ir.Constant(llvm_kind, ir.Undefined), value, ir.Constant(_INT, 0))
    zeros = ir.Constant(ir.VectorType(_INT, kind.lanes), [0] * kind.lanes)
    return builder.shuffle_vector(one, ir.Constant(llvm_kind, ir.Undefined), zeros)


def _first(builder, kind, count):
    """The mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(count.type, kind.lanes), list(range(kind.lanes)))
    return builder.icmp_signed("<", numbers, _splat(builder, kind, count))


def _load(builder, kind, address, count=None):
    if count is None:
        return builder.load(address, align=kind.dtype.bitwidth // 8)
    vector = _llvm(kind)
    mask = _first(builder, kind, count)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [address.type, _INT, mask.type, vector]),
        f"llvm.masked.load.v{kind.lanes}f{kind.dtype.bitwidth}.p0")
    align = ir.Constant(_INT, kind.dtype.bitwidth // 8)
    return builder.call(function, [address, align, mask, ir.Constant(vector, None)])


def _store(builder, kind, value, address, count=None):
    if count is None:
        builder.store(value, address, align=kind.dtype.bitwidth // 8)
        return
    mask = _first(builder, kind, count)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [value.type, address.type, _INT, mask.type]),
        f"llvm.masked.store.v{kind.lanes}f{kind.dtype.bitwidth}.p0")
    builder.call(function, [value, address, ir.Constant(_INT, kind.dtype.bitwidth // 8), mask])


def _counts(builder, count, given, kind, vectors):
    """How many of a row's ``count`` elements each of its vectors holds; None, where it is ``given`` as None, for all."""
    return [None if given is types.none else _moved(builder, count, -j * kind.lanes) for j in range(vectors)]


def _optional(count):
    return types.none if count is types.none else types.intp


# --- Vectors --------------------------------------------------------------------------------------------------

@overload(len)
def _lanes_of_vector(v):
    if isinstance(v, Vector):
        n = v.lanes
        return lambda v: n


def lanes(a):
    """Number of lanes of a vector of the dtype of the array ``a``."""
    return REGISTER // a.itemsize


@overload(lanes)
def _lanes(a):
    n = Vector(a.dtype).lanes
    return lambda a: n


@intrinsic
def at(typing, a, i):
    """The element at position ``i`` of the array ``a``."""
    def code(context, builder, signature, args):
        return builder.load(_pointer(context, builder, a, *args))

    return a.dtype(a, types.intp), code


@intrinsic
def load(typing, a, i):
    """The vector at position ``i`` of the array ``a``."""
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        return _load(builder, kind, _pointer(context, builder, a, *args, kind))

    return kind(a, types.intp), code


@intrinsic
def load_part(typing, a, i, count):
    """The first ``count`` elements at position ``i`` of ``a``; the lanes behind them are 0."""
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        return _load(builder, kind, _pointer(context, builder, a, *args[:2], kind), args[2])

    return kind(a, types.intp, types.intp), code


@intrinsic
def store(typing, a, i, v):
    """Write the vector ``v`` to position ``i`` of ``a``."""
    def code(context, builder, signature, args):
        _store(builder, v, args[2], _pointer(context, builder, a, *args[:2], v))
        return context.get_dummy_value()

    return types.none(a, types.intp, v), code


@intrinsic
def store_part(typing, a, i, v, count):
    """Write the first ``count`` lanes of ``v`` to position ``i`` of ``a``."""
    def code(context, builder, signature, args):
        _store(builder, v, args[2], _pointer(context, builder, a, *args[:2], v), args[3])
        return context.get_dummy_value()

    return types.none(a, types.intp, v, types.intp), code


@intrinsic
def out_of_line(typing):
    """Compile the function that says so once, and let its callers call it, instead of a copy in each of them.

    For functions of explicit vectors: their loops are not unrolled or turned into vectors once more either, which is
    where most of the time of compiling goes.
    """
    def code(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.none(), code


@intrinsic
def store_whole(typing, a, i, v, count):
    """Write the first ``count`` lanes of ``v``, whole numbers, to position ``i`` of the int32 array ``a``."""
    def code(context, builder, signature, args):
        integers = builder.fptosi(args[2], ir.VectorType(_INT, v.lanes))
        address = builder.bitcast(_pointer(context, builder, a, *args[:2]), integers.type.as_pointer())
        mask = _first(builder, v, args[3])
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [integers.type, address.type, _INT, mask.type]),
            f"llvm.masked.store.v{v.lanes}i32.p0")
        builder.call(function, [integers, address, ir.Constant(_INT, 4), mask])
        return context.get_dummy_value()

    return types.none(a, types.intp, v, types.intp), code


@intrinsic
def load_whole(typing, a, i, like, count):
    """The first ``count`` elements at position ``i`` of the int32 array ``a``, as floats in a vector as ``like`` is one."""
    def code(context, builder, signature, args):
        integers = ir.VectorType(_INT, like.lanes)
        address = builder.bitcast(_pointer(context, builder, a, *args[:2]), integers.as_pointer())
        mask = _first(builder, like, args[3])
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(integers, [address.type, _INT, mask.type, integers]),
            f"llvm.masked.load.v{like.lanes}i32.p0")
        loaded = builder.call(function, [address, ir.Constant(_INT, 4), mask, ir.Constant(integers, None)])
        return builder.sitofp(loaded, _llvm(like))

    return like(a, types.intp, like, types.intp), code


@intrinsic
def flat(typing, a):
    """The memory of the array ``a`` as an array of one axis.

    Kernels that go by flat positions alone take this, and are compiled once for arrays of any number of axes.
    """
    kind = types.Array(a.dtype, 1, "A", readonly=not a.mutable)

    def code(context, builder, signature, args):
        source, result = context.make_array(a)(context, builder, args[0]), context.make_array(kind)(context, builder)
        populate_array(result, data=source.data, shape=[source.nitems], strides=[source.itemsize], itemsize=source.itemsize,
                       meminfo=source.meminfo, parent=source.parent)
        return impl_ret_borrowed(context, builder, kind, result._getvalue())

    return kind(a), code


@intrinsic
def splat(typing, x):
    """The vector with the float32 or float64 ``x`` in all lanes."""
    kind = Vector(x)

    def code(context, builder, signature, args):
        return _splat(builder, kind, args[0])

    return kind(x), code


def _lanewise(name, arguments, build, result=lambda v: v):
    """An instruction on ``arguments`` vectors of one kind: ``build(builder, kind, *values)``."""
    def make(v):
        def code(context, builder, signature, args):
            return build(builder, v, *args)

        return result(v)(*[v] * arguments), code

    if arguments == 1:
        def typed(typing, a):
            return make(a) if isinstance(a, Vector) else None
    elif arguments == 2:
        def typed(typing, a, b):
            return make(a) if isinstance(a, Vector) and a == b else None
    else:
        def typed(typing, a, b, c):
            return make(a) if isinstance(a, Vector) and a == b == c else None
    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


fma = _lanewise("fma", 3, lambda builder, kind, a, b, c: _call(builder, "fma", kind, a, b, c))
fma.__doc__ = "a * b + c, rounded once."
sqrt = _lanewise("sqrt", 1, lambda builder, kind, a: _call(builder, "sqrt", kind, a))
rint = _lanewise("rint", 1, lambda builder, kind, a: _call(builder, "rint", kind, a))
rint.__doc__ = "The nearest integer, as a float; halves go to the even one."
fabs = _lanewise("fabs", 1, lambda builder, kind, a: _call(builder, "fabs", kind, a))
copysign = _lanewise("copysign", 2, lambda builder, kind, a, b: _call(builder, "copysign", kind, a, b))
copysign.__doc__ = "The size of ``a`` with the sign of ``b``."
maximum = _lanewise("maximum", 2, lambda builder, kind, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
maximum.__doc__ = "The larger one; ``b`` where either is NaN."
minimum = _lanewise("minimum", 2, lambda builder, kind, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
minimum.__doc__ = "The smaller one; ``b`` where either is NaN."


def _power_of_two(builder, kind, n):
    # A large number added, n + bias stands in the last bits of the sum; moved up, it is the exponent's field.
    bits = kind.dtype.bitwidth
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)
    integers = ir.VectorType(ir.IntType(bits), kind.lanes)
    moved = builder.fadd(n, ir.Constant(n.type, [1.5 * 2.0**mantissa + bias] * kind.lanes))
    field = builder.shl(builder.bitcast(moved, integers), ir.Constant(integers, [mantissa] * kind.lanes))
    return builder.bitcast(field, n.type)


power_of_two = _lanewise("power_of_two", 1, _power_of_two)
power_of_two.__doc__ = "2**n for integers ``n`` in the range of normal exponents (-126 .. 127 in float32)."


def _exponent(builder, kind, x):
    bits = kind.dtype.bitwidth
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)
    integers = ir.VectorType(ir.IntType(bits), kind.lanes)
    shifted = builder.lshr(builder.bitcast(x, integers), ir.Constant(integers, [mantissa] * kind.lanes))
    return builder.sitofp(builder.sub(shifted, ir.Constant(integers, [bias] * kind.lanes)), x.type)


exponent = _lanewise("exponent", 1, _exponent)
exponent.__doc__ = "The exponent e of normal x > 0 as a float: 2**e <= x < 2**(e + 1)."

_OPERATORS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_COMPARISONS = {operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "=="}


def _binary(symbol, instruction):
    @overload(symbol)
    def typed(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: instruction(a, b)


for _symbol, _name in _OPERATORS.items():
    _binary(_symbol, _lanewise(_name, 2, lambda builder, kind, a, b, name=_name: getattr(builder, name)(a, b)))
for _symbol, _name in _COMPARISONS.items():
    _binary(_symbol, _lanewise(f"compare{_name}", 2, lambda builder, kind, a, b, name=_name: builder.fcmp_ordered(name, a, b),
                               result=lambda v: Mask(v.lanes)))


@intrinsic
def select(typing, mask, a, b):
    """``a`` in the lanes where ``mask`` is true, ``b`` in the others."""
    if isinstance(mask, Mask) and isinstance(a, Vector) and a == b:
        return a(mask, a, b), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def first_lanes(typing, like, count):
    """The mask of the first ``count`` lanes of the vector ``like``."""
    def code(context, builder, signature, args):
        return _first(builder, like, args[1])

    return Mask(like.lanes)(like, types.intp), code


def _reduce(builder, kind, v, combine):
    # Halves, quarters, ...: a tree of fixed shape.
    size = kind.lanes
    while size > 1:
        size //= 2
        undefined = ir.Constant(v.type, ir.Undefined)
        low, high = (builder.shuffle_vector(v, undefined, ir.Constant(
            ir.VectorType(_INT, size), list(range(start, start + size)))) for start in (0, size))
        v = combine(low, high)
    return builder.extract_element(v, ir.Constant(_INT, 0))


@intrinsic
def reduce_add(typing, v):
    """The sum of a vector's lanes."""
    def code(context, builder, signature, args):
        return _reduce(builder, v, args[0], builder.fadd)

    return v.dtype(v), code


@intrinsic
def reduce_max(typing, v):
    """The largest lane of a vector."""
    def code(context, builder, signature, args):
        return _reduce(builder, v, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return v.dtype(v), code


# --- Rows and tiles -------------------------------------------------------------------------------------------

@intrinsic(prefer_literal=True)
def load_row(typing, a, i, count, vectors):
    """``vectors`` vectors side by side from position ``i`` of ``a``; of these ``count`` elements, None for all."""
    kind, n = Vector(a.dtype), vectors.literal_value
    row = types.UniTuple(kind, n)

    def code(context, builder, signature, args):
        counts = _counts(builder, args[2], count, kind, n)
        return context.make_tuple(builder, row, [
            _load(builder, kind, _pointer(context, builder, a, args[0], _moved(builder, args[1], j * kind.lanes), kind),
                  counts[j]) for j in range(n)])

    return row(a, types.intp, _optional(count), vectors), code


@intrinsic(prefer_literal=True)
def zero_tile(typing, a, size):
    """A tile of ``size`` vectors of the dtype of the array ``a``, all 0."""
    kind = Vector(a.dtype)
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        return context.make_tuple(builder, tile, [ir.Constant(_llvm(kind), None)] * len(tile))

    return tile(a, size), code


@intrinsic
def outer(typing, tile, a, i, stride, row):
    """``tile + column * row``: the step of a matrix product, one fma for each of the tile's vectors.

    The column's elements lie in the array ``a`` at positions i, i + stride, ...
    """
    kind, width = row.dtype, len(row)

    def code(context, builder, signature, args):
        vectors, rows = cgutils.unpack_tuple(builder, args[4]), cgutils.unpack_tuple(builder, args[0])
        first, result = _pointer(context, builder, a, args[1], args[2]), []
        for m in range(len(rows) // width):
            step = builder.mul(args[3], ir.Constant(args[3].type, m))  # the same at each call in a loop: computed before it
            x = _splat(builder, kind, builder.load(builder.gep(first, [step])))
            result += [_call(builder, "fma", kind, x, v, rows[m * width + j]) for j, v in enumerate(vectors)]
        return context.make_tuple(builder, tile, result)

    return tile(tile, a, types.intp, types.intp, row), code


@intrinsic(prefer_literal=True)
def load_tile(typing, a, i, stride, count, size, vectors):
    """A tile of ``size`` vectors in rows of ``vectors``, which lie in ``a`` at positions i, i + stride, ..."""
    kind, width = Vector(a.dtype), vectors.literal_value
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        counts = _counts(builder, args[3], count, kind, width)
        position, result = args[1], []
        for _ in range(len(tile) // width):
            result += [_load(builder, kind, _pointer(
                context, builder, a, args[0], _moved(builder, position, j * kind.lanes), kind), counts[j]) for j in range(width)]
            position = builder.add(position, args[2])
        return context.make_tuple(builder, tile, result)

    return tile(a, types.intp, types.intp, _optional(count), size, vectors), code


@intrinsic(prefer_literal=True)
def store_tile(typing, tile, a, i, stride, count, vectors):
    """Write a tile, in rows of ``vectors``, to positions i, i + stride, ... of ``a``; of each row ``count`` elements."""
    kind, width = tile.dtype, vectors.literal_value

    def code(context, builder, signature, args):
        counts = _counts(builder, args[4], count, kind, width)
        values = cgutils.unpack_tuple(builder, args[0])
        position = args[2]
        for m in range(len(tile) // width):
            for j in range(width):
                _store(builder, kind, values[m * width + j],
                       _pointer(context, builder, a, args[1], _moved(builder, position, j * kind.lanes), kind), counts[j])
            position = builder.add(position, args[3])
        return context.get_dummy_value()

    return types.none(tile, a, types.intp, types.intp, _optional(count), vectors), code


@intrinsic(prefer_literal=True)
def lanewise(typing, tile, a, i, a_row, b, j, b_row, count, width):
    """``tile + a * b`` lane by lane: the step of a matrix of dot products, each of them over the lanes of a vector.

    The rows of the tile belong to the vectors of ``a`` at positions i, i + a_row, ..., its ``width`` columns to those
    of ``b`` at j, j + b_row, ...; ``count`` elements of each vector take part.
    """
    kind, columns = tile.dtype, width.literal_value

    def vectors(context, builder, array, value, position, stride, n, part):
        result = []
        for _ in range(n):
            result.append(_load(builder, kind, _pointer(context, builder, array, value, position, kind), part))
            position = builder.add(position, stride)
        return result

    def code(context, builder, signature, args):
        acc = cgutils.unpack_tuple(builder, args[0])
        part = None if count is types.none else args[7]
        left = vectors(context, builder, a, *args[1:4], len(acc) // columns, part)
        right = vectors(context, builder, b, *args[4:7], columns, part)
        return context.make_tuple(builder, tile, [
            _call(builder, "fma", kind, x, y, acc[m * columns + k])
            for m, x in enumerate(left) for k, y in enumerate(right)])

    return tile(tile, a, types.intp, types.intp, b, types.intp, types.intp, _optional(count), width), code


@intrinsic
def at_least(typing, tile, low):
    """The tile, with each element below its lane of ``low`` raised to that; NaN stays NaN."""
    def code(context, builder, signature, args):
        return context.make_tuple(builder, tile, [
            builder.select(builder.fcmp_ordered(">", args[1], v), args[1], v) for v in cgutils.unpack_tuple(builder, args[0])])

    return tile(tile, low), code


def _turned(builder, kind, rows):
    """The columns of the square of vectors ``rows``."""
    lanes, half = kind.lanes, 1
    rows = list(rows)
    while half < lanes:
        upper = [m if not m & half else lanes + m - half for m in range(lanes)]
        lower = [m + half if not m & half else lanes + m for m in range(lanes)]
        for m in range(lanes):
            if not m & half:
                pair = rows[m], rows[m + half]
                rows[m], rows[m + half] = (builder.shuffle_vector(*pair, ir.Constant(
                    ir.VectorType(_INT, lanes), order)) for order in (upper, lower))
        half *= 2
    return rows


@intrinsic
def turn(typing, a, i, a_row, b, j, b_row):
    """Transpose a square of lanes x lanes elements: its rows lie in ``a`` from i, in ``b`` from j, ``_row`` apart.

    Each of log2(lanes) rounds exchanges the off-diagonal quarters of blocks of twice the size.
    """
    kind = Vector(a.dtype)
    lanes = kind.lanes

    def code(context, builder, signature, args):
        rows, position = [], args[1]
        for _ in range(lanes):
            rows.append(_load(builder, kind, _pointer(context, builder, a, args[0], position, kind)))
            position = builder.add(position, args[2])
        rows = _turned(builder, kind, rows)
        position = args[4]
        for row in rows:
            _store(builder, kind, row, _pointer(context, builder, b, args[3], position, kind))
            position = builder.add(position, args[5])
        return context.get_dummy_value()

    return types.none(a, types.intp, types.intp, b, types.intp, types.intp), code


@intrinsic
def turn_part(typing, a, i, a_row, b, j, b_row, rows, columns):
    """Transpose ``rows`` x ``columns`` elements, at most lanes of either; as :func:`turn` otherwise."""
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        def part(m, inside, along):
            # No lane at all of a row that is not there.
            present = builder.icmp_signed("<", ir.Constant(inside.type, m), inside)
            return builder.select(present, along, ir.Constant(along.type, 0))

        vectors, position = [], args[1]
        for m in range(kind.lanes):
            vectors.append(_load(builder, kind, _pointer(context, builder, a, args[0], position, kind),
                                 part(m, args[6], args[7])))
            position = builder.add(position, args[2])
        position = args[4]
        for m, vector in enumerate(_turned(builder, kind, vectors)):
            _store(builder, kind, vector, _pointer(context, builder, b, args[3], position, kind), part(m, args[7], args[6]))
            position = builder.add(position, args[5])
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
tile_fma = _tilewise("tile_fma", 3, lambda builder, kind, a, b, c: _call(builder, "fma", kind, a, b, c))
tile_fma.__doc__ = "a * b + c, rounded once."


@intrinsic(prefer_literal=True)
def splat_tile(typing, a, i, stride, size):
    """A tile of ``size`` vectors: the elements of ``a`` at positions i, i + stride, ..., each in all lanes of one."""
    kind = Vector(a.dtype)
    tile = types.UniTuple(kind, size.literal_value)

    def code(context, builder, signature, args):
        position, result = args[1], []
        for _ in range(len(tile)):
            result.append(_splat(builder, kind, builder.load(_pointer(context, builder, a, args[0], position))))
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
            result = _call(builder, "fma", v, x, y, result)
        return result

    return v(a, b, v), code


@intrinsic
def store_sums(typing, tile, a, i):
    """Write the sum of the lanes of each of a tile's vectors to the positions from ``i`` of ``a``."""
    def code(context, builder, signature, args):
        for m, vector in enumerate(cgutils.unpack_tuple(builder, args[0])):
            total = _reduce(builder, tile.dtype, vector, builder.fadd)
            builder.store(total, _pointer(context, builder, a, args[1], _moved(builder, args[2], m)))
        return context.get_dummy_value()

    return types.none(tile, a, types.intp), code
