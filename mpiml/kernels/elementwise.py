"""Functions of each element, beside their vjps: one pass over the memory, a vector at a time.

They go through an array in the order in which it lies in memory, and their results lie in the same order: a transposed
array, or pictures with the batch innermost, are neither copied nor rearranged.

All of them take arrays of any shape, float32 or float64, and ``out``, an array of the same shape and dtype without gaps
for the result. They raise TypeError for other dtypes and for several, ValueError for shapes that differ and for an ``out``
that does not fit. How exact they are is said in :mod:`mpiml.kernels.polynomial`.
"""

import numba
import numpy as np
from numba.extending import overload

from . import aligned
from .jit import kernel, vector_function
from .polynomial import exp as vector_exp
from .polynomial import log as vector_log
from .polynomial import normal_tail, number
from .polynomial import sigmoid as vector_sigmoid
from .polynomial import tanh as vector_tanh
from .public import public, refuse
from .simd import lanes, load_wide, select, store, store_part

# --- Arrays in the order of their memory ----------------------------------------------------------------------

def line(x):
    """The elements of an array without gaps, in the order of memory; None if there are gaps."""
    flat = x.ravel(order="K")
    return None if flat.flags.owndata else flat  # of an array with gaps it is a copy


def line_like(x, y):
    """The elements of ``x``, of the shape of ``y``, in the order in which those of ``y`` lie in memory."""
    if x.strides == y.strides or (x.flags.c_contiguous and y.flags.c_contiguous):
        flat = line(x)
        if flat is not None:
            return flat
    copy = np.empty_like(y, dtype=x.dtype)
    copy[...] = x
    return line(copy)


# In compiled code the order of memory is a matter of types: C, Fortran, or strides that are not known ("A").

@overload(line)
def _line(x):
    if x.layout == "C":
        return lambda x: x.reshape(-1)
    if x.layout == "F":
        return lambda x: x.T.reshape(-1)
    raise numba.errors.TypingError("out is an array without gaps: in compiled code of C or Fortran layout")


@overload(line_like)
def _line_like(x, y):
    if x.layout == y.layout:
        return lambda x, y: line(x)
    if y.layout == "C":
        return lambda x, y: np.ascontiguousarray(x).reshape(-1)
    return lambda x, y: np.ascontiguousarray(x.T).reshape(-1)


@public
def result_like(x, out):
    """``out``, if it fits, or a new array whose elements lie in memory as those of ``x``."""
    if out is None:
        return aligned.empty_like(x) if x.nbytes >= aligned.LARGE and line(x) is not None else np.empty_like(x)
    if out.shape != x.shape or out.dtype != x.dtype:
        refuse("out has shape {} and dtype {}, the result {} and {}", out.shape, out.dtype, x.shape, x.dtype)
    if line(out) is None:
        refuse("out, of shape {} and strides {}, has gaps: pass a whole array", out.shape, out.strides)
    return out


def map_one(name, function):
    """A kernel ``out = function(x)`` for flat arrays, of a function of a vector; ``name``: whom it serves."""
    @kernel(exact=True, reads="x", writes="out", floats="x out", name=name)
    def run(x, out):
        step = 2 * lanes(x)
        left = x.size % step
        whole = x.size - left
        for i in range(0, whole, step):
            store(out, i, function(load_wide(x, i, None, 2)))
        if left:
            store_part(out, whole, function(load_wide(x, whole, left, 2)), left)

    return run


def map_two(name, function):
    """A kernel ``out = function(g, x)`` for flat arrays, of a function of two vectors; ``name``: whom it serves."""
    @kernel(exact=True, reads="g x", writes="out", floats="x g out", name=name)
    def run(g, x, out):
        step = 2 * lanes(x)
        left = x.size % step
        whole = x.size - left
        for i in range(0, whole, step):
            store(out, i, function(load_wide(g, i, None, 2), load_wide(x, i, None, 2)))
        if left:
            store_part(out, whole, function(load_wide(g, whole, left, 2), load_wide(x, whole, left, 2)), left)

    return run


@public
def _one(run, x, out):
    """``y = run(x)`` by a kernel of :func:`map_one`, checked."""
    y = result_like(x, out)
    run(line_like(x, y), line(y))
    return y


@public
def _two(run, g, x, out):
    """``y = run(g, x)`` by a kernel of :func:`map_two`, likewise."""
    if g.shape != x.shape:
        refuse("a gradient of shape {} for an array of shape {}", g.shape, x.shape)
    y = result_like(x, out)
    run(line_like(g, y), line_like(x, y), line(y))
    return y


# --- What is done with a vector -------------------------------------------------------------------------------

@vector_function
def _exp_slope(g, y):
    return g * y


@vector_function
def _log_slope(g, x):
    return g / x


@vector_function
def _tanh_slope(g, y):
    return g * (number(y, "1") - y * y)


@vector_function
def _sigmoid_slope(g, y):
    return g * y * (number(y, "1") - y)


@vector_function
def _positive(x):
    return select(number(x, "0") > x, number(x, "0"), x)  # NaN is not below 0


@vector_function
def _relu_slope(g, y):
    return select(y > number(y, "0"), g, number(y, "0"))


@vector_function
def _positive_sum(x, y):
    return _positive(x + y)


@vector_function
def _silu(x):
    return x * vector_sigmoid(x)


