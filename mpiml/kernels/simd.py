"""Vectors as values: for kernels that say themselves what the registers of the processor do.

Each instruction is a line or two of LLVM's intermediate language; in a kernel they read like NumPy:

    v = load(x, i)                     # lanes(x) consecutive elements of x, from flat position i
    store(y, i, maximum(v, v * slope)) # operators work lane by lane

Arrays are addressed by flat position in elements from their first element, so a kernel that goes by strides computes
positions from ``a.strides[d] // a.itemsize``.

No instruction may be reordered or fused by the compiler, so a lane's result does not depend on where in an array, or in
which lane, it is computed. The number of lanes is that of the widest registers of this CPU; LLVM turns what a CPU lacks
into what it has.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .registers import (
    INT,
    REGISTER,
    Mask,
    Vector,
    emit_call,
    emit_fetch,
    emit_first,
    emit_load,
    emit_masked_load,
    emit_masked_store,
    emit_pointer,
    emit_reduce,
    emit_splat,
    emit_store,
    float_fields,
    llvm_vector,
    optional,
)


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
        return builder.load(emit_pointer(context, builder, a, *args))

    return a.dtype(a, types.intp), code


@intrinsic
def load(typing, a, i):
    """The vector at position ``i`` of the array ``a``."""
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        return emit_load(builder, kind, emit_pointer(context, builder, a, *args, kind))

    return kind(a, types.intp), code


@intrinsic
def load_part(typing, a, i, count):
    """The first ``count`` elements at position ``i`` of ``a``; the lanes behind them are 0."""
    kind = Vector(a.dtype)

    def code(context, builder, signature, args):
        return emit_load(builder, kind, emit_pointer(context, builder, a, *args[:2], kind), args[2])

    return kind(a, types.intp, types.intp), code


@intrinsic(prefer_literal=True)
def load_wide(typing, a, i, count, registers):
    """So many vectors side by side at position ``i`` of ``a``, as one; of its elements the first ``count``, None for all.

    What is computed with it is as many streams of instructions, none of which waits for another.
    """
    kind = Vector(a.dtype, registers.literal_value)

    def code(context, builder, signature, args):
        address = emit_pointer(context, builder, a, *args[:2], kind)
        return emit_load(builder, kind, address, None if count is types.none else args[2])

    return kind(a, types.intp, optional(count), registers), code


@intrinsic
def store(typing, a, i, v):
    """Write the vector ``v`` to position ``i`` of ``a``."""
    def code(context, builder, signature, args):
        emit_store(builder, v, args[2], emit_pointer(context, builder, a, *args[:2], v))
        return context.get_dummy_value()

    return types.none(a, types.intp, v), code


@intrinsic
def store_part(typing, a, i, v, count):
    """Write the first ``count`` lanes of ``v``, None for all, to position ``i`` of ``a``."""
    def code(context, builder, signature, args):
        lanes_used = None if count is types.none else args[3]
        emit_store(builder, v, args[2], emit_pointer(context, builder, a, *args[:2], v), lanes_used)
        return context.get_dummy_value()

    return types.none(a, types.intp, v, optional(count)), code


@intrinsic
def prefetch(typing, a, i):
    """Have the cache line of position ``i`` of ``a`` brought to the second cache, and go on meanwhile."""
    def code(context, builder, signature, args):
        emit_fetch(builder, emit_pointer(context, builder, a, *args), near=2)
        return context.get_dummy_value()

    return types.none(a, types.intp), code


@intrinsic
def address(typing, a, i):
    """Where position ``i`` of ``a`` is in memory: a number of bytes."""
    def code(context, builder, signature, args):
        return builder.ptrtoint(emit_pointer(context, builder, a, *args), ir.IntType(types.intp.bitwidth))

    return types.intp(a, types.intp), code


@intrinsic
def prefetch_address(typing, address):
    """As :func:`prefetch`, for the cache line at an :func:`address`."""
    def code(context, builder, signature, args):
        emit_fetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), near=2)
        return context.get_dummy_value()

    return types.none(types.intp), code


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
    """Write the first ``count`` lanes of ``v``, None for all: whole numbers, to position ``i`` of the int32 array ``a``."""
    def code(context, builder, signature, args):
        integers = builder.fptosi(args[2], ir.VectorType(INT, v.lanes))
        address = builder.bitcast(emit_pointer(context, builder, a, *args[:2]), integers.type.as_pointer())
        if count is types.none:
            builder.store(integers, address, align=4)
        else:
            emit_masked_store(builder, integers, "i32", address, emit_first(builder, v, args[3]), 4)
        return context.get_dummy_value()

    return types.none(a, types.intp, v, optional(count)), code


@intrinsic
def load_whole(typing, a, i, like, count):
    """As floats in a vector like ``like``: the first ``count`` elements, None for all, at position ``i`` of the int32 ``a``."""
    def code(context, builder, signature, args):
        integers = ir.VectorType(INT, like.lanes)
        address = builder.bitcast(emit_pointer(context, builder, a, *args[:2]), integers.as_pointer())
        if count is types.none:
            loaded = builder.load(address, align=4)
        else:
            loaded = emit_masked_load(builder, integers, "i32", address, emit_first(builder, like, args[3]), 4)
        return builder.sitofp(loaded, llvm_vector(like))

    return like(a, types.intp, like, optional(count)), code


@intrinsic
def flat(typing, a):
    """The memory of the array ``a`` as an array of one axis.

    Kernels that go by flat positions alone take this, and are compiled once for arrays of any number of axes. It is
    :func:`borrowed`: the array must be kept alive.
    """
    kind = types.Array(a.dtype, 1, "A", readonly=not a.mutable)

    def code(context, builder, signature, args):
        from numba.np.arrayobj import populate_array  # brings strings and sets along, which only compiling needs
        source, result = context.make_array(a)(context, builder, args[0]), context.make_array(kind)(context, builder)
        populate_array(result, data=source.data, shape=[source.nitems], strides=[source.itemsize], itemsize=source.itemsize,
                       meminfo=None)
        return result._getvalue()

    return kind(a), code


@intrinsic
def borrowed(typing, a):
    """The array ``a``, not counted as a reference to its memory: for arguments of a kernel, which its caller keeps alive.

    A function that is handed an array counts a reference, even where it is inlined. Where that is once for each row, it
    takes longer than the row: all stores before it must be done, and all vectors leave the registers.
    """
    def code(context, builder, signature, args):
        view = context.make_array(a)(context, builder, args[0])
        for name in "meminfo", "parent":
            setattr(view, name, cgutils.get_null_value(getattr(view, name).type))
        return view._getvalue()

    return a(a), code


@intrinsic
def in_use(typing, a):
    """Keep the array ``a`` until here: what is :func:`borrowed` of it, or :func:`flat`, does not."""
    return types.none(a), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def splat(typing, x):
    """The vector with the float32 or float64 ``x`` in all lanes."""
    kind = Vector(x)

    def code(context, builder, signature, args):
        return emit_splat(builder, kind, args[0])

    return kind(x), code


@intrinsic
def filled(typing, like, x):
    """A vector as ``like`` is one, with ``x`` in all lanes."""
    if isinstance(like, Vector):
        return like(like, like.dtype), lambda context, builder, signature, args: emit_splat(builder, like, args[1])


def _lanewise(name, arguments, build, result=lambda v: v):
    """An instruction on ``arguments`` vectors of one kind: ``build(builder, kind, *values)``."""
    def make(v):
        def code(context, builder, signature, args):
            return build(builder, v, *args)

        return result(v)(*[v] * arguments), code

    # Numba reads the number of an intrinsic's arguments from its parameters, so each needs a function of its own.
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


fma = _lanewise("fma", 3, lambda builder, kind, a, b, c: emit_call(builder, "fma", kind, a, b, c))
fma.__doc__ = "a * b + c, rounded once."
sqrt = _lanewise("sqrt", 1, lambda builder, kind, a: emit_call(builder, "sqrt", kind, a))
rint = _lanewise("rint", 1, lambda builder, kind, a: emit_call(builder, "rint", kind, a))
rint.__doc__ = "The nearest integer, as a float; halves go to the even one."
fabs = _lanewise("fabs", 1, lambda builder, kind, a: emit_call(builder, "fabs", kind, a))
copysign = _lanewise("copysign", 2, lambda builder, kind, a, b: emit_call(builder, "copysign", kind, a, b))
copysign.__doc__ = "The size of ``a`` with the sign of ``b``."
maximum = _lanewise("maximum", 2, lambda builder, kind, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
maximum.__doc__ = "The larger one; ``b`` where either is NaN."
minimum = _lanewise("minimum", 2, lambda builder, kind, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
minimum.__doc__ = "The smaller one; ``b`` where either is NaN."


def _power_of_two(builder, kind, n):
    # The spacing of floats near 1.5 * 2**fraction is 1: so n + bias stands in the last bits of the sum, and moved up by the
    # fraction's width it is the exponent's field.
    fraction, bias = float_fields(kind.dtype)
    integers = ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.lanes)
    moved = builder.fadd(n, ir.Constant(n.type, [1.5 * 2.0**fraction + bias] * kind.lanes))
    field = builder.shl(builder.bitcast(moved, integers), ir.Constant(integers, [fraction] * kind.lanes))
    return builder.bitcast(field, n.type)


power_of_two = _lanewise("power_of_two", 1, _power_of_two)
power_of_two.__doc__ = "2**n for integers ``n`` in the range of normal exponents (-126 .. 127 in float32)."


def _exponent(builder, kind, x):
    fraction, bias = float_fields(kind.dtype)
    integers = ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.lanes)
    shifted = builder.lshr(builder.bitcast(x, integers), ir.Constant(integers, [fraction] * kind.lanes))
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
        return emit_first(builder, like, args[1])

    return Mask(like.lanes)(like, types.intp), code


@intrinsic
def reduce_add(typing, v):
    """The sum of a vector's lanes."""
    def code(context, builder, signature, args):
        return emit_reduce(builder, v, args[0], builder.fadd)

    return v.dtype(v), code


@intrinsic
def reduce_max(typing, v):
    """The largest lane of a vector."""
    def code(context, builder, signature, args):
        return emit_reduce(builder, v, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return v.dtype(v), code
