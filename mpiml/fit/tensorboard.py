"""The history of a training for those who look at theirs in TensorBoard."""

import os


class TensorBoard:
    """Writes what each epoch came to as scalars of TensorBoard, over the number of steps; a callback of :func:`mpiml.fit.fit`.

    The values of the validation are written under "validation", all others under "training": "validation/loss",
    "training/samples_per_s". Rank 0 writes. When a training goes on from a checkpoint, TensorBoard hides what was written of
    steps that are taken again.

    Parameters
    ----------
    folder : str or path
        For this run; ``tensorboard --logdir`` takes it, or the folder above it to compare runs.

    Raises
    ------
    ImportError
        tensorboardX is not installed.
    """

    def __init__(self, folder):
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError("files for TensorBoard are written by tensorboardX: pip install 'mpiml[tensorboard]'") from error
        self.folder, self._open, self._writer = os.fspath(folder), tensorboardX.SummaryWriter, None

    def __call__(self, training):
        training.grid.together(f"writing to {self.folder}", self._write, training)

    def _write(self, training):
        if training.grid.rank:
            return
        epoch = training.history[-1]
        if self._writer is None:
            # The suffix: a run that is resumed within the same second gets a file of its own.
            self._writer = self._open(self.folder, purge_step=epoch["step"], filename_suffix=f".{epoch['step']}")
        for name, value in epoch.items():
            if name not in ("epoch", "step"):
                part, name = ("validation", name[11:]) if name.startswith("validation ") else ("training", name)
                self._writer.add_scalar(f"{part}/{name.replace('/', '_per_').replace(' ', '_')}", value, epoch["step"])
        self._writer.flush()

    def end(self, training):
        if self._writer is not None:
            self._writer.close()
            self._writer = None
