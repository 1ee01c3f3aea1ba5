"""Training on the ranks there are, against the same job on one: passes on any number of ranks."""

import contextlib
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import metrics
from mpiml.data import batches, share
from mpiml.nn import (
    AvgPool2d,
    BatchNorm2d,
    Concatenate,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    Residual,
    Sequential,
)
from mpiml.ops import cross_entropy, gelu, identity, mse_loss, relu
from mpiml.ops import mean as tensor_mean
from mpiml.ops import sum as tensor_sum
from mpiml.optim import SGD, Adam, clip_norm
from mpiml.parallel import Grid, RankError, RanksLost, Watch, evaluate, gradient, place
from mpiml.parallel import grid as grid_module
from mpiml.parallel.shared import SharedSum
from mpiml.parallel.sum import PlainSum, summation
from mpiml.schedule import F
from mpiml.tensor import Tensor

GRID = Grid()
ALONE = Grid(comm=MPI.COMM_SELF)
SHARED = GRID.size > 1 and sys.platform == "linux"


def mlp():
    return Sequential(Linear(12, 16), relu, LayerNorm(16), Dropout(0.3), Linear(16, 10))


def conv_net():
    return Sequential(
        Conv2d(2, 4, 3, padding=1), BatchNorm2d(4, samples=2), relu, MaxPool2d(2),
        Residual(Sequential(Conv2d(4, 4, 3, padding=1), GroupNorm(2, 4), gelu)),
        Concatenate(identity, Conv2d(4, 2, 1)), AvgPool2d(2), Flatten(), Dropout(0.2), Linear(6 * 2 * 2, 10))


def bag():
    return Sequential(Embedding(20, 6), Flatten(), Linear(6 * 5, 10))


def problem(model, samples):
    rng = np.random.default_rng(1)
    x = {"mlp": lambda: rng.standard_normal((samples, 12)),
         "conv_net": lambda: rng.standard_normal((samples, 2, 8, 8)),
         "bag": lambda: rng.integers(0, 20, (samples, 5))}[model.__name__]()
    return x, rng.integers(0, 10, samples)


def mine(grid, *arrays, multiple=1):
    start, stop = share(len(arrays[0]), grid.replica, grid.data, multiple)
    return [a[start:stop] for a in arrays]


@pytest.mark.parametrize("samples", [16, 17, 23])
@pytest.mark.parametrize("model", [mlp, conv_net, bag])
def test_the_gradient_is_that_of_one_rank(model, samples):
    x, y = problem(model, samples)
    results = []
    for grid in GRID, ALONE:
        net = place(model(), grid, seed=3, dtype=np.float64)
        loss = gradient(net, cross_entropy, grid)(*mine(grid, x, y, multiple=2))
        results.append((loss, net.gradient[:net.learnt].copy()))
        SGD(net, lr=0.0).step()  # lets the running statistics absorb what was measured
        results[-1] += (net.vector.copy(),)
    (loss, ours, vector), (one_loss, one, one_vector) = results
    assert loss == pytest.approx(one_loss, rel=1e-12)
    np.testing.assert_allclose(ours, one, rtol=0, atol=1e-10 * np.abs(one).max())
    np.testing.assert_allclose(vector, one_vector, rtol=1e-10, atol=1e-12)


