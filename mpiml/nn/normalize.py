"""Layers that bring values to mean 0 and deviation 1."""

from mpiml import ops
from mpiml.ops.check import image

from .module import Module, Parameter, Statistic, constant, given


class LayerNorm(Module):
    """x standardised over its last axes, of shape ``normalized_shape``, then scaled and shifted."""

    def __init__(self, normalized_shape, eps=1e-5):
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.weight = Parameter(shape, constant(1.0))
        self.bias = Parameter(shape, constant(0.0))
        self.eps = eps

    def __call__(self, x, training=False):
        return ops.layer_norm(x, *given(training, self.weight, self.bias), eps=self.eps, axes=len(self.weight.shape))


class GroupNorm(Module):
    """x (n, num_channels, ...) standardised in each sample over each of ``num_groups`` groups of channels."""

    def __init__(self, num_groups, num_channels, eps=1e-5):
        self.groups = num_groups
        self.weight = Parameter((num_channels,), constant(1.0))
        self.bias = Parameter((num_channels,), constant(0.0))
        self.eps = eps

    def __call__(self, x, training=False, relu=False):
        return ops.group_norm(x, self.groups, *given(training, self.weight, self.bias), eps=self.eps, relu=relu)


class BatchNorm2d(Module):
    """Images standardised for each channel over the batch in training, else by running statistics.

    Parameters
    ----------
    num_features : int
        Number of channels.
    samples : int, optional
        Take the statistics over this many consecutive samples instead of the whole batch. On several ranks it
        must be given, and each rank's share must start at a multiple of it (``batches(..., multiple=samples)``):
        so the statistics are the same on any number of ranks. Prefer :class:`GroupNorm` where you can choose.
    momentum : float
        Share of the new statistics in the running ones.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, samples=None):
        self.weight = Parameter((num_features,), constant(1.0))
        self.bias = Parameter((num_features,), constant(0.0))
        self.running_mean = Statistic((num_features,), constant(0.0))
        self.running_var = Statistic((num_features,), constant(1.0))
        self.num_batches_tracked = Statistic((), constant(0.0))
        self.eps, self.momentum, self.samples = eps, momentum, samples

    def __call__(self, x, training=False, relu=False):
        image("BatchNorm2d", x)
        return ops.batch_norm(
            x, *given(training, self.running_mean, self.running_var, self.num_batches_tracked, self.weight, self.bias),
            training=bool(training), samples=self.samples, eps=self.eps, relu=relu)

    def absorb(self):
        """running += momentum * (measured - running), with what was measured since the last call."""
        seen = float(self.num_batches_tracked.grad)
        if seen:
            for running in self.running_mean, self.running_var:
                running.value += self.momentum * (running.grad / seen - running.value)
                running.grad[...] = 0
            self.num_batches_tracked.value += 1
            self.num_batches_tracked.grad[...] = 0
