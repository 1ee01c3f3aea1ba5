"""The derivative table: every differentiable function beside arithmetic, one vjp per argument.

Each function takes plain arrays or Tensors, float32 or float64, and returns the same kind; see
:mod:`mpiml.tensor` for the rules. Names and arguments follow PyTorch where the thing is the same. Losses
return *sums* over the samples: sums of parts add up to the sum of the whole, on any number of ranks, and one
division by the number of samples gives the mean.
"""

import builtins

import numpy as np

from . import kernels as k
from .tensor import FLOATS, add, divide, getitem, matmul, multiply, negative, op, power, subtract, unbroadcast

__all__ = ["add", "avg_pool2d", "batch_norm", "binary_cross_entropy_with_logits", "broadcast_to", "clip",
           "concatenate", "conv2d", "cross_entropy", "divide", "dropout", "embedding", "exp", "flatten", "gelu",
           "getitem", "group_norm", "huber_loss", "identity", "l1_loss", "layer_norm", "linear", "log",
           "log_softmax", "matmul", "max", "max_pool2d", "mean", "min", "mse_loss", "multiply", "negative", "pad",
           "power", "relu", "reshape", "sigmoid", "silu", "softmax", "sqrt", "stack", "subtract", "sum", "tanh",
           "transpose", "where"]


# --- Shapes ---------------------------------------------------------------------------------------------------

def identity(x):
    """x itself: the branch that does nothing."""
    return x


@op
def reshape(x, shape):
    """x with the same elements in another shape; one entry may be -1."""
    return np.reshape(x, shape), (lambda g: g.reshape(x.shape),)


def flatten(x):
    """x (n, ...) as (n, features)."""
    return reshape(x, (x.shape[0], int(np.prod(x.shape[1:]))))


@op
def transpose(x, axes=None):
    """x with its axes reversed, or in the order ``axes``."""
    return np.transpose(x, axes), (lambda g: np.transpose(
        g, None if axes is None else np.argsort([axis % x.ndim for axis in axes])),)


@op
def broadcast_to(x, shape):
    """x repeated along new axes and axes of size 1, to ``shape``."""
    return np.broadcast_to(x, shape), (lambda g: unbroadcast(g, x),)


@op
def _concatenate(*parts, axis):
    ends = np.cumsum([np.shape(p)[axis] for p in parts])

    def vjp(i):
        return lambda g: np.split(g, ends[:-1], axis=axis)[i]

    return np.concatenate(parts, axis=axis), tuple(vjp(i) for i in range(len(parts)))


def concatenate(parts, axis=0):
    """The arrays ``parts`` joined along an axis they have."""
    return _concatenate(*parts, axis=axis)


@op
def _stack(*parts, axis):
    def vjp(i):
        return lambda g: np.take(g, i, axis=axis)

    return np.stack(parts, axis=axis), tuple(vjp(i) for i in range(len(parts)))


def stack(parts, axis=0):
    """The arrays ``parts``, of one shape, along a new axis."""
    return _stack(*parts, axis=axis)


@op
def pad(x, widths, value=0.0):
    """x with ``value`` around it; ``widths`` is a pair (before, after) for each axis, as in ``numpy.pad``."""
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return np.pad(x, widths, constant_values=value), (lambda g: g[inside],)


# --- Reductions -----------------------------------------------------------------------------------------------

def _expand(g, x, axis, keepdims):
    # A reduced array with the reduced axes back, of size 1.
    return g if keepdims or axis is None else np.expand_dims(g, axis)


def _count(x, axis):
    return x.size if axis is None else int(np.prod([x.shape[a] for a in np.atleast_1d(axis)]))


@op
def sum(x, axis=None, keepdims=False):
    """Sum over ``axis`` (an int, a tuple, or None for all)."""
    return np.sum(x, axis, keepdims=keepdims), (
        lambda g: np.broadcast_to(_expand(g, x, axis, keepdims), x.shape),)


@op
def mean(x, axis=None, keepdims=False):
    """Mean over ``axis`` (an int, a tuple, or None for all).

    Raises
    ------
    ValueError
        There is nothing to take the mean of.
    """
    count = _count(x, axis)
    if count == 0:
        raise ValueError(f"the mean over axis {axis} of an array of shape {x.shape} is a mean of nothing")
    return np.mean(x, axis, keepdims=keepdims), (
        lambda g: np.broadcast_to(_expand(g, x, axis, keepdims) / count, x.shape),)


