"""``@public``: one body for Python and for your own ``@njit`` code; and how kernels refuse what does not fit.

A public kernel is a short function: it checks shapes and dtypes, makes its output, and hands both to compiled loops.
Python runs it as it stands. In code compiled with ``numba.njit`` the same name means the same body, compiled along.
The one difference is the text of errors: compiled code cannot format values into it.
"""

import numba
import numpy as np
from numba.extending import overload, register_jitable

from . import aligned


def public(function):
    """Let ``function`` be called from Python and from ``@njit`` code, where a division by 0 is as in NumPy, no error."""
    return register_jitable(error_model="numpy")(function)


def refuse(text, *values):
    """Raise the ValueError that ``text``, formatted with ``values``, says."""
    raise ValueError(text.format(*values))


# An @overload says what stands in compiled code for the Python function it names: it is called with types, not values,
# and returns the function to compile. So what can be seen from types alone is refused while compiling.

@overload(refuse, prefer_literal=True)
def _refuse(text, *values):
    message = text.literal_value

    def raises(text, *values):
        raise ValueError(message)

    return raises


def _each(arguments):
    """The types of ``*arguments``: numba gives an overload either them or one tuple type that holds them."""
    together = len(arguments) == 1 and isinstance(arguments[0], (tuple, numba.types.BaseTuple))
    return arguments[0] if together else arguments


def check_writable(*arrays):
    """Refuse what may not be written, such as a file that is mapped into memory; None is fine."""
    for array in arrays:
        if array is not None and not array.flags.writeable:
            raise ValueError(f"an array of shape {array.shape} to be written to is read-only: pass a copy")


@overload(check_writable)
def _check_writable(*arrays):
    if any(isinstance(array, numba.types.Array) and not array.mutable for array in _each(arrays)):
        raise numba.errors.TypingError("a kernel of mpiml is to write to a read-only array")
    return lambda *arrays: None


def given(array, shape, dtype):
    """``array``, or one of this shape and dtype that holds anything if it is None."""
    return np.empty(shape, dtype) if array is None else array


@overload(given)
def _given(array, shape, dtype):
    # Decided by types: what stands after "is None" would have to be of one type in both cases, of one dtype, too.
    if isinstance(array, numba.types.Array):
        return lambda array, shape, dtype: array
    return lambda array, shape, dtype: np.empty(shape, dtype)


@public
def output(out, shape, dtype):
    """``out`` if it has this shape and dtype and may be written; a new array if it is None."""
    if out is None:
        return aligned.array(shape, dtype)
    check_writable(out)
    if out.shape != shape or out.dtype != dtype:
        refuse("out has shape {} and dtype {}, the result {} and {}", out.shape, out.dtype, shape, dtype)
    return out


@public
def contiguous_output(out, shape, dtype):
    """As :func:`output`, for kernels that write one row behind the other."""
    if out is None:
        return aligned.array(shape, dtype)
    y = output(out, shape, dtype)
    if not y.flags.c_contiguous:
        refuse("the result is written to a C-contiguous out, not to one of shape {} with strides {}", y.shape, y.strides)
    return y


@public
def whole_rows(x):
    """``x`` (..., features), or a copy of it if the elements of a row, the last axis, do not follow each other."""
    if x.strides[x.ndim - 1] == x.itemsize or x.shape[-1] == 1:  # the stride of an axis of one element means nothing
        return x
    return np.ascontiguousarray(x)


@public
def matrix(x):
    """``x`` (..., features) as a matrix (rows, features): as it lies if it is one, else contiguous, copied if need be."""
    if x.ndim == 2:
        return x
    features = x.shape[-1]
    return np.ascontiguousarray(x).reshape((x.size // max(features, 1), features))  # -1 would not do for an empty one
