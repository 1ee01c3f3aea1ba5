"""Elementwise losses, summed: squared, absolute, Huber and binary cross-entropy errors, beside their vjps.

Each loss is accumulated in float64, in one pass in the order of memory, and is a number; the vjps return arrays of the shape
of x, given the gradient ``g`` of that number. All take arrays of one shape and dtype, float32 or float64, and raise
TypeError for other dtypes, ValueError for shapes that differ.
"""

from .elementwise import line, line_like, result_like
from .jit import kernel, vector_function
from .polynomial import exp_of_negative, log, number, sigmoid
from .public import public, refuse
from .simd import fabs, first_lanes, lanes, load, load_part, maximum, minimum, reduce_add, select, splat, store_part

_STRETCH = 32  # vectors whose losses are added in the dtype of the data, before their sum goes to float64


@vector_function
def _squared(x, target, _):
    e = x - target
    return e * e


@vector_function
def _absolute(x, target, _):
    return fabs(x - target)


@vector_function
def _huber(x, target, delta):
    e = fabs(x - target)
    half = number(x, "0.5")
    return select(e > delta, delta * (e - half * delta), half * e * e)


@vector_function
def _huber_slope(x, target, delta):
    # The difference is the second argument, so that NaN stays.
    return maximum(number(x, "0") - delta, minimum(delta, x - target))


@vector_function
def _binary(x, target, _):
    # max(x, 0) - x * target + log(1 + e), with e = exp(-|x|) that cannot overflow.
    e = exp_of_negative(number(x, "0") - fabs(x))
    u = number(x, "1") + e
    # log(u) e / (u - 1) makes up for the rounding of u where e is small.
    rest = select(u > number(x, "1"), log(u) * (e / (u - number(x, "1"))), e)
    return maximum(number(x, "0"), x) - x * target + rest


@vector_function
def _binary_slope(x, target, _):
    return sigmoid(x) - target


def _make_sum(name, function):
    """A kernel for the sum of ``function(x, target, parameter)`` over flat arrays."""
    @kernel(exact=True, reads="x target", floats="x target", name=name)
    def run(x, target, parameter):
        step = lanes(x)
        parameters = splat(x.dtype.type(parameter))
        loss = 0.0
        for start in range(0, x.size, _STRETCH * step):
            stop = min(x.size, start + _STRETCH * step)
            total = splat(x.dtype.type(0))
            for i in range(start, stop - stop % step, step):
                total = total + function(load(x, i), load(target, i), parameters)
            left = stop % step
            if left:
                v = function(load_part(x, stop - left, left), load_part(target, stop - left, left), parameters)
                total = total + select(first_lanes(v, left), v, splat(x.dtype.type(0)))
            loss += reduce_add(total)
        return loss

    return run


def _make_slope(name, function):
    """A kernel for ``g`` times the slopes ``function(x, target, parameter)`` of flat arrays."""
    @kernel(exact=True, reads="x target", writes="out", floats="x target out", name=name)
    def run(g, x, target, parameter, out):
        factor, parameters = splat(x.dtype.type(g)), splat(x.dtype.type(parameter))
        for i in range(0, x.size, lanes(x)):
            left = x.size - i
            v = function(load_part(x, i, left), load_part(target, i, left), parameters)
            store_part(out, i, factor * v, left)

    return run


_sum_squared, _sum_absolute = _make_sum("squared", _squared), _make_sum("absolute", _absolute)
_sum_huber, _run_huber_vjp = _make_sum("huber", _huber), _make_slope("huber_vjp", _huber_slope)
_sum_binary, _run_binary_vjp = _make_sum("binary", _binary), _make_slope("binary_vjp", _binary_slope)


@public
def _summed(run, x, target, parameter):
    if x.shape != target.shape:
        refuse("a loss compares arrays of one shape, not {} with {}", x.shape, target.shape)
    return run(line_like(x, x), line_like(target, x), parameter)


@public
def _slopes(run, g, x, target, parameter):
    if x.shape != target.shape:
        refuse("a loss compares arrays of one shape, not {} with {}", x.shape, target.shape)
    out = result_like(x, None)
    run(float(g), line_like(x, out), line_like(target, out), parameter, line(out))
    return out


@public
def huber(x, target, delta):
    """Sum of e**2 / 2 where |e| <= delta, else delta * (|e| - delta / 2), with e = x - target (Huber 1964)."""
    return _summed(_sum_huber, x, target, float(delta))


@public
def huber_vjp(g, x, target, delta):
    """Gradient for x of ``huber``; ``g`` is a scalar."""
    return _slopes(_run_huber_vjp, g, x, target, float(delta))


@public
def squared(x, target):
    """Sum of (x - target)**2."""
    return _summed(_sum_squared, x, target, 0.0)


@public
def absolute(x, target):
    """Sum of |x - target|."""
    return _summed(_sum_absolute, x, target, 0.0)


@public
def binary(x, target):
    """Sum of -target * log(sigmoid(x)) - (1 - target) * log(1 - sigmoid(x)), finite for every finite x."""
    return _summed(_sum_binary, x, target, 0.0)


@public
def binary_vjp(g, x, target):
    """Gradient for x of ``binary``; ``g`` is a scalar."""
    return _slopes(_run_binary_vjp, g, x, target, 0.0)
