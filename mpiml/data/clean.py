"""Cleaning a table: what is wrong in it is dropped, filled in or left, and told."""

import hashlib
import json

import numpy as np

from mpiml.alone import Alone

from .table import numbers, numeric


def clean(table, target=None, classes=None, *, missing="keep", wrong="error", duplicates="keep", constant="keep", grid=None):
    """A table without what cannot be learned from, and a report of all that was found.

    - Rows whose ``target`` is missing, or not among the ``classes``, are dropped.
    - Infinite numbers and NaN, in columns most of whose values are numbers, become missing values.
    - The rest is up to the arguments.

    Parameters
    ----------
    table : Table
    target : str, optional
        The column to be predicted.
    classes : sequence of str, optional
        What it may be; by default anything.
    missing : "keep" or "drop"
        Rows with missing values: :class:`mpiml.data.Features` fills them in.
    wrong : "error", "missing" or "drop"
        Values that are no numbers, in columns most of whose values are: an error, a missing value, or no such row.
    duplicates : "keep" or "drop"
        Rows that are the same as an earlier one.
    constant : "keep" or "drop"
        Columns, but for the target, that have the same value in all rows. They do no harm, and other files of the same
        kind may have other values there.
    grid : mpiml.parallel.Grid, optional
        The ranks that hold the rows together; to be called on all of them.

    Returns
    -------
    table : Table
        This rank's rows.
    report : list of str
        Lines of text with counts, the first line of the file where each thing was found, and what became of it; of all
        ranks' rows, on every rank.

    Raises
    ------
    ValueError
        A value is no number and ``wrong`` is "error", or no rows are left.

    Examples
    --------
    >>> from mpiml.data import Table
    >>> table = Table({"age": ["30", "inf", "41", "41"], "job": ["clerk", "smith", "", ""], "town": ["Rome"] * 4})
    >>> table, report = clean(table, target="job", constant="drop")
    >>> print(*report, sep="\\n")
    the table: 4 rows of 3 columns
    age: 1 value infinite, first in row 2: taken for missing
    job: 2 values missing in the target, first in row 3: rows dropped
    age: 1 value missing, first in row 2: kept
    town: 'Rome' in all rows: column dropped
    left: 2 rows of 2 columns
    """
    for name, value, choices in (("missing", missing, ("keep", "drop")), ("wrong", wrong, ("error", "missing", "drop")),
                                 ("duplicates", duplicates, ("keep", "drop")), ("constant", constant, ("keep", "drop"))):
        if value not in choices:
            raise ValueError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r}")
    grid = grid or Alone()
    report = _Report(table)

    for name, problem in numeric(table, grid).items():
        if problem and wrong == "error":
            raise ValueError(f"{problem}: mend the file, or say wrong=\"missing\" or wrong=\"drop\"")
        values, texts = numbers(table[name])
        infinite, nan = np.isinf(values), np.isnan(values) & ~texts & (table[name] != "")
        report.tell(table, infinite, name, "infinite", "taken for missing")
        report.tell(table, nan, name, "not a number", "taken for missing")
        table = _blank(table, name, infinite | nan)
        if wrong == "drop":
            table = report.drop(table, texts, name, "of another type")
        else:
            report.tell(table, texts, name, "of another type", "taken for missing")
            table = _blank(table, name, texts)
    if target is not None:
        table = report.drop(table, table[target] == "", target, "missing in the target")
        if classes is not None:
            other = np.array([text not in classes for text in table[target].tolist()], bool)
            table = report.drop(table, other, target, "outside the classes")
    for name in table.names:
        if missing == "drop":
            table = report.drop(table, table[name] == "", name, "missing")
        else:
            report.tell(table, table[name] == "", name, "missing", "kept")
    copies = _copies(table, grid)
    if duplicates == "drop":
        table = report.drop(table, copies, None, "same as an earlier row")
    else:
        report.tell(table, copies, None, "same as an earlier row", "kept")

    rows = sum(map(int, grid.texts(str(len(table)))))
    alike = {name: text for name, text in _constants(table, grid).items() if name != target and rows > 1}
    lines = [*report.lines(grid), *(f"{name}: {text or 'missing'!r} in all rows: " + (
        "column dropped" if constant == "drop" else "kept") for name, text in alike.items())]
    if not rows:
        raise ValueError("no rows are left: " + "; ".join(lines))
    if constant == "drop":
        table = table.without(*alike)
    return table, [*lines, f"left: {rows} rows of {len(table.names)} columns"]


class _Report:
    """What was found: on each rank the same things in the same order, in numbers and rows of its own."""

    def __init__(self, table):
        self.name, self.columns, self.rows, self.notes = table.path or "the table", len(table.names), len(table), table.notes
        self.findings = []

    def tell(self, table, found, column, what, fate):
        """Note that some rows have something; ``found`` says which."""
        first = table.line(found.argmax()) if found.any() else None
        self.findings.append([column, what, fate, int(found.sum()), first])

    def drop(self, table, found, column, what):
        """The table without the rows that have something."""
        self.tell(table, found, column, what, "rows dropped")
        return table[~found]

    def lines(self, grid):
        """The report, of all ranks' rows."""
        rows, notes, findings = zip(*(json.loads(text) for text in grid.texts(
            json.dumps([self.rows, self.notes, self.findings]))), strict=True)
        lines = [f"{self.name}: {sum(rows)} rows of {self.columns} columns", *(note for some in notes for note in some)]
        for same in zip(*findings, strict=True):
            column, what, fate, *_ = same[0]
            count = sum(number for *_, number, _ in same)
            first = next((line for *_, line in same if line), None)
            if count:
                what = f"value{'s' * (count > 1)} {what}" if column else what
                lines.append(f"{column or 'rows'}: {count} {what}, first in {first}: {fate}")
        return lines


def _blank(table, name, rows):
    """The table with missing values in a column."""
    return table.replace(name, np.where(rows, "", table[name])) if rows.any() else table


def _copies(table, grid):
    """Which rows are the same as an earlier one, on whatever rank."""
    columns = zip(*(table[name].tolist() for name in table.names), strict=True) if table.names else ()
    mine = b"".join(hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in columns)
    digests = grid.rows(np.frombuffer(mine, np.uint64).reshape(-1, 2))
    order = np.lexsort(digests.T)  # stable: equal rows stay in their order
    copies = np.zeros(len(digests), bool)
    copies[order[1:]] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    start = sum(map(int, grid.texts(str(len(table)))[:grid.rank]))
    return copies[start:start + len(table)]


def _constants(table, grid):
    """{column: the value that all rows have}."""
    mine = []
    for name in table.names:
        column = table[name]
        mine.append([*column[:1], *column[column != column[:1]][:1]])  # two different ones say as much as many
    values = [set().union(*some) for some in zip(*map(json.loads, grid.texts(json.dumps(mine))), strict=True)]
    return {name: min(some) for name, some in zip(table.names, values, strict=True) if len(some) == 1}
