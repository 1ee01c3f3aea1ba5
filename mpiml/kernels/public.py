"""``@public``: one body for Python and for your own ``@njit`` code; and how kernels refuse what does not fit.

A public kernel is a short function: it checks shapes and dtypes, makes its output, and hands both to compiled loops.
Python runs it as it stands. In code compiled with ``numba.njit`` the same name means the same body, compiled along.
The one difference is the text of errors: compiled code cannot format values into it.
"""

import numba
import numpy as np
from numba.extending import overload, register_jitable

_FLOATS = np.dtype(np.float32), np.dtype(np.float64)


def public(function):
    """Let ``function`` be called from Python and from ``@njit`` code."""
    return register_jitable(error_model="numpy")(function)


def refuse(text, *values):
    """Raise the ValueError that ``text``, formatted with ``values``, says."""
    raise ValueError(text.format(*values))


@overload(refuse, prefer_literal=True)
def _refuse(text, *values):
    message = text.literal_value

    def raises(text, *values):
        raise ValueError(message)

    return raises


def check_dtypes(name, x, *others):
    """Refuse an ``x`` that is not float32 or float64, and others of another dtype."""
    dtype = x.dtype
    if dtype not in _FLOATS:
        raise TypeError(f"{name} takes float32 or float64, not {dtype}: convert it with .astype(np.float32)")
    for other in others:
        if other is not None and other.dtype != dtype:
            raise TypeError(f"{name} got arrays of {dtype} and {other.dtype}: convert the first with "
                            f".astype(np.{other.dtype}), or the other")


@overload(check_dtypes)
def _check_dtypes(name, x, *others):
    others = others[0] if len(others) == 1 and isinstance(others[0], (tuple, numba.types.BaseTuple)) else others
    arrays = [x, *(other for other in others if isinstance(other, numba.types.Array))]
    if len({a.dtype for a in arrays}) > 1 or x.dtype not in (numba.float32, numba.float64):
        raise numba.errors.TypingError("a kernel of mpiml takes arrays of one dtype, float32 or float64, not "
                                       + ", ".join(str(a.dtype) for a in arrays))
    return lambda name, x, *others: None


def check_writable(*arrays):
    """Refuse what may not be written, such as a file that is mapped into memory; None is fine."""
    for array in arrays:
        if array is not None and not array.flags.writeable:
            raise ValueError(f"an array of shape {array.shape} to be written to is read-only: pass a copy")


@overload(check_writable)
def _check_writable(*arrays):
    arrays = arrays[0] if len(arrays) == 1 and isinstance(arrays[0], (tuple, numba.types.BaseTuple)) else arrays
    if any(isinstance(array, numba.types.Array) and not array.mutable for array in arrays):
        raise numba.errors.TypingError("a kernel of mpiml is to write to a read-only array")
    return lambda *arrays: None


@public
def output(out, shape, dtype):
    """``out`` if it has this shape and dtype and may be written; a new array if it is None."""
    if out is None:
        return np.empty(shape, dtype)
    check_writable(out)
    if out.shape != shape or out.dtype != dtype:
        refuse("out has shape {} and dtype {}, the result {} and {}", out.shape, out.dtype, shape, dtype)
    return out


@public
def contiguous_output(out, shape, dtype):
    """As :func:`output`, for kernels that write one row behind the other."""
    if out is None:
        return np.empty(shape, dtype)
    y = output(out, shape, dtype)
    if not y.flags.c_contiguous:
        refuse("the result is written to a C-contiguous out, not to one of shape {} with strides {}", y.shape, y.strides)
    return y
