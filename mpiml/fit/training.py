"""What a callback is given."""

import math
from dataclasses import dataclass, field

from mpiml.parallel import Grid, Part


@dataclass
class Training:
    """A training that is under way.

    A callback is a function of one, called on all ranks together after each epoch; if it returns a text, training stops, and
    the text says why. It must return the same on all ranks, which it does if it decides by ``history`` alone; then it also does
    so when the training goes on from a checkpoint, as the history is part of that. A callback with a method ``end(training)``
    is called once more when all is done.

    Attributes
    ----------
    model : mpiml.parallel.Part
    grid : mpiml.parallel.Grid
    optimizer : mpiml.optim.Optimizer
    run : str or None
        The folder of this run.
    history : list of dict
        For each epoch: "epoch" (from 1), "step" (taken so far), "loss" (mean over the epoch's batches), "validation loss" and
        "validation NAME" for each metric, if there are data for it, "lr" (of the last step), "samples/s" and "seconds" (of
        the epoch's steps, without validation).
    """

    model: Part
    grid: Grid
    optimizer: object
    run: str = None
    history: list = field(default_factory=list)

    def best(self, name, higher=False):
        """Position in ``history`` of the epoch with the smallest, or highest, value of ``name``; the first one of equals.

        Values that are not finite are never the best, unless there are no others.

        Raises
        ------
        ValueError
            There is no such value.
        """
        if name not in self.history[0]:
            raise ValueError(f"the history has no {name!r}, it has {', '.join(map(repr, self.history[0]))}: for a validation "
                             f"loss or metric call fit(..., validation=(x, y), metrics=...)")
        values = [epoch[name] * (-1 if higher else 1) for epoch in self.history]
        return min(range(len(values)), key=lambda i: (not math.isfinite(values[i]), values[i], i))
