"""Replay: programs with the same bits as the ops they stand for, and what is not made a program."""

import copy
import gc
import re
import threading
import weakref

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import Replay, Tensor, op, ops
from mpiml.nn import (
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
    Module,
    Positions,
    Residual,
    SelfAttention,
    Sequential,
    Step,
)
from mpiml.optim import SGD
from mpiml.parallel import Grid, gradient, place
from mpiml.schedule import SCHEDULES
from mpiml.tensor import backward

RANKS = MPI.COMM_WORLD.size
rng = np.random.default_rng(0)


def mlp():
    return Sequential(Linear(6, 8), ops.relu, LayerNorm(8), ops.gelu, Linear(8, 4))


def conv_net():
    return Sequential(
        Conv2d(2, 4, 3, padding=1), BatchNorm2d(4, samples=2), ops.relu, MaxPool2d(2),
        Residual(Sequential(Conv2d(4, 4, 3, padding=1), GroupNorm(2, 4), ops.gelu)), ops.relu,
        Concatenate(ops.identity, Conv2d(4, 2, 1)), Flatten(), Linear(6 * 3 * 3, 4))


def transformer():
    block = Residual(Sequential(LayerNorm(8), SelfAttention(8, 2, is_causal=True)))
    return Sequential(Embedding(11, 8), Positions(5, 8), block, block, lambda x: ops.mean(x[:, 1:], axis=1), Linear(8, 4))


class Tied(Module):
    """A weight that is used three times, and by an op with a vjp for each argument."""

    def __init__(self):
        self.layer = Linear(6, 6, bias=False)
        self.head = Linear(6, 4)

    def __call__(self, x, training=False):
        for _ in range(3):
            x = self.layer(ops.tanh(self.layer(x, training)) * x - ops.multiply(0.5, x), training)
        return self.head(x, training)


INPUTS = {mlp: lambda n: rng.standard_normal((n, 6)), Tied: lambda n: rng.standard_normal((n, 6)),
          conv_net: lambda n: rng.standard_normal((n, 2, 6, 6)), transformer: lambda n: rng.integers(0, 11, (n, 5))}


def samples(model, n, dtype):
    x = INPUTS[model](n)
    return x if x.dtype == int else x.astype(dtype), rng.integers(0, 4, n)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("model", INPUTS)
def test_a_program_gives_the_same_bits(model, dtype):
    nets = [model().init(seed=1, dtype=dtype) for _ in range(2)]
    optimizers = [SGD(net, lr=0.1, momentum=0.9) for net in nets]
    steps = [lambda x, y, net=net: ops.cross_entropy(net(x, True), y) / len(y) for net in nets]
    steps[1] = Replay(steps[1], nets[1])
    for n in 6, 6, 6, 4, 6, 4, 4:  # shapes take turns
        x, y = samples(model, n, dtype)
        losses = [step(x, y) for step in steps]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        assert losses[0].value == losses[1].value
        np.testing.assert_array_equal(nets[0].vector, nets[1].vector)
    assert steps[1].reasons == []
    assert str(steps[1]).count("def backward") == 2


def test_a_program_calls_nothing_but_the_ops():
    net, calls = mlp().init(dtype=np.float64), []

    def function(x):
        calls.append(len(x))
        return net(x, True)

    replay = Replay(function)
    for n in 3, 3, 3, 5, 3, 5, 5, 3:
        assert replay(np.ones((n, 6))).shape == (n, 4)
    assert calls == [3, 3, 5, 5]


def test_a_program_has_the_names_of_the_model():
    net = mlp().init()
    replay = Replay(net)
    assert str(replay) == "# nothing was replayed"
    for _ in range(2):
        replay(np.ones((2, 6), np.float32), True)
    assert "def forward(vjps, x, p0_weight, p0_bias, p2_weight, p2_bias, p4_weight, p4_bias):" in str(replay)
    assert 'v, vjps["linear 0"] = linear(x, p0_weight, p0_bias, True)  # (2, 8)' in str(replay)
    assert 'parts = vjps.pop("linear 3")(g, [True, into[5], into[6], None])' in str(replay)


