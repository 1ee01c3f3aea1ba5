"""Linear maps, convolutions, pooling, dropout."""

from mpiml import ops
from mpiml.random import key

from .module import NO_MEMORY, Module, Parameter, Step, given, uniform


class Linear(Module):
    """x (..., in_features) -> x @ weight.T + bias (..., out_features)."""

    def __init__(self, in_features, out_features, bias=True):
        bound = in_features**-0.5 if in_features else 0.0
        self.weight = Parameter((out_features, in_features), uniform(bound), order="F")
        self.bias = Parameter((out_features,), uniform(bound)) if bias else None

    def __call__(self, x, training=False, relu=False):
        return ops.linear(x, *given(training, self.weight, self.bias), relu)


class Conv2d(Module):
    """Images (n, in_channels, h, w) -> (n, out_channels, oh, ow), see :func:`mpiml.ops.conv2d`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"Conv2d cannot split {in_channels} input and {out_channels} output channels into "
                             f"{groups} equal groups")
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        bound = (in_channels // groups * kh * kw) ** -0.5
        self.weight = Parameter((out_channels, in_channels // groups, kh, kw), uniform(bound), order="F")
        self.bias = Parameter((out_channels,), uniform(bound)) if bias else None
        self.options = stride, padding, dilation, groups

    def __call__(self, x, training=False, relu=False):
        return ops.conv2d(x, *given(training, self.weight, self.bias), *self.options, relu)


class MaxPool2d(Module):
    """Largest element of each window of images, see :func:`mpiml.ops.max_pool2d`."""

    def __init__(self, kernel_size, stride=None, padding=0):
        self.options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}

    def __call__(self, x, training=False, relu=False):
        return ops.max_pool2d(x, **self.options, relu=relu)


class AvgPool2d(Module):
    """Mean of each window of images, see :func:`mpiml.ops.avg_pool2d`."""

    def __init__(self, kernel_size, stride=None, padding=0):
        self.options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}

    def __call__(self, x, training=False):
        return ops.avg_pool2d(x, **self.options)


class Flatten(Module):
    """x (n, ...) -> (n, features)."""

    def __call__(self, x, training=False):
        return ops.flatten(x)


class Dropout(Module):
    """In training each element is 0 with probability ``p``, the others divided by 1 - p; else x itself.

    The mask depends on (seed, the layer's name, step, sample): ``training`` must be a :class:`Step`.
    """

    def __init__(self, p=0.5):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout sets elements to 0 with a probability 0 <= p < 1, not {p}")
        self.p = p

    def __call__(self, x, training=False):
        if not training or self.p == 0:
            return x
        if not isinstance(training, Step):
            raise TypeError("Dropout needs to know the step, or it would drop the same elements in each: call "
                            "model(x, training=Step(number))")
        if not hasattr(self, "place"):
            raise RuntimeError(NO_MEMORY)
        return ops.dropout(x, self.p, key(*self.place, "dropout", training.number), training.first)


class Conv1d(Module):
    """Sequences (n, in_channels, length) -> (n, out_channels, out_length): a convolution of images of height 1."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias=True):
        bound = (in_channels * kernel_size) ** -0.5
        self.weight = Parameter((out_channels, in_channels, kernel_size), uniform(bound), order="F")
        self.bias = Parameter((out_channels,), uniform(bound)) if bias else None
        self.options = (1, stride), (0, padding), (1, dilation)

    def __call__(self, x, training=False, relu=False):
        if x.ndim != 3:
            raise ValueError(f"Conv1d takes sequences of shape (n, channels, length), not {x.shape}")
        weight, bias = given(training, self.weight, self.bias)
        flat, kernel = (ops.reshape(a, (*a.shape[:2], 1, a.shape[2])) for a in (x, weight))
        y = ops.conv2d(flat, kernel, bias, *self.options, relu=relu)
        return ops.reshape(y, (*y.shape[:2], y.shape[3]))
