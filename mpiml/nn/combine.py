"""What builds a model of layers: one after the other, side by side, around a shortcut."""

import inspect

from mpiml import ops

from .layers import MaxPool2d
from .module import Module, run


class Sequential(Module):
    """Layers and plain functions, one after the other.

    A slice, ``model[2:5]``, is a Sequential of the same layers under the same names. Where :func:`mpiml.ops.relu` follows a
    layer whose ``__call__`` has an argument ``relu``, the layer is told to apply it, so that one kernel computes both. One
    between a layer and a :class:`MaxPool2d` is applied by the latter: the same result, of fewer numbers.
    """

    def __init__(self, *layers, first=0):
        self.layers = layers
        self.first = first
        self._calls = []  # (layer, whether it also computes the relu behind it: the value between is nobody's)
        for layer in layers:
            if layer is ops.relu and self._calls and _takes_relu(self._calls[-1]):
                self._calls[-1] = self._calls[-1][0], True
            elif type(layer) is MaxPool2d and self._calls and self._calls[-1][1]:  # of a subclass nobody knows what it does
                self._calls[-1:] = (self._calls[-1][0], False), (layer, True)
            else:
                self._calls.append((layer, False))

    def children(self):
        for i, layer in enumerate(self.layers, self.first):
            if isinstance(layer, Module):
                yield str(i), layer

    def __call__(self, x, training=False):
        for layer, fused in self._calls:
            x = layer(x, training, relu=True) if fused else run(layer, x, training)
        return x

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return self.layers[index]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of a Sequential is a run of its layers, without a step of {step}")
        return Sequential(*self.layers[start:stop], first=self.first + start)


class Residual(Module):
    """``shortcut(x) + body(x)`` (He et al. 2016); the shortcut is the identity unless given."""

    def __init__(self, body, shortcut=ops.identity):
        self.body = body
        self.shortcut = shortcut

    def __call__(self, x, training=False, relu=False):
        shortcut, body = run(self.shortcut, x, training), run(self.body, x, training)
        if relu and shortcut.shape == body.shape:
            return ops.add_relu(shortcut, body)
        return ops.relu(shortcut + body) if relu else shortcut + body


class Concatenate(Module):
    """The outputs of several branches of one input, joined along ``axis`` (channels by default).

    A DenseNet layer (Huang et al. 2017) is ``Concatenate(identity, body)``.
    """

    def __init__(self, *branches, axis=1):
        self.branches = branches
        self.axis = axis

    def __call__(self, x, training=False):
        return ops.concatenate([run(branch, x, training) for branch in self.branches], self.axis)


def _takes_relu(call):
    layer, fused = call
    return not fused and isinstance(layer, Module) and "relu" in inspect.signature(type(layer).__call__).parameters
