"""A training loop for those who want none of their own, and what it tells of itself.

:func:`fit` is the loop of the README with validation, callbacks, a log and checkpoints around it, on any grid. It is written
to be read: whoever needs more copies it and changes it.
"""

from .callbacks import Best, EarlyStopping
from .loop import fit
from .tensorboard import TensorBoard
from .training import Training

__all__ = ["Best", "EarlyStopping", "TensorBoard", "Training", "fit"]
