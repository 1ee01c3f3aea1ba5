"""Optimizers and learning-rate schedules.

An optimizer is one kernel over the model's flat vector. ``step()`` uses the gradient that has accumulated and
sets it to zero. A learning rate is a number or a schedule: a function of the step's number, from 0.

>>> rate = warmup(cosine(0.1, steps=100), steps=10)
>>> [round(rate(step), 4) for step in (0, 9, 10, 60, 110)]
[0.01, 0.1, 0.1, 0.05, 0.0]
"""

import itertools
import math

import numpy as np

from . import kernels as k
from .kernels import aligned
from .nn import Statistic


def _require(condition, rule, value):
    if not condition:
        raise ValueError(f"{rule}, not {value!r}")


def constant(lr):
    """``lr`` at every step."""
    return lambda step: lr


def step_decay(lr, every, factor=0.1):
    """``lr``, multiplied by ``factor`` after each ``every`` steps."""
    _require(lr >= 0, "step_decay needs lr >= 0", lr)
    _require(every > 0, "step_decay needs every > 0", every)
    return lambda step: lr * factor ** (step // every)


def cosine(lr, steps, final=0.0):
    """Half a cosine from ``lr`` down to ``final`` over ``steps`` steps (Loshchilov and Hutter 2017), then ``final``."""
    _require(lr >= 0, "cosine needs lr >= 0", lr)
    _require(steps > 0, "cosine needs steps > 0", steps)
    return lambda step: final + (lr - final) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def warmup(schedule, steps):
    """A linear rise to the start of ``schedule`` (or a number) in the first ``steps`` steps, then the schedule."""
    _require(steps > 0, "warmup needs steps > 0", steps)
    schedule = schedule if callable(schedule) else constant(schedule)
    return lambda step: schedule(0) * (step + 1) / steps if step < steps else schedule(step - steps)


def clip_norm(model, max_norm):
    """Scale the model's gradient down to a Euclidean norm of ``max_norm`` if it is longer; return the norm it had.

    On a grid to be called on all ranks together: the norm is that of the whole model's gradient.
    """
    _require(max_norm > 0, "clip_norm needs max_norm > 0", max_norm)
    gradient = model.gradient[:model.learnt]
    # A norm for each parameter first, so that the result does not depend on where the model is cut.
    norm = model.joint_norm([k.norm(gradient[start:stop]) for start, stop in itertools.pairwise(model.segments)])
    if norm > max_norm:
        k.scale(gradient, max_norm / norm)
    return norm


class Optimizer:
    """What all optimizers share: the model, the learning rate and the number of steps taken.

    Attributes
    ----------
    steps : int
        Number of steps taken.
    moments : tuple of str
        Names of the attributes, arrays (learnt,), that ``update`` carries from step to step: a checkpoint keeps them.
    """

    moments = ()

    def __init__(self, model, lr):
        if not hasattr(model, "vector"):
            raise RuntimeError("this model has no memory yet: call model.init(seed), or on a grid use what place(model, grid) "
                               "returned, before making its optimizer")
        _require(callable(lr) or lr >= 0, "the learning rate must be a function or a number lr >= 0", lr)
        self.model = model
        self.lr = lr if callable(lr) else constant(lr)
        self.steps = 0

    def _moments(self):
        # As the model's own vectors begin at a cache line; a step of SGD with momentum takes half longer where none does.
        return aligned.zeros(self.model.learnt, self.model.vector.dtype)

    def step(self):
        """Move the parameters by one step along the accumulated gradient, and set it to zero."""
        model = self.model
        self.update(model.vector[:model.learnt], model.gradient[:model.learnt], self.lr(self.steps))
        model.absorb_statistics()
        self.steps += 1


def _adapt(model, adapt_vectors):
    """Which parameters have their own rate."""
    return np.array([adapt_vectors or len(p.shape) > 1 for p in model.layout().values() if not isinstance(p, Statistic)], bool)


class SGD(Optimizer):
    """Gradient descent, with momentum, Nesterov's momentum and weight decay, see :func:`mpiml.kernels.sgd`."""

    def __init__(self, model, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        super().__init__(model, lr)
        _require(momentum >= 0, "SGD needs momentum >= 0", momentum)
        _require(weight_decay >= 0, "SGD needs weight_decay >= 0", weight_decay)
        if nesterov and not momentum:
            raise ValueError("Nesterov's method is a kind of momentum: give momentum > 0")
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.moments = ("velocity",) if momentum else ()
        self.velocity = self._moments() if momentum else np.empty(0, model.vector.dtype)

    def update(self, vector, gradient, lr):
        k.sgd(vector, gradient, self.velocity, lr, self.momentum, self.nesterov, self.weight_decay)


class Adam(Optimizer):
    """Adam; ``weight_decay`` is added to the gradient, see :func:`mpiml.kernels.adam`."""

    decoupled = False
    moments = ("mean", "square")

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(model, lr)
        _require(all(0 <= beta < 1 for beta in betas), "Adam needs 0 <= beta < 1 for both betas", betas)
        _require(eps >= 0, "Adam needs eps >= 0", eps)
        _require(weight_decay >= 0, "Adam needs weight_decay >= 0", weight_decay)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.mean, self.square = self._moments(), self._moments()

    def update(self, vector, gradient, lr):
        t = self.steps + 1
        rests = [1 - beta for beta in self.betas]
        corrections = [1 - beta**t for beta in self.betas]
        l2, decay = (0.0, self.weight_decay) if self.decoupled else (self.weight_decay, 0.0)
        k.adam(vector, gradient, self.mean, self.square, lr, *self.betas, *rests, *corrections, self.eps, l2, decay)


class AdamW(Adam):
    """Adam with ``weight_decay`` taken off the weights themselves (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(model, lr, betas, eps, weight_decay)


class LARS(Optimizer):
    """Momentum with a rate for each parameter by the norms of its weights and gradient, for large batches.

    See :func:`mpiml.kernels.lars` (You et al. 2017, "Large batch training of convolutional networks").

    Parameters
    ----------
    lr : number or function of the step
    momentum, weight_decay : float
    trust : float
        The length of a step relative to that of the parameter, for ``lr=1``.
    eps : float
        Added to the gradient's norm.
    adapt_vectors : bool
        Also give biases and the weights of norms, all parameters of one axis, their own rate and decay; by default
        they take plain momentum steps of ``lr``, as is customary.
    """

    moments = ("velocity",)

    def __init__(self, model, lr, momentum=0.9, weight_decay=0.0, trust=0.001, eps=0.0, adapt_vectors=False):
        super().__init__(model, lr)
        _require(momentum >= 0, "LARS needs momentum >= 0", momentum)
        _require(weight_decay >= 0, "LARS needs weight_decay >= 0", weight_decay)
        _require(trust > 0, "LARS needs trust > 0", trust)
        _require(eps >= 0, "LARS needs eps >= 0", eps)
        self.momentum, self.weight_decay, self.trust, self.eps = momentum, weight_decay, trust, eps
        self.bounds, self.adapt = model.segments, _adapt(model, adapt_vectors)
        self.velocity = self._moments()

    def update(self, vector, gradient, lr):
        k.lars(vector, gradient, self.velocity, self.bounds, self.adapt, lr, self.momentum, self.weight_decay, self.trust,
               self.eps)


class LAMB(Adam):
    """Adam with a rate for each parameter by the norms of its weights and step, for large batches.

    See :func:`mpiml.kernels.lamb` (You et al. 2020, "Large batch optimization for deep learning: training BERT in 76
    minutes"). Parameters are those of :class:`Adam`, and ``adapt_vectors`` as in :class:`LARS`.
    """

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, adapt_vectors=False):
        super().__init__(model, lr, betas, eps, weight_decay)
        self.bounds, self.adapt = model.segments, _adapt(model, adapt_vectors)

    def update(self, vector, gradient, lr):
        t = self.steps + 1
        rests = [1 - beta for beta in self.betas]
        corrections = [1 - beta**t for beta in self.betas]
        k.lamb(vector, gradient, self.mean, self.square, self.bounds, self.adapt, lr, *self.betas, *rests, *corrections,
               self.eps, self.weight_decay)
