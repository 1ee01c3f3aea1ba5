"""The training step: the gradient of the mean loss over the global batch, on any grid."""

import hashlib
import itertools
import math
from time import perf_counter

import numpy as np

from mpiml import kernels as k
from mpiml.nn import BatchNorm2d, Dropout, Step
from mpiml.tensor import Tensor

from .grid import RankError
from .sum import summation


def gradient(model, loss, grid, watch=None, first_step=0):
    """A function ``step(x, y)`` that leaves the gradient of the global mean loss in ``model.gradient``.

    Each rank computes the *sum* of the loss over its share and its gradient; one all-reduce adds up gradients,
    losses and numbers of samples; one division makes means of them. So the result is that of one rank with the
    whole batch, however unevenly the batch is shared; a rank may even have none.

    Parameters
    ----------
    model : mpiml.nn.Module
        Placed on the grid, see :func:`mpiml.parallel.place`.
    loss : function of (output, target)
        Returns the *sum* over the samples, such as :func:`mpiml.ops.cross_entropy`; a mean would be divided twice.
    grid : mpiml.parallel.Grid
    watch : mpiml.parallel.Watch, optional
        Records the time of each part.
    first_step : int
        Number of the first step, which dropout depends on; later steps count on from it.

    Returns
    -------
    step : function of (x, y)
        To be called on all ranks together. Takes this rank's share, replaces the model's gradient and returns the
        mean loss, a float, the same on all ranks. It raises :class:`~mpiml.parallel.RankError` on all ranks, with
        the ranks at fault, if the loss or the gradient is not finite or the whole batch is empty; the model's
        gradient is then zero, so that training may go on with the next batch. An error in a rank's own share (a
        shape, a label) is raised on that rank.
    """
    if not hasattr(model, "vector"):
        raise RuntimeError("this model has no memory yet: call place(model, grid) before gradient(model, ...)")
    grid.same("the weights", hashlib.blake2b(model.vector.tobytes(), digest_size=8).hexdigest())
    numbers = itertools.count(first_step)
    total = summation(grid, len(model.sums), model.sums.dtype)
    model.accumulate_in(total.vector)
    sums = model.sums
    norms = list(model.named(BatchNorm2d).values())
    # Only these layers depend on where a share lies in the batch; without them nobody needs to ask.
    positioned = bool(norms or model.named(Dropout))
    for norm in norms:
        if norm.samples is None and grid.data > 1:
            raise ValueError(f"BatchNorm2d takes its statistics over the whole batch, which is spread over {grid.data} ranks: "
                             f"give it samples=, a number of samples that one rank holds, or use GroupNorm")

    def step(x, y):
        start = perf_counter()
        number, first = next(numbers), 0
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
        if positioned:
            first = _first(grid, len(x), norms)
        if model.sums is not sums:  # another step, for another loss, say, was made or used since
            model.accumulate_in(sums)
        sums[:] = 0
        if len(x):
            value = loss(model(x, Step(number, first)), y)
            if not isinstance(value, Tensor):
                raise TypeError(f"the loss depends on no parameter of the model: {value!r} is a plain number; a model must "
                                f"hand `training` on to its layers")
            value.backward()
            sums[-2] = value.value
        sums[-1] = len(x)
        ready = perf_counter()
        local = float(sums[-2])
        total()
        if watch:
            watch.record(ready - start, perf_counter() - ready)
        mean, count = float(sums[-2]), float(sums[-1])
        check = k.scale(model.gradient, sums.dtype.type(1 / count)) if count else math.nan
        if not math.isfinite(mean + check):
            _explain(grid, model, number, x, y, local, mean, count)
        return mean / count

    return step


def _first(grid, samples, norms):
    """Number of the first sample of this rank's share in the global batch, which must suit the normalisations."""
    sizes = np.empty(grid.data, np.int64)
    grid.comm.Allgather(np.array([samples], np.int64), sizes)
    starts = np.cumsum(sizes) - sizes
    for norm in norms:
        odd = np.flatnonzero(starts % (norm.samples or 1) * sizes).tolist()
        if odd:
            raise RankError(f"rank {odd[0]}'s share starts at sample {starts[odd[0]]} of the batch, which is not a multiple "
                            f"of BatchNorm2d's samples={norm.samples}: use batches(..., multiple={norm.samples})", odd)
    return int(starts[grid.replica])


def _explain(grid, model, number, x, y, local, total, count):
    # Every rank has seen the same reduced sums, so all come here or none.
    if not count:
        raise RankError(f"the batch of step {number} is empty on all {grid.size} ranks", list(range(grid.size)))
    if math.isfinite(total) and np.isfinite(model.gradient).all():
        return  # only the check itself overflowed
    problem = ""
    for name, array in ("input", x), ("target", y):
        array = np.asarray(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = ~np.isfinite(array)
            place = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            problem = f"{bad.sum()} of the {bad.size} values of its {name} are not finite, the first at {place}"
            break
    else:
        if not math.isfinite(local):
            problem = f"its loss is {local}, of finite inputs"
    problems = grid.texts(problem)
    model.sums[:] = 0
    ranks = [rank for rank, text in enumerate(problems) if text]
    said = "; ".join(f"rank {rank}: {problems[rank]}" for rank in ranks[:5]) or "all inputs and losses are finite"
    fix = ("clean the data" if any("values" in text for text in problems) else
           "training diverges: lower the learning rate, or clip the gradient's norm")
    what = (f"the gradient of step {number} is not finite" if math.isfinite(total) else
            f"the loss of step {number} is {total / count}")
    raise RankError(f"{what} ({said}): {fix}", ranks or list(range(grid.size)))
