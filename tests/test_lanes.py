"""The same bits on any grid: passes on any number of ranks."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from train_lanes import MODELS, digest, problem, train

from mpiml import lanes, schedule
from mpiml.data import batches, share
from mpiml.lanes import Leaves, Node, add_rows, cover, program, root
from mpiml.nn import BatchNorm2d, Flatten, Linear, Sequential
from mpiml.ops import cross_entropy
from mpiml.parallel import Grid, RankError, evaluate, gradient, place
from mpiml.parallel.sum import TreeSum

RANKS = MPI.COMM_WORLD.size
GRIDS = [(pipe, order) for pipe in (1, 2, 4) for order in ("gpipe", "one_f_one_b", "zb_h1", "interleaved", "zb_v")
         if RANKS % pipe == 0 and (pipe > 1 or order == "one_f_one_b")]
HOSTS = [hosts for hosts in (2, 3, 4) if RANKS % hosts == 0 and RANKS > hosts]


def tree_sum(values, node, count):
    """The definition, by recursion."""
    if node.index << node.level >= count:
        return None
    if node.level == 0:
        return values[node.index]
    left, right = (tree_sum(values, Node(node.level - 1, 2 * node.index + side), count) for side in (0, 1))
    return left if right is None else left + right


def spread(rng, *shape):
    """Numbers whose sum depends on the order."""
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)).astype(np.float32)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 12), st.randoms(use_true_random=False))
def test_any_cover_makes_the_same_root(count, ranks, rnd):
    values = spread(np.random.default_rng(count), count, 5)
    homes = [rnd.randrange(ranks) for _ in range(count)]
    nodes = [node for rank in range(ranks) for node in cover([lane for lane in range(count) if homes[lane] == rank], count)]
    rows = np.stack([tree_sum(values, node, count) for node in nodes])
    result = np.empty((1, 5), np.float32)
    add_rows(rows, program(nodes, [root(count)], count), 0, 5, result)
    np.testing.assert_array_equal(result[0], tree_sum(values, root(count), count))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 16, 21])
def test_a_run_is_covered_by_few_nodes(count):
    for first, stop in itertools.combinations(range(count + 1), 2):
        nodes = cover(range(first, stop), count)
        leaves = [lane for level, index in nodes for lane in range(index << level, min((index + 1) << level, count))]
        assert leaves == list(range(first, stop))
        assert len(nodes) <= max(1, 2 * (count - 1).bit_length())
    assert cover(range(count), count) == [root(count)]


@pytest.mark.parametrize("stop", [1, 3, 5, 11])
def test_lanes_are_added_in_one_order_whenever_they_are_ready(stop):
    net = Sequential(Linear(3, 2)).init()
    values = spread(np.random.default_rng(0), 11, 10)
    held = range(stop // 3, stop)
    empty = {stop // 2} if stop > 3 else set()
    there = [None if lane in empty else value for lane, value in enumerate(values)]

    def whole(node):
        if node.index << node.level >= 11:
            return None
        if node.level == 0:
            return there[node.index]
        pair = [part for part in (whole(Node(node.level - 1, 2 * node.index + side)) for side in (0, 1)) if part is not None]
        return pair[0] + pair[1] if len(pair) == 2 else pair[0] if pair else None

    rows = [np.empty(10, np.float32) for _ in cover(held, 11)]
    leaves = Leaves(net, rows, held, 11)
    rnd = random.Random(1)  # noqa: S311
    for _ in range(10):
        leaves.clear()
        order = [m for m in range(len(held)) for _ in range(2) if held[m] not in empty]
        rnd.shuffle(order)
        seen = set()
        for m in empty:
            leaves.close(m - held[0])
        for m in order:  # two parts of each lane, of several lanes at a time
            leaves.at(m)
            value = values[held[m]][:-2]
            part = np.concatenate([p.grad.ravel() for p in net.layout().values()])
            for p, start, end in zip(net.layout().values(), net.segments[:-1], net.segments[1:], strict=True):
                if m in seen:
                    p.grad[...] = value[start:end].reshape(p.shape, order=p.order)
                else:
                    assert not part.any()
            if m in seen:
                leaves.close(m, *values[held[m]][-2:])
            seen.add(m)
        leaves.finish()
        for node, row in zip(cover(held, 11), rows, strict=True):
            expected = whole(node)
            np.testing.assert_array_equal(row, np.zeros(10) if expected is None else expected)


@pytest.mark.parametrize("pipe, order", GRIDS)
@pytest.mark.parametrize("model, count, size", [("mlp", 8, 64), ("mlp", 11, 40), ("conv_net", 8, 100)])
def test_every_grid_ends_with_the_weights_of_one_process(model, count, size, pipe, order):
    net = MODELS[model]()
    if len(net) < pipe * (2 if order in ("interleaved", "zb_v") else 1):
        return  # fewer layers than chunks
    x, y = problem(model, 150)
    multiple = 4 if model == "conv_net" else 1
    alone = MODELS[model]().init(seed=1)
    losses = train(alone, lanes.gradient(alone, cross_entropy, count), x, y, size, 5, multiple=multiple)
    grid = Grid(pipe=pipe, lanes=count)
    net = place(net, grid, seed=1, schedule=getattr(schedule, order))
    ours = train(net, gradient(net, cross_entropy, grid), x, y, size, 5, grid=grid, multiple=multiple)
    weights = net.collect()
    if grid.rank == 0:
        assert digest(weights) == digest({name: p.value for name, p in alone.named().items()})
    assert ours == losses
    assert evaluate(net, x, y, {"loss": cross_entropy}, grid) == evaluate(net, x, y, {"loss": cross_entropy}, grid, 256)


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
@pytest.mark.parametrize("model", MODELS)
def test_threads_change_no_bit(model, threads):
    x, y = problem(model, 150)
    multiple = 4 if model == "conv_net" else 1
    alone, same = MODELS[model]().init(seed=1), MODELS[model]().init(seed=1)
    expected = train(alone, lanes.gradient(alone, cross_entropy, 11, threads=1), x, y, 100, 3, multiple=multiple)
    assert train(same, lanes.gradient(same, cross_entropy, 11, threads=threads), x, y, 100, 3, multiple=multiple) == expected
    grid = Grid(lanes=11)
    net = place(MODELS[model](), grid, seed=1)
    step = gradient(net, cross_entropy, grid, threads=threads)
    assert train(net, step, x, y, 100, 3, grid=grid, multiple=multiple) == expected
    np.testing.assert_array_equal(same.vector, alone.vector)
    np.testing.assert_array_equal(net.vector, alone.vector)


def test_an_error_in_a_thread_is_raised():
    x, y = problem("mlp", 12)
    net = MODELS["mlp"]().init()
    step = lanes.gradient(net, cross_entropy, 4, threads=4)
    with pytest.raises(ValueError, match="label 10"):
        step(x, np.where(np.arange(12) == 7, 10, y))
    loss = step(x, y)  # what the failed step has left does no harm
    assert loss == lanes.gradient(MODELS["mlp"]().init(), cross_entropy, 4, first_step=1)(x, y)


@pytest.mark.parametrize("count", [RANKS, RANKS + 1, 16])
def test_the_sum_by_messages(count):
    values = spread(np.random.default_rng(3), count, 1003)
    nodes = [cover(range(*share(count, rank, RANKS)), count) for rank in range(RANKS)]
    rows = np.stack([tree_sum(values, node, count) for node in nodes[MPI.COMM_WORLD.rank]])
    TreeSum(MPI.COMM_WORLD.Dup(), nodes, count)(rows)
    np.testing.assert_array_equal(rows[0], tree_sum(values, root(count), count))


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("spread_out", [False, True])
def test_several_nodes(hosts, spread_out):
    grid = Grid(lanes=13)
    each = grid.size // hosts
    grid.near = grid.comm.Split(grid.rank % hosts if spread_out else grid.rank // each)
    grid.across = grid.comm.Split(grid.near.rank)
    x, y = problem("mlp", 100)
    alone = MODELS["mlp"]().init(seed=1)
    train(alone, lanes.gradient(alone, cross_entropy, 13), x, y, 50, 3)
    net = place(MODELS["mlp"](), grid, seed=1)
    train(net, gradient(net, cross_entropy, grid), x, y, 50, 3, grid=grid)
    np.testing.assert_array_equal(net.vector, alone.vector)


def test_batches_smaller_than_the_lanes():
    grid = Grid(lanes=16)
    x, y = problem("mlp", 5)
    alone = MODELS["mlp"]().init(seed=1)
    expected = lanes.gradient(alone, cross_entropy, 16)(x, y)
    net = place(MODELS["mlp"](), grid, seed=1)
    start, stop = share(5, grid.replica, grid.data, lanes=16)
    assert gradient(net, cross_entropy, grid)(x[start:stop], y[start:stop]) == expected
    np.testing.assert_array_equal(net.gradient, alone.gradient)


def test_what_lanes_refuse():
    with pytest.raises(ValueError, match=f"one at least for each of the {RANKS} replicas, not 0"):
        Grid(lanes=0)
    grid = Grid(lanes=2 * RANKS + 1)
    net = place(MODELS["mlp"](), grid)
    with pytest.raises(ValueError, match=rf"has those as its micro-batches, here {2 * RANKS + 1}: leave out microbatches=2"):
        gradient(net, cross_entropy, grid, microbatches=2)
    with pytest.raises(ValueError, match=r"threads is a whole number above 0, .* not 0"):
        gradient(net, cross_entropy, grid, threads=0)
    plain = Grid()
    with pytest.raises(ValueError, match="1 on a grid without lanes or with a pipeline, not 2"):
        gradient(place(MODELS["mlp"](), plain), cross_entropy, plain, threads=2)
    step = gradient(net, cross_entropy, grid)
    x, y = problem("mlp", 6 * RANKS)
    if RANKS > 1:
        mine = slice(6 * grid.rank, 6 * grid.rank + 6)
        with pytest.raises(RankError, match=r"rank \d has 6 samples of a batch of \d+, but its lanes have \d+: use batches"):
            step(x[mine], y[mine])
        with pytest.raises(RankError, match=r"the ranks of this job differ in\n  lanes +16"):
            Grid(lanes=16 + grid.rank)
    for bx, by in batches(x, y, 6 * RANKS, grid=grid):
        assert np.isfinite(step(bx, by))
    alone = MODELS["mlp"]().init()
    with pytest.raises(ValueError, match="a whole number above 0, not 0"):
        lanes.gradient(alone, cross_entropy, 0)
    with pytest.raises(ValueError, match="threads is a whole number above 0, not 0"):
        lanes.gradient(alone, cross_entropy, 2, threads=0)
    with pytest.raises(ValueError, match="x has 3 and y has 2"):
        lanes.gradient(alone, cross_entropy, 2)(x[:3], y[:2])
    with pytest.raises(ValueError, match="cut into 2 pieces"):
        lanes.gradient(Sequential(BatchNorm2d(1), Flatten(), Linear(4, 2)).init(), cross_entropy, 2)
