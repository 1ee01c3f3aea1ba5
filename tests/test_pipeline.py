"""Pipelines and hybrids on the ranks there are, against the same job on one: passes on any number of ranks."""

import functools
import tracemalloc
import weakref

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import metrics
from mpiml.data import share
from mpiml.nn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    Residual,
    Sequential,
    Step,
    normal,
)
from mpiml.nn import given as given_
from mpiml.ops import cross_entropy, gelu, matmul, mean, relu, reshape, softmax, transpose
from mpiml.optim import SGD, clip_norm
from mpiml.parallel import Grid, Profile, RankError, Watch, evaluate, gradient, place, predict, profile
from mpiml.parallel.place import partition
from mpiml.schedule import SCHEDULES, B, F, ScheduleError, gpipe, interleaved, one_f_one_b, simulate, zb_v
from mpiml.tensor import Tensor

RANKS = MPI.COMM_WORLD.size
ALONE = Grid(comm=MPI.COMM_SELF)
PIPES = [pipe for pipe in range(1, RANKS + 1) if RANKS % pipe == 0]


@functools.cache
def grid_of(pipe):
    return Grid(pipe=pipe)


# --- Models of 17 layers or more, for two chunks on each of eight stages ---------------------------------------

def mlp():
    blocks = [layer for _ in range(7) for layer in (Linear(9, 9), relu)]
    return Sequential(Linear(12, 9), LayerNorm(9), *blocks, Dropout(0.3), Linear(9, 10))


def conv_net():
    blocks = [Residual(Sequential(Conv2d(4, 4, 3, padding=1), GroupNorm(2, 4), gelu)) for _ in range(6)]
    return Sequential(Conv2d(2, 4, 3, padding=1), BatchNorm2d(4, samples=2), relu, *blocks, MaxPool2d(2),
                      Conv2d(4, 6, 3, stride=2, padding=1), relu, BatchNorm2d(6, samples=1), Dropout(0.2), relu, Flatten(),
                      Linear(24, 10))


class Attention(Module):
    def __init__(self, features, heads):
        self.heads = heads
        self.project, self.out = Linear(features, 3 * features), Linear(features, features)

    def __call__(self, x, training=False):
        n, t, d = x.shape
        parts = transpose(reshape(self.project(x, training), (n, t, 3, self.heads, d // self.heads)), (2, 0, 3, 1, 4))
        q, k, v = parts[0], parts[1], parts[2]
        scores = softmax(matmul(q, transpose(k, (0, 1, 3, 2))) * (d // self.heads) ** -0.5)
        return self.out(reshape(transpose(matmul(scores, v), (0, 2, 1, 3)), (n, t, d)), training)


class Positions(Module):
    def __init__(self, length, features):
        self.weight = Parameter((length, features), normal(0.1))

    def __call__(self, x, training=False):
        weight, = given_(training, self.weight)
        return x + weight


def transformer():
    def block(i):
        body = Attention(8, 2) if i % 2 == 0 else Sequential(Linear(8, 16), gelu, Linear(16, 8))
        return Residual(Sequential(LayerNorm(8), body))
    return Sequential(Embedding(20, 8), Positions(5, 8), Dropout(0.1), *[block(i) for i in range(12)], LayerNorm(8),
                      lambda x: mean(x, axis=1), Linear(8, 10))


def problem(model, samples):
    rng = np.random.default_rng(1)
    x = {"mlp": lambda: rng.standard_normal((samples, 12)),
         "conv_net": lambda: rng.standard_normal((samples, 2, 8, 8)),
         "transformer": lambda: rng.integers(0, 20, (samples, 5))}[model.__name__]()
    return x, rng.integers(0, 10, samples)


def mine(grid, *arrays, multiple=1):
    start, stop = share(len(arrays[0]), grid.replica, grid.data, multiple)
    return [a[start:stop] for a in arrays]


@functools.cache
def expected(model, samples):
    """Loss, {name: gradient} and {name: value after a step} of one rank with the whole batch at once."""
    net = place(model(), ALONE, seed=3, dtype=np.float64)
    loss = gradient(net, cross_entropy, ALONE)(*problem(model, samples))
    gradients = {name: p.grad.copy() for name, p in net.named().items() if not name.endswith(("_mean", "_var", "_tracked"))}
    clip_norm(net, 0.5)
    SGD(net, lr=0.1).step()
    return loss, gradients, {name: p.value.copy() for name, p in net.named().items()}


def check(grid, model, samples, **options):
    """One step on the grid must leave the loss, the gradients and the weights of one rank."""
    loss, gradients, weights = expected(model, samples)
    schedule = options.pop("schedule", one_f_one_b)
    net = place(model(), grid, seed=3, dtype=np.float64, schedule=schedule)
    step = gradient(net, cross_entropy, grid, **options)
    for _ in range(options.pop("steps", 1)):
        x, y = mine(grid, *problem(model, samples), multiple=2)
    assert step(x, y) == pytest.approx(loss, rel=1e-12)
    largest = max(np.abs(g).max() for g in gradients.values())
    for name, parameter in net.named().items():
        if name in gradients:
            np.testing.assert_allclose(parameter.grad, gradients[name], rtol=0, atol=1e-10 * largest, err_msg=name)
    clip_norm(net, 0.5)
    SGD(net, lr=0.1).step()
    for name, parameter in net.named().items():
        np.testing.assert_allclose(parameter.value, weights[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("model", [mlp, conv_net, transformer])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
@pytest.mark.parametrize("pipe", PIPES)
def test_the_gradient_is_that_of_one_rank(pipe, microbatches, schedule, model):
    check(grid_of(pipe), model, 19, schedule=schedule, microbatches=microbatches)
