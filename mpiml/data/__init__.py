"""Data sets, tables and their features, and batches."""

from .batches import batches, share
from .cifar10 import cifar10, colors
from .clean import clean
from .columns import Labels, Number
from .features import Features
from .find import find
from .idx import read_idx
from .images import crop_and_flip, normalize
from .mnist import digits, mnist, pixels
from .read_csv import read_csv
from .rows import Rows
from .scale import StandardScaler
from .split import split
from .table import Table
from .text import TextFeatures, Vocabulary, read_text, windows

__all__ = ["Features", "Labels", "Number", "Rows", "StandardScaler", "Table", "TextFeatures", "Vocabulary", "batches",
           "cifar10", "clean", "colors", "crop_and_flip", "digits", "find", "mnist", "normalize", "pixels", "read_csv",
           "read_idx", "read_text", "share", "split", "windows"]
