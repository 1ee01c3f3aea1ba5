"""Data sets and their batches."""

from .batches import batches, share
from .idx import read_idx
from .mnist import digits, mnist, pixels
from .text import Vocabulary, read_text, windows

__all__ = ["Vocabulary", "batches", "digits", "mnist", "pixels", "read_idx", "read_text", "share", "windows"]
