"""Columns of a table as arrays: categories as integers, numbers standardised; targets of a model, and parts of its features."""

import numpy as np

from mpiml.alone import Alone

from .scale import StandardScaler
from .table import distinct

_SHOWN = 10  # classes that a message lists


class Labels:
    """A column of categories: ``encode`` makes integers of them, ``decode`` names.

    Parameters
    ----------
    column : str
    classes : sequence of str
        Class i is that of the integer i.

    Examples
    --------
    >>> from mpiml.data import Table
    >>> labels = Labels.fit(Table({"species": ["Gentoo", "Adelie", "Gentoo"]}), "species")
    >>> labels.classes, labels.encode(Table({"species": ["Adelie"]})).tolist(), labels.decode([1, 0])
    (['Adelie', 'Gentoo'], [0], ['Gentoo', 'Adelie'])
    """

    def __init__(self, column, classes):
        self.column, self.classes = column, list(classes)
        self._codes = {text: code for code, text in enumerate(self.classes)}

    @classmethod
    def fit(cls, table, column, missing=False, grid=None):
        """The classes in a column, on all ranks together, in alphabetical order; with ``missing``, that is one, too."""
        return cls(column, [text for text in distinct(table[column], grid or Alone()) if text or missing])

    def encode(self, table, unknown="error"):
        """The column's classes, int64 (n,).

        Raises
        ------
        ValueError
            A value is missing or none of the classes; the message says which, and where. With ``unknown="ignore"`` it
            becomes -1.
        """
        texts = table[self.column]
        codes = np.array([self._codes.get(text, -1) for text in texts.tolist()], np.int64)
        if unknown == "error" and (codes < 0).any():
            row = int(np.argmax(codes < 0))
            shown = [text or "(missing)" for text in self.classes[:_SHOWN]] + ["..."] * (len(self.classes) > _SHOWN)
            what = repr(texts[row]) if texts[row] else "a missing value"
            raise ValueError(f"{table.where(row, self.column)}: {what} is none of the {len(self.classes)} known values: "
                             f"{', '.join(shown)}")
        return codes

    def decode(self, codes):
        """The names of classes, a list of str; of the rows of an array (n, classes), the names of their largest elements."""
        codes = np.asarray(codes)
        return [self.classes[code] for code in (codes.argmax(axis=1) if codes.ndim == 2 else codes).tolist()]

    def settings(self):
        """What :meth:`from_settings` needs, as JSON can carry it."""
        return {"kind": "classes", "column": self.column, "classes": self.classes}

    @classmethod
    def from_settings(cls, settings):
        return cls(settings["column"], settings["classes"])


class Number:
    """A column of numbers: ``encode`` standardises them, ``decode`` makes the numbers again.

    Parameters
    ----------
    column : str
    mean, deviation : float

    Examples
    --------
    >>> from mpiml.data import Table
    >>> mass = Number.fit(Table({"mass": ["3", "5"]}), "mass")
    >>> mass.encode(Table({"mass": ["6"]})).tolist(), mass.decode([2.0]).tolist()
    ([[2.0]], [6.0])
    """

    def __init__(self, column, mean=0.0, deviation=1.0):
        self.column, self.mean, self.deviation = column, float(mean), float(deviation)

    @classmethod
    def fit(cls, table, column, grid=None):
        """With mean and standard deviation of a column, on all ranks together; missing values are left out."""
        grid = grid or Alone()
        values = grid.together(f"reading column {column}", table.numbers, column)
        if not any(map(int, grid.texts(str(np.count_nonzero(~np.isnan(values)))))):
            raise ValueError(f"column {column} has no numbers: leave it out")
        scaler = StandardScaler.fit(values[:, None], grid)
        return cls(column, scaler.mean[0], scaler.deviation[0])

    def encode(self, table, missing="error", dtype="float32"):
        """(the column - mean) / deviation, (n, 1): the shape of the outputs of a model with one of them.

        Raises
        ------
        ValueError
            A value is not a number, or missing; the message says which, and where. With ``missing="keep"``, missing values
            are NaN.
        """
        values = table.numbers(self.column)
        if missing == "error" and np.isnan(values).any():
            row = int(np.argmax(np.isnan(values)))
            raise ValueError(f"{table.where(row, self.column)}: a number is missing")
        return ((values - self.mean) / self.deviation).astype(dtype)[:, None]

    def decode(self, outputs):
        """The numbers of which standardised ones, (n, 1) or (n,), were made: float64 (n,)."""
        return np.asarray(outputs, np.float64).reshape(len(outputs)) * self.deviation + self.mean

    def settings(self):
        """What :meth:`from_settings` needs, as JSON can carry it."""
        return {"kind": "number", "column": self.column, "mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_settings(cls, settings):
        return cls(settings["column"], settings["mean"], settings["deviation"])
