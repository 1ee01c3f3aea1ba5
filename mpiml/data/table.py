"""Tables: columns of text by name, whose rows know from which line of which file they are."""

import json
from copy import copy

import numpy as np


class Table:
    """Columns of text, all of one length; a missing value is the empty text.

    ``table["age"]`` is a column, an object array (n,) of str; ``table[rows]`` is a table of those rows, where
    ``rows`` is a slice, or an array of row numbers or of booleans.

    Parameters
    ----------
    columns : {name: sequence of str}
        None is a missing value, too, and numbers are written down as Python does.
    lines : int array (n,), optional
        The line in the file at which each row begins; else rows are counted from 1.
    path : str, optional
        The file, for messages.
    notes : sequence of str
        What was repaired when it was read, for the report of :func:`mpiml.data.clean`.

    Raises
    ------
    ValueError
        The columns differ in length.

    Examples
    --------
    >>> table = Table({"name": ["Ada", "Emmy"], "age": ["36", ""]})
    >>> len(table), table["name"].tolist(), table.numbers("age").tolist()
    (2, ['Ada', 'Emmy'], [36.0, nan])
    >>> table[1:]["name"].tolist()
    ['Emmy']
    """

    def __init__(self, columns, lines=None, path=None, notes=()):
        self._columns = {name: _texts(column) for name, column in columns.items()}
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a table are of one length, not {lengths}")
        self.lines = np.arange(1, max(lengths.values(), default=0) + 1) if lines is None else lines
        self.path, self.notes = path, tuple(notes)

    @property
    def names(self):
        """The names of the columns, a tuple."""
        return tuple(self._columns)

    def __len__(self):
        return len(self.lines)

    def __repr__(self):
        return f"Table of {len(self)} rows: {', '.join(self.names)}"

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self._columns:
                raise ValueError(f"{self.path or 'the table'} has no column {key!r}, it has {', '.join(self.names)}; if these "
                                 f"are values, the file has no header: read_csv(..., names=[...]) names the columns")
            return self._columns[key]
        return self._with({name: column[key] for name, column in self._columns.items()}, self.lines[key])

    def replace(self, name, column):
        """The table with this column in place of the one called ``name``, or beside the others if there is none."""
        column = _texts(column)
        if len(column) != len(self):
            raise ValueError(f"the columns of the table have {len(self)} rows, but the new {name} has {len(column)}")
        return self._with(self._columns | {name: column}, self.lines)

    def without(self, *names):
        """The table without these columns; those that it does not have are not missed."""
        return self._with({name: column for name, column in self._columns.items() if name not in names}, self.lines)

    def map(self, name, function):
        """The table with ``function`` of each text in the column ``name``, missing ones left out.

        >>> Table({"income": [">50K.", ""]}).map("income", lambda text: text.rstrip("."))["income"].tolist()
        ['>50K', '']
        """
        results = {text: function(text) if text else text for text in set(self[name].tolist())}
        return self.replace(name, [results[text] for text in self[name].tolist()])

    def _with(self, columns, lines):
        table = copy(self)
        table._columns, table.lines = columns, lines
        return table

    def where(self, row, name=None):
        """Where a row is, in words: ``adult.csv, line 17, column age``."""
        file = f"{self.path}, " if self.path else ""
        return f"{file}{self.line(row)}" + (f", column {name}" if name else "")

    def line(self, row):
        """The line of a row, in words: ``line 17``, or ``row 17`` where there is no file."""
        return f"{'line' if self.path else 'row'} {self.lines[row]}"

    def numbers(self, name):
        """A column as numbers, float64 (n,); a missing value is NaN.

        Raises
        ------
        ValueError
            A value is not a number, or not finite; the message says which one, and where.
        """
        values, wrong = numbers(self[name])
        wrong = np.flatnonzero(wrong | np.isinf(values))
        if len(wrong):
            text = self[name][wrong[0]]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"{self.where(wrong[0], name)}: {text!r} is not a {'finite ' * is_number(text)}number{more}: mend "
                             f"the file, or let clean(table, wrong=\"missing\") take such values for missing")
        return values


def _texts(column):
    if isinstance(column, np.ndarray) and column.dtype == object and set(map(type, column.tolist())) <= {str}:
        return column
    known = {}  # so that equal texts share their memory
    texts = ("" if value is None else str(value) for value in column)
    return np.array([known.setdefault(text, text) for text in texts], object)


def numbers(column):
    """(values, wrong): texts as float64, NaN where they are missing or wrong, and which of them are not numbers.

    >>> numbers(np.array(["1.5", "", "inf", "abc"], object))
    (array([1.5, nan, inf, nan]), array([False, False, False,  True]))
    """
    texts = column.tolist()
    if "_" not in "".join(texts):
        try:
            return np.array([float(text) if text else np.nan for text in texts]), np.zeros(len(texts), bool)
        except ValueError:
            pass  # some are not; and what are few different texts are parsed once each
    wrong = {text for text in set(texts) if text and not is_number(text)}
    known = {text: np.nan if text == "" or text in wrong else float(text) for text in set(texts)}
    return np.array([known[text] for text in texts], np.float64), np.array([text in wrong for text in texts], bool)


def is_number(text):
    """Whether a text is a number, as NumPy and spreadsheets write them: ``1_000``, which Python takes, is none."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def distinct(column, grid):
    """The different values of a column, or of an array of labels, on all ranks together, in ascending order: a list."""
    values = sorted(set(column.tolist()))
    return sorted(set().union(*map(json.loads, grid.texts(json.dumps(values)))))


def numeric(table, grid):
    """The columns that hold numbers, on all ranks together: more than half of their values are.

    Returns
    -------
    {name: None or str}
        Of a column with other texts among its numbers, an error message for the first of them.
    """
    counts = []
    for name in table.names:
        values, wrong = numbers(table[name])
        first = f"{table.where(wrong.argmax(), name)}: {table[name][wrong.argmax()]!r}" if wrong.any() else ""
        counts.append((int((~np.isnan(values)).sum()), int(wrong.sum()), first))
    found = {}
    for name, *column in zip(table.names, *map(json.loads, grid.texts(json.dumps(counts))), strict=True):
        good, bad, firsts = zip(*column, strict=True)
        if sum(good) > sum(bad):
            found[name] = next((f"{first} is not a number, as the column's other values are ({sum(bad)} of "
                                f"{sum(good) + sum(bad)} are not)" for first in firsts if first), None)
    return found
