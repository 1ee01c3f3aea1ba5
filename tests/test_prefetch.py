"""Batches read ahead in a thread: the same ones, whatever happens meanwhile."""

import gc
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
from launch import environment, mpirun

from mpiml.data import batches, crop_and_flip


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mpiml-prefetch")]


def gone():
    """Whether the threads end, in a moment."""
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not threads()


def grid(rank=0, ranks=1):
    return SimpleNamespace(replica=rank, data=ranks, lanes=None, pipe=1, undone=0, generation=0, same=lambda what, value: None)


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), "u1")


@pytest.mark.parametrize("ahead", [1, 2, 100])
def test_the_same_batches(ahead):
    options = {"epoch": 2, "seed": 3, "augment": crop_and_flip, "transform": lambda x: x / 255, "start": 1}
    early = batches(IMAGES, np.arange(50), 8, **options, ahead=ahead)
    late = batches(IMAGES, np.arange(50), 8, **options)
    assert len(early) == len(late) == 6
    for (x, y), (x_late, y_late) in zip(early, late, strict=True):
        np.testing.assert_array_equal(x, x_late)
        np.testing.assert_array_equal(y, y_late)
    assert gone() and len(list(early)) == 6


class Source:
    """Numbers that tell which of them were read, by which thread."""

    def __init__(self, n, fails=None):
        self.n, self.fails, self.read = n, fails, []
        self.threads = set()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name)
        if self.fails in index:
            raise OSError(f"row {self.fails} cannot be read")
        self.read.append(index.tolist())
        return np.asarray(index)


def reads(source, count):
    deadline = time.monotonic() + 5
    while len(source.read) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)  # and no more
    return source.read


def test_it_reads_as_far_ahead_as_it_was_told_to():
    source = Source(20)
    share = iter(batches(source, np.arange(20), 2, shuffle=False, ahead=3))
    next(share)
    assert reads(source, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    next(share)
    assert reads(source, 5)[4:] == [[8, 9]]
    assert all(name.startswith("mpiml-prefetch") for name in source.threads)
    share.close()
    assert gone()


def test_without_ahead_there_is_no_thread():
    source = Source(20)
    for _ in batches(source, np.arange(20), 2):
        assert not threads()
    assert source.threads == {threading.current_thread().name}


def test_a_batch_comes_again_in_other_shares():
    # What was read ahead for the shares of before is nobody's any more.
    smaller, source = grid(0, 4), Source(32)
    seen = []
    for x, y in batches(source, np.arange(32), 8, shuffle=False, grid=smaller, ahead=2):
        assert x.tolist() == y.tolist()
        seen.append(y.tolist())
        if len(seen) == 1:
            reads(source, 3)
            smaller.data = 2  # lost elsewhere, after the step
        if len(seen) == 2:
            reads(source, 6)
            smaller.data, smaller.undone = 1, 1  # lost in the step
    assert seen == [[0, 1], [8, 9, 10, 11], list(range(8, 16)), list(range(16, 24)), list(range(24, 32))]
    assert gone()


def test_an_exception_is_raised_where_its_batch_was_wanted():
    source = Source(20, fails=5)
    seen = []
    with pytest.raises(OSError, match="row 5 cannot be read") as caught:
        for _, y in batches(source, np.arange(20), 2, shuffle=False, ahead=2):
            seen.append(y.tolist())
    assert seen == [[0, 1], [2, 3]]
    assert "in __getitem__" in "".join(traceback.format_exception(caught.value))
    assert gone()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_the_thread_ends_with_the_loop(how):
    def loop():
        for _ in batches(Source(100), np.arange(100), 2, ahead=2):
            assert len(threads()) == 1
            if how == "break":
                break
            raise KeyError("of the loop")

    if how == "break":
        loop()
    else:
        with pytest.raises(KeyError, match="of the loop"):
            loop()
    gc.collect()
    assert gone()


@pytest.mark.parametrize("ahead", [-1, 1.5, "2", None])
def test_how_far_ahead(ahead):
    with pytest.raises(ValueError, match="ahead is a number of batches to be read ahead, a whole number from 0, not "):
        batches(np.zeros(9), np.zeros(9), 3, ahead=ahead)


PROGRAM = """
import sys
import numpy as np
from mpiml.data import batches
share = iter(batches(np.zeros(100), np.zeros(100), 2, ahead=3))
next(share)
{}
"""


@pytest.mark.launch
@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1)])
def test_the_program_ends_though_the_loop_is_under_way(end, code):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(end)], capture_output=True, text=True, timeout=60,
                         env=environment())
    assert run.returncode == code and ("ZeroDivisionError" in run.stderr) == (code == 1), run.stderr


JOB = """
import os, sys
import numpy as np
from mpiml.data import Rows, batches
from mpiml.nn import Linear
from mpiml.ops import cross_entropy
from mpiml.optim import SGD
from mpiml.parallel import Grid, gradient, place

grid = Grid()
path = f"{sys.argv[1]}/x_{grid.rank}.npy"
np.save(path, np.ones((640, 4), np.float32))
x, y = Rows(path), np.zeros(640, int)
model = place(Linear(4, 2), grid, seed=0)
step, optimizer = gradient(model, cross_entropy, grid), SGD(model, lr=0.1)
if grid.rank == 1:
    os.truncate(path, 128 + 300 * 16)
for images, labels in batches(x, y, 64, grid=grid, shuffle=False, ahead=int(sys.argv[2])):
    step(images, labels)
    optimizer.step()
"""


@pytest.mark.launch
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_row_that_one_rank_cannot_read_ends_the_job(ahead, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    run = mpirun(2, str(tmp_path / "job.py"), str(tmp_path), str(ahead), timeout=60)
    assert run.code and not run.left
    assert "rank 1 of 2" in run.err and "x_1.npy ends in row 300 (byte 4928)" in run.err, run.err
