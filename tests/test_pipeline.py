"""Pipelines and hybrids on the ranks there are, against the same job on one: passes on any number of ranks."""

import functools
import itertools
import json
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import metrics
from mpiml.data import batches, share
from mpiml.nn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    Residual,
    Sequential,
    given,
    normal,
)
from mpiml.ops import cross_entropy, gelu, matmul, mean, mse_loss, relu, reshape, softmax, transpose
from mpiml.optim import SGD, Adam, clip_norm
from mpiml.parallel import Grid, Profile, RankError, Watch, evaluate, gradient, place, predict, profile
from mpiml.parallel.place import partition
from mpiml.parallel.watch import _clock
from mpiml.save import load, load_model, save
from mpiml.schedule import (
    SCHEDULES,
    B,
    F,
    ScheduleError,
    W,
    gpipe,
    interleaved,
    one_f_one_b,
    orders,
    owners,
    simulate,
    zb_h1,
    zb_v,
)
from mpiml.tensor import op

RANKS = MPI.COMM_WORLD.size
ALONE = Grid(comm=MPI.COMM_SELF)
PIPES = [pipe for pipe in range(1, RANKS + 1) if RANKS % pipe == 0]


@functools.cache
def grid_of(pipe):
    return Grid(pipe=pipe)


# --- Models of 17 layers or more, for two chunks on each of eight stages ---------------------------------------

def mlp():
    blocks = [layer for _ in range(7) for layer in (Linear(9, 9), relu)]
    return Sequential(Linear(12, 9), LayerNorm(9), *blocks, Dropout(0.3), Linear(9, 10))


def conv_net():
    blocks = [Residual(Sequential(Conv2d(4, 4, 3, padding=1), GroupNorm(2, 4), gelu)) for _ in range(6)]
    return Sequential(Conv2d(2, 4, 3, padding=1), BatchNorm2d(4, samples=2), relu, *blocks, MaxPool2d(2),
                      Conv2d(4, 6, 3, stride=2, padding=1), relu, BatchNorm2d(6, samples=1), Dropout(0.2), relu, Flatten(),
                      Linear(24, 10))