def test_gradients_for_arguments():
    weight = Tensor(rng.standard_normal((3, 3)))
    replay = Replay(lambda x, y, z: ops.linear(x, weight) * y + x)
    for _ in range(4):
        x, y, z = (Tensor(rng.standard_normal((2, 3))) for _ in range(3))
        same_x, same_y = Tensor(x.value), Tensor(y.value)
        g, weight.grad = rng.standard_normal((2, 3)), None
        replay(x, y, z).backward(g)
        ours, weight.grad = weight.grad, None
        (ops.linear(same_x, weight) * same_y + same_x).backward(g)
        for mine, expected in (x.grad, same_x.grad), (y.grad, same_y.grad), (ours, weight.grad):
            np.testing.assert_array_equal(mine, expected)
        assert z.grad is None


def test_a_program_is_one_op_among_others():
    net = mlp().init(dtype=np.float64)
    replay = Replay(lambda x: net(x, True))
    x = np.ones((2, 6))
    for _ in range(4):
        net.gradient[:] = 0
        (replay(ops.tanh(Tensor(x))) * replay(x)).backward(np.ones((2, 4)))  # twice in one tape
        ours = net.gradient.copy()
        net.gradient[:] = 0
        (net(np.tanh(x), True) * net(x, True)).backward(np.ones((2, 4)))
        np.testing.assert_allclose(ours, net.gradient, rtol=1e-12, atol=1e-12)


def test_the_memory_of_the_parameters_may_change():
    net = mlp().init(seed=1, dtype=np.float64)
    replay, x = Replay(net), rng.standard_normal((2, 6))
    for _ in range(3):
        replay(x, True)
    net.init(seed=2, dtype=np.float64)
    net.accumulate_in(np.zeros(len(net.sums)))
    np.testing.assert_array_equal(replay(x, True).value, net(x))
    replay(x, True).backward(np.ones((2, 4)))
    assert net.gradient.any()


def test_part_of_the_gradients_may_be_put_off():
    net = mlp().init(dtype=np.float64)
    replay, value = Replay(net), rng.standard_normal((2, 6))
    for _ in range(2):
        replay(Tensor(value), True)
    replay(Tensor(value), True).backward(np.ones((2, 4)))
    expected, net.gradient[:] = net.gradient.copy(), 0
    x, later = Tensor(value), []
    assert list(backward(replay(x, True), np.ones((2, 4)), wrt=x, later=later)) == [x]
    assert not net.gradient.any()
    for contribute in later:
        contribute()
    np.testing.assert_array_equal(net.gradient, expected)


def test_a_tape_is_walked_once():
    replay = Replay(mlp().init())
    for _ in range(3):
        y = replay(np.ones((2, 6), np.float32), True)
        y.backward(np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match="already walked"):
        y.backward(np.ones((2, 4), np.float32))


def test_nothing_is_kept_between_calls():
    values = []

    @op
    def double(x):
        value = 2 * x
        values.append(weakref.ref(value))
        return value, (lambda g: g + 0 * value,)

    w = Tensor(np.ones(3))
    replay = Replay(lambda x: ops.exp(double(double(w * x))))
    for calls in 1, 2, 3, 4:
        replay(np.ones(3)).backward(np.ones(3))
        gc.collect()
        assert len(values) == 2 * calls
        assert all(value() is None for value in values)


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, w, n: ops.dropout(x * w, 0.5, n), "dropout had other arguments"),
    (lambda x, w, n: (x * w) ** float(n), "power had other arguments"),
    (lambda x, w, n: ops.where(np.array([n > 1, True]), x * w, x), "where took an array that"),
    (lambda x, w, n: x * w if n % 2 else x + w, "it called .* where it had called"),
    (lambda x, w, n: ops.exp(x * w) if n % 2 else x * w, "it called . ops where it had called ."),
    (lambda x, w, n: x * Tensor(w.value), "a Tensor that is not among its arguments"),
    (lambda x, w, n: np.exp(x), "it returned ndarray, not a Tensor"),
    (lambda x, w, n: w, "it returned Tensor, not a Tensor from one of its ops"),
])
def test_what_is_not_the_same_each_time_is_called_each_time(function, reason):
    w, calls = Tensor(np.array([0.5, 2.0])), []

    def counted(x):
        calls.append(x)
        return function(x, w, len(calls))

    replay = Replay(counted)
    for n in 1, 2, 3, 4:
        x = rng.standard_normal(2) ** 2
        np.testing.assert_array_equal(getattr(replay(x), "value", 0), getattr(function(x, w, n), "value", 0))
    assert len(calls) == 4
    assert len(replay.reasons) == 1
    assert str(replay).startswith("# called each time, as ")
    assert re.search(reason, replay.reasons[0])