def _extreme(reduce, x, axis, keepdims):
    value = reduce(x, axis, keepdims=keepdims)

    def vjp(g):
        mask = x == _expand(value, x, axis, keepdims)
        share = mask / mask.sum(axis, keepdims=True, dtype=x.dtype)  # equal elements share the gradient
        return share * _expand(g, x, axis, keepdims)

    return value, (vjp,)


@op
def max(x, axis=None, keepdims=False):
    """Largest element over ``axis``; equal ones share the gradient evenly."""
    return _extreme(np.max, x, axis, keepdims)


@op
def min(x, axis=None, keepdims=False):
    """Smallest element over ``axis``; equal ones share the gradient evenly."""
    return _extreme(np.min, x, axis, keepdims)


# --- Elementwise ----------------------------------------------------------------------------------------------

def _floats(name, x):
    # Kernels compute in the dtype of x: of integers, sigmoid would be 0.
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} takes float32 or float64, not {x.dtype}: convert it with .astype(np.float32)")


@op
def exp(x):
    """e**x."""
    y = np.exp(x)
    return y, (lambda g: g * y,)


@op
def log(x):
    """Natural logarithm."""
    return np.log(x), (lambda g: g / x,)


@op
def sqrt(x):
    """Square root."""
    y = np.sqrt(x)
    return y, (lambda g: g / (2 * y),)


@op
def tanh(x):
    """Hyperbolic tangent."""
    y = np.tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@op
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    _floats("sigmoid", x)
    y = k.sigmoid(x)
    return y, (lambda g: k.sigmoid_vjp(g, y),)


@op
def relu(x):
    """max(x, 0)."""
    y = k.relu(x)
    return y, (lambda g: k.relu_vjp(g, y),)


@op
def gelu(x, approximate="none"):
    """x * Phi(x) (Hendrycks and Gimpel 2016), exact or with ``approximate="tanh"``."""
    _floats("gelu", x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu knows approximate="none" and "tanh", not {approximate!r}')
    tanh = approximate == "tanh"
    return k.gelu(x, tanh), (lambda g: k.gelu_vjp(g, x, tanh),)


@op
def silu(x):
    """x * sigmoid(x)."""
    _floats("silu", x)
    return k.silu(x), (lambda g: k.silu_vjp(g, x),)


@op
def where(mask, x, y):
    """x where the boolean array ``mask`` is true, else y, with broadcasting."""
    return np.where(mask, x, y), (None, lambda g: unbroadcast(np.where(mask, g, np.zeros_like(g)), x),
                                  lambda g: unbroadcast(np.where(mask, np.zeros_like(g), g), y))


@op
def clip(x, low=None, high=None):
    """x limited to low .. high (numbers or None); no gradient where the limit holds."""
    inside = np.ones(x.shape, bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return np.clip(x, low, high), (lambda g: g * inside,)


@op
def dropout(x, p, key, first=0):
    """x (n, ...) with each element set to 0 with probability ``p``, the others divided by 1 - p.

    The mask is a function of (``key``, ``first`` + row, element) alone, see :func:`mpiml.kernels.dropout`.
    """
    _floats("dropout", x)
    if not 0 <= p < 1:
        raise ValueError(f"dropout sets elements to 0 with a probability 0 <= p < 1, not {p}")
    return k.dropout(x, p, key, first), (lambda g: k.dropout(g, p, key, first),)


# --- Layers ---------------------------------------------------------------------------------------------------

def _same_dtype(name, x, other, argument="weight"):
    if x.dtype != other.dtype:
        raise TypeError(f"{name} got an input of {x.dtype} and a {argument} of {other.dtype}: convert the input with "
                        f".astype(np.{other.dtype}), or the {argument}")


def _vectors(name, x, shape, **arrays):
    # A kernel does not look at bounds, and broadcasting hides a wrong shape.
    for argument, array in arrays.items():
        if array is not None:
            _same_dtype(name, x, array, argument)
            if array.shape != shape:
                raise ValueError(f"{name} of an input of shape {x.shape} takes a {argument} of shape {shape}, not "
                                 f"{array.shape}")


@op
def linear(x, weight, bias=None):
    """x (..., in) @ weight (out, in).T + bias (out,)."""
    _same_dtype("linear", x, weight)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear takes {weight.shape[1]} features (weight {weight.shape}), but the input of shape "
                         f"{x.shape} has {x.shape[-1] if x.ndim else 'none'} in its last axis")
    _vectors("linear", x, weight.shape[:1], bias=bias)
    return k.linear(x, weight, bias), (lambda g: k.linear_vjp_x(g, weight),
                                       lambda g: k.linear_vjp_weight(g, x),
                                       lambda g: k.linear_vjp_bias(g))


def _pair(name, value):
    pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} is a number or a pair (height, width), not {value!r}")
    return int(pair[0]), int(pair[1])


