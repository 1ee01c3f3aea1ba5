"""Files joined to one array that is read where it is indexed, in all the ways in which they can be broken."""

import gc
import os

import numpy as np
import pytest

from mpiml.data import Rows, batches
from mpiml.parallel import Grid, evaluate, predict

GRID = Grid()


def saved(folder, arrays):
    paths = [folder / f"part_{number}.npy" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return paths


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 3, 2)).astype(np.float32) for n in (5, 1, 7)]


@pytest.fixture
def rows(parts, tmp_path):
    return Rows(saved(tmp_path, parts))


INDICES = [[0], [12, 0, 5, 5, 6], [-1, -13], range(13), range(3, 9), [4, 5, 6, 7], [], np.arange(13) % 2 == 0,
           np.array([3, 4], np.uint8)]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_those_of_the_joined_array(index, rows, parts):
    whole = np.concatenate(parts)
    index = np.asarray(index, int if len(index) == 0 else None)
    found = rows[index]
    np.testing.assert_array_equal(found, whole[index])
    assert found.dtype == whole.dtype and found.flags.writeable and type(found) is np.ndarray


def test_it_looks_like_an_array(rows, parts):
    whole = np.concatenate(parts)
    assert (len(rows), rows.shape, rows.ndim, rows.dtype) == (13, whole.shape, 3, np.float32)
    np.testing.assert_array_equal(rows, whole)
    np.testing.assert_array_equal(rows[-2], whole[-2])
    assert np.asarray(rows, np.float64).dtype == np.float64
    assert "Rows of shape (13, 3, 2) and dtype float32 in 3 files" in repr(rows)


@pytest.mark.parametrize("cut", [slice(4, 9), slice(None), slice(None, None, -2), slice(2, 2), slice(-4, None)], ids=str)
def test_a_slice_reads_nothing_until_it_is_asked(cut, rows, parts, monkeypatch):
    whole = np.concatenate(parts)[cut]
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", None)
        part = rows[cut]
        assert isinstance(part, Rows) and part.shape == whole.shape
    np.testing.assert_array_equal(part, whole)
    if len(whole) > 1:
        np.testing.assert_array_equal(part[1:][[0]], whole[1:2])


@pytest.mark.parametrize("index, message", [([13], "there is no row 13: there are 13"), ([0, -14], "no row -14"),
                                            ([1.5], "by integers"), ([[0, 1]], "by integers"), ([True], "by integers"),
                                            ((0, 1), "first axis alone")], ids=str)
def test_an_index_that_does_not_fit(index, message, rows):
    with pytest.raises(IndexError, match=message):
        rows[index if isinstance(index, tuple) else np.asarray(index)]


def test_records_of_bytes(tmp_path):
    rng = np.random.default_rng(0)
    records = [rng.integers(0, 256, (n, 1 + 12), "u1") for n in (4, 3)]
    for number, array in enumerate(records):
        array.tofile(tmp_path / str(number))
    whole = np.concatenate(records)
    paths = [tmp_path / "0", tmp_path / "1"]
    images, labels = Rows(paths, np.uint8, (3, 2, 2), before=1), Rows(paths, np.uint8, after=12)
    np.testing.assert_array_equal(images, whole[:, 1:].reshape(-1, 3, 2, 2))
    np.testing.assert_array_equal(labels[[6, 2, 3]], whole[[6, 2, 3], 0])


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_rank_reads_its_share_alone(ranks, rows, parts, monkeypatch):
    from types import SimpleNamespace
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, memory, at: read.append(len(memory[0])) or real(file, memory, at))
    y, seen = np.arange(13), []
    for rank in range(ranks):
        grid = SimpleNamespace(replica=rank, data=ranks, lanes=None, pipe=1, undone=0, generation=0, same=lambda *_: None)
        for x, labels in batches(rows, y, 6, grid=grid):
            np.testing.assert_array_equal(x, np.concatenate(parts)[labels])
            seen += labels.tolist()
    assert sorted(seen) == list(range(13)) and sum(read) == np.concatenate(parts).nbytes