def test_an_array_that_stays_is_read_again():
    mask, w = np.array([True, False]), Tensor(np.array([1.0, 2.0]))
    replay = Replay(lambda x: ops.where(mask, x * w, 0 * x))
    for _ in range(3):
        replay(np.ones(2))
    mask[:] = [False, True]
    np.testing.assert_array_equal(replay(np.ones(2)).value, [0, 2])


def test_what_does_not_reach_the_result_is_left_out():
    seen = []

    @op
    def spy(x):
        seen.append(1)
        return x + 0, (lambda g: g,)

    w = Tensor(np.ones(2))

    def function(x):
        spy(x * w)  # of interest to the function alone
        return ops.exp(x * w)

    replay = Replay(function)
    for _ in range(5):
        replay(np.ones(2))
    assert len(seen) == 2


def test_a_step_may_have_any_number_where_nothing_depends_on_it():
    net, with_dropout = mlp().init(), Sequential(Linear(6, 6), Dropout(0.5)).init()
    x = np.ones((2, 6), np.float32)
    for model, reasons in (net, 0), (with_dropout, 1):
        replay = Replay(model)
        for number in range(4):
            np.testing.assert_array_equal(replay(x, Step(number)).value, model(x, Step(number)).value)
        assert len(replay.reasons) == reasons


def test_one_replay_in_another():
    net = mlp().init(dtype=np.float64)
    inner = Replay(net)
    outer = Replay(lambda x: ops.exp(inner(x, True)))
    x = rng.standard_normal((2, 6))
    for _ in range(4):
        np.testing.assert_array_equal(outer(x).value, ops.exp(net(x)))
    assert str(outer).count("linear(") == 2


def test_threads_record_apart():
    net = mlp().init(dtype=np.float64)
    x, results = rng.standard_normal((2, 6)), {}

    def work(i):
        replay = Replay(net)
        results[i] = [replay(x, True).value for _ in range(20)], str(replay)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({text for _, text in results.values()}) == 1
    for values, _ in results.values():
        for value in values:
            np.testing.assert_array_equal(value, net(x))


def test_an_error_while_recording_leaves_nothing_behind():
    net = mlp().init()
    replay = Replay(net)
    with pytest.raises(ValueError, match="linear takes 6 features"):
        replay(np.ones((2, 5), np.float32), True)
    for _ in range(3):
        y = replay(np.ones((2, 6), np.float32), True)
    np.testing.assert_array_equal(y.value, net(np.ones((2, 6), np.float32)))


# --- What a recording does not show, or shows wrongly ------------------------------------------------------------

W = Tensor(np.array([0.5, -2.0, 3.0]))
MASKS = np.array([[True, False, True], [True, True, False]])


@op
def masked(x, *, mask):
    return np.where(mask, x, 0), (lambda g: np.where(mask, g, 0),)


def same(function, *calls):
    """The Replay, after calls that all have to give the same bits as the function itself."""
    replay = Replay(function)
    for args in calls:
        results = []
        for f in replay, function:
            W.grad = None
            output = f(*[a.copy() if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in args])
            output.backward(np.ones(output.shape))
            results.append((output.value, W.grad))
        for mine, expected in zip(*results, strict=True):
            np.testing.assert_array_equal(mine, expected)
    return replay


