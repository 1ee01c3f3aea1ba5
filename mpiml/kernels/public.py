"""``@public``: one body for Python and for your own ``@njit`` code; and how kernels refuse what does not fit.

A public kernel is a short function: it checks shapes and dtypes, makes its output, and hands both to compiled loops.
Python runs it as it stands. In code compiled with ``numba.njit`` the same name means the same body, compiled along.
The one difference is the text of errors: compiled code cannot format values into it.
"""

import numba
import numpy as np
from numba.extending import overload, register_jitable

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def public(function):
    """Let ``function`` be called from Python and from ``@njit`` code."""
    return register_jitable(error_model="numpy")(function)


def refuse(text, *values):
    """Raise the ValueError that ``text``, formatted with ``values``, says."""
    raise ValueError(text.format(*values))


def refuse_type(text, *values):
    """Raise the TypeError that ``text``, formatted with ``values``, says."""
    raise TypeError(text.format(*values))


@overload(refuse, prefer_literal=True)
def _refuse(text, *values):
    message = text.literal_value

    def raises(text, *values):
        raise ValueError(message)

    return raises


@overload(refuse_type, prefer_literal=True)
def _refuse_type(text, *values):
    message = text.literal_value

    def raises(text, *values):
        raise TypeError(message)

    return raises


def check_dtypes(name, x, *others):
    """Refuse an ``x`` that is not float32 or float64, and others of another dtype."""
    dtype = x.dtype
    if dtype != _FLOAT32 and dtype != _FLOAT64:
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


@public
def output(out, shape, dtype):
    """``out`` if it has this shape and dtype and may be written; a new array if it is None."""
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        refuse("out has shape {} and dtype {}, the result {} and {}", out.shape, out.dtype, shape, dtype)
    return out
