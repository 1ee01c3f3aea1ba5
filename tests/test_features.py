"""Cleaning, splitting, standardising and encoding tables: the same bits on any number of ranks."""

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from threads import on_ranks

from mpiml.data import Features, Labels, Number, StandardScaler, Table, clean, read_csv, split

RANKS = [1, 2, 3, 4, 5, 6, 7, 8]


def uneven(n, size, seed=0):
    """Cuts of n rows into ``size`` runs of any length, some of them empty."""
    inner = np.sort(np.random.default_rng(seed).integers(0, n + 1, size - 1)).tolist()
    return [slice(start, stop) for start, stop in zip([0, *inner], [*inner, n], strict=True)]


# --- Standardising --------------------------------------------------------------------------------------------

def test_mean_and_deviation_are_exact():
    x = np.random.default_rng(0).normal(1e3, 1e-3, (500, 1))
    scaler = StandardScaler.fit(x)
    exact = [Fraction(value) for value in x[:, 0].tolist()]
    mean = sum(exact) / 500
    assert scaler.mean[0] == float(mean)
    assert scaler.deviation[0] == math.sqrt(sum((value - mean)**2 for value in exact) / 500)
    z = scaler.transform(x)
    assert abs(z.mean()) < 1e-6 and abs(z.std() - 1) < 1e-6
    np.testing.assert_allclose(scaler.inverse(z), x, rtol=1e-15)


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8"])
def test_the_same_bits_on_any_number_of_ranks(dtype, size):
    random = np.random.default_rng(1)
    x = (random.normal(size=(203, 3)) * 10.0**random.integers(-8, 9, (203, 3))).astype(dtype)
    whole = StandardScaler.fit(x)
    for seed in range(5):
        shuffled = random.permutation(x)
        shares = [shuffled[cut] for cut in uneven(len(x), size, seed)]
        for scaler in on_ranks(size, lambda grid, shares=shares: StandardScaler.fit(shares[grid.rank], grid)):
            assert scaler.mean.tobytes() == whole.mean.tobytes()
            assert scaler.deviation.tobytes() == whole.deviation.tobytes()


def test_extreme_numbers():
    for values in [5e-324, -5e-324], [1e153, -1e153, 1], [2.0**53 + 2, -2.0**53, 1], [-0.0, 0.0], [1e-320, 1e100]:
        scaler = StandardScaler.fit(np.array(values)[:, None])
        assert scaler.mean[0] == float(sum(map(Fraction, values)) / len(values)) and scaler.deviation[0] > 0


def test_missing_and_constant_columns():
    scaler = StandardScaler.fit(np.array([[1, 7, np.nan], [np.nan, 7, 4], [5, 7, 8]]))
    assert scaler.mean.tolist() == [3, 7, 6] and scaler.deviation.tolist() == [2, 1, 2]
    for values, message in ([np.nan, np.nan], "column 0 has no numbers"), ([1, np.inf], "an infinite number has no place"), (
            [1e200, -1e200], "the numbers of column 0 are too large"):
        with pytest.raises(ValueError, match=message):
            StandardScaler.fit(np.array(values)[:, None])


# --- Splitting ------------------------------------------------------------------------------------------------

LABELS = np.array(["a"] * 50 + ["b"] * 30 + ["c"] * 7, object)[np.random.default_rng(2).permutation(87)]


@pytest.mark.parametrize("labels", [LABELS, LABELS.astype(str), np.unique(LABELS, return_inverse=True)[1]], ids="oUi")
def test_split_is_stratified(labels):
    parts = split(labels, (0.8, 0.1, 0.1), seed=3)
    assert sorted(np.concatenate(parts)) == list(range(87))
    for part, fraction in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert (np.diff(part) > 0).all()
        for label, count in Counter(labels.tolist()).items():
            assert abs(Counter(labels[part].tolist())[label] - fraction * count) <= 1