def arrays(calls):
    return [(rng.standard_normal((2, 3)),) for _ in range(calls)]


def test_two_arguments_may_be_one_array():
    x, y = np.ones(3), np.full(3, 2.0)
    assert not same(lambda a, b: a * W + b, (x, x), (x, x), (x, y), (y, x)).reasons
    replay, one = Replay(lambda a, b: a * W + ops.multiply(2, b)), Tensor(x)
    for b in one, one, Tensor(y):
        np.testing.assert_array_equal(replay(one, b).value, x * W.value + 2 * b.value)
    assert "one Tensor" in replay.reasons[0]


def test_an_argument_may_be_an_array_of_the_function_as_well():
    x = np.ones(3)
    assert not same(lambda a: a * W + x, (x,), (x,), (np.zeros(3),)).reasons


def test_arguments_that_are_equal_but_not_the_same():
    x = np.ones(3)
    same(lambda a, n: a * W * (2 if n is True else 3), *[(x, n) for n in (True, True, True, 1, 1, 1, 1.0)])
    same(lambda a, n: a * W * float(np.copysign(1, n)), *[(x, n) for n in (0.0, 0.0, 0.0, -0.0)])
    same(lambda a, n: a * W * (2 if n[0] is True else 3), *[(x, n) for n in ((1,), (1,), (1,), (True,))])


def test_numpy_scalars_are_arrays():
    assert not same(lambda a, n: a * W * n, *[(np.ones(3), np.float64(n)) for n in range(4)]).reasons


@pytest.mark.parametrize("function", [
    lambda x: (x * W)[[0, 1]],  # not (0, 1)
    lambda x: ops.where(MASKS, *[x * W, x]),
    op(lambda x: (3 * x, (lambda g: 3 * g,))),
    lambda lambda_: masked(lambda_ * W, mask=MASKS),
])
def test_what_is_written_down_means_the_same(function):
    assert not same(lambda x: function(x * W), *arrays(4)).reasons


def test_an_array_may_be_an_option():
    def attend(x, mask):
        x = ops.reshape(x * W, (1, 2, 3))
        return ops.scaled_dot_product_attention(x, x, x, mask=mask)

    x = rng.standard_normal((2, 3))
    masks = [np.array([[True, n > 1]]) for n in range(4)]
    assert not same(attend, *[(x, masks[n]) for n in (0, 0, 2, 3)]).reasons


COUNTS = np.zeros(3)


def counting(x):
    COUNTS[:] += 1
    return x * W * COUNTS


def stepping(x):
    loss = ops.sum(x * W)
    loss.backward()
    return loss


def replaced(x):
    h = x * W
    h.value = np.clip(h.value, 0, 1)
    return ops.exp(h)


def in_place(x):
    h = ops.exp(x)
    h[0] = 0
    return h * W


OUTSIDE = W * np.ones(3)


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x: x * W / np.abs(np.sign(x)).max(), "took an array that"),  # which was 1 twice
    (lambda x: ops.where(ops.sum(x) * 0 == 0, x * W, x), "took an array that"),
    (counting, "changed an array in place"),
    (in_place, "changed an array in place"),
    (replaced, "changed an array in place"),
    (stepping, "called backward"),
    (lambda x: x * W * 2 if ops.sum(x * W) > 0 else x * W, "looked at the value"),
    (lambda x: x * OUTSIDE, "value of an op that it did not call"),
])
def test_what_a_recording_cannot_hold_is_refused(function, reason):
    replay = Replay(function)
    for (x,) in arrays(4):
        replay(x)
    assert re.search(reason, replay.reasons[0])
    assert "def" not in str(replay)


def test_an_argument_in_a_tuple_is_refused():
    x, y = rng.standard_normal((2, 3)), np.array([0, 1])
    assert "inside a tuple" in same(lambda x, y: (x * W)[:, y], (x, y), (x, y), (x, y[::-1].copy())).reasons[0]


