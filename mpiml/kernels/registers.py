"""Vector registers as a type of numba's, and what instructions on them are made of.

:class:`Vector` is numba's type for a register of floats, :class:`Mask` for one truth value a lane. The ``emit_``
functions write LLVM's intermediate language; :mod:`mpiml.kernels.simd` and :mod:`mpiml.kernels.tile` make of them the
instructions that kernels use.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import models, register_model

INT = ir.IntType(32)


def _register_bytes():
    """Width of this CPU's widest vector registers in bytes: which ones does LLVM take for 64 bytes?"""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu = config.CPU_NAME or llvm.get_host_cpu_name()
    features = config.CPU_FEATURES
    # To try another CPU's code set NUMBA_CPU_NAME=haswell, say, and NUMBA_CPU_FEATURES to nothing: by the name alone numba
    # still uses what this CPU has beyond it, which takes the matrix product from 95 to 84 % of the peak of AVX2.
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
    """Numba's type for a register of floats, or for several of them as one."""

    def __init__(self, dtype, registers=1):
        self.dtype = dtype
        self.lanes = registers * REGISTER * 8 // dtype.bitwidth
        super().__init__(f"Vector({dtype}, {self.lanes})")


class Mask(types.Type):
    """One truth value a lane."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(f"Mask({lanes})")


def llvm_float(dtype):
    """LLVM's type for numba's float32 or float64."""
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def llvm_vector(vector):
    """LLVM's type for a :class:`Vector`."""
    return ir.VectorType(llvm_float(vector.dtype), vector.lanes)


def float_fields(dtype):
    """Of IEEE 754's floats: how many bits the fraction has, the lowest ones, and what is added to the exponent above it."""
    return (23, 127) if dtype == types.float32 else (52, 1023)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, llvm_vector(kind))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


# --- What instructions are made of ------------------------------------------------------------------

def emit_call(builder, name, kind, *args):
    """LLVM's function ``name`` for vectors of a kind, whose arguments are all of that kind."""
    suffix = f"v{kind.lanes}f{kind.dtype.bitwidth}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(llvm_vector(kind), [a.type for a in args]), f"llvm.{name}.{suffix}")
    return builder.call(function, args)


def emit_pointer(context, builder, array, value, position, kind=None):
    """Address of an element, by its flat position, of an array of this type and value; of a vector of a ``kind`` there."""
    data = context.make_array(array)(context, builder, value).data
    address = builder.gep(data, [position])
    return builder.bitcast(address, llvm_vector(kind).as_pointer()) if kind else address


def emit_moved(builder, position, elements):
    """``position + elements``, where the second is known when this is compiled."""
    return builder.add(position, ir.Constant(position.type, elements)) if elements else position


def emit_splat(builder, kind, value):
    """A vector with the number ``value`` in all lanes: put into the first one, from where a shuffle copies it to all."""
    llvm_kind = ir.VectorType(value.type, kind.lanes)
    one = builder.insert_element(ir.Constant(llvm_kind, ir.Undefined), value, ir.Constant(INT, 0))
    zeros = ir.Constant(ir.VectorType(INT, kind.lanes), [0] * kind.lanes)
    return builder.shuffle_vector(one, ir.Constant(llvm_kind, ir.Undefined), zeros)


def emit_first(builder, kind, count):
    """The mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(count.type, kind.lanes), list(range(kind.lanes)))
    return builder.icmp_signed("<", numbers, emit_splat(builder, kind, count))


def emit_masked_load(builder, vector, element, address, mask, size):
    """The ``vector`` (LLVM's type, of an ``element`` such as "f32") at an address: 0, and nothing read, where masked out."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [address.type, INT, mask.type, vector]),
        f"llvm.masked.load.v{vector.count}{element}.p0")
    return builder.call(function, [address, ir.Constant(INT, size), mask, ir.Constant(vector, None)])


def emit_masked_store(builder, value, element, address, mask, size):
    """Write the lanes of a vector that ``mask`` lets through; ``size``, here and above, is that of an element in bytes."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [value.type, address.type, INT, mask.type]),
        f"llvm.masked.store.v{value.type.count}{element}.p0")
    builder.call(function, [value, address, ir.Constant(INT, size), mask])


def emit_load(builder, kind, address, count=None):
    """The vector at an address that need not be that of a whole vector; with ``count``, of its first lanes."""
    size = kind.dtype.bitwidth // 8
    if count is None:
        return builder.load(address, align=size)
    mask = emit_first(builder, kind, count)
    return emit_masked_load(builder, llvm_vector(kind), f"f{8 * size}", address, mask, size)


def emit_store(builder, kind, value, address, count=None):
    """Write a vector, or its first ``count`` lanes, to an address."""
    size = kind.dtype.bitwidth // 8
    if count is None:
        builder.store(value, address, align=size)
    else:
        emit_masked_store(builder, value, f"f{8 * size}", address, emit_first(builder, kind, count), size)


def emit_fetch(builder, address, near=3):
    """Have the line of the cache at an address fetched while the work goes on; any address will do.

    ``near`` is 3 for the first cache, 2 for the second.
    """
    byte = builder.bitcast(address, ir.IntType(8).as_pointer())
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte.type, INT, INT, INT]), "llvm.prefetch.p0")
    read, how_near, data = (ir.Constant(INT, value) for value in (0, near, 1))  # to read; data, not instructions
    builder.call(function, [byte, read, how_near, data])


def emit_counts(builder, count, given, kind, vectors):
    """How many of a row's ``count`` elements each of its vectors holds; None, where it is ``given`` as None, for all."""
    return [None if given is types.none else emit_moved(builder, count, -j * kind.lanes) for j in range(vectors)]


def optional(count):
    """The type of an argument that may be None: a number of elements, given as that or left out."""
    return types.none if count is types.none else types.intp


def emit_reduce(builder, kind, v, combine):
    """All lanes of ``v`` combined to one number: its halves, the halves of that, ..., a tree of fixed shape."""
    size = kind.lanes
    while size > 1:
        size //= 2
        undefined = ir.Constant(v.type, ir.Undefined)
        low, high = (builder.shuffle_vector(v, undefined, ir.Constant(
            ir.VectorType(INT, size), list(range(start, start + size)))) for start in (0, size))
        v = combine(low, high)
    return builder.extract_element(v, ir.Constant(INT, 0))