@pytest.mark.parametrize("size", RANKS)
def test_split_depends_on_labels_and_seed_alone(size):
    whole = split(LABELS, (0.7, 0.3), seed=3)
    cuts = uneven(len(LABELS), size, size)
    shares = on_ranks(size, lambda grid: split(LABELS[cuts[grid.rank]], (0.7, 0.3), seed=3, grid=grid))
    for number, part in enumerate(whole):
        rows = [share[number] + cut.start for share, cut in zip(shares, cuts, strict=True)]
        np.testing.assert_array_equal(np.concatenate(rows), part)
    assert split(LABELS, (0.7, 0.3), seed=4)[0].tolist() != whole[0].tolist()


def test_rows_that_are_all_alike():
    train, test = split(10, (0.8, 0.2))
    assert len(train) == 8 and len(test) == 2 and sorted([*train, *test]) == list(range(10))
    assert [len(part) for part in split(1000, (1 / 3, 1 / 3, 1 / 3))] == [333, 334, 333]


@pytest.mark.parametrize("labels, fractions, message", [
    (10, (0.5, 0.4), r"their sum is 1: \(0.5, 0.4\) are not"),
    (10, (1.1, -0.1), "fractions are above 0"),
    (10, (), "fractions are above 0"),
    (2, (0.9, 0.1), r"2 rows in parts of \(0.9, 0.1\) make parts of \[2, 0\] rows: none may be empty"),
    (0, (0.9, 0.1), "0 rows"),
    (np.ones(3), (0.5, 0.5), r"labels are integers or texts, one for each row, not an array of float64 of shape \(3,\)"),
    (np.ones((3, 2), int), (0.5, 0.5), r"of shape \(3, 2\)"),
])
def test_splits_that_cannot_be(labels, fractions, message):
    with pytest.raises(ValueError, match=message):
        split(labels, fractions)


# --- Cleaning -------------------------------------------------------------------------------------------------

DIRTY = """age,job,town,income
30,clerk,Rome,low
inf,,Rome,high
41,smith,Rome,
abc,smith,Rome,low
NaN,smith,Rome,medium
30,clerk,Rome,low
-1e999,clerk,Rome,high
"""


@pytest.fixture
def dirty(tmp_path):
    path = tmp_path / "dirty.csv"
    path.write_text(DIRTY)
    return path


def rows(*tables):
    return [row for table in tables for row in zip(*(table[name].tolist() for name in table.names), strict=True)]


def test_the_report_tells_everything(dirty):
    table = read_csv(dirty, missing=[""])
    table, report = clean(table, "income", ["low", "high"], wrong="missing", duplicates="drop", constant="drop")
    assert report == [
        f"{dirty}: 7 rows of 4 columns",
        "age: 2 values infinite, first in line 3: taken for missing",
        "age: 1 value not a number, first in line 6: taken for missing",
        "age: 1 value of another type, first in line 5: taken for missing",
        "income: 1 value missing in the target, first in line 4: rows dropped",
        "income: 1 value outside the classes, first in line 6: rows dropped",
        "age: 3 values missing, first in line 3: kept",
        "job: 1 value missing, first in line 3: kept",
        "rows: 1 same as an earlier row, first in line 7: rows dropped",
        "town: 'Rome' in all rows: column dropped",
        "left: 4 rows of 3 columns"]
    assert rows(table) == [("30", "clerk", "low"), ("", "", "high"), ("", "smith", "low"), ("", "clerk", "high")]


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("options", [
    {"wrong": "missing"}, {"wrong": "drop", "duplicates": "drop"}, {"wrong": "missing", "missing": "drop", "constant": "drop"},
    {"wrong": "missing", "target": "income", "classes": ["low"], "duplicates": "drop"}], ids=str)
def test_the_same_on_any_number_of_ranks(options, size, dirty):
    table, report = clean(read_csv(dirty), **options)
    shares = on_ranks(size, lambda grid: clean(read_csv(dirty, grid=grid), grid=grid, **options))
    assert rows(*(share for share, _ in shares)) == rows(table)
    assert all(told == report for _, told in shares)


