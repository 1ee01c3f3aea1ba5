"""Half the bits: float32 to and from bfloat16 and float16.

NumPy has no bfloat16; here it is its bits in uint16: the upper half of a float32's, with all of its exponent. Both
kinds are rounded to the nearest, halves to even, as IEEE 754 has it; NaN stays NaN, and what is too large becomes
infinity. A TypeError tells of an array of another dtype than the function takes, a ValueError of an ``out`` that does not
fit.
"""

import numpy as np
from llvmlite import ir
from numba import errors, types
from numba.extending import intrinsic, overload

from .jit import kernel
from .public import contiguous_output, public

_FLOAT16, _FLOAT32, _UINT16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.uint16)
_16, _32 = ir.IntType(16), ir.IntType(32)


def _round(builder, x):
    """The upper half of a float32's bits, rounded by the lower one.

    Seen as integers, floats of one sign are in order; so what is added to the bits, just under half of the upper half's last
    place or with an odd upper half just that, carries into it where the nearest number, or the even one, lies above.
    """
    bits = builder.bitcast(x, _32)
    odd = builder.and_(builder.lshr(bits, _32(16)), _32(1))
    nearest = builder.add(bits, builder.add(odd, _32(0x7FFF)))
    quiet = builder.or_(bits, _32(0x400000))  # or a NaN whose upper half is that of infinity would become it
    return builder.trunc(builder.lshr(builder.select(builder.fcmp_unordered("uno", x, x), quiet, nearest), _32(16)), _16)


def _make(build, given, result):
    """A kernel that converts number by number, by the instructions that ``build`` emits."""
    @intrinsic
    def convert(typing, x):
        return result(given), lambda context, builder, signature, args: build(builder, args[0])

    @kernel(exact=True)
    def convert_all(x, y):
        for i in range(y.size):
            y[i] = convert(x[i])

    return convert_all


_to_bfloat16 = _make(_round, types.float32, types.uint16)
_from_bfloat16 = _make(lambda builder, bits: builder.bitcast(builder.shl(builder.zext(bits, _32), _32(16)), ir.FloatType()),
                       types.uint16, types.float32)
_to_float16 = _make(lambda builder, x: builder.bitcast(builder.fptrunc(x, ir.HalfType()), _16), types.float32, types.uint16)
_from_float16 = _make(lambda builder, bits: builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType()),
                      types.uint16, types.float32)


def _check(name, x, dtype):
    """Refuse an array of another dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{name} takes an array of {dtype}, not of {x.dtype}")


@overload(_check)
def _compiled_check(name, x, dtype):
    if x.dtype != dtype.dtype:
        raise errors.TypingError(f"this conversion takes an array of {dtype.dtype}, not of {x.dtype}")
    return lambda name, x, dtype: None


@public
def _flat(x):
    """The elements in C order, copied if need be."""
    return np.ascontiguousarray(x).reshape(-1)


@public
def to_bfloat16(x, out=None):
    """The bfloat16 nearest to each float32 of ``x``, as bits: an array of uint16 of the same shape.

    ``out`` is a contiguous array for the result, here and in the functions below.
    """
    _check("to_bfloat16", x, _FLOAT32)
    y = contiguous_output(out, x.shape, _UINT16)
    _to_bfloat16(_flat(x), y.reshape(-1))
    return y


@public
def from_bfloat16(x, out=None):
    """The float32 that equal the bfloat16 of the bits ``x``, uint16."""
    _check("from_bfloat16", x, _UINT16)
    y = contiguous_output(out, x.shape, _FLOAT32)
    _from_bfloat16(_flat(x), y.reshape(-1))
    return y


@public
def to_float16(x, out=None):
    """The float16 nearest to each float32 of ``x``."""
    _check("to_float16", x, _FLOAT32)
    y = contiguous_output(out, x.shape, _FLOAT16)
    _to_float16(_flat(x), y.reshape(-1).view(_UINT16))
    return y


@public
def from_float16(x, out=None):
    """The float32 that equal the float16 ``x``."""
    _check("from_float16", x, _FLOAT16)
    y = contiguous_output(out, x.shape, _FLOAT32)
    _from_float16(_flat(x).view(_UINT16), y.reshape(-1))
    return y
