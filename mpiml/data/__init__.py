"""Data sets and their batches."""

from .batches import batches, share
from .idx import read_idx
from .mnist import digits, mnist, pixels

__all__ = ["batches", "digits", "mnist", "pixels", "read_idx", "share"]
