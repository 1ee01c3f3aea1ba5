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

from .combine import Concatenate, Residual, Sequential
from .layers import AvgPool2d, Conv1d, Conv2d, Dropout, Flatten, Linear, MaxPool2d
from .module import Module, Parameter, Statistic, Step, constant, given, normal, run, uniform
from .normalize import BatchNorm2d, GroupNorm, LayerNorm
from .sequence import Embedding, EmbeddingBag, Positions, SelfAttention

__all__ = ["AvgPool2d", "BatchNorm2d", "Concatenate", "Conv1d", "Conv2d", "Dropout", "Embedding", "EmbeddingBag", "Flatten",
           "GroupNorm", "LayerNorm", "Linear", "MaxPool2d", "Module", "Parameter", "Positions", "Residual", "SelfAttention",
           "Sequential", "Statistic", "Step", "constant", "given", "normal", "run", "uniform"]
