"""Weights, models and checkpoints in safetensors files: arrays by name, and never a program to run.

:func:`save` and :func:`load` carry weights to and from files that PyTorch reads and writes, :func:`load_model` builds the
model as well, and :class:`Checkpoints` keep all that a training needs to go on where it was, on one rank or many.
"""

from mpiml.restart import STOPPED

from .checkpoints import Checkpoints
from .weights import load, load_model, save

__all__ = ["STOPPED", "Checkpoints", "load", "load_model", "save"]
