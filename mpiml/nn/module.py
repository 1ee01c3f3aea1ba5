"""What a layer is: a function with parameters, which are views of one flat vector."""

import math
from typing import NamedTuple

import numpy as np

from mpiml.kernels import aligned
from mpiml.random import generator
from mpiml.tensor import FLOATS, Tensor

NO_MEMORY = "this model has no memory yet: call model.init(seed) before using it"


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
        self._measuring = [module for module in self.named(Module).values() if type(module).absorb is not Module.absorb]
        learnt = [p.size for p in self._layout.values() if not isinstance(p, Statistic)]
        self.segments = np.cumsum([0, *learnt], dtype=np.int64)
        self.learnt = sum(learnt)
        size = sum(p.size for p in self._layout.values())
        self.vector = aligned.empty(size, dtype)
        for name, value in self.views(self.vector).items():
            parameter = self._layout[name]
            parameter.value = value
            parameter.value[...] = parameter.fill(generator(seed, name), parameter.shape)
        self.accumulate_in(aligned.zeros(size + 2, dtype))
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
        for module in self._measuring:
            module.absorb()

    def absorb(self):
        """The same of this layer alone, which may have none."""

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
            raise RuntimeError(NO_MEMORY)
    if not training:
        return [None if p is None else p.value for p in parameters]
    twins = getattr(training, "twins", None)
    return [twins.get(id(p), p) for p in parameters] if twins else parameters


def run(layer, x, training):
    """``layer(x)``, with ``training`` handed on if the layer is a Module and not a plain function."""
    return layer(x, training) if isinstance(layer, Module) else layer(x)
