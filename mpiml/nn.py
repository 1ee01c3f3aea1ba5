"""Layers: functions with parameters, and the combinators that build a model of them.

A model is a function, ``model(x)``; its parameters are one flat vector. A :class:`Parameter` is at first only a
shape and a rule to fill it; :meth:`Module.init` allocates the model's vector, makes every parameter a view of
it, and fills each from (seed, its name) alone, so that every rank builds the same model without a broadcast.

Training is an argument: ``model(x, training=True)`` hands the parameters to the ops as Tensors, which records
the tape; ``model(x)`` hands over plain arrays and returns one.

>>> import numpy as np
>>> from mpiml.ops import relu
>>> model = Sequential(Linear(4, 3), relu, Linear(3, 2)).init(seed=0)
>>> model
Sequential of 23 parameters: 0.weight (3, 4), 0.bias (3,), 2.weight (2, 3), 2.bias (2,)
>>> model(np.zeros((5, 4), np.float32)).shape
(5, 2)
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from . import ops
from .ops.check import image
from .random import generator, key
from .tensor import FLOATS, Tensor

_NO_MEMORY = "this model has no memory yet: call model.init(seed) before using it"


class Step(NamedTuple):
    """What randomness in a training step depends on: pass it as ``training`` to a model with dropout.

    ``number`` counts the steps; ``first`` is the number of ``x[0]`` in the global batch. ``twins``, {id of a Parameter:
    Tensor}, are leaves to take instead of the parameters, so that their gradients stay apart from another thread's.
    """

    number: int
    first: int = 0
    twins: dict | None = None


class Parameter(Tensor):
    """A leaf of a model: a shape and a rule to fill it; a view of the model's vector after ``init``.

    Parameters
    ----------
    shape : tuple of int
    fill : function of (numpy.random.Generator, shape)
        Returns the initial values.
    order : "C" or "F"
        Which axis lies side by side in memory, the last one or the first. Weights (out, ...) of linear maps and
        convolutions are "F": their kernels take the weights of neighbouring outputs together.
    """

    __slots__ = ("_shape", "fill", "order")

    def __init__(self, shape, fill, order="C"):
        self.value = self.grad = self.node = None
        self._shape = tuple(shape)
        self.fill = fill
        self.order = order

    shape = property(lambda self: self._shape)
    size = property(lambda self: int(np.prod(self._shape)))

    def __repr__(self):
        return f"Parameter{self._shape}"


class Statistic(Parameter):
    """A parameter that is measured, not learnt, such as a running mean: it follows the learnt ones in the vector."""

    __slots__ = ()


def uniform(bound):
    """Rule: uniform in -bound .. bound."""
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def normal(std=1.0):
    """Rule: normal with mean 0 and standard deviation ``std``."""
    return lambda rng, shape: std * rng.standard_normal(shape)


def constant(value):
    """Rule: ``value`` everywhere."""
    return lambda rng, shape: np.full(shape, value)


class Module:
    """A function of (x, training) with parameters: the base of all layers, and of your own.

    A subclass sets :class:`Parameter` and Module attributes (or lists of Modules) in ``__init__`` and defines
    ``__call__(self, x, training=False)``, in which :func:`given` turns parameters into what the ops take.

    Attributes
    ----------
    vector : (size,) array, after ``init``
        All parameters, the learnt ones first, then the statistics.
    gradient : (size,) array
        Their gradients, views of which are the parameters' ``grad``.
    sums : (size + 2,) array
        The memory of ``gradient``, with room for the loss and the number of samples behind it, so that one
        all-reduce sums everything a step needs.
    learnt : int
        Number of learnt parameters, the length of the first part of ``vector``.
    segments : (n + 1,) int64 array
        Where each of the n learnt :class:`Parameter` objects begins in the vector, and where the last one ends.
    """

    def __new__(cls, *args, **options):
        module = super().__new__(cls)
        module._arguments = args, options  # what mpiml.describe writes down
        return module

    def children(self):
        """(name, Parameter or Module) pairs, in the order in which they were set."""
        for name, child in vars(self).items():
            if isinstance(child, (Parameter, Module)):
                yield name, child
            elif isinstance(child, (list, tuple)):
                for i, item in enumerate(child):
                    if isinstance(item, (Parameter, Module)):
                        yield f"{name}.{i}", item

    def named(self, kind=Parameter, prefix=""):
        """{name: object} of all Parameters (or Modules) of a kind below this one; a shared one under its first name."""
        found, seen = {}, set()
        stack = [(prefix, self)]
        while stack:
            name, child = stack.pop()
            if id(child) in seen:
                continue
            seen.add(id(child))
            if isinstance(child, kind):
                found[name] = child
            if isinstance(child, Module):
                stack += reversed([(f"{name}.{n}".lstrip("."), c) for n, c in child.children()])
        return found

    def layout(self):
        """{name: Parameter} in the order in which they lie in the vector."""
        return dict(sorted(self.named().items(), key=lambda item: isinstance(item[1], Statistic)))

    def init(self, seed=0, dtype=np.float32):
        """Allocate the vector and fill every parameter from (seed, name); return the model itself.

        Parameters
        ----------
        seed : int
        dtype : float32 or float64
        """
        dtype = np.dtype(dtype)
        if dtype not in FLOATS:
            raise TypeError(f"parameters are float32 or float64, not {dtype}")
        self._layout = self.layout()
        learnt = [p.size for p in self._layout.values() if not isinstance(p, Statistic)]
        self.segments = np.cumsum([0, *learnt], dtype=np.int64)
        self.learnt = sum(learnt)
        size = sum(p.size for p in self._layout.values())
        self.vector = np.empty(size, dtype)
        for name, value in self.views(self.vector).items():
            parameter = self._layout[name]
            parameter.value = value
            parameter.value[...] = parameter.fill(generator(seed, name), parameter.shape)
        self.accumulate_in(np.zeros(size + 2, dtype))
        for name, module in self.named(Module).items():
            module.place = seed, name
        return self

    def views(self, vector):
        """{name: its part of ``vector``, in its shape}; a vector of all parameters, or of the learnt ones alone."""
        layout = self._layout.items()
        if len(vector) == self.learnt:
            layout = [(name, p) for name, p in layout if not isinstance(p, Statistic)]
        stops = np.cumsum([p.size for _, p in layout], dtype=int)
        return {name: vector[stop - p.size:stop].reshape(p.shape, order=p.order)
                for (name, p), stop in zip(layout, stops, strict=True)}

    def accumulate_in(self, sums):
        """Let the gradients accumulate in this vector of length size + 2, such as one in shared memory."""
        self.sums = sums
        self.gradient = sums[:-2]
        for name, grad in self.views(self.gradient).items():
            self._layout[name].grad = grad

    def whole(self):
        """The model that this is all of; a part of a model that lies on several ranks has another."""
        return self

    def joint_norm(self, norms):
        """The norm of a vector over the whole model, given the norms of those parameters of it that are held here."""
        return math.hypot(*sorted(norms))  # sorted, so that no order of the parameters shows

    def absorb_statistics(self):
        """Move the running statistics by what the last steps measured; optimizers call it at the end of a step."""
        for module in self.named(BatchNorm2d).values():
            module.absorb()

    def __repr__(self):
        named = self.named()
        return (f"{type(self).__name__} of {sum(p.size for p in named.values())} parameters" + ": " * bool(named)
                + ", ".join(f"{name} {p.shape}" for name, p in named.items()))


def given(training, *parameters):
    """The parameters as an op takes them: Tensors in training, else plain arrays; None stays None.

    Raises
    ------
    RuntimeError
        A parameter has no memory yet.
    """
    for p in parameters:
        if p is not None and p.value is None:
            raise RuntimeError(_NO_MEMORY)
    if not training:
        return [None if p is None else p.value for p in parameters]
    twins = getattr(training, "twins", None)
    return [twins.get(id(p), p) for p in parameters] if twins else parameters


def run(layer, x, training):
    """``layer(x)``, with ``training`` handed on if the layer is a Module and not a plain function."""
    return layer(x, training) if isinstance(layer, Module) else layer(x)


# --- Combinators ----------------------------------------------------------------------------------------------

class Sequential(Module):
    """Layers and plain functions, one after the other.

    A slice, ``model[2:5]``, is a Sequential of the same layers under the same names.
    """

    def __init__(self, *layers, first=0):
        self.layers = layers
        self.first = first

    def children(self):
        for i, layer in enumerate(self.layers, self.first):
            if isinstance(layer, Module):
                yield str(i), layer

    def __call__(self, x, training=False):
        layers = iter(itertools.zip_longest(self.layers, self.layers[1:]))
        for layer, following in layers:
            if following is ops.relu and type(layer) in _WITH_RELU:  # one kernel for both; the value between is nobody's
                x = layer(x, training, relu=True)
                next(layers)
            else:
                x = run(layer, x, training)
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


# --- Layers ---------------------------------------------------------------------------------------------------

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

    def __call__(self, x, training=False):
        return ops.max_pool2d(x, **self.options)


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
            raise RuntimeError(_NO_MEMORY)
        return ops.dropout(x, self.p, key(*self.place, "dropout", training.number), training.first)


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


class Embedding(Module):
    """Integers of any shape -> rows of a table, (..., embedding_dim), at first normal with deviation ``std``."""

    def __init__(self, num_embeddings, embedding_dim, std=1.0):
        self.weight = Parameter((num_embeddings, embedding_dim), normal(std))

    def __call__(self, x, training=False):
        return ops.embedding(x, *given(training, self.weight))


class EmbeddingBag(Module):
    """Rows of integers (n, length) -> the mean of their rows of a table, (n, embedding_dim).

    The integer ``padding_idx`` is left out; the mean of nothing is 0.
    """

    def __init__(self, num_embeddings, embedding_dim, padding_idx=0, std=1.0):
        self.weight = Parameter((num_embeddings, embedding_dim), normal(std))
        self.padding_idx = padding_idx

    def __call__(self, x, training=False):
        x = np.asarray(x)
        return ops.masked_mean(ops.embedding(x, *given(training, self.weight)), x != self.padding_idx)


class Positions(Module):
    """x (n, length, embedding_dim) plus a learnt vector for each of at most ``max_length`` positions."""

    def __init__(self, max_length, embedding_dim, std=0.02):
        self.weight = Parameter((max_length, embedding_dim), normal(std))

    def __call__(self, x, training=False):
        weight, = given(training, self.weight)
        length, most = x.shape[-2], len(weight)
        if length > most:
            raise ValueError(f"a sequence of {length} is too long for a model of {most} positions: cut it")
        return x + (weight if length == most else weight[:length])


class SelfAttention(Module):
    """Attention of each position of x (n, length, embed_dim) to the others, in ``num_heads`` heads (Vaswani et al. 2017).

    Parameters
    ----------
    embed_dim, num_heads : int
        The first is a multiple of the second.
    is_causal : bool
        Positions see themselves and those before them.
    """

    def __init__(self, embed_dim, num_heads, is_causal=False):
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"SelfAttention cannot split {embed_dim} features into {num_heads} equal heads")
        self.query, self.key, self.value, self.out = (Linear(embed_dim, embed_dim) for _ in range(4))
        self.num_heads, self.is_causal = num_heads, is_causal

    def __call__(self, x, training=False, mask=None):
        """``mask`` (n, length) of booleans, optional, says which positions may be seen; those that see none get ``out(0)``."""
        n, length, features = x.shape
        split = n, length, self.num_heads, features // self.num_heads

        def heads(layer):
            return ops.transpose(ops.reshape(layer(x, training), split), (0, 2, 1, 3))

        y = ops.scaled_dot_product_attention(heads(self.query), heads(self.key), heads(self.value), self.is_causal, mask)
        return self.out(ops.reshape(ops.transpose(y, (0, 2, 1, 3)), x.shape), training)


_WITH_RELU = (Residual, Linear, Conv2d, Conv1d, GroupNorm, BatchNorm2d)
