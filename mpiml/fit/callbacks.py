"""What may happen after each epoch: stopping early, keeping the best weights."""

import math
import os

import numpy as np


class EarlyStopping:
    """Stops a training when a value has not become better for some epochs (Prechelt 1998, "Early stopping - but when?").

    Parameters
    ----------
    monitor : str
        A value of the history, such as "validation loss"; "loss", that of the training itself, stops at convergence.
    patience : int
        Epochs without a better value after which it stops.
    least : float
        A value that is better by less than this counts as no better.
    higher : bool
        Whether higher values are better, as of an accuracy.
    """

    def __init__(self, monitor="validation loss", patience=5, least=0.0, higher=False):
        if not isinstance(patience, (int, np.integer)) or patience < 1:
            raise ValueError(f"patience is a number of epochs, a whole number above 0, not {patience!r}")
        if not least >= 0:
            raise ValueError(f"least is a difference, 0 or more, not {least!r}")
        self.monitor, self.patience, self.least, self.higher = monitor, patience, least, higher

    def __call__(self, training):
        training.best(self.monitor)  # refuses a name that is not there
        best, since = math.inf, 0
        for epoch in training.history:
            value = epoch[self.monitor] * (-1 if self.higher else 1)
            better = value < best - (self.least if math.isfinite(best) else 0)
            best, since = (value, 0) if better else (best, since + 1)
        if since >= self.patience:
            return (f"{self.monitor} has not become better than {-best if self.higher else best:.6g} for {since} "
                    f"epoch{'s' * (since > 1)}")
        return None


class Best:
    """Keeps the weights of the best epoch, and puts them into the model when training ends.

    They lie in memory, a copy on each rank; with a run folder also in its file ``best.safetensors``, from where a training that
    goes on gets them back.

    Parameters
    ----------
    monitor : str
        A value of the history.
    higher : bool
        Whether higher values are better, as of an accuracy.
    """

    def __init__(self, monitor="validation loss", higher=False):
        self.monitor, self.higher, self._epoch, self._vector = monitor, higher, None, None

    def __call__(self, training):
        if training.best(self.monitor, self.higher) != len(training.history) - 1:
            return
        self._epoch, self._vector = len(training.history) - 1, training.model.vector.copy()
        if training.run:
            from mpiml.save import save
            weights, grid = training.model.collect(), training.grid
            grid.together("saving the best weights", lambda: grid.rank == 0 and save(weights, self._path(training)))

    def end(self, training):
        if not training.history:
            return
        if self._epoch == training.best(self.monitor, self.higher):
            training.model.vector[...] = self._vector
        elif training.run and training.grid.all(os.path.exists(self._path(training))):
            from mpiml.save import load
            training.grid.together("loading the best weights", load, training.model, self._path(training))

    def _path(self, training):
        return os.path.join(training.run, "best.safetensors")