def _image(name, x):
    if x.ndim != 4:
        raise ValueError(f"{name} takes images of shape (n, channels, height, width), not {x.shape}")


def _windows(name, x, size, stride, padding, dilation=(1, 1)):
    for axis in (0, 1):
        if size[axis] < 1 or stride[axis] < 1 or dilation[axis] < 1 or padding[axis] < 0:
            raise ValueError(f"{name} needs sizes, strides and dilations >= 1 and padding >= 0, got {size}, "
                             f"{stride}, {dilation} and {padding}")
        if k.out_size(x.shape[2 + axis], size[axis], stride[axis], padding[axis], dilation[axis]) < 1:
            raise ValueError(f"{name} with windows of {size}, dilation {dilation} and padding {padding} finds no "
                             f"place in images of {x.shape[2:]}")


@op
def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Cross-correlation of x (n, c, h, w) with weight (out, c / groups, kh, kw), plus bias (out,)."""
    _image("conv2d", x)
    _same_dtype("conv2d", x, weight)
    stride, padding, dilation = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    if weight.ndim != 4 or groups < 1:
        raise ValueError(f"conv2d takes a weight of shape (out, channels / groups, height, width) and groups >= 1, not "
                         f"{weight.shape} and {groups}")
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(f"conv2d with weight {weight.shape} and groups={groups} takes {weight.shape[1] * groups} "
                         f"channels, but the input of shape {x.shape} has {x.shape[1]}; the outputs must be a "
                         f"multiple of the groups")
    _vectors("conv2d", x, weight.shape[:1], bias=bias)
    _windows("conv2d", x, weight.shape[2:], stride, padding, dilation)
    value = k.conv2d(x, weight, stride, padding, dilation, groups)
    if bias is not None:
        value += bias[:, None, None]
    return value, (lambda g: k.conv2d_vjp_x(g, weight, x.shape, stride, padding, dilation, groups),
                   lambda g: k.conv2d_vjp_weight(g, x, weight.shape, stride, padding, dilation, groups),
                   lambda g: g.sum(axis=(0, 2, 3)))


@op
def max_pool2d(x, kernel_size, stride=None, padding=0):
    """Largest element of each window of x (n, c, h, w); ``stride`` is the window's size by default."""
    _image("max_pool2d", x)
    size = _pair("kernel_size", kernel_size)
    stride, padding = _pair("stride", kernel_size if stride is None else stride), _pair("padding", padding)
    _windows("max_pool2d", x, size, stride, padding)
    if 2 * padding[0] > size[0] or 2 * padding[1] > size[1]:
        raise ValueError(f"max_pool2d with windows of {size} takes a padding of half of that at most, not {padding}")
    value, index = k.max_pool2d(x, size, stride, padding)
    return value, (lambda g: k.max_pool2d_vjp(g, index, x.shape),)


@op
def avg_pool2d(x, kernel_size, stride=None, padding=0):
    """Mean of each window of x (n, c, h, w), padding counted as zeros; ``stride`` is the window's size by default."""
    _floats("avg_pool2d", x)
    _image("avg_pool2d", x)
    size = _pair("kernel_size", kernel_size)
    stride, padding = _pair("stride", kernel_size if stride is None else stride), _pair("padding", padding)
    _windows("avg_pool2d", x, size, stride, padding)
    return k.avg_pool2d(x, size, stride, padding), (lambda g: k.avg_pool2d_vjp(g, x.shape, size, stride, padding),)