class Attention(Module):
    def __init__(self, features, heads):
        self.heads = heads
        self.project, self.out = Linear(features, 3 * features), Linear(features, features)

    def __call__(self, x, training=False):
        n, t, d = x.shape
        parts = transpose(reshape(self.project(x, training), (n, t, 3, self.heads, d // self.heads)), (2, 0, 3, 1, 4))
        q, k, v = parts[0], parts[1], parts[2]
        scores = softmax(matmul(q, transpose(k, (0, 1, 3, 2))) * (d // self.heads) ** -0.5)
        return self.out(reshape(transpose(matmul(scores, v), (0, 2, 1, 3)), (n, t, d)), training)


class Positions(Module):
    def __init__(self, length, features):
        self.weight = Parameter((length, features), normal(0.1))

    def __call__(self, x, training=False):
        weight, = given(training, self.weight)
        return x + weight


def transformer():
    def block(i):
        body = Attention(8, 2) if i % 2 == 0 else Sequential(Linear(8, 16), gelu, Linear(16, 8))
        return Residual(Sequential(LayerNorm(8), body))
    return Sequential(Embedding(20, 8), Positions(5, 8), Dropout(0.1), *[block(i) for i in range(12)], LayerNorm(8),
                      lambda x: mean(x, axis=1), Linear(8, 10))


def problem(model, samples):
    rng = np.random.default_rng(1)
    x = {"mlp": lambda: rng.standard_normal((samples, 12)),
         "conv_net": lambda: rng.standard_normal((samples, 2, 8, 8)),
         "transformer": lambda: rng.integers(0, 20, (samples, 5))}[model.__name__]()
    return x, rng.integers(0, 10, samples)


def mine(grid, *arrays, multiple=1):
    start, stop = share(len(arrays[0]), grid.replica, grid.data, multiple)
    return [a[start:stop] for a in arrays]


@functools.cache
def expected(model, samples):
    """Loss, {name: gradient} and {name: value after a step} of one rank with the whole batch at once."""
    net = place(model(), ALONE, seed=3, dtype=np.float64)
    loss = gradient(net, cross_entropy, ALONE)(*problem(model, samples))
    gradients = {name: p.grad.copy() for name, p in net.named().items() if not name.endswith(("_mean", "_var", "_tracked"))}
    clip_norm(net, 0.5)
    SGD(net, lr=0.1).step()
    return loss, gradients, {name: p.value.copy() for name, p in net.named().items()}


def check(grid, model, samples, schedule=one_f_one_b, **options):
    """One step on the grid must leave the loss, the gradients and the weights of one rank."""
    loss, gradients, weights = expected(model, samples)
    net = place(model(), grid, seed=3, dtype=np.float64, schedule=schedule)
    step = gradient(net, cross_entropy, grid, **options)
    assert step(*mine(grid, *problem(model, samples), multiple=2)) == pytest.approx(loss, rel=1e-12)
    largest = max(np.abs(g).max() for g in gradients.values())
    for name, parameter in net.named().items():
        if name in gradients:
            np.testing.assert_allclose(parameter.grad, gradients[name], rtol=0, atol=1e-10 * largest, err_msg=name)
    clip_norm(net, 0.5)
    SGD(net, lr=0.1).step()
    for name, parameter in net.named().items():
        np.testing.assert_allclose(parameter.value, weights[name], rtol=1e-10, atol=1e-12, err_msg=name)


def some_mlp(grid, **options):
    return place(mlp(), grid, dtype=np.float64, **options)


@pytest.mark.parametrize("model", [mlp, conv_net, transformer])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
@pytest.mark.parametrize("pipe", PIPES)
def test_the_gradient_is_that_of_one_rank(pipe, microbatches, schedule, model):
    check(grid_of(pipe), model, 19, schedule=schedule, microbatches=microbatches)


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("pipe", PIPES)
def test_fewer_samples_than_micro_batches(pipe, samples):
    for schedule in one_f_one_b, interleaved, zb_v:
        check(grid_of(pipe), transformer, samples, schedule=schedule, microbatches=8)
    check(grid_of(pipe), conv_net, samples, microbatches=5)


@pytest.mark.parametrize("model", [mlp, conv_net, transformer])
@pytest.mark.parametrize("pipe", PIPES)
def test_recomputed_stages_give_the_same_gradient(pipe, model):
    check(grid_of(pipe), model, 19, microbatches=4, recompute=True)
    check(grid_of(pipe), model, 19, microbatches=4, recompute={0, pipe - 1}, schedule=zb_v)


@pytest.mark.parametrize("pipe", PIPES)
def test_an_epoch_of_uneven_batches_ends_like_on_one_rank(pipe):
    x, y = problem(transformer, 61)
    results = []
    for grid, microbatches in (grid_of(pipe), 3), (ALONE, 1):
        net = place(transformer(), grid, dtype=np.float64, schedule=interleaved)
        optimizer, step = Adam(net, lr=0.01), gradient(net, cross_entropy, grid, microbatches)
        losses = []
        for bx, by in batches(x, y, 25, grid=grid):
            losses.append(step(bx, by))
            optimizer.step()
        results.append((losses, net.collect() if grid is ALONE else net.named()))
    (ours, held), (one, weights) = results
    assert ours == pytest.approx(one, rel=1e-10)
    for name, parameter in held.items():
        np.testing.assert_allclose(parameter.value, weights[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("pipe", PIPES)
def test_shapes_and_lengths_may_change_from_step_to_step(pipe):
    def model():
        return Sequential(*[Linear(4, 4) for _ in range(8)], lambda x: mean(x, axis=1), Linear(4, 10))

    grid = grid_of(pipe)
    rng = np.random.default_rng(0)
    net, one = (place(model(), g, dtype=np.float64) for g in (grid, ALONE))
    step, alone = gradient(net, cross_entropy, grid, 3), gradient(one, cross_entropy, ALONE)
    for samples, length in [(9, 3), (9, 3), (9, 5), (4, 5), (9, 3), (13, 1)]:
        x, y = rng.standard_normal((samples, length, 4)), rng.integers(0, 10, samples)
        assert step(*mine(grid, x, y)) == pytest.approx(alone(x, y), rel=1e-12)


@pytest.mark.parametrize("width", [1, 300, 3000, 400_000])
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, zb_v], ids=lambda schedule: schedule.__name__)
def test_messages_of_all_sizes(schedule, width):
    # From 8 bytes to megabytes, far below and far above the size from which an MPI waits for the receiver.
    class Scale(Module):
        def __init__(self):
            self.weight = Parameter((1,), normal())

        def __call__(self, x, training=False):
            weight, = given(training, self.weight)
            return x * weight

    grid = grid_of(RANKS)
    x, y = np.random.default_rng(0).standard_normal((4, width)), np.zeros((4, width))
    results = []
    for g in grid, ALONE:
        net = place(Sequential(*[Scale() for _ in range(2 * RANKS)]), g, dtype=np.float64, schedule=schedule)
        results.append([gradient(net, mse_loss, g, 4)(x, y) for _ in range(2)])
    assert results[0] == pytest.approx(results[1], rel=1e-10)


class Synchronous:
    """A communicator whose sends are through only when they are received, as they may be in any MPI."""

    def __init__(self, comm):
        self.comm, self.Isend = comm, comm.Issend

    def __getattr__(self, name):
        return getattr(self.comm, name)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_schedule_needs_mpi_to_buffer_messages(schedule):
    x, y = problem(mlp, 16)
    grid = grid_of(RANKS)
    results = []
    for synchronous in False, True:
        net = some_mlp(grid, schedule=schedule)
        if synchronous:
            net.link._comm = Synchronous(net.link._comm)
        step = gradient(net, cross_entropy, grid, 6)
        results.append([step(x, y), step(x[:9], y[:9]), predict(net, x, grid, 2).tolist()])
    assert results[0] == results[1]


def test_the_callers_communicator_is_left_alone():
    comm = MPI.COMM_WORLD.Dup()
    request = comm.Irecv(np.empty(1), MPI.ANY_SOURCE, MPI.ANY_TAG)  # would catch any message of the library
    x, y = problem(mlp, 16)
    grid, watch = Grid(pipe=RANKS, comm=comm), Watch()
    net = some_mlp(grid)
    gradient(net, cross_entropy, grid, 4, watch=watch)(x, y)
    predict(net, x, grid, 3)
    evaluate(net, x, y, {"loss": cross_entropy}, grid)
    watch.draw(grid)
    net.collect()
    assert not request.Test()
    comm.Send(np.ones(1), comm.rank)
    request.Wait()


def test_grids_of_some_of_the_ranks():
    if RANKS % 2 == 0:
        half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
        grid = Grid(pipe=half.size, comm=half)
        check(grid, [mlp, transformer][MPI.COMM_WORLD.rank % 2], 19, microbatches=4, schedule=zb_h1)


def test_memory_for_live_micro_batches_is_what_the_simulation_says():
    # Each layer keeps a large array from its forward to its backward pass, which can be counted.
    kept, alive = [], []

    @op
    def keeping(x):
        big = np.ones(100_000)
        kept.append(weakref.ref(big))
        alive.append(sum(ref() is not None for ref in kept))
        return x + 0, (lambda g: g * big[0],)

    @op
    def keeping_for_weights(x, weight):
        big = np.ones(100_000)
        kept.append(weakref.ref(big))
        alive.append(sum(ref() is not None for ref in kept))
        return x * weight, (lambda g: g * weight, lambda g: (g * x).sum(keepdims=True).reshape(1) * big[0])

    class Keeping(Module):
        def __init__(self):
            self.weight = Parameter((1,), normal())

        def __call__(self, x, training=False):
            return keeping_for_weights(x, *given(training, self.weight))

    grid = grid_of(RANKS)
    for schedule, microbatches in (gpipe, 8), (one_f_one_b, 8), (interleaved, 8), (zb_h1, 8), (zb_v, 8), (one_f_one_b, 2):
        layers = [Sequential(Linear(3, 3), Keeping() if "zb" in schedule.__name__ else keeping) for _ in range(2 * RANKS)]
        net = place(Sequential(*layers), grid, dtype=np.float64, schedule=schedule)
        step = gradient(net, mse_loss, grid, microbatches)
        x = np.ones((8, 3))
        step(x, x)
        del alive[:], kept[:]
        step(x, x)
        blocks = len(layers) // len(net.bounds)  # of each chunk
        assert max(alive) == blocks * simulate(schedule, RANKS, microbatches).peak[grid.stage], schedule
        assert not any(ref() is not None for ref in kept)


def test_recomputation_frees_the_activations():
    def peak(recompute):
        net = place(Sequential(*[Linear(64, 64) for _ in range(4 * RANKS)]), grid_of(RANKS), schedule=gpipe)
        step = gradient(net, mse_loss, grid_of(RANKS), 8, recompute=recompute)
        x = np.ones((4096, 64), np.float32)
        step(x, x)
        tracemalloc.start()
        step(x, x)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak(True) < 0.6 * peak(False)


@pytest.mark.parametrize("schedule", [one_f_one_b, interleaved, zb_v], ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("pipe", PIPES)
def test_predictions_come_in_the_callers_order_on_every_rank(pipe, schedule):
    grid = grid_of(pipe)
    for model in mlp, conv_net, transformer:
        x, y = problem(model, 50)
        net, one = place(model(), grid, dtype=np.float64, schedule=schedule), model().init(dtype=np.float64)
        for size in 1, 7, 100:
            np.testing.assert_allclose(predict(net, x, grid, size), one(x), rtol=1e-12, atol=1e-14)
        measured = {"loss": cross_entropy, "accuracy": metrics.correct}
        assert evaluate(net, x, y, measured, grid, 7) == evaluate(one, x, y, measured, ALONE, 7)
    negative = predict(net, x, grid, 9, transform=lambda ids: 19 - ids)
    np.testing.assert_allclose(negative, one(19 - x), rtol=1e-12, atol=1e-14)


def test_predictions_of_plain_functions_and_odd_bytes():
    x = np.arange(101 * 3).reshape(3, 101)
    np.testing.assert_array_equal(predict(lambda x: x % 7, x, grid_of(RANKS), 2), x % 7)
    # 101 bytes for a sample: as many as the header of a message.
    layers = [lambda x: x.astype(np.uint8)] + [lambda x: 255 - x] * 8
    net = place(Sequential(*layers), grid_of(RANKS), cuts=range(1, RANKS))
    for _ in range(2):
        np.testing.assert_array_equal(predict(net, x, grid_of(RANKS), 1), x.astype(np.uint8))
    with pytest.raises(ValueError, match="3 samples gave 2 outputs of"):
        predict(lambda x: x[:1], x, grid_of(1), 2)
    with pytest.raises(ValueError, match="x has length 0"):
        predict(lambda x: x, x[:0], grid_of(1))


def test_predicting_keeps_no_tape_and_leaves_the_training_alone():
    grid = grid_of(RANKS)
    x, y = problem(mlp, 16)
    net = some_mlp(grid)
    step = gradient(net, cross_entropy, grid, 4)
    first = step(x, y)
    before = net.gradient.copy()
    assert isinstance(predict(net, x, grid, 3), np.ndarray)
    np.testing.assert_array_equal(net.gradient, before)
    expected = gradient(some_mlp(grid), cross_entropy, grid, 4, first_step=1)(x, y)
    assert (step(x, y), first == expected) == (expected, False)  # dropout differs from step to step


def holding(owner, order):
    """A schedule: chunk c lies on stage owner[c]; ``order(chunks, microbatches)`` lists the computations of some chunks."""
    def schedule(stage, stages, microbatches):
        return order([chunk for chunk, of in enumerate(owner) if of == stage], microbatches)
    return schedule


def all_forward_then_back(chunks, microbatches):
    return ([F(m, c) for c in chunks for m in range(microbatches)]
            + [B(m, c) for c in reversed(chunks) for m in range(microbatches)])


def test_stages_of_any_order_and_chunks_that_only_look_at_their_input():
    # Flatten, and Dropout when predicting, hand on a view of what they got.
    def model():
        views = [layer for _ in range(2 * RANKS + 1) for layer in (Linear(6, 6), Flatten(), Dropout(0.5), relu)]
        return Sequential(*views, Linear(6, 10), Flatten())

    one, x = model().init(dtype=np.float64), np.random.default_rng(0).standard_normal((30, 6))
    ring = [0, 1, 0, *range(2, RANKS)] if RANKS > 1 else [0, 0]
    schedules = {"zb_v": zb_v, "interleaved": functools.partial(interleaved, chunks=3),
                 "ring": holding(ring, all_forward_then_back)}
    for schedule in schedules.values():
        chunks = len(owners(orders(schedule, RANKS, 1)))
        for first in 1, 2, 4:  # cuts around the views in different ways
            net = place(model(), grid_of(RANKS), dtype=np.float64, schedule=schedule, cuts=range(first, first + chunks - 1))
            for size in 1, 2:
                np.testing.assert_allclose(predict(net, x, grid_of(RANKS), size), one(x), rtol=1e-12, atol=1e-14)
            results = []
            for grid, placed in (grid_of(RANKS), net), (ALONE, place(model(), ALONE, dtype=np.float64)):
                results.append(gradient(placed, cross_entropy, grid, 3)(x, np.arange(30) % 10))
                results.append({name: p.grad.copy() for name, p in placed.named().items()})
            assert results[0] == pytest.approx(results[2], rel=1e-12)
            for name, grad in results[1].items():
                np.testing.assert_allclose(grad, results[3][name], rtol=0, atol=1e-10)


def reverse(stage, stages, microbatches):
    """Stage 0 takes the gradients in the opposite order of that in which stage 1 makes them."""
    actions = [F(m, stage) for m in range(microbatches)]
    order = range(microbatches)
    return actions + [B(m, stage) for m in (reversed(order) if stage == 0 else order)]


def late(stage, stages, microbatches):
    """A V whose upper chunks compute all gradients of their weights at the end."""
    down, up = stage, 2 * stages - 1 - stage
    return ([action for m in range(microbatches) for action in (F(m, down), F(m, up), B(m, up), B(m, down), W(m, down))]
            + [W(m, up) for m in range(microbatches)])


@pytest.mark.parametrize("schedule", [reverse, late], ids=lambda schedule: schedule.__name__)
def test_unusual_schedules_give_the_same_gradient(schedule):
    def model():  # chunk RANKS - 1 hands on a view of what it was sent, to a chunk of the same stage
        return Sequential(*[Flatten() if i == RANKS - 1 else Linear(7, 7) for i in range(2 * RANKS)])

    x = np.random.default_rng(0).standard_normal((12, 7))
    chunks = len(owners(orders(schedule, RANKS, 1)))
    net = place(model(), grid_of(RANKS), dtype=np.float64, schedule=schedule, cuts=range(1, chunks))
    one = place(model(), ALONE, dtype=np.float64)
    step = gradient(net, mse_loss, grid_of(RANKS), 4)
    for _ in range(2):
        assert step(x, x) == pytest.approx(gradient(one, mse_loss, ALONE)(x, x), rel=1e-12)
    for name, parameter in net.named().items():
        np.testing.assert_allclose(parameter.grad, one.named()[name].grad, rtol=0, atol=1e-12)
    assert not net.link._sent


def test_integers_between_chunks_and_chunks_that_ignore_their_input():
    def model():
        return Sequential(lambda x: x + 0, Flatten(), Embedding(20, 4), Flatten(), *[Linear(20, 20) for _ in range(RANKS)],
                          Constant(20), *[Linear(20, 20) for _ in range(RANKS)])

    class Constant(Module):
        def __init__(self, features):
            self.weight = Parameter((features,), normal())

        def __call__(self, x, training=False):
            weight, = given(training, self.weight)
            return weight + np.zeros((len(x), 1))

    x, y = np.random.default_rng(0).integers(0, 20, (8, 5)), np.zeros((8, 20))
    one = place(model(), ALONE, dtype=np.float64)
    expected = gradient(one, mse_loss, ALONE)(x, y)
    for first in 1, 2, 4:
        net = place(model(), grid_of(RANKS), dtype=np.float64, cuts=range(first, first + RANKS - 1))
        assert gradient(net, mse_loss, grid_of(RANKS), 4)(x, y) == pytest.approx(expected, rel=1e-12)
        for name, parameter in net.named().items():
            np.testing.assert_allclose(parameter.grad, one.named()[name].grad, rtol=0, atol=1e-12)
    measured = profile(model(), x, ALONE, repeats=1, dtype=np.float64)
    assert measured.forward.shape == (5 + 2 * RANKS,)


def test_many_sizes_do_not_pile_up_buffers():
    grid = grid_of(RANKS)
    net = place(Sequential(*[Linear(4, 4) for _ in range(2 * RANKS)]), grid, dtype=np.float64)
    step = gradient(net, mse_loss, grid, 2)
    for samples in range(2, 80, 2):
        step(np.ones((samples, 4)), np.ones((samples, 4)))
    assert len(net.link._free) <= 17


def test_two_losses_of_one_model_take_turns():
    grid = grid_of(RANKS)
    x, y = problem(mlp, 16)
    net = place(Sequential(*[Linear(12, 12) for _ in range(2 * RANKS)]), grid, dtype=np.float64)
    once, twice = (gradient(net, loss, grid, 2) for loss in (cross_entropy, lambda *pair: 2 * cross_entropy(*pair)))
    for _ in range(2):
        loss = once(x, y)
        expected = net.gradient.copy()
        assert twice(x, y) == pytest.approx(2 * loss)
        np.testing.assert_allclose(net.gradient, 2 * expected, rtol=1e-12)


def test_shares_that_do_not_suit_a_normalisation_are_refused_by_all():
    if RANKS % 2 == 0 and RANKS > 2:
        norm = Sequential(BatchNorm2d(2, samples=2), Flatten(), *[Linear(8, 8) for _ in range(RANKS)])
        net = place(norm, grid_of(RANKS // 2), dtype=np.float64)
        grid = net.grid
        x, y = np.ones((3 - grid.replica, 2, 2, 2)), np.ones((3 - grid.replica, 8))
        with pytest.raises(RankError, match="share starts at sample 3 of the batch, which is not a multiple"):
            gradient(net, mse_loss, grid, 1)(x, y)


def test_a_schedule_whose_chunks_move_is_refused():
    def moving(stage, stages, microbatches):
        return gpipe((stage + microbatches - 1) % stages, stages, microbatches)

    if RANKS > 1:
        net = some_mlp(grid_of(RANKS), schedule=moving)
        with pytest.raises(ScheduleError, match=r"micro-batches the schedule has the chunks on the stages"):
            gradient(net, cross_entropy, grid_of(RANKS), 2 * RANKS + 1)


def test_outputs_that_cannot_be_joined_are_refused_by_all():
    x = np.arange(8)
    for odd in (lambda x: x.astype(np.float32 if x[0] < 2 else np.float64)), (lambda x: np.ones((len(x), 1 + int(x[0] < 2)))):
        with pytest.raises(ValueError, match="predict joins outputs of one dtype and shape"):
            predict(odd, x, grid_of(1), 1)


@pytest.mark.parametrize("place_of", [0, -1])
def test_waiting_for_a_slow_stage_counts_as_waiting(place_of):
    def pause():
        time.sleep(0.06)
        return 1

    @op
    def slow(x):
        return x * pause(), (lambda g: g * pause(),)

    if RANKS > 1:
        layers = [Linear(4, 4) for _ in range(RANKS)]
        layers[place_of] = Sequential(Linear(4, 4), slow)
        grid, watch = grid_of(RANKS), Watch()
        net = place(Sequential(*layers), grid, dtype=np.float64, cuts=range(1, RANKS))
        step = gradient(net, mse_loss, grid, 2, watch=watch)
        watch.restart()
        for _ in range(3):
            step(np.ones((4, 4)), np.ones((4, 4)))
        times = watch.times(grid)
        waiting = np.delete(times["wait"], place_of)
        assert (waiting > 0.6).all() and times["wait"][place_of] < 0.5 * waiting.min()
        assert (times["other"] < 0.15).all()


def test_a_broken_schedule_is_refused_before_the_first_message():
    def stuck(stage, stages, microbatches):
        actions = gpipe(stage, stages, microbatches)
        return actions if stage or microbatches == 2 * stages else [actions[-1], *actions[:-1]]

    grid = grid_of(RANKS)
    net = some_mlp(grid, schedule=stuck)
    with pytest.raises(ScheduleError, match=r"stuck with \d stages and 3 micro-batches never ends: stage 0 with B\(2, 0\), "
                                            r"entry 0 of its list, waits for F\(2, 0\) of stage 0"):
        gradient(net, cross_entropy, grid, 3)


def test_where_a_model_is_cut():
    grid = grid_of(RANKS)
    net = some_mlp(grid)
    assert net.bounds[0][0] == 0 and net.bounds[-1][1] == 18 and len(net.bounds) == RANKS
    assert len(net.report().splitlines()) == RANKS
    if RANKS > 1:
        cuts = list(range(3, 2 + RANKS))
        assert [start for start, _ in some_mlp(grid, cuts=cuts).bounds] == [0, *cuts]
        one_heavy = some_mlp(grid, balance=[100.0] + [1.0] * 17)
        assert one_heavy.bounds[0] == (0, 1)
        slow = some_mlp(grid, balance=[1.0] * 18, speeds=[1.0] + [9.0] * (RANKS - 1))
        assert slow.bounds[0][1] - slow.bounds[0][0] <= slow.bounds[-1][1] - slow.bounds[-1][0]
        for wrong in [0] * (RANKS - 1), list(range(18, 17 + RANKS)), [3] * RANKS:
            with pytest.raises(ValueError, match=f"cuts takes {RANKS - 1} growing numbers from 1 to 17, the layers"):
                some_mlp(grid, cuts=wrong)
        with pytest.raises(ValueError, match="give one or the other"):
            some_mlp(grid, cuts=range(1, RANKS), balance=[1.0] * 18)
        with pytest.raises(TypeError, match=r"a schedule is a function, such as .* not 'gpipe'"):
            some_mlp(grid, schedule="gpipe")
        with pytest.raises(ValueError, match="balance has 2 costs, but the model has 18 layers"):
            some_mlp(grid, balance=[1.0, 2.0])
        with pytest.raises(ValueError, match=f"speeds are {RANKS} numbers above 0"):
            some_mlp(grid, speeds=[1.0])
        with pytest.raises(ValueError, match=f"a model of 1 layers cannot be cut into {RANKS} chunks"):
            place(Sequential(Linear(3, 3)), grid)
        with pytest.raises(TypeError, match="cuts a Sequential between its layers; this model is one Linear"):
            place(Linear(3, 3), grid)
        with pytest.raises(RankError, match="its cuts must be the same on all ranks"):
            some_mlp(grid, cuts=range(1 + grid.rank % 2, RANKS + grid.rank % 2))
        with pytest.raises(RuntimeError, match=rf"rank {grid.rank} holds only layers? .* of 18: call predict"):
            net(np.zeros((2, 12)))
        shared = Linear(4, 4)
        with pytest.raises(ValueError, match=rf"{RANKS - 1}.weight is the same parameter as 0.weight, but they would lie "
                                             rf"on the stages {RANKS - 1} and 0"):
            place(Sequential(shared, *[Linear(4, 4) for _ in range(RANKS - 2)], shared), grid)


def test_tied_weights_on_one_stage_are_one_parameter():
    def tied():
        shared = Linear(6, 6)
        return Sequential(shared, *[Linear(6, 6) for _ in range(2 * RANKS - 2)], shared)

    x = np.random.default_rng(0).standard_normal((8, 6))
    net, one = place(tied(), grid_of(RANKS), dtype=np.float64, schedule=zb_v), tied().init(dtype=np.float64)
    loss = gradient(net, mse_loss, grid_of(RANKS), 4)(x, x)
    value = mse_loss(one(x, training=True), x) / len(x)
    value.backward()
    assert loss == pytest.approx(float(value), rel=1e-12)
    for name, parameter in net.named().items():
        np.testing.assert_allclose(parameter.grad, one.named()[name].grad, rtol=1e-9, atol=1e-12)


def test_the_partition_is_the_best_there_is():
    rng = np.random.default_rng(0)
    for _ in range(60):
        layers, runs = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        if runs > layers:
            continue
        costs, speeds = rng.integers(0, 9, layers), rng.choice([1.0, 2.0, 0.5], runs)

        def slowest(cuts, costs=costs, speeds=speeds, layers=layers):
            return max(costs[a:b].sum() / speed for (a, b), speed in
                       zip(itertools.pairwise([0, *cuts, layers]), speeds, strict=True))

        best = min(map(slowest, itertools.combinations(range(1, layers), runs - 1)))
        assert slowest(partition(costs, speeds)) == pytest.approx(best)


def test_a_profile_measures_what_a_layer_does():
    layers = Sequential(Linear(4, 4), Linear(700, 700), relu, Linear(700, 700), Flatten())
    layers.layers = layers.layers[1:]
    measured = profile(layers, np.zeros((64, 700), np.float32), grid_of(RANKS), repeats=9)
    assert isinstance(measured, Profile)
    assert (measured.forward > 0).all() and measured.weight[0] > 0
    assert measured.seconds[0] > measured.seconds[1]  # 40 times, on a core of its own
    assert measured.backward[2] > measured.backward[1]
    np.testing.assert_array_equal(measured.message, 64 * 700 * 4)
    np.testing.assert_allclose(measured.memory[[0, 2]], 64 * 700 * 4, rtol=0.05)
    assert measured.speeds.shape == (RANKS,) and measured.speeds.mean() == pytest.approx(1)
    ALONE.same("profile", measured.forward.tolist())
    costs = measured.chunks([(0, 2), (2, 4)], latency=1.0, bandwidth=1e6)
    assert costs["forward"] == pytest.approx([measured.forward[:2].sum(), measured.forward[2:].sum()])
    assert costs["message"] == pytest.approx([1 + 64 * 700 * 4 / 1e6])
    grid_of(RANKS).same("profile", (measured.forward.tolist(), measured.speeds.tolist()))


def test_a_cut_by_profile():
    grid = grid_of(RANKS)
    x, y = problem(conv_net, 8)
    measured = profile(conv_net(), x, grid, cross_entropy, y, repeats=2, dtype=np.float64)
    net = place(conv_net(), grid, dtype=np.float64, balance=measured)
    if RANKS > 1:
        assert all("ms (" in line and "MB for a micro-batch" in line for line in net.report().splitlines())
        with pytest.raises(TypeError, match="profile measures the layers of a Sequential"):
            profile(Linear(3, 3), x, grid)
    assert np.isfinite(gradient(net, cross_entropy, grid, 4)(x, y))


@pytest.mark.parametrize("pipe", PIPES)
def test_weights_are_collected_saved_and_loaded(pipe, tmp_path):
    grid = grid_of(pipe)
    net, one = place(conv_net(), grid, seed=5, schedule=zb_v), conv_net().init(seed=5)
    weights = net.collect()
    assert (weights is None) == (grid.rank > 0)
    folder = grid.texts(str(tmp_path))[0]
    if grid.rank == 0:
        assert list(weights) == list(one.named())
        for name, parameter in one.named().items():
            np.testing.assert_array_equal(weights[name], parameter.value)
        save(weights, f"{folder}/weights")
        save(net, f"{folder}/model", {"note": 3}, weights)
        if pipe > 1:
            with pytest.raises(ValueError, match=r"other ranks hold .*: weights = model\.collect\(\) on all ranks together"):
                save(net, f"{folder}/part")
    grid.comm.Barrier()
    other = load(place(conv_net(), grid, seed=6, schedule=zb_v), f"{folder}/weights")
    np.testing.assert_array_equal(other.vector, net.vector)
    other, about = load_model(f"{folder}/model", place=functools.partial(place, grid=grid, schedule=zb_v))
    np.testing.assert_array_equal(other.vector, net.vector)
    assert about == {"note": 3} and other.bounds == net.bounds


@pytest.mark.parametrize("pipe", PIPES)
def test_a_nan_is_reported_by_all_and_training_may_go_on(pipe):
    grid = grid_of(pipe)
    x, y = problem(mlp, 24)
    net = some_mlp(grid)
    step, optimizer = gradient(net, cross_entropy, grid, 3), SGD(net, lr=0.1)
    before = net.vector.copy()
    bad = x.copy()
    bad[-1, 5] = np.nan
    with pytest.raises(RankError, match=rf"step 0 is nan \(rank {grid.data - 1}: 1 of the .* input are not finite, "
                                        r"the first at .*5\)\): clean the data") as caught:
        step(*mine(grid, bad, y))
    assert caught.value.ranks == [grid.data - 1]
    optimizer.step()
    np.testing.assert_array_equal(net.vector, before)
    assert np.isfinite(step(*mine(grid, x, y)))
    with pytest.raises(RankError, match=f"batch of step 2 is empty on all {grid.size} ranks"):
        step(x[:0], y[:0])


def test_a_gradient_that_is_infinite_on_one_stage_is_told_to_all():
    grid = grid_of(RANKS)

    @op
    def cliff(x):
        return x + 0, (lambda g: g * np.inf,)

    net = place(Sequential(Linear(3, 3), cliff, *[Linear(3, 3) for _ in range(2 * RANKS)]), grid, dtype=np.float64)
    with np.errstate(invalid="ignore"), pytest.raises(RankError, match="the gradient of step 0 is not finite"):
        gradient(net, mse_loss, grid, 2)(np.ones((4, 3)), np.ones((4, 3)))


def test_what_gradient_refuses():
    grid = grid_of(RANKS)
    net = some_mlp(grid)
    with pytest.raises(ValueError, match="microbatches is a whole number above 0, not 0"):
        gradient(net, cross_entropy, grid, 0)
    with pytest.raises(ValueError, match="use one Grid for both"):
        gradient(net, cross_entropy, Grid(comm=MPI.COMM_SELF))
    norm = place(Sequential(BatchNorm2d(2), *[Flatten() for _ in range(RANKS)]), grid)
    with pytest.raises(ValueError, match=r"pieces .*: give it samples="):
        gradient(norm, cross_entropy, grid, 3)
    if RANKS > 1:
        with pytest.raises(RankError, match="the number of micro-batches must be the same"):
            gradient(net, cross_entropy, grid, 1 + grid.rank % 2)
        net.vector[:1] += grid.replica
        both = grid_of(1)
        replicas = some_mlp(both)
        replicas.vector[:1] += both.rank == both.size - 1
        with pytest.raises(RankError, match=f"the weights must be the same on all replicas of a stage, but rank {RANKS - 1}"):
            gradient(replicas, cross_entropy, both)


@pytest.mark.parametrize("pipe", PIPES)
def test_the_watch_shows_what_the_stages_did(pipe, tmp_path):
    grid = grid_of(pipe)
    x, y = mine(grid, *problem(mlp, 32 * RANKS))
    net, watch = some_mlp(grid, schedule=one_f_one_b), Watch()
    with pytest.raises(ValueError, match="nothing was recorded"):
        watch.timeline(grid)
    step = gradient(net, cross_entropy, grid, 4, watch=watch)
    for _ in range(3):
        step(x, y)
    step(x[:2], y[:2])  # a shorter one, which is not typical
    timeline = watch.timeline(grid)
    assert [[span.action for span in spans] for spans in timeline.spans] == [
        one_f_one_b(stage, pipe, 4) for stage in range(pipe)]
    assert timeline.peak == [min(pipe - stage, 4) for stage in range(pipe)]
    for spans in timeline.spans:
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    ends = {span.action: span.end for spans in timeline.spans for span in spans}
    starts = {span.action: span.start for spans in timeline.spans for span in spans}
    for action in ends:
        if isinstance(action, F) and action.chunk:
            assert starts[action] >= ends[F(action.microbatch, action.chunk - 1)]
    assert [len(spans) for spans in watch.timeline(grid, step=3).spans] == [4] * pipe
    drawn = watch.draw(grid)
    assert drawn.count("stage 0 |") == 2 and drawn.startswith("simulated: ") and "\nmeasured: " in drawn
    folder = grid.texts(str(tmp_path))[0]
    watch.trace(grid, f"{folder}/trace.json")
    if grid.rank == 0:
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        assert {e["name"] for e in events if e["ph"] == "M"} == {"process_name", "thread_name"}
        spans = [e for e in events if e["ph"] == "X"]
        assert {(e["pid"], e["tid"]) for e in spans} == {(r % grid.data, r // grid.data) for r in range(grid.size)}
        assert min(e["ts"] for e in spans) == 0 and {"F0", "B3"} <= {e["name"] for e in spans}
    watch.draw(grid, f"{folder}/timeline.svg")
    times = watch.times(grid)
    assert (times["compute"] > 0).all() and (sum(times.values()) > 0).all()


def test_clocks_of_several_nodes_are_compared():
    grid = Grid()
    grid.node = grid.comm.Split(grid.rank * 2 // grid.size)  # as if each half of the ranks had a node of its own
    assert abs(_clock(grid)) < 0.05  # one clock in truth