def test_tensors_of_another_shape_are_recorded_anew():
    w = Tensor(np.ones(3))
    replay = Replay(lambda x: ops.sum(w * W[0]) * x / len(w))
    for size in 3, 3, 3, 5, 5, 5:
        w.value = np.arange(size + 0.0)
        np.testing.assert_array_equal(replay(np.ones(2)).value, w.value.sum() * W.value[0] * np.ones(2) / size)


def test_a_copy_is_of_its_own():
    replay = Replay(mlp().init())
    x = np.ones((2, 6), np.float32)
    for _ in range(3):
        replay(x, True)
    other = copy.deepcopy(replay)
    other.function.init(seed=2)
    for _ in range(3):
        np.testing.assert_array_equal(other(x, True).value, other.function(x))
    np.testing.assert_array_equal(replay(x, True).value, replay.function(x))


def test_an_outer_recording_sees_the_ops_of_an_inner_program():
    inner = same(lambda x: x * W, *arrays(3))
    assert not same(lambda x: ops.exp(inner(x)), *arrays(3)).reasons


def test_new_numbers_do_not_fill_the_memory():
    replay = Replay(lambda x, n: x * W * n)
    for n in range(1000):
        replay(np.ones(3), n)
    assert len(replay._found) <= 256


def test_a_list_is_refused():
    with pytest.raises(TypeError, match=r"key of a dict .*list.*: give what is in a list as arrays"):
        Replay(lambda x, y: x * W)(np.ones(3), [1])


def test_a_masked_array_is_refused():
    with pytest.raises(TypeError, match=r"plain arrays, not a MaskedArray: give it np\.asarray"):
        Replay(lambda x: x * W)(np.ma.ones(3))


# --- On a grid: passes on any number of ranks -------------------------------------------------------------------

def _train(model, pipe, schedule, replay, lanes=None):
    grid = Grid(pipe=pipe, lanes=lanes)
    net = place(model(), grid, seed=3, schedule=SCHEDULES[schedule])
    step, optimizer = gradient(net, ops.cross_entropy, grid, replay=replay), SGD(net, lr=0.1)
    data, losses = np.random.default_rng(5), []
    for _ in range(5):
        x, y = data.standard_normal((16, 6), np.float32), data.integers(0, 4, 16)
        start, stop = grid.replica * 16 // grid.data, (grid.replica + 1) * 16 // grid.data
        losses.append(step(x[start:stop], y[start:stop]))
        optimizer.step()
    return losses, net.vector


def deep():
    return Sequential(*[layer for _ in range(8) for layer in (Linear(6, 6), ops.relu)], Linear(6, 4))


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "interleaved"])
@pytest.mark.parametrize("pipe", [pipe for pipe in range(1, RANKS + 1) if RANKS % pipe == 0])
def test_training_is_replayed_with_the_same_bits(pipe, schedule):
    losses, vector = _train(deep, pipe, schedule, replay=True)
    expected, other = _train(deep, pipe, schedule, replay=False)
    assert losses == expected
    np.testing.assert_array_equal(vector, other)


def test_lanes_in_threads_are_replayed():
    lanes = 8 if 8 % RANKS == 0 else RANKS
    losses, vector = _train(deep, 1, "one_f_one_b", True, lanes)
    expected, other = _train(deep, 1, "one_f_one_b", False, lanes)
    assert losses == expected
    np.testing.assert_array_equal(vector, other)


def test_a_model_that_cannot_be_replayed_is_refused():
    with pytest.raises(ValueError, match=r"chunk 0 .* cannot be replayed, as dropout had other arguments .*: leave out replay"):
        _train(lambda: Sequential(Linear(6, 4), Dropout(0.5)), 1, "one_f_one_b", True)


def test_a_schedule_that_splits_backward_passes_is_refused():
    with pytest.raises(ValueError, match="repeats backward passes as a whole"):
        _train(deep, RANKS, "zb_h1", True)
