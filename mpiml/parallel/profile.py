"""What each layer of a model costs, measured."""

import copy
import tracemalloc
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpiml.nn import Sequential, Step
from mpiml.tensor import Tensor, backward


class Profile(NamedTuple):
    """Costs of each layer for one micro-batch, (layers,) arrays; the same on all ranks.

    Attributes
    ----------
    forward, backward, weight : seconds
        Of the forward pass, the gradient for the layer's input, and those of its weights.
    memory : bytes
        What the layer keeps alive from its forward to its backward pass.
    message : bytes
        The layer's output.
    speeds : (stages,) array
        How fast the ranks of each stage measured the whole model, relative to the mean.
    """

    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray
    memory: np.ndarray
    message: np.ndarray
    speeds: np.ndarray

    @property
    def seconds(self):
        """Time of each layer, all in all."""
        return self.forward + self.backward + self.weight

    def chunks(self, bounds, latency=0.0, bandwidth=np.inf):
        """The costs of chunks of layers, as :func:`mpiml.schedule.simulate` takes them.

        Parameters
        ----------
        bounds : list of (int, int)
            First layer of each chunk, and the one behind its last.
        latency, bandwidth : float
            Seconds for an empty message, bytes per second.

        Returns
        -------
        {"forward", "backward", "weight", "message": list of seconds}
        """
        costs = {name: [float(getattr(self, name)[start:stop].sum()) for start, stop in bounds]
                 for name in ("forward", "backward", "weight")}
        return costs | {"message": [latency + float(self.message[stop - 1]) / bandwidth for _, stop in bounds[:-1]]}


def profile(model, x, grid, loss=None, y=None, repeats=9, dtype=np.float32):
    """Measure what each layer of a model costs for a micro-batch; to be called on all ranks together.

    Every rank runs the whole model, on weights of its own that are then forgotten, all ranks at the same time as in
    training. Of each time the median over the repeats is taken, then the mean over the ranks.

    Parameters
    ----------
    model : mpiml.nn.Sequential
    x : array
        A micro-batch of inputs.
    grid : mpiml.parallel.Grid
    loss : function of (output, target), optional
        Counted as part of the last layer.
    y : array, optional
        Targets, for the loss.
    repeats : int
    dtype : float32 or float64

    Returns
    -------
    Profile
    """
    if not isinstance(model, Sequential):
        raise TypeError(f"profile measures the layers of a Sequential; this model is one {type(model).__name__}")
    trial = copy.deepcopy(model).init(dtype=dtype)
    layers = [trial[i:i + 1] for i in range(len(trial))]
    if loss is not None:
        last = layers[-1]
        layers[-1] = lambda x, training: loss(last(x, training), y)
    _run(layers, x)  # compiles the kernels
    sizes = np.array(_memory(layers, x))
    times = np.empty((repeats, 3, len(layers)))
    for repeat in range(repeats):
        grid.comm.Barrier()
        times[repeat] = _run(layers, x)
    times = np.ascontiguousarray(np.median(times, axis=0))
    totals = np.empty(grid.size)
    grid.comm.Allgather(np.array([times.sum()]), totals)
    grid.comm.Allreduce(MPI.IN_PLACE, times, MPI.SUM)
    speeds = 1 / totals.reshape(grid.pipe, grid.data).mean(axis=1)
    grid.comm.Allreduce(MPI.IN_PLACE, sizes, MPI.SUM)
    return Profile(*times / grid.size, *sizes / grid.size, speeds / speeds.mean())


def _run(layers, x):
    """Seconds of each layer's F, B and W, (3, layers), in one pass through the model and back."""
    times = np.zeros((3, len(layers)))
    tape = []
    for i, layer in enumerate(layers):
        x = Tensor(x) if i and x.dtype.kind == "f" else x
        start = perf_counter()
        output = layer(x, Step(0))
        times[0, i] = perf_counter() - start
        tape.append((x, output))
        x = output.value if isinstance(output, Tensor) else output
    g = np.ones_like(x)
    for i, (x, output) in reversed(list(enumerate(tape))):
        if not isinstance(output, Tensor):
            break
        later = []
        start = perf_counter()
        for _ in backward(output, g, x, later):
            pass
        middle = perf_counter()
        for contribute in later:
            contribute()
        times[1:, i] = middle - start, perf_counter() - middle
        tape[i] = None
        g = (np.zeros_like(x.value) if x.grad is None else x.grad) if isinstance(x, Tensor) else None
        x = output = None
    return times


def _memory(layers, x):
    """Bytes that each layer's forward pass leaves alive, and those of its output, as two lists of floats."""
    held, sent, tape = [], [], []
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        for i, layer in enumerate(layers):
            x = Tensor(x) if i and x.dtype.kind == "f" else x
            before = tracemalloc.get_traced_memory()[0]
            output = layer(x, Step(0))
            held.append(max(0.0, tracemalloc.get_traced_memory()[0] - before))
            tape.append(output)
            x = output.value if isinstance(output, Tensor) else output
            sent.append(float(x.nbytes))
    finally:
        if not tracing:
            tracemalloc.stop()
    return held, sent