@vector_function
def _silu_slope(g, x):
    s = vector_sigmoid(x)
    return g * s * (number(x, "1") + x * (number(x, "1") - s))


@vector_function
def _gelu(x):
    a, above, _ = normal_tail(x)
    return _positive(x) - a * above  # x (1 - above) where x > 0, else x above


@vector_function
def _gelu_slope(g, x):
    a, above, e = normal_tail(x)
    negative = above - a * e * number(x, "1 / sqrt(2 pi)")  # cdf(x) + x density(x) at x = -a; together with that at a it is 1
    return g * select(x > number(x, "0"), number(x, "1") - negative, negative)


# tanh(u) = 2 sigmoid(2 u) - 1, which makes the tanh form x * sigmoid(a x (1 + 0.044715 x**2)), a = 2 sqrt(2 / pi).
@vector_function
def _tanh_gelu(x):
    u = x * number(x, "1.5957691216057308") * (number(x, "1") + number(x, "0.044715") * x * x)
    return x * vector_sigmoid(u)


@vector_function
def _tanh_gelu_slope(g, x):
    square = x * x
    s = vector_sigmoid(x * number(x, "1.5957691216057308") * (number(x, "1") + number(x, "0.044715") * square))
    slope = number(x, "1.5957691216057308") * (number(x, "1") + number(x, "0.134145") * square)  # three times 0.044715
    return g * (s + x * s * (number(x, "1") - s) * slope)


_run_exp, _run_exp_vjp = map_one("exp", vector_exp), map_two("exp_vjp", _exp_slope)
_run_log, _run_log_vjp = map_one("log", vector_log), map_two("log_vjp", _log_slope)
_run_tanh, _run_tanh_vjp = map_one("tanh", vector_tanh), map_two("tanh_vjp", _tanh_slope)
_run_sigmoid, _run_sigmoid_vjp = map_one("sigmoid", vector_sigmoid), map_two("sigmoid_vjp", _sigmoid_slope)
positive_part, _run_relu_vjp = map_one("relu", _positive), map_two("relu_vjp", _relu_slope)
_run_add_relu = map_two("add_relu", _positive_sum)
_run_silu, _run_silu_vjp = map_one("silu", _silu), map_two("silu_vjp", _silu_slope)
_run_gelu, _run_gelu_vjp = map_one("gelu", _gelu), map_two("gelu_vjp", _gelu_slope)
_run_tanh_gelu, _run_tanh_gelu_vjp = map_one("gelu", _tanh_gelu), map_two("gelu_vjp", _tanh_gelu_slope)


# --- Public functions -----------------------------------------------------------------------------------------

@public
def exp(x, out=None):
    """e**x of each element of ``x``."""
    return _one(_run_exp, x, out)


@public
def exp_vjp(g, y, out=None):
    """Gradient for x of ``y = exp(x)``, given the gradient ``g`` for y."""
    return _two(_run_exp_vjp, g, y, out)


@public
def log(x, out=None):
    """The natural logarithm of ``x``: -infinity of 0, NaN of what is negative."""
    return _one(_run_log, x, out)


@public
def log_vjp(g, x, out=None):
    """Gradient for x of ``log(x)``."""
    return _two(_run_log_vjp, g, x, out)


@public
def tanh(x, out=None):
    """The hyperbolic tangent of ``x``."""
    return _one(_run_tanh, x, out)


@public
def tanh_vjp(g, y, out=None):
    """Gradient for x of ``y = tanh(x)``."""
    return _two(_run_tanh_vjp, g, y, out)


@public
def relu(x, out=None):
    """max(x, 0) of ``x``; NaN stays NaN."""
    return _one(positive_part, x, out)


@public
def relu_vjp(g, y, out=None):
    """Gradient for x of ``y = relu(x)``, given the gradient ``g`` for y; 0 at the kink."""
    return _two(_run_relu_vjp, g, y, out)


@public
def add_relu(x, y, out=None):
    """max(x + y, 0) of arrays of one shape; NaN stays NaN. Its vjp, for either, is :func:`relu_vjp`."""
    if x.shape != y.shape:
        refuse("add_relu adds arrays of one shape, not {} and {}", x.shape, y.shape)
    return _two(_run_add_relu, x, y, out)


@public
def sigmoid(x, out=None):
    """1 / (1 + exp(-x)) of ``x``, without overflow for any x."""
    return _one(_run_sigmoid, x, out)


@public
def sigmoid_vjp(g, y, out=None):
    """Gradient for x of ``y = sigmoid(x)``."""
    return _two(_run_sigmoid_vjp, g, y, out)


@public
def silu(x, out=None):
    """x * sigmoid(x) (Elfwing et al. 2018, "swish")."""
    return _one(_run_silu, x, out)


@public
def silu_vjp(g, x, out=None):
    """Gradient for x of ``silu(x)``."""
    return _two(_run_silu_vjp, g, x, out)


@public
def gelu(x, tanh=False, out=None):
    """x * Phi(x), Phi the normal distribution (Hendrycks and Gimpel 2016); ``tanh``: their tanh form of it."""
    if tanh:
        return _one(_run_tanh_gelu, x, out)
    return _one(_run_gelu, x, out)


@public
def gelu_vjp(g, x, tanh=False, out=None):
    """Gradient for x of ``gelu(x, tanh)``."""
    if tanh:
        return _two(_run_tanh_gelu_vjp, g, x, out)
    return _two(_run_gelu_vjp, g, x, out)