def test_serial_training_without_a_grid_gives_the_same_gradient():
    x, y = problem(bag, 21)
    net, same = place(bag(), GRID, dtype=np.float64), bag().init(dtype=np.float64)
    gradient(net, cross_entropy, GRID)(*mine(GRID, x, y))
    (cross_entropy(same(x, training=True), y) / len(y)).backward()
    np.testing.assert_allclose(net.gradient, same.gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
@pytest.mark.parametrize("size", [16, 27])
def test_an_epoch_ends_like_on_one_rank(dtype, tolerance, size):
    x, y = problem(mlp, 205)
    results = []
    for grid in GRID, ALONE:
        net = place(mlp(), grid, dtype=dtype)
        optimizer, step = Adam(net, lr=0.01), gradient(net, cross_entropy, grid)
        for epoch in range(2):
            losses = []
            for bx, by in batches(x.astype(dtype), y, size, epoch=epoch, grid=grid):
                losses.append(step(bx, by))
                clip_norm(net, 1.0)
                optimizer.step()
        results.append((np.mean(losses), net.vector))
    (ours, vector), (one, one_vector) = results
    assert ours == pytest.approx(one, rel=tolerance)
    np.testing.assert_allclose(vector, one_vector, rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("mean", [lambda output, y: cross_entropy(output, y) / len(y),
                                  lambda output, y: tensor_mean((output[:, 0] - y) * (output[:, 0] - y))])
def test_a_mean_is_refused(mean):
    x, y = problem(mlp, 40)
    net = place(mlp(), GRID, dtype=np.float64)
    with pytest.raises(ValueError, match=r"the loss of \d+ samples is .* and that of the same samples twice as well"):
        gradient(net, mean, GRID)(*mine(GRID, x, y))


def test_a_loss_of_a_fixed_number_of_samples_is_taken():
    x, y = problem(mlp, 8 * GRID.size)
    weights = np.linspace(1, 2, 8)
    net = place(mlp(), GRID, dtype=np.float64)
    loss = gradient(net, lambda output, y: (output[:, 0] * weights).sum() if isinstance(output, np.ndarray) else
                    tensor_sum(output[:, 0] * weights), GRID)(*mine(GRID, x, y))
    assert np.isfinite(loss)


@pytest.mark.skipif(GRID.size == 1, reason="one rank has the whole batch")
def test_the_whole_batch_on_every_rank_is_worth_a_warning():
    x, y = problem(mlp, 24)
    net = place(mlp(), GRID, dtype=np.float64)
    step = gradient(net, cross_entropy, GRID)
    with pytest.warns(UserWarning, match="got the same 24 samples") if GRID.rank == 0 else contextlib.nullcontext():
        step(x, y)
    step(x, y)  # once is enough


def test_all_ranks_hold_the_same_bits():
    net = place(mlp(), GRID)
    x, y = (a.astype(np.float32) if a.dtype == float else a for a in problem(mlp, 40))
    step, optimizer = gradient(net, cross_entropy, GRID), SGD(net, lr=0.1, momentum=0.9)
    for _ in range(5):
        step(*mine(GRID, x, y))
        optimizer.step()
    GRID.same("weights", net.vector.tobytes().hex()[:4096])
    assert not np.array_equal(net.vector, mlp().init().vector)


def test_a_rank_without_samples_takes_part():
    x, y = problem(mlp, 1)
    net, one = place(mlp(), GRID, dtype=np.float64), place(mlp(), ALONE, dtype=np.float64)
    loss = gradient(net, cross_entropy, GRID)(*mine(GRID, x, y))
    assert loss == pytest.approx(gradient(one, cross_entropy, ALONE)(x, y), rel=1e-12)
    np.testing.assert_allclose(net.gradient, one.gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_evaluation_is_exact(size):
    x, y = problem(mlp, 333)
    measured = {"loss": cross_entropy, "accuracy": metrics.correct}
    net = place(mlp(), GRID, dtype=np.float64)
    ours = evaluate(net, x, y, measured, GRID, size)
    assert ours == evaluate(net, x, y, measured, ALONE, size)
    assert ours["accuracy"] == np.mean(net(x).argmax(axis=1) == y)
    assert ours["loss"] == pytest.approx(float(cross_entropy(net(x), y)) / 333, rel=1e-12)


def test_evaluation_of_nothing():
    with pytest.raises(ValueError, match="x has 0 and y has 0"):
        evaluate(identity, np.zeros((0, 3)), np.zeros(0), {}, GRID)


def test_a_nan_is_reported_by_all_and_training_may_go_on():
    x, y = problem(mlp, 24)
    net = place(mlp(), GRID, dtype=np.float64)
    step, optimizer = gradient(net, cross_entropy, GRID), SGD(net, lr=0.1)
    before = net.vector.copy()
    bad = x.copy()
    bad[-1, 5] = np.nan
    with pytest.raises(RankError, match=rf"step 0 is nan \(rank {GRID.size - 1}: 1 of the .* input are not finite, "
                                        r"the first at .*5\)\): clean the data") as caught:
        step(*mine(GRID, bad, y))
    assert caught.value.ranks == [GRID.size - 1]
    optimizer.step()
    np.testing.assert_array_equal(net.vector, before)
    assert np.isfinite(step(*mine(GRID, x, y)))


def test_a_diverged_model_is_told_from_bad_data():
    x, y = problem(mlp, 24)
    net = place(mlp(), GRID, dtype=np.float64)
    net.vector[:] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(RankError, match="training diverges: lower the learning rate"):
        gradient(net, cross_entropy, GRID)(*mine(GRID, x, y))


def test_an_infinite_gradient_of_a_finite_loss_is_reported():
    class Root(Linear):
        def __call__(self, x, training=False):
            return super().__call__(x, training) ** 0.5

    net = place(Root(3, 1, bias=False), GRID, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(RankError, match="gradient of step 0 is not finite"):
        gradient(net, mse_loss, GRID)(np.zeros((2, 3)), np.ones((2, 1)))


def test_an_empty_batch():
    net = place(mlp(), GRID, dtype=np.float64)
    with pytest.raises(RankError, match=f"batch of step 0 is empty on all {GRID.size} ranks"):
        gradient(net, cross_entropy, GRID)(np.zeros((0, 12)), np.zeros(0, int))


def test_x_and_y_of_different_lengths():
    with pytest.raises(ValueError, match="x has 3 samples but y has 2"):
        gradient(place(mlp(), GRID), cross_entropy, GRID)(np.zeros((3, 12)), np.zeros(2, int))


def test_a_model_that_forgets_training():
    class Forgetful(Linear):
        def __call__(self, x, training=False):
            return super().__call__(x)

    with pytest.raises(TypeError, match="hand `training` on to its layers"):
        gradient(place(Forgetful(12, 10), GRID, dtype=np.float64), cross_entropy, GRID)(*problem(mlp, 3))


def test_batch_norm_needs_shares_it_can_split():
    net = place(Sequential(BatchNorm2d(2)), GRID, dtype=np.float64)
    if GRID.size > 1:
        with pytest.raises(ValueError, match=f"cut into {GRID.size} pieces .*: give it samples="):
            gradient(net, cross_entropy, GRID)
    else:
        gradient(net, cross_entropy, GRID)
    net = place(Sequential(BatchNorm2d(2, samples=4), Flatten(), Linear(2 * 64, 10)), GRID, dtype=np.float64)
    x, y = problem(conv_net, 3 * GRID.size)
    step = gradient(net, cross_entropy, GRID)
    if GRID.size > 1:
        with pytest.raises(RankError, match=r"rank 1's share starts at sample 3 .* BatchNorm2d's samples=4") as caught:
            step(*mine(GRID, x, y))
        assert 1 in caught.value.ranks
    assert np.isfinite(step(*mine(GRID, x, y, multiple=4)))


def test_a_grid_that_does_not_fit():
    n = GRID.size
    with pytest.raises(ValueError, match=rf"data={n + 3} x pipe=1 needs {n + 3} processes, but there are {n}: start it with "
                                         rf"mpirun -n {n + 3}, or choose data x pipe among {n}x1.*1x{n}|1x1"):
        Grid(data=n + 3)
    with pytest.raises(ValueError, match=rf"pipe={n + 1} needs a multiple of {n + 1} processes, but there are {n}: choose"):
        Grid(pipe=n + 1)
    with pytest.raises(ValueError, match="pipe is a whole number above 0, not 0"):
        Grid(pipe=0)
    grid = Grid(pipe=n)
    assert (grid.data, grid.pipe, grid.stage, grid.replica) == (1, n, GRID.rank, 0)


def test_the_launcher_of_another_mpi(monkeypatch):
    for name in "PMI_SIZE", "OMPI_COMM_WORLD_SIZE":
        monkeypatch.setenv(name, str(GRID.size + 1))
    with pytest.raises(RuntimeError, match=rf"started {GRID.size + 1} processes \(PMI_SIZE\).* sees {GRID.size}"):
        Grid()


def test_ranks_that_differ_are_told_so():
    GRID.same("a constant", 1)
    if GRID.size > 1:
        with pytest.raises(RankError, match=r"text must be .* \(digest [0-9a-f]+\); .* \(digest [0-9a-f]+\)"):
            GRID.same("text", "a" * 1000 + str(GRID.rank > 0))
        told = f"number must be the same on all ranks, but .*rank {GRID.size - 1} has 7"
        with pytest.raises(RankError, match=told) as caught:
            GRID.same("number", 7 if GRID.rank == GRID.size - 1 else 5)
        assert GRID.size == 2 or caught.value.ranks == [GRID.size - 1]
        with pytest.raises(RankError, match=r"the model's seed, dtype, .* rank 0 has \(0, 'float32'"):
            place(mlp(), GRID, seed=GRID.rank)
        with pytest.raises(RankError, match="'samples': 9"):
            batches(np.zeros((9 + GRID.rank, 1)), np.zeros(9 + GRID.rank), 8, grid=GRID)


def test_weights_and_data_that_differ_are_refused():
    x, y = problem(mlp, 10)
    if GRID.size > 1:
        net = place(mlp(), GRID)
        net.vector[0] += GRID.rank == 1
        with pytest.raises(RankError, match="the weights must be the same on all replicas of a stage, but rank 1 has others"):
            gradient(net, cross_entropy, GRID)
        with pytest.raises(RankError, match="the numbers of samples in x and y"):
            evaluate(mlp().init(dtype=np.float64), x[GRID.rank:], y[GRID.rank:], {"loss": cross_entropy}, GRID)
    with pytest.raises(RuntimeError, match=r"call place\(model, grid\) before gradient"):
        gradient(mlp(), cross_entropy, GRID)


def test_two_steps_of_one_model_do_not_disturb_each_other():
    x, y = problem(bag, 16)
    net = place(bag(), GRID, dtype=np.float64)
    first = gradient(net, cross_entropy, GRID)
    first(*mine(GRID, x, y))
    expected = net.gradient.copy()
    second = gradient(net, lambda output, target: 2 * cross_entropy(output, target), GRID)
    second(*mine(GRID, x, y))
    np.testing.assert_allclose(net.gradient, 2 * expected)
    first(*mine(GRID, x, y))
    np.testing.assert_array_equal(net.gradient, expected)


def test_once_per_node():
    calls = []
    results = GRID.once_per_node(lambda a: calls.append(a) or [a, None, "text"], 5)
    assert results == [5, None, "text"]
    assert len(calls) == (GRID.node.rank == 0)

    def broken():
        raise OSError("no space")

    with pytest.raises(RankError, match="rank 0 failed in broken: OSError: no space") as caught:
        GRID.once_per_node(broken)
    assert 0 in caught.value.ranks
    assert GRID.all(True)
    assert GRID.all(GRID.rank > 0) is False


def test_arrays_once_per_node():
    calls = []

    def make(n):
        calls.append(n)
        return [np.arange(n, dtype=np.uint8), np.full((2, 3), 0.5), np.ones((4, 0), np.float32), np.arange(6).reshape(2, 3).T]

    arrays = GRID.arrays_once_per_node(make, 5)
    assert len(calls) == (GRID.node.rank == 0 or not SHARED)
    for array, expected in zip(arrays, make(5), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype and array.flags.writeable
    arrays[0][:] = GRID.rank
    GRID.comm.Barrier()
    assert (arrays[0] == GRID.rank).all()


@pytest.mark.parametrize("trouble", ["folder", "room"])
def test_arrays_are_made_by_each_rank_where_memory_cannot_be_shared(trouble, monkeypatch):
    if trouble == "folder":
        monkeypatch.setattr(grid_module, "_SHARED", "/nowhere")
    else:
        monkeypatch.setattr(grid_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    array, = GRID.arrays_once_per_node(lambda: [np.full(100, GRID.rank)])
    assert (array == GRID.rank).all()


def test_what_goes_wrong_with_arrays_is_raised_on_every_rank():
    def broken():
        raise FileNotFoundError("no such data")

    with pytest.raises(FileNotFoundError, match="no such data"):
        GRID.arrays_once_per_node(broken)


def test_an_error_of_one_rank_is_raised_on_all():
    def broken(number):
        if GRID.rank == GRID.size - 1:
            raise OSError(f"no space for {number}")

    assert GRID.together("counting", lambda number: number + GRID.rank, 5) == 5 + GRID.rank
    with pytest.raises(RankError, match=f"^rank {GRID.size - 1} failed in writing: OSError: no space for 7$") as caught:
        GRID.together("writing", broken, 7)
    assert caught.value.ranks == [GRID.size - 1]
    assert GRID.maximum(GRID.rank, -GRID.rank, True) == [GRID.size - 1, 0, 1]


def test_an_error_of_all_ranks_is_raised_if_nobody_died_meanwhile():
    def refuse():
        raise RankError("all found this", [0])

    grid = object.__new__(Grid)
    grid.elastic, grid._attempting, grid.undone, grid.size = True, False, 0, 2
    grid.comm = SimpleNamespace(waiting=lambda what: contextlib.nullcontext(), Agree=lambda flag: flag)
    with pytest.raises(RankError, match="all found this"):
        grid.attempt(refuse)
    grid.comm.Agree, grid._go_on_without = lambda flag: 0, lambda: [2]
    with pytest.raises(RanksLost, match="rank 2 died: 2 ranks are left"):
        grid.attempt(refuse)
    assert grid.undone == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 5, 1000, 30011])
def test_the_sum_in_shared_memory(size, dtype):
    total = summation(GRID, size, dtype)
    assert isinstance(total, SharedSum if SHARED else PlainSum)
    if SHARED and GRID.rank == 0:
        total._words[16] = 2**31 - 7  # the counter of rounds wraps around on the way
    GRID.comm.Barrier()
    for step in range(20):
        total.rows[0][:] = np.arange(size) % 11 + GRID.rank + step
        if (GRID.rank + step) % 3 == 0:
            time.sleep(0.0005)
        total()
        np.testing.assert_array_equal(
            total.rows[0], (np.arange(size) % 11 + step) * GRID.size + sum(range(GRID.size)))


LAYOUTS = {  # as if runs of ranks had a node each
    "two": lambda rank, size: rank * 2 // size,
    "three": lambda rank, size: rank * 3 // size,
    "growing": lambda rank, size: int((8 * rank + 1) ** 0.5 - 1) // 2,  # of 1, 2, 3, ... ranks: one is of mean size
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_across_nodes(layout):
    grid = Grid()
    nodes = [LAYOUTS[layout](rank, grid.size) for rank in range(grid.size)]
    grid.near = grid.comm.Split(nodes[grid.rank])
    grid.across = grid.comm.Split(grid.near.rank)
    total = summation(grid, 1003, np.float64)
    sizes = {nodes.count(node) for node in nodes}
    alike = SHARED and len(sizes) == 1 and sizes != {1}
    assert isinstance(total, SharedSum if alike else PlainSum)
    for step in range(5):
        total.rows[0][:] = np.arange(1003) * (grid.rank + step)
        total()
        np.testing.assert_array_equal(
            total.rows[0], np.arange(1003.0) * (sum(range(grid.size)) + step * grid.size))


def test_texts_of_any_length():
    assert GRID.texts("é" * GRID.rank) == ["é" * rank for rank in range(GRID.size)]


def test_the_callers_communicator_is_left_alone():
    comm = MPI.COMM_WORLD.Dup()
    grid = Grid(comm=comm)
    assert grid.comm != comm
    request = comm.Irecv(np.empty(1), MPI.ANY_SOURCE, MPI.ANY_TAG)  # would catch any message of the library
    net = place(bag(), grid, dtype=np.float64)
    x, y = problem(bag, 16)
    gradient(net, cross_entropy, grid)(*mine(grid, x, y))
    evaluate(net, x, y, {"loss": cross_entropy}, grid)
    assert not request.Test()
    comm.Send(np.ones(1), comm.rank)
    request.Wait()


def test_the_watch_accounts_for_all_time():
    watch = Watch()
    for step in range(3):
        done = 10 + 0.1 * (GRID.rank + 1)
        watch.action(step, F(0, 0), 10.0, 10.0, done, done)
        watch.all_reduce(step, 20.0, 20.5 if GRID.rank else 20.25)
    times = watch.times(GRID)
    slow = np.arange(GRID.size) > 0
    np.testing.assert_allclose(times["compute"], 0.3 * np.arange(1, GRID.size + 1))
    np.testing.assert_allclose(times["communicate"], 0.75)
    np.testing.assert_allclose(times["wait"], 0.75 * slow)
    lines = watch.report(GRID).splitlines()
    assert lines[0].startswith(f"slowest rank {GRID.size - 1}: compute {0.3 * GRID.size:.2f} s")
    assert lines[1].startswith("fastest rank 0: compute 0.30 s")


def test_the_step_takes_its_arrays_as_they_come():
    net = place(bag(), GRID, dtype=np.float64)
    x, y = mine(GRID, *problem(bag, 16))
    step = gradient(net, cross_entropy, GRID)
    expected = step(x, y)
    assert step(np.asfortranarray(x), y.astype(np.uint8)) == expected
    assert step(x[::-1][::-1], y) == expected
    assert isinstance(expected, float)
    assert not isinstance(net(x), Tensor)