def test_evaluation_and_prediction_of_rows(rows, parts, tmp_path):
    whole = np.concatenate(parts)
    np.save(tmp_path / "y.npy", np.arange(13))
    np.testing.assert_array_equal(predict(lambda x: x * 2, rows, GRID, size=4), whole * 2)
    found = evaluate(lambda x: x[:, 0, 0] > 0, rows, Rows(tmp_path / "y.npy"), {"sum": lambda z, y: float((z * y).sum())},
                     GRID, size=4)
    assert found["sum"] == ((whole[:, 0, 0] > 0) * np.arange(13)).sum() / 13


def test_files_are_closed_with_the_last_slice(rows):
    number = rows._files[0].handle.number
    part = rows[2:]
    del rows
    os.fstat(number)
    assert len(part[[0]]) == 1


def test_files_are_closed(tmp_path, parts):
    rows = Rows(saved(tmp_path, parts))
    numbers = [file.handle.number for file in rows._files]
    del rows
    gc.collect()
    for number in numbers:
        with pytest.raises(OSError):
            os.fstat(number)


# --- What can be wrong ----------------------------------------------------------------------------------------

def whole_file(tmp_path):
    path = tmp_path / "good.npy"
    np.save(path, np.arange(40, dtype=np.int16).reshape(10, 4))
    return path.read_bytes()


BROKEN = {
    "empty": (lambda data: b"", r"is not a whole file of NumPy's format \.npy \(.*\): write it with np\.save"),
    "foreign": (lambda data: b"\x89PNG" + data, "is not a whole file of NumPy's format"),
    "header": (lambda data: data[:40], "is not a whole file of NumPy's format"),
    "cut": (lambda data: data[:-11], r"is cut short: its header says 10 rows of 8 bytes, and row 8 \(byte 192\) has 5"),
    "no rows": (lambda data: data[:128], r"is cut short: its header says 10 rows of 8 bytes, and row 0 \(byte 128\) has 0"),
    "longer": (lambda data: data + b"1", r"is longer than its header says: .* row 10 \(byte 208\) should be the end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(case, tmp_path):
    change, message = BROKEN[case]
    (tmp_path / "bad.npy").write_bytes(change(whole_file(tmp_path)))
    with pytest.raises(ValueError, match=r"bad\.npy " + message):
        Rows([tmp_path / "good.npy", tmp_path / "bad.npy"])


@pytest.mark.parametrize("array, message", [
    (np.array([{}, 1]), "holds Python objects"), (np.float32(3), "holds one number"),
    (np.ones((3, 2), order="F"), "in the order of Fortran"), (np.ones((3, 5)), r"has rows of shape \(5,\) and dtype float64, "
     r"but .*good\.npy of \(4,\) and int16: they cannot be joined"), (np.ones((3, 4), np.int32), "dtype int32, but")], ids=str)
def test_an_array_that_does_not_fit(array, message, tmp_path):
    whole_file(tmp_path)
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"bad\.npy.* {message}"):
        Rows([tmp_path / "good.npy", tmp_path / "bad.npy"])


@pytest.mark.parametrize("size, message", [(0, "is empty: it should hold records of 13 bytes"),
                                           (44, r"is cut short, .*: record 3 \(byte 39\) has 5 of 13 bytes")])
def test_broken_records(size, message, tmp_path):
    (tmp_path / "file.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"file\.bin {message}"):
        Rows(tmp_path / "file.bin", np.uint8, (3, 4), before=1)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Rows(tmp_path / "nowhere.npy")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Rows(tmp_path / "nowhere.bin", np.uint8)
    with pytest.raises(ValueError, match="name one at least"):
        Rows([])


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    whole_file(tmp_path)
    rows = Rows(tmp_path / "good.npy")
    os.truncate(tmp_path / "good.npy", 128 + 7 * 8 + 3)
    assert rows[[6]].tolist() == [[24, 25, 26, 27]]
    for index in [7], [5, 6, 7]:
        with pytest.raises(ValueError, match=r"good\.npy ends in row 7 \(byte 187\), but had 10 rows when it was opened"):
            rows[index]


def test_a_disk_that_fails(tmp_path, monkeypatch):
    whole_file(tmp_path)
    rows = Rows(tmp_path / "good.npy")

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=r"row 3 \(byte 152\) cannot be read: Input/output error.*good\.npy"):
        rows[[3]]
