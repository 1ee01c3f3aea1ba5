"""Tables on real ranks: shares of a file become arrays on every rank; and the examples with tables, from end to end."""

import os
import re

import pytest
from launch import mpirun

pytestmark = pytest.mark.launch

SHARES = """
import sys
import numpy as np
from mpiml.data import Features, Labels, clean, read_csv, split
from mpiml.parallel import Grid, RankError
import mpiml.parallel.grid as module

def arrays(grid):
    table, report = clean(read_csv(sys.argv[1], grid=grid), "kind", grid=grid)
    parts = [table[rows] for rows in split(table["kind"], (0.7, 0.3), 1, grid)]
    features = Features.fit(parts[0], without=["kind"], missing="indicator", unknown="ignore", grid=grid)
    labels = Labels.fit(parts[0], "kind", grid=grid)
    return report, [a for part in parts for a in (features.encode(part), labels.encode(part))]

grid = Grid()
report, alone = arrays(None)
for folder in module._SHARED, "/no/such/folder":
    module._SHARED = folder
    told, shares = arrays(grid)
    assert told == report
    for mine, whole in zip(shares, alone, strict=True):
        everyones = grid.rows(mine)
        assert everyones.tobytes() == whole.tobytes() and everyones.dtype == whole.dtype, (everyones, whole)
        grid.comm.Barrier()
        everyones[...] = grid.rank
        grid.comm.Barrier()
        assert (everyones == grid.rank).all()
assert grid.rows(np.ones((0, 3), np.float32)).shape == (0, 3)
for action, message in (lambda: grid.rows(np.zeros(2, np.float32 if grid.rank else np.float64)), "dtype and shape of a row"), (
        lambda: read_csv("nowhere.csv", grid=grid), "failed in reading nowhere.csv: FileNotFoundError"):
    try:
        action()
    except RankError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("all is the same on rank", grid.rank)
"""


def test_shares_of_a_file_are_the_arrays_of_one_rank(tmp_path):
    path, code = tmp_path / "data.csv", tmp_path / "shares.py"
    path.write_text("size,place,kind\n" + "".join(
        f"{'' if i % 7 == 0 else i * 1.1},\"a \"\"big\"\"\nplace, {i % 4}\",{'xyz'[i % 3]}\n" for i in range(50)))
    code.write_text(SHARES)
    run = mpirun(3, str(code), str(path))
    assert run.code == 0 and run.out.count("all is the same on rank") == 3, run.err


@pytest.fixture(scope="module")
def data():
    folder = os.environ.get("MPIML_DATA")
    if not folder:
        pytest.skip("MPIML_DATA names no folder with tables")
    return folder


def example(ranks, name, *options):
    run = mpirun(ranks, f"examples/{name}.py", *options)
    assert run.code == 0, run.err
    return run.out


def test_linear_regression_comes_to_the_closed_form():
    out = example(2, "linear_regression")
    assert "these penguins are made up" in out and float(re.search(r"largest difference (\S+);", out)[1]) < 1e-6


def test_linear_regression_of_penguins(data):
    out = example(1, "linear_regression", "--data", data)
    assert "body_mass_g: 2 values missing in the target, first in line 5: rows dropped" in out
    assert float(re.search(r"largest difference (\S+);", out)[1]) < 1e-6


def accuracy(out):
    return float(re.search(r"test loss .*, accuracy (\S+)$", out, re.M)[1])


def test_adults(data):
    out = example(2, "adult", "--data", data, "--epochs", "2")
    assert "adult-train.csv: 32561 rows of 15 columns\nworkclass: 1836 values missing, first in line 28: kept\n" in out
    assert accuracy(out) >= 0.845


def test_penguins_on_any_number_of_ranks(data):
    outs = [example(ranks, "penguins", "--data", data, "--epochs", "30") for ranks in (1, 3)]
    assert min(map(accuracy, outs)) >= 0.97 and accuracy(outs[0]) == accuracy(outs[1])
    told = [[line for line in out.splitlines() if not line.startswith("epoch")] for out in outs]
    assert told[0] == told[1]


def test_without_data_an_example_says_what_it_needs():
    run = mpirun(1, "examples/adult.py")
    assert run.code == 2 and "which folder holds adult-train.csv? Name it by --data FOLDER, or by the variable" in run.err
