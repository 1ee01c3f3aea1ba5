"""Weights and checkpoints in safetensors files: arrays by name, and never a program to run.

:func:`save` and :func:`load` carry weights to and from files that PyTorch reads and writes, :class:`Checkpoints` all
that a training needs to go on where it was, on one rank or many.
"""

from mpiml.restart import STOPPED

from .checkpoints import Checkpoints
from .weights import load, save

__all__ = ["STOPPED", "Checkpoints", "load", "save"]
