"""The outputs of a model, computed by all ranks."""

import json
import math

import numpy as np

from mpiml.data.batches import share

from .place import Part
from .recorder import recorder


def predict(model, x, grid, size=256, transform=None):
    """``model(x)`` on every rank; to be called on all ranks together.

    x is cut into runs of ``size`` samples. Each replica takes a part of the runs and streams them through its stages;
    nothing is taped.

    Parameters
    ----------
    model : Part, or function of an array
        What :func:`mpiml.parallel.place` returned; or a function that each rank has.
    x : array (n, ...), the same on all ranks
    grid : mpiml.parallel.Grid
    size : int
        Samples that pass through a stage together.
    transform : function of an array, optional
        Applied to each run of x.

    Returns
    -------
    array (n, ...)
        In the order of x.

    Raises
    ------
    ValueError
        There are no samples, or the outputs cannot be joined; on all ranks.
    mpiml.parallel.RankError
        The ranks disagree on the number of samples.
    """
    with recorder.at("predict"):
        return grid.again(_predict, model, x, grid, size, transform)


def _predict(model, x, grid, size, transform):
    runs = runs_of(x, grid, size)
    mine = [np.ascontiguousarray(output) for _, output in stream(model, x, grid, runs, transform)]
    forms = {(output.dtype.str, *output.shape[1:]): None for output in mine}
    everyones = [json.loads(text) for text in grid.texts(json.dumps([sum(map(len, mine)), *forms]))]
    rows = [count for count, *_ in everyones]
    found = sorted({tuple(form) for _, *forms in everyones for form in forms}, key=str)
    if len(found) != 1 or sum(rows) != len(x):
        raise ValueError(f"predict joins outputs of one dtype and shape, one for each sample: {len(x)} samples gave "
                         f"{sum(rows)} outputs of {' and '.join(map(str, found))}")
    dtype, *shape = found[0]
    everything = np.empty((len(x), *shape), dtype)
    mine = np.concatenate(mine) if mine else np.empty((0, *shape), dtype)
    row = math.prod(shape) * everything.itemsize
    # The ranks that hold the last chunk follow each other in the order of their replicas, which is that of x.
    grid.comm.Allgatherv(mine.reshape(-1).view(np.uint8), [everything.reshape(-1).view(np.uint8), [n * row for n in rows]])
    return everything


def runs_of(x, grid, size):
    """The runs of samples of this replica, as (start, stop)."""
    grid.same("the number of samples and the size of a run", (len(x), size))
    if len(x) == 0:
        raise ValueError("there are no samples to compute: x has length 0")
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"size is a number of samples, a whole number above 0, not {size!r}")
    count = -(-len(x) // size)
    return [(run * size, min(len(x), (run + 1) * size)) for run in range(*share(count, grid.replica, grid.data))]


def stream(model, x, grid, runs, transform=None):
    """Yield (run, output) for the runs of this replica, on the rank that holds the last chunk; nothing on the others.

    Every rank of the replica must take all that is yielded.
    """
    def inputs(run):
        part = np.asarray(x[slice(*run)])
        return transform(part) if transform else part

    if not isinstance(model, Part):
        if grid.stage == 0:
            yield from ((run, model(inputs(run))) for run in runs)
        return
    link, last = model.link, len(model.bounds) - 1
    # Several chunks on a rank take turns, as many runs at a time as there are stages, so that none waits for long. A
    # fast stage is held back between the groups, never in one, where the others may need it to go on.
    for begin in range(0, len(runs), grid.pipe):
        group = runs[begin:begin + grid.pipe]
        link.finish(keep=len(group) * len(model.chunks))
        for number, chunk in model.chunks.items():
            for run in group:
                array, buffer = link.receive(("F", 0, number)) if number else (inputs(run), None)
                output = chunk(array)
                if buffer is not None and np.may_share_memory(output, buffer):
                    output = output.copy()
                link.release(buffer)
                if number == last:
                    yield run, output
                else:
                    link.deliver(("F", 0, number + 1), output, matched=True)
    link.finish()
