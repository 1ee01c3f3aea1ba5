"""The features of a table: its columns as one array, ready for a model."""

import numpy as np

from mpiml.alone import Alone

from .columns import Labels, Number
from .table import distinct, numeric

_MANY = 1000  # categories: more of them are rather names or numbers of the rows


class Features:
    """What a model is given of each row of a table: numbers standardised, categories as 0 and 1 (one-hot).

    Made by :meth:`fit` from the rows for training, and saved with the model, so that new rows are encoded alike.

    Parameters
    ----------
    columns : sequence of Number and Labels
    missing : "error", "mean" or "indicator"
        What becomes of a missing number: an error; the mean; or the mean, and beside each column of numbers another one says
        by 1 where they were missing.
    unknown : "error" or "ignore"
        What becomes of a category that was not there in training: an error, or zeros in all its columns. A missing category
        is one of its own, if there were such rows in training.
    dtype : str

    Attributes
    ----------
    names : list of str
        Of the k columns of the array: ``age``, ``age missing``, ``job=clerk``.

    Examples
    --------
    >>> from mpiml.data import Table
    >>> table = Table({"age": ["30", "50", ""], "job": ["clerk", "", "smith"], "city": ["Rome", "Rome", "Oslo"]})
    >>> features = Features.fit(table, without=["city"])
    >>> features.names
    ['age', 'job=', 'job=clerk', 'job=smith']
    >>> features.encode(table).tolist()
    [[-1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """

    def __init__(self, columns, missing="mean", unknown="error", dtype="float32"):
        for name, value, choices in (("missing", missing, ("error", "mean", "indicator")),
                                     ("unknown", unknown, ("error", "ignore"))):
            if value not in choices:
                raise ValueError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r}")
        self.columns, self.missing, self.unknown, self.dtype = list(columns), missing, unknown, np.dtype(dtype).name
        self.names = []
        for column in self.columns:
            if isinstance(column, Labels):
                self.names += [f"{column.column}={text}" for text in column.classes]
            else:
                self.names += [column.column, f"{column.column} missing"][:1 + (missing == "indicator")]

    @classmethod
    def fit(cls, table, numbers=None, categories=None, without=(), grid=None, **options):
        """Features with the means, deviations and categories of a table.

        Parameters
        ----------
        table : Table
        numbers, categories : sequence of str, optional
            The columns to use, each as what it is. If neither is given, all columns are used, and those are numbers whose
            values are; if one is, the other is empty unless given.
        without : sequence of str
            Columns that are not used, the target above all.
        grid : mpiml.parallel.Grid, optional
            The ranks that hold the rows together; to be called on all of them.
        **options
            ``missing``, ``unknown`` and ``dtype``.

        Raises
        ------
        ValueError
            A column does not exist, is not what it was said to be, holds numbers but for some values, or has so many
            categories that it rather names the rows.
        """
        grid = grid or Alone()
        without = [without] if isinstance(without, str) else without
        for name in without:
            table[name]  # refuses a name that is not there: a target that is misspelt here would be among the features
        if numbers is None and categories is None:
            numbers, categories = _kinds(table.without(*without), grid)
        numbers, categories = numbers or (), categories or ()
        of_numbers = {name: Number.fit(table, name, grid) for name in numbers if name not in without}
        of_categories = {name: Labels.fit(table, name, missing=True, grid=grid) for name in categories if name not in without}
        columns = of_numbers | of_categories
        if not columns:
            raise ValueError(f"there are no columns to make features of: {table!r}, without {', '.join(without)}")
        return cls([columns[name] for name in table.names if name in columns], **options)

    def encode(self, table):
        """The features of each row, (n, k); columns that are none of the features are left out.

        Raises
        ------
        ValueError
            A column is missing, or a value is missing, unknown or of the wrong type; the message says which, and where.
        """
        lacking = [column.column for column in self.columns if column.column not in table.names]
        if lacking:
            raise ValueError(f"{table.path or 'the table'} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; it "
                             f"has {', '.join(table.names)}")
        parts = [np.empty((len(table), 0), self.dtype)]
        for column in self.columns:
            if isinstance(column, Labels):
                codes = column.encode(table, self.unknown)
                parts.append(codes[:, None] == np.arange(len(column.classes)))
            else:
                values = column.encode(table, "error" if self.missing == "error" else "keep", self.dtype)
                parts.append(np.nan_to_num(values))
                if self.missing == "indicator":
                    parts.append(np.isnan(values))
        return np.concatenate(parts, axis=1, dtype=self.dtype)

    def codes(self, table):
        """The categories alone, as integers for an :class:`mpiml.nn.Embedding`: int64 (n, number of categorical columns).

        With ``unknown="ignore"``, unknown ones are -1.
        """
        columns = [column.encode(table, self.unknown) for column in self.columns if isinstance(column, Labels)]
        return np.stack(columns, axis=1) if columns else np.empty((len(table), 0), np.int64)

    def settings(self):
        """What :meth:`from_settings` needs, as JSON can carry it."""
        return {"kind": "table", "columns": [column.settings() for column in self.columns], "missing": self.missing,
                "unknown": self.unknown, "dtype": self.dtype}

    @classmethod
    def from_settings(cls, settings):
        columns = [{"number": Number, "classes": Labels}[column["kind"]].from_settings(column)
                   for column in settings["columns"]]
        return cls(columns, settings["missing"], settings["unknown"], settings["dtype"])


def _kinds(table, grid):
    """(numbers, categories): the columns of each kind."""
    found = numeric(table, grid)
    for name, problem in found.items():
        if problem:
            raise ValueError(f"{problem}: mend it, let clean(table, wrong=\"missing\") take such values for missing, or name "
                             f"{name} among the categories")
    rest = [name for name in table.names if name not in found]
    rows = sum(map(int, grid.texts(str(len(table)))))
    for name in rest:
        count = len(distinct(table[name], grid))
        if count > _MANY:
            raise ValueError(f"{table.path or 'the table'}: column {name} has {count} different values in {rows} rows: leave "
                             f"it out (without=[{name!r}]), or name it among the categories")
    return list(found), rest
