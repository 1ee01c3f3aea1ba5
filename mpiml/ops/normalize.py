"""Layer, group and batch normalisation: one kernel, three views."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op

from .check import floats, vectors


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
    floats("layer_norm", x)
    shape = x.shape[x.ndim - axes:]
    vectors("layer_norm", x, shape, weight=weight, bias=bias)
    features = int(np.prod(shape))
    return _normalize(x, (x.size // max(features, 1), 1, features), 1, eps, weight, bias, shape)[:2]


@op
def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """x (n, c, ...) standardised for each sample over each of ``groups`` groups of channels (Wu and He 2018)."""
    n, c = x.shape[:2]
    if c % groups:
        raise ValueError(f"group_norm cannot split {c} channels into {groups} equal groups")
    floats("group_norm", x)
    vectors("group_norm", x, (c,), weight=weight, bias=bias)
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
    floats("batch_norm", x)
    vectors("batch_norm", x, (c,), running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    shape = (c, *(1,) * (x.ndim - 2))
    if not training:
        scale = 1 / np.sqrt(running_var + eps).reshape(shape)
        y = (x - running_mean.reshape(shape)) * scale
        value, vjps = _affine(y, weight, bias, shape, lambda g: g * scale)
        return value, (vjps[0], None, None, None, *vjps[1:])
    view = (n, c, int(np.prod(x.shape[2:])))
    samples = samples or max(n, 1)
    if min(samples, n) * view[2] == 1:
        raise ValueError(f"batch_norm cannot take statistics over a single value per channel (input {x.shape}): use "
                         f"larger batches, or group_norm")
    value, (vjp_x, *vjps), mean, var = _normalize(x, view, samples, eps, weight, bias, shape)
    sizes = np.minimum(samples, n - samples * np.arange(len(mean))).astype(x.dtype)[:, None]
    values = sizes * view[2]
    return value, (vjp_x, lambda g: (sizes * mean).sum(axis=0),
                   lambda g: (sizes * var * values / np.maximum(values - 1, 1)).sum(axis=0),
                   lambda g: sizes.sum(), *vjps)
