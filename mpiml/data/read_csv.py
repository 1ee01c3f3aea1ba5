"""Reading CSV files, on one rank or by all of them together."""

import csv
import json
import os

import numpy as np

from mpiml.alone import Alone

from .records import records, well_quoted
from .table import Table

MISSING = "", "?", "NA", "N/A", "nan", "NaN", "null"
LONG = 60  # characters of a text that a message shows


def read_csv(path, names=None, *, header=None, missing=MISSING, separator=",", quotes=True, ragged="error",
             errors="strict", grid=None):
    """The table in a CSV file.

    Blanks around fields and empty lines are left out, and so is a byte order mark. Fields may be quoted, with separators
    and line ends in them and quotes doubled, as RFC 4180 has it.

    Parameters
    ----------
    path : path
    names : sequence of str, optional
        The columns, of a file without a header.
    header : bool, optional
        Whether the first line names the columns; by default, if there are no ``names``. With both, ``names`` count.
    missing : sequence of str
        What stands for a missing value.
    separator : str
        One character of ASCII.
    quotes : bool
        False: quotes are characters like any other, and a line is a row.
    ragged : "error" or "drop"
        What becomes of rows with too few or too many fields. Of those that were dropped the table's ``notes`` tell.
    errors : "strict", "replace" or "ignore"
        What becomes of bytes that are not UTF-8: an error, U+FFFD, or nothing; told in the ``notes``, too.
    grid : mpiml.parallel.Grid, optional
        Each rank reads a part of the file, and gets a run of its rows: those of all ranks, in their order, are those
        that one rank would read. To be called on all ranks together.

    Returns
    -------
    Table

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is empty, or something is wrong in it; the message says what, in which line, and what to do.
    mpiml.parallel.RankError
        With a grid: the same, on all ranks.
    """
    header = names is None if header is None else header
    for name, value, choices in ("ragged", ragged, ("error", "drop")), ("errors", errors, ("strict", "replace", "ignore")):
        if value not in choices:
            raise ValueError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r}")
    if len(separator) != 1 or not separator.isascii() or separator in "\"\r\n":
        raise ValueError(f"separator is one character of ASCII, neither a quote nor a line end, not {separator!r}")
    parser = Parser(os.fspath(path), separator, quotes, errors)
    grid = grid or Alone()
    return grid.again(_read, parser, names, header, frozenset(missing), ragged, grid)


def _read(parser, names, header, missing, ragged, grid):
    path, reading = parser.path, f"reading {parser.path}"
    parser.notes.clear()
    found = records(path, parser.quotes, grid)
    first = grid.together(reading, lambda: [[line, *row] for line, row in parser(found[:1])])
    # The first record of all is that of the first rank that has any.
    firsts = [(rank, *json.loads(text)) for rank, text in enumerate(grid.texts(json.dumps(first))) if text != "[]"]
    if not firsts:
        raise ValueError(f"{path} is empty: no line has text in it")
    owner, (line, *fields) = firsts[0]
    fields = [field.strip() for field in fields]
    names = _columns(f"{path}, line {line}", fields, names, header)
    if header and owner == grid.rank:
        del found[0]
    else:
        parser.notes.clear()  # of the first record, which is parsed again
    table = grid.together(reading, _table, parser, found, names, missing, ragged)
    if not any(map(int, grid.texts(str(len(table))))):
        raise ValueError(f"{path} has {'a header, but ' * header}no rows")
    return table


def _columns(where, fields, names, header):
    """The names of the columns, checked; ``fields`` are those of the first line."""
    if header:
        twice = sorted({field for field in fields if fields.count(field) > 1})
        if names is None and (twice or "" in fields):
            raise ValueError(f"{where}: a header names each column once, but " + (
                f"{', '.join(map(repr, twice))} stand{'s' * (len(twice) == 1)} there more than once" if any(twice) else
                "a name is empty") + ": read_csv(..., names=[...], header=True) gives other names")
    elif fields == list(names):
        raise ValueError(f"{where} is a header, with the names that were given: leave out names=, or say header=True")
    names = fields if names is None else [str(name) for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"each column has a name of its own, not {names}")
    if len(names) != len(fields):
        raise ValueError(f"{where} has {len(fields)} fields, but there are names for {len(names)} columns: {', '.join(names)}")
    return names


def _table(parser, found, names, missing, ragged):
    """The table of these records."""
    rows, lines, notes = [], [], parser.notes
    for line, row in parser(found):
        if len(row) == len(names):
            rows.append(row)
            lines.append(line)
            continue
        problem = f"{parser.path}, line {line} has {len(row)} fields, but there are {len(names)} columns"
        if ragged == "error":
            raise ValueError(f"{problem}: {excerpt(parser.separator.join(row))}; mend the line, or leave such lines out by "
                             f"read_csv(..., ragged=\"drop\")")
        notes.append(f"{problem}: dropped")
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    columns = [np.array(list(map(Values(missing).__getitem__, column)), object) for column in columns]
    return Table(dict(zip(names, columns, strict=True)), np.array(lines, np.int64), parser.path, notes)


class Values(dict):
    """What the fields of a column stand for: stripped, and empty if missing; equal ones share their memory."""

    def __init__(self, missing):
        self.missing = missing

    def __missing__(self, field):
        text = field.strip()
        self[field] = text = "" if text in self.missing else text
        return text


class Parser:
    """Records as rows of fields; calling it on pairs (line, bytes) yields pairs (line, fields)."""

    def __init__(self, path, separator, quotes, errors):
        self.path, self.separator, self.quotes, self.errors = path, separator, quotes, errors
        self.well_quoted, self.notes = well_quoted(separator), []

    def __call__(self, found):
        rows = csv.reader((self.text(line, record) for line, record in found), delimiter=self.separator,
                          quoting=csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE, skipinitialspace=self.separator != " ")
        for line, _ in found:
            try:
                row = next(rows)  # one for each record, since a record ends where the reader takes it to end
            except csv.Error as error:
                raise ValueError(f"{self.path}, line {line}: {error}; csv.field_size_limit(N) sets another") from error
            yield line, row

    def text(self, line, record):
        where = f"{self.path}, line {line}"
        if b"\0" in record:
            raise ValueError(f"{where} has a zero byte in it: this is no CSV file in UTF-8")
        if self.quotes and b'"' in record and not self.well_quoted(record):
            raise ValueError(f"{where}: a quote is out of place in {excerpt(record)}: a field with quotes in it stands in "
                             f"quotes and has them doubled; read_csv(..., quotes=False) takes them for plain characters")
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            wrong = f"the byte 0x{record[error.start]:02x} is not UTF-8"
            if self.errors == "strict":
                raise ValueError(f"{where}: {wrong} in {excerpt(record)}: save the file as UTF-8, or repair it by "
                                 f"read_csv(..., errors=\"replace\")") from error
            self.notes.append(f"{where}: {wrong}: {self.errors}d".replace("ignored", "left out"))
            return record.decode(errors=self.errors)


def excerpt(text):
    """The beginning of a text, as Python writes it, for messages."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= LONG else text[:LONG] + "...")