@op
def embedding(ids, weight):
    """weight[ids]: rows of ``weight`` (rows, features) for integers ``ids`` of any shape."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding takes integer ids, not {ids.dtype}")
    return k.embedding(ids, weight), (None, lambda g: k.embedding_vjp(g, ids, len(weight)))


# --- Normalisation --------------------------------------------------------------------------------------------

def _affine(y, weight, bias, shape, vjp_y):
    """``y * weight + bias``, both seen as ``shape``; the vjps for what ``y`` was made of, weight and bias."""
    axes = (*range(y.ndim - len(shape)), *(i - len(shape) for i, n in enumerate(shape) if n == 1))
    value = y if weight is None else y * weight.reshape(shape)
    if bias is not None:
        value = value + bias.reshape(shape)
    return value, (lambda g: vjp_y(g if weight is None else g * weight.reshape(shape)),
                   lambda g: (g * y).sum(axis=axes).reshape(weight.shape),
                   lambda g: g.sum(axis=axes).reshape(bias.shape))


def _normalize(x, view, samples, eps, weight, bias, shape):
    """``x``, seen as ``view``, standardised, scaled and shifted; its vjps; the blocks' mean and variance."""
    y, mean, var = k.standardize(x.reshape(view), samples, eps)
    value, vjps = _affine(y.reshape(x.shape), weight, bias, shape, lambda g: k.standardize_vjp(
        g.reshape(view), y, var, samples, eps).reshape(x.shape))
    return value, vjps, mean, var


