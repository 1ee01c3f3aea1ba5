"""Data sets and their batches."""

from .batches import batches, share
from .cifar10 import cifar10, colors
from .idx import read_idx
from .images import crop_and_flip, normalize
from .mnist import digits, mnist, pixels
from .rows import Rows

__all__ = ["Rows", "batches", "cifar10", "colors", "crop_and_flip", "digits", "mnist", "normalize", "pixels", "read_idx",
           "share"]
