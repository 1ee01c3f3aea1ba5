"""Tables: CSV files in all the ways in which they can be dirty, read by one rank or by many."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import on_ranks

from mpiml.data import Table, find, read_csv

RANKS = [1, 2, 3, 4, 5, 8]


@pytest.fixture
def file(tmp_path):
    """A function that writes text or bytes to a file and returns its path."""
    def write(content):
        path = tmp_path / "data.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def content(*tables):
    """The rows of tables one behind the other, each with the line where it begins."""
    return [(int(line), *row) for table in tables
            for line, row in zip(table.lines, zip(*(table[name] for name in table.names), strict=True), strict=True)]


def same_on_ranks(path, **options):
    """The table of one rank, after a check that the shares of many ranks are that table."""
    table = read_csv(path, **options)
    for size in RANKS:
        shares = on_ranks(size, lambda grid: read_csv(path, grid=grid, **options))
        assert content(*shares) == content(table)
        assert {share.names for share in shares} == {table.names}
        assert [note for share in shares for note in share.notes] == list(table.notes)
    return table


# --- Files that are fine --------------------------------------------------------------------------------------

def test_columns_and_lines(file):
    table = same_on_ranks(file("age, job\n30, clerk\n41, \n"))
    assert table.names == ("age", "job") and len(table) == 2
    assert content(table) == [(2, "30", "clerk"), (3, "41", "")]
    assert table.numbers("age").tolist() == [30, 41]
    assert repr(table) == "Table of 2 rows: age, job"


def test_rows_know_their_lines(file):
    table = read_csv(file("a,b\n1,x\n\n2,\"y\ny\"\n3,z\n"))
    assert content(table) == [(2, "1", "x"), (4, "2", "y\ny"), (6, "3", "z")]
    assert content(table[np.array([2, 0])]) == [(6, "3", "z"), (2, "1", "x")]
    assert content(table[table["b"] == "z"]) == content(table[2:]) == [(6, "3", "z")]
    assert table[2:].where(0, "b").endswith("data.csv, line 6, column b")


TEXTS = {
    "names": ("1,x\n2,y\n", {"names": ["a", "b"]}, [(1, "1", "x"), (2, "2", "y")]),
    "other names": ("a,a\n1,x\n", {"names": ["a", "b"], "header": True}, [(2, "1", "x")]),
    "no end": ("a,b\n1,x\n2,y", {}, [(2, "1", "x"), (3, "2", "y")]),
    "windows": ("a,b\r\n1,x\r\n2,y\r\n", {}, [(2, "1", "x"), (3, "2", "y")]),
    "old mac": ("a,b\r1,x\r2,y\r", {}, [(2, "1", "x"), (3, "2", "y")]),
    "empty lines": ("\n\r\n  \na,b\n\n1,x\n\n\n2,y\n\n\n \n", {}, [(6, "1", "x"), (9, "2", "y")]),
    "BOM": ("\ufeffa,b\n1,x\n", {}, [(2, "1", "x")]),
    "BOM and quotes": ("\ufeff\"a\",\"b\"\n1,x\n", {}, [(2, "1", "x")]),
    "missing": ("a,b\nNA,?\nnan,\"\"\n", {}, [(2, "", ""), (3, "", "")]),
    "what is missing": ("a,b\nNA,?\n-,x\n", {"missing": ["-"]}, [(2, "NA", "?"), (3, "", "x")]),
    "quotes": ("a,b\n\"1,5\",\"he said \"\"so\"\"\"\n \"2\" , \"y\" \n", {}, [(2, "1,5", "he said \"so\""), (3, "2", "y")]),
    "lines in quotes": ("a,b\n\"1\n\n2\",\"x\r\ny\"\n\"\n\",\"\"\"\n\"\n", {}, [(2, "1\n\n2", "x\r\ny"), (6, "", "\"")]),
    "quotes as text": ("a,b\n5\" disk,x\n\"y,z\n", {"quotes": False}, [(2, "5\" disk", "x"), (3, "\"y", "z")]),
    "tabs": ("a\tb\n1,5\tx\n\ty\n", {"separator": "\t"}, [(2, "1,5", "x"), (3, "", "y")]),
    "tabs alone": ("a\tb\n\t\n1\t\n", {"separator": "\t"}, [(2, "", ""), (3, "1", "")]),
    "spaces": ("a b\n1 x\n\n\"2 3\" \"\"\n", {"separator": " "}, [(2, "1", "x"), (4, "2 3", "")]),
    "semicolons": ("a;b\n1,5;x\n", {"separator": ";"}, [(2, "1,5", "x")]),
    "one row": ("1,x", {"names": ["a", "b"]}, [(1, "1", "x")]),
    "letters": ("a,b\nå,Ω\n数,😀\n", {}, [(2, "å", "Ω"), (3, "数", "😀")]),
}


@pytest.mark.parametrize("text, options, expected", TEXTS.values(), ids=TEXTS)
def test_text(text, options, expected, file):
    table = same_on_ranks(file(text), **options)
    assert table.names == ("a", "b") and content(table) == expected


FIELD = st.text(st.sampled_from("ab1 ,;\"\n\r?é"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=12), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_what_python_writes_is_read(tmp_path_factory, rows, end, bom):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("first", "second", "third"), *rows])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    expected = [tuple("" if field.strip() == "?" else field.strip() for field in row) for row in rows]
    table = read_csv(path)
    assert [row for _, *row in content(table)] == [list(row) for row in expected]
    for size in 2, 3, 7:
        assert content(*on_ranks(size, lambda grid: read_csv(path, grid=grid))) == content(table)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab,, \"\n\r\t"), max_size=30), st.sampled_from(",\t a"))
def test_any_text_is_read_as_python_does_or_refused_on_all_ranks(tmp_path_factory, text, separator):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(text.encode())
    options = {"names": ["x", "y"], "ragged": "drop", "separator": separator}
    try:
        table = read_csv(path, **options)
    except ValueError as problem:
        with pytest.raises(type(problem)):
            on_ranks(3, lambda grid: read_csv(path, grid=grid, **options))
        return
    for size in 2, 5:
        assert content(*on_ranks(size, lambda grid: read_csv(path, grid=grid, **options))) == content(table)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != " ")
    rows = [[field.strip() for field in row] for row in lines if len(row) == 2]
    found = [row for _, *row in content(table)]
    if separator == " ":  # a line of blanks is an empty one, not one of empty fields
        rows, found = [row for row in rows if any(row)], [row for row in found if any(row)]
    assert found == rows


def test_many_empty_fields_and_a_wrong_quote_take_no_time(file):
    for separator in ",", "\t", " ":
        with pytest.raises(ValueError, match="line 1: a quote is out of place"):
            read_csv(file(10_000 * f" {separator}  " + "a\"b"), separator=separator)


# --- Files that are not ---------------------------------------------------------------------------------------

BAD = {
    "empty": (b"", {}, r"data.csv is empty: no line has text in it"),
    "blank": (b"\xef\xbb\xbf\n \r\n\n", {}, r"data.csv is empty"),
    "only a header": (b"a,b\n", {}, r"data.csv has a header, but no rows"),
    "few fields": (b"a,b\n1,x\n\n2\n", {}, r"line 4 has 1 fields, but there are 2 columns: '2'; .*ragged=\"drop\""),
    "many fields": (b"a,b\n1,x\n2,y,z\n", {}, r"line 3 has 3 fields, but there are 2 columns: '2,y,z'"),
    "names for others": (b"1,x\n2,y\n", {"names": ["a", "b", "c"]}, r"line 1 has 2 fields, but there are names for 3 columns"),
    "same names": (b"a,b,a\n1,2,3\n", {}, r"line 1: a header names each column once, but 'a' stands there more than once"),
    "no name": (b"a,,c\n1,2,3\n", {}, r"line 1: a header names each column once, but a name is empty"),
    "given twice": (b"1,2\n", {"names": ["a", "a"]}, r"each column has a name of its own, not \['a', 'a'\]"),
    "a header, too": (b"a,b\n1,2\n", {"names": ["a", "b"]}, r"line 1 is a header, with the names that were given"),
    "not UTF-8": (b"a,b\n1,x\n2,caf\xe9\n", {}, r"line 3: the byte 0xe9 is not UTF-8 in '2,caf.'.*errors=\"replace\""),
    "UTF-16": ("a,b\n1,x\n".encode("utf-16"), {}, r"line 1 has a zero byte in it: this is no CSV file in UTF-8"),
    "a quote inside": (b"a,b\n1,5\" disk\n2,y\n", {}, r"line 2: a quote is out of place in '1,5\" disk\\n2,y'.*quotes=False"),
    "behind a quote": (b"a,b\n1,\"x\"y\n", {}, r"line 2: a quote is out of place"),
    "open quote": (b"a,b\n1,x\n2,\"y\n3,z\n", {}, r"line 3: a quote is out of place in '2,\"y\\n3,z'"),
    "long field": (b"a,b\n1," + 200_000 * b"x" + b"\n", {}, r"line 2: field larger than field limit"),
    "no row left": (b"1,2\n", {"names": ["a"], "ragged": "drop"}, r"line 1 has 2 fields, but there are names for 1 columns"),
    "separator": (b"a||b\n1||2\n", {"separator": "||"}, r"separator is one character of ASCII, .*, not '\|\|'"),
    "ragged": (b"a\n1\n", {"ragged": "keep"}, r"ragged is 'error' or 'drop', not 'keep'"),
    "errors": (b"a\n1\n", {"errors": "surrogateescape"}, r"errors is 'strict' or 'replace' or 'ignore'"),
}


@pytest.mark.parametrize("data, options, message", BAD.values(), ids=BAD)
def test_what_cannot_be_read(data, options, message, file):
    path = file(data)
    for size in RANKS:
        with pytest.raises(ValueError, match=message):
            on_ranks(size, lambda grid: read_csv(path, grid=grid, **options))
    with pytest.raises(ValueError, match=message):
        read_csv(path, **options)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        on_ranks(3, lambda grid: read_csv(tmp_path / "nowhere.csv", grid=grid))


def test_ragged_rows_are_dropped_and_told(file):
    path = file("a,b\n1,x\n2\n3,y,z\n4,w\n")
    table = same_on_ranks(path, ragged="drop")
    assert content(table) == [(2, "1", "x"), (5, "4", "w")]
    assert table.notes == (f"{path}, line 3 has 1 fields, but there are 2 columns: dropped",
                           f"{path}, line 4 has 3 fields, but there are 2 columns: dropped")


@pytest.mark.parametrize("errors, text, fate", [("replace", "caf\ufffd", "replaced"), ("ignore", "caf", "left out")])
def test_bytes_that_are_no_text_are_repaired_and_told(errors, text, fate, file):
    path = file(b"a,b\n1,x\n2,caf\xe9\n")
    table = same_on_ranks(path, errors=errors)
    assert content(table) == [(2, "1", "x"), (3, "2", text)]
    assert table.notes == (f"{path}, line 3: the byte 0xe9 is not UTF-8: {fate}",)


def test_a_repaired_header_is_told_once(file):
    path = file(b"a,caf\xe9\n1,x\n2,y\n")
    table = same_on_ranks(path, errors="replace")
    assert table.names == ("a", "caf\ufffd") and table.notes == (f"{path}, line 1: the byte 0xe9 is not UTF-8: replaced",)
    table = same_on_ranks(path, errors="replace", names=["a", "b"])
    assert len(table) == 3 and table.notes == (f"{path}, line 1: the byte 0xe9 is not UTF-8: replaced",)


def test_ranks_that_read_different_files(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.csv").write_text("a\n1\n" + rank * "2\n")
    with pytest.raises(ValueError, match=r"the ranks read different files: .* has 4 and 6 bytes"):
        on_ranks(2, lambda grid: read_csv(tmp_path / f"{grid.rank}.csv", grid=grid))


# --- Tables ---------------------------------------------------------------------------------------------------

def test_a_table_of_lists():
    table = Table({"a": [1, None, 2.5], "b": ["x", "y", ""]})
    assert table["a"].tolist() == ["1", "", "2.5"] and np.isnan(table.numbers("a")[1])
    assert table.where(2, "b") == "row 3, column b" and table[1:].where(0) == "row 2"
    with pytest.raises(ValueError, match=r"one length, not {'a': 1, 'b': 2}"):
        Table({"a": ["1"], "b": ["1", "2"]})
    with pytest.raises(ValueError, match="have 3 rows, but the new c has 2"):
        table.replace("c", ["1", "2"])


def test_columns_change_in_a_new_table():
    table = Table({"a": ["1.", "", "2."], "b": ["x", "y", "z"]})
    assert table.map("a", lambda text: text.rstrip("."))["a"].tolist() == ["1", "", "2"]
    assert table.without("b", "q").names == ("a",)
    assert table.replace("c", ["u", "v", "w"]).names == ("a", "b", "c")
    assert table["a"].tolist() == ["1.", "", "2."] and table.names == ("a", "b")


@pytest.mark.parametrize("text, what", [("abc", "not a number"), ("1_000", "not a number"), ("3,5", "not a number"),
                                        ("inf", "not a finite number"), ("-1e999", "not a finite number")])
def test_what_is_no_number(text, what, file):
    table = read_csv(file(f"a;b\n1;2\n;3\n{text};4\n"), separator=";")
    with pytest.raises(ValueError, match=rf"data.csv, line 4, column a: '{text}' is {what}"):
        table.numbers("a")


def test_no_such_column(file):
    with pytest.raises(ValueError, match=r"data.csv has no column 'age', it has 39, State-gov; .* names=\[...\]"):
        read_csv(file("39,State-gov\n50,Private\n"))["age"]


# --- Where files are ------------------------------------------------------------------------------------------

def test_files_are_found_in_a_named_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MPIML_DATA", raising=False)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("a\n1\n")
    assert find("a.csv", tmp_path) == find("a.csv", tmp_path / "csv") == tmp_path / "csv" / "a.csv"
    with pytest.raises(FileNotFoundError, match=r"which folder holds a\.csv\? Name it by --data FOLDER, or by the var"):
        find("a.csv")
    monkeypatch.setenv("MPIML_DATA", str(tmp_path))
    assert find("a.csv") == tmp_path / "csv" / "a.csv"
    with pytest.raises(FileNotFoundError, match=r"neither .* nor a folder in it holds b\.csv: name another one"):
        find("b.csv")