def test_what_clean_cannot_do(dirty):
    table = read_csv(dirty)
    with pytest.raises(ValueError, match=r"line 5, column age: 'abc' is not a number, as the column's other values are "
                                         r"\(1 of 6 are not\): mend the file, or say wrong=\"missing\" or wrong=\"drop\""):
        clean(table)
    with pytest.raises(ValueError, match=r"no rows are left: .*income: 5 values outside the classes"):
        clean(table, "income", ["none"], wrong="drop")
    with pytest.raises(ValueError, match=r"has no column 'wage', it has age, job, town, income"):
        clean(table, "wage", wrong="drop")
    with pytest.raises(ValueError, match="duplicates is 'keep' or 'drop', not 'maybe'"):
        clean(table, duplicates="maybe")


def test_notes_of_reading_are_in_the_report(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,x\n2\n3,y\n")
    _, report = clean(read_csv(tmp_path / "a.csv", ragged="drop"))
    assert report[1].endswith("a.csv, line 3 has 1 fields, but there are 2 columns: dropped")


# --- Features -------------------------------------------------------------------------------------------------

PEOPLE = Table({"age": ["30", "50", "", "40", "40"], "job": ["smith", "", "clerk", "clerk", "smith"],
                "wage": ["1", "2", "3", "4", "5"]})


def test_numbers_are_standardised_and_categories_one_hot():
    features = Features.fit(PEOPLE, without=["wage"])
    assert features.names == ["age", "job=", "job=clerk", "job=smith"]
    x = features.encode(PEOPLE)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[:, 0], np.array([-10, 10, 0, 0, 0]) / np.sqrt(50), rtol=1e-6)
    assert x[:, 1:].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert features.codes(PEOPLE).tolist() == [[2], [0], [1], [1], [2]]
    assert features.encode(PEOPLE[:0]).shape == (0, 4)


def test_what_becomes_of_missing_numbers():
    features = Features.fit(PEOPLE, numbers=["age"], missing="indicator", dtype="float64")
    assert features.names == ["age", "age missing"]
    assert features.encode(PEOPLE)[1:3, 1].tolist() == [0, 1] and features.encode(PEOPLE)[2, 0] == 0
    with pytest.raises(ValueError, match="row 3, column age: a number is missing"):
        Features.fit(PEOPLE, numbers=["age"], missing="error").encode(PEOPLE)


@pytest.mark.parametrize("size", RANKS)
def test_features_are_the_same_on_any_number_of_ranks(size):
    random = np.random.default_rng(5)
    table = Table({"a": random.normal(size=60).tolist(), "b": random.integers(0, 30, 60).tolist(),
                   "c": random.choice(["x", "y", "é", ""], 60).tolist()})
    whole = Features.fit(table, missing="indicator")
    cuts = uneven(60, size, size)
    shares = on_ranks(size, lambda grid: Features.fit(table[cuts[grid.rank]], missing="indicator", grid=grid))
    assert all(share.settings() == whole.settings() for share in shares)
    x = np.concatenate([share.encode(table[cut]) for share, cut in zip(shares, cuts, strict=True)])
    assert x.tobytes() == whole.encode(table).tobytes()


def test_settings_are_json():
    for columns in {"without": ["wage"]}, {"numbers": ["wage"], "categories": ["age"], "unknown": "ignore", "dtype": "float64"}:
        features = Features.fit(PEOPLE, **columns)
        again = Features.from_settings(json.loads(json.dumps(features.settings())))
        assert again.settings() == features.settings() and next(iter(features.settings().items())) == ("kind", "table")
        assert again.encode(PEOPLE).tobytes() == features.encode(PEOPLE).tobytes()