@op
def layer_norm(x, weight=None, bias=None, eps=1e-5, axes=1):
    """x (..., features) standardised over its last ``axes`` axes, times weight plus bias (Ba et al. 2016)."""
    _floats("layer_norm", x)
    shape = x.shape[x.ndim - axes:]
    _vectors("layer_norm", x, shape, weight=weight, bias=bias)
    features = int(np.prod(shape))
    return _normalize(x, (x.size // builtins.max(features, 1), 1, features), 1, eps, weight, bias, shape)[:2]


@op
def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """x (n, c, ...) standardised for each sample over each of ``groups`` groups of channels (Wu and He 2018)."""
    n, c = x.shape[:2]
    if c % groups:
        raise ValueError(f"group_norm cannot split {c} channels into {groups} equal groups")
    _floats("group_norm", x)
    _vectors("group_norm", x, (c,), weight=weight, bias=bias)
    view = (n, groups, int(np.prod(x.shape[1:])) // groups)
    value, (vjp_x, *vjps), _, _ = _normalize(x, view, 1, eps, weight, bias, (c, *(1,) * (x.ndim - 2)))
    return value, (vjp_x, None, *vjps)


@op
def batch_norm(x, running_mean, running_var, seen, weight=None, bias=None, training=False, samples=None, eps=1e-5):
    """x (n, c, ...) standardised for each channel, times weight plus bias (Ioffe and Szegedy 2015).

    In training by the statistics of the batch, otherwise by the running ones.

    The running statistics take part in the reverse pass like parameters, though no loss depends on them: what
    accumulates in their ``grad`` is the *sum* over blocks of (samples * mean), (samples * unbiased variance) and
    (samples). So they travel with the gradients, are summed over ranks and micro-batches by the same all-reduce,
    and ``sum / samples`` is the exact average wherever the blocks were computed.

    Parameters
    ----------
    running_mean, running_var : (c,)
    seen : () array
        Where the number of samples behind the sums is accumulated.
    samples : int, optional
        Take the statistics over this many consecutive samples instead of the whole batch ("ghost batches", Hoffer
        et al. 2017): then they depend on the samples alone, not on how a batch is spread over ranks.
    """
    n, c = x.shape[:2]
    _floats("batch_norm", x)
    _vectors("batch_norm", x, (c,), running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    shape = (c, *(1,) * (x.ndim - 2))
    if not training:
        scale = 1 / np.sqrt(running_var + eps).reshape(shape)
        y = (x - running_mean.reshape(shape)) * scale
        value, vjps = _affine(y, weight, bias, shape, lambda g: g * scale)
        return value, (vjps[0], None, None, None, *vjps[1:])
    view = (n, c, int(np.prod(x.shape[2:])))
    samples = samples or builtins.max(n, 1)
    if builtins.min(samples, n) * view[2] == 1:
        raise ValueError(f"batch_norm cannot take statistics over a single value per channel (input {x.shape}): use "
                         f"larger batches, or group_norm")
    value, (vjp_x, *vjps), mean, var = _normalize(x, view, samples, eps, weight, bias, shape)
    sizes = np.minimum(samples, n - samples * np.arange(len(mean))).astype(x.dtype)[:, None]
    values = sizes * view[2]
    return value, (vjp_x, lambda g: (sizes * mean).sum(axis=0),
                   lambda g: (sizes * var * values / np.maximum(values - 1, 1)).sum(axis=0),
                   lambda g: sizes.sum(), *vjps)


# --- Losses: sums over the samples ----------------------------------------------------------------------------

@op
def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)) over ``axis``."""
    _floats("softmax", x)
    y = k.softmax(np.moveaxis(x, axis, -1))
    return np.moveaxis(y, -1, axis), (
        lambda g: np.moveaxis(k.softmax_vjp(np.moveaxis(g, axis, -1), y), -1, axis),)


@op
def log_softmax(x, axis=-1):
    """x - log(sum(exp(x))) over ``axis``."""
    _floats("log_softmax", x)
    y = k.log_softmax(np.moveaxis(x, axis, -1))
    return np.moveaxis(y, -1, axis), (
        lambda g: np.moveaxis(k.log_softmax_vjp(np.moveaxis(g, axis, -1), y), -1, axis),)


@op
def cross_entropy(logits, target, label_smoothing=0.0, ignore_index=-100):
    """Cross-entropy of softmax(logits) against ``target``, summed over the samples.

    Parameters
    ----------
    logits : (..., classes)
    target : (...) integer labels, or (..., classes) probabilities
    label_smoothing : float in [0, 1)
        Move this share of the target to all classes alike (Szegedy et al. 2016).
    ignore_index : int
        Samples with this label add nothing to the sum.

    Raises
    ------
    ValueError
        A label outside 0 .. classes - 1, or shapes that do not belong together.
    """
    _floats("cross_entropy", logits)
    target = np.asarray(target)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label smoothing moves a share 0 <= label_smoothing < 1 of the target, not {label_smoothing}")
    classes = logits.shape[-1]
    rows = logits.reshape(-1, classes) if logits.size else np.empty((0, classes), logits.dtype)
    if target.dtype.kind in "iu" and target.shape == logits.shape[:-1]:
        labels = target.reshape(-1)
        loss, p = k.label_loss(rows, labels, label_smoothing, ignore_index)
        return logits.dtype.type(loss), (
            lambda g: k.label_loss_vjp(g, p, labels, label_smoothing, ignore_index).reshape(logits.shape),)
    if target.dtype.kind == "f" and target.shape == logits.shape:
        _same_dtype("cross_entropy", logits, target, "target")
        goal = target * (1 - label_smoothing) + label_smoothing / classes
        log_p = k.log_softmax(logits)
        mass = goal.sum(axis=-1, keepdims=True)
        return -np.sum(goal * log_p), (lambda g: g * (np.exp(log_p) * mass - goal),)
    raise ValueError(f"cross_entropy of logits {logits.shape} takes integer labels of shape {logits.shape[:-1]} or "
                     f"probabilities of shape {logits.shape}, not {target.dtype} of shape {target.shape}")


def _same_shape(name, x, target):
    _floats(name, x)
    target = np.asarray(target)
    if x.shape != target.shape:
        raise ValueError(f"{name} compares arrays of one shape, not {x.shape} with {target.shape}")
    return target.astype(x.dtype, copy=False)


@op
def binary_cross_entropy_with_logits(x, target):
    """-target * log(sigmoid(x)) - (1 - target) * log(1 - sigmoid(x)), summed over all elements."""
    target = _same_shape("binary_cross_entropy_with_logits", x, target)
    return x.dtype.type(k.binary(x, target)), (lambda g: k.binary_vjp(g, x, target),)


@op
def mse_loss(x, target):
    """(x - target)**2, summed over all elements."""
    target = _same_shape("mse_loss", x, target)
    return x.dtype.type(k.squared(x, target)), (lambda g: 2 * g * (x - target),)


@op
def l1_loss(x, target):
    """|x - target|, summed over all elements."""
    target = _same_shape("l1_loss", x, target)
    return x.dtype.type(k.absolute(x, target)), (lambda g: g * np.sign(x - target),)


@op
def huber_loss(x, target, delta=1.0):
    """Squared error up to |x - target| = delta, linear beyond (Huber 1964), summed over all elements."""
    target = _same_shape("huber_loss", x, target)
    return x.dtype.type(k.huber(x, target, delta)), (lambda g: k.huber_vjp(g, x, target, delta),)
