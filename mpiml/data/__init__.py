"""Data sets, tables and their features, and batches."""

from .batches import batches, share
from .clean import clean
from .columns import Labels, Number
from .features import Features
from .find import find
from .idx import read_idx
from .mnist import digits, mnist, pixels
from .read_csv import read_csv
from .scale import StandardScaler
from .split import split
from .table import Table
from .text import TextFeatures, Vocabulary, read_text, windows

__all__ = ["Features", "Labels", "Number", "StandardScaler", "Table", "TextFeatures", "Vocabulary", "batches", "clean",
           "digits", "find", "mnist", "pixels", "read_csv", "read_idx", "read_text", "share", "split", "windows"]