def test_rows_at_prediction(tmp_path):
    features = Features.fit(PEOPLE, without=["wage"])
    (tmp_path / "new.csv").write_text("city,job,age\nRome,clerk,40\nOslo,pilot,41\n")
    new = read_csv(tmp_path / "new.csv")
    assert features.encode(new[:1]).tolist() == [[0, 0, 1, 0]]  # another order, and one column more
    with pytest.raises(ValueError, match=r"new.csv, line 3, column job: 'pilot' is none of the 3 known values: "
                                         r"\(missing\), clerk, smith"):
        features.encode(new)
    ignoring = Features.fit(PEOPLE, without=["wage"], unknown="ignore")
    assert ignoring.encode(new)[1, 1:].tolist() == [0, 0, 0] and ignoring.codes(new).tolist() == [[1], [-1]]
    with pytest.raises(ValueError, match=r"new.csv lacks the columns age, job; it has city"):
        features.encode(new.without("job", "age"))
    with pytest.raises(ValueError, match=r"new.csv, line 2, column age: 'old' is not a number"):
        features.encode(new.replace("age", ["old", "40"]))
    never = Features.fit(Table({"job": ["clerk", "smith"]}))
    with pytest.raises(ValueError, match="row 2, column job: a missing value is none of the 2 known values: clerk, smith"):
        never.encode(Table({"job": ["clerk", ""]}))


def test_columns_that_are_no_features():
    with pytest.raises(ValueError, match=r"row 2, column a: 'x' is not a number, as the column's other values are \(1 of 3"):
        Features.fit(Table({"a": ["1", "x", "3"]}))
    assert Features.fit(Table({"a": ["1", "x", "3"]}), categories=["a"]).names == ["a=1", "a=3", "a=x"]
    with pytest.raises(ValueError, match=r"column a has 1001 different values in 1001 rows: leave it out \(without=\['a'\]\)"):
        Features.fit(Table({"a": [f"name {i}" for i in range(1001)]}))
    with pytest.raises(ValueError, match="column a has no numbers: leave it out"):
        Features.fit(Table({"a": ["", ""]}), numbers=["a"])
    with pytest.raises(ValueError, match="there are no columns to make features of: Table of 1 rows: a, without a"):
        Features.fit(Table({"a": ["1"]}), without=["a"])
    with pytest.raises(ValueError, match="missing is 'error' or 'mean' or 'indicator', not 'zero'"):
        Features([], missing="zero")


# --- Targets --------------------------------------------------------------------------------------------------

def test_labels():
    labels = Labels.fit(PEOPLE, "job")
    assert labels.classes == ["clerk", "smith"]
    assert labels.encode(PEOPLE[2:]).tolist() == [0, 0, 1] and labels.encode(PEOPLE[2:]).dtype == np.int64
    assert labels.decode([1, 0]) == labels.decode(np.array([[0.1, 0.9], [0.8, 0.2]])) == ["smith", "clerk"]
    with pytest.raises(ValueError, match="row 2, column job: a missing value is none of the 2 known values"):
        labels.encode(PEOPLE)
    with pytest.raises(ValueError, match=r"row 1, column job: 'smith' is none of the 2 known values: pilot, clerk"):
        Labels("job", ["pilot", "clerk"]).encode(PEOPLE)
    assert Labels("job", ["smith", "clerk"]).encode(PEOPLE[2:]).tolist() == [1, 1, 0]
    assert Labels.from_settings(json.loads(json.dumps(labels.settings()))).settings() == {
        "kind": "classes", "column": "job", "classes": ["clerk", "smith"]}
    shares = on_ranks(3, lambda grid: Labels.fit(PEOPLE[grid.rank:grid.rank + 1], "job", grid=grid))
    assert [share.classes for share in shares] == 3 * [["clerk", "smith"]]


def test_numbers_as_a_target():
    wage = Number.fit(PEOPLE, "wage")
    y = wage.encode(PEOPLE)
    assert y.dtype == np.float32 and y.shape == (5, 1) and abs(y.mean()) < 1e-6 and abs(y.std() - 1) < 1e-6
    np.testing.assert_allclose(wage.decode(y), [1, 2, 3, 4, 5], rtol=1e-6)
    assert Number.from_settings(json.loads(json.dumps(wage.settings()))).settings() == wage.settings()
    with pytest.raises(ValueError, match="row 3, column age: a number is missing"):
        Number.fit(PEOPLE, "age").encode(PEOPLE)
    with pytest.raises(ValueError, match="row 1, column job: 'smith' is not a number"):
        Number.fit(PEOPLE, "job")
