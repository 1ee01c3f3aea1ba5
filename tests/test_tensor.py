"""The tape: what it records, in which order it is walked, what it refuses, and when it lets go."""

import gc
import weakref

import numpy as np
import pytest

from mpiml import Tensor, op, ops
from mpiml.tensor import add, backward, multiply, value_of


def leaf(*values, dtype=np.float64):
    return Tensor(np.array(values, dtype))


# --- Tensors --------------------------------------------------------------------------------------------------

def test_a_tensor_keeps_its_array():
    value = np.ones((2, 3), np.float32)
    x = Tensor(value)
    assert x.value is value
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, np.float32, 2)
    assert x.grad is None
    assert Tensor([1.0, 2.0]).dtype == np.float64
    assert value_of(x) is value
    assert value_of(3) == 3


def test_numbers_and_truth():
    assert float(Tensor(np.array(2.5))) == 2.5
    assert bool(leaf(2.5))
    assert not leaf(0.0)
    assert repr(leaf(1, 2, dtype=np.float32)) == "Tensor([1., 2.], float32)"


def test_a_tensor_is_a_key_by_identity():
    a, b = leaf(1), leaf(1)
    assert len({a, b, a}) == 2


@pytest.mark.parametrize("value", [[1, 2], True, np.zeros(2, np.float16), np.zeros(2, complex), np.array(["a"]), None])
def test_a_tensor_holds_floats_only(value):
    with pytest.raises(TypeError, match="holds float32 or float64, not"):
        Tensor(value)


def test_comparisons_give_masks():
    x, y = leaf(1, 2, 3), leaf(3, 2, 1)
    for other in y, y.value:
        for mask, expected in [(x < other, [1, 0, 0]), (x <= other, [1, 1, 0]), (x > other, [0, 0, 1]),
                               (x >= other, [0, 1, 1]), (x == other, [0, 1, 0]), (x != other, [1, 0, 1])]:
            assert type(mask) is np.ndarray
            np.testing.assert_array_equal(mask, np.array(expected, bool))
    np.testing.assert_array_equal(np.array([2.0, 2.0, 2.0]) < x, [False, False, True])


@pytest.mark.parametrize("f", [np.asarray, np.array, np.exp, np.sum, lambda x: np.add(x, 1)])
def test_numpy_does_not_lose_the_gradient_in_silence(f):
    with pytest.raises(TypeError):
        f(leaf(1, 2))


def test_in_place_addition_to_an_array_is_refused():
    array = np.ones(2)
    with pytest.raises(TypeError):
        array += leaf(1, 2)


@pytest.mark.parametrize("other", [np.array([[1.0, 2.0], [4.0, 8.0]]), np.float64(2), 2, 2.0, np.array(2.0)])
@pytest.mark.parametrize("f", [
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a**b,
], ids="+-*/^")
def test_operators_in_both_orders(f, other):
    value = np.array([[1.0, 2.0], [0.5, 3.0]])
    for result, expected in [(f(Tensor(value), other), f(value, other)), (f(other, Tensor(value)), f(other, value)),
                             (f(Tensor(value), Tensor(value)), f(value, value))]:
        assert isinstance(result, Tensor)
        np.testing.assert_array_equal(result.value, expected)


def test_matrix_product_negative_and_index():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    for result, expected in [(Tensor(a) @ b, a @ b), (a @ Tensor(b), a @ b), (Tensor(a) @ Tensor(b), a @ b),
                             (-Tensor(a), -a), (Tensor(a)[1, ::2], a[1, ::2])]:
        assert isinstance(result, Tensor)
        np.testing.assert_array_equal(result.value, expected)


def test_python_numbers_do_not_widen_float32():
    x = leaf(1, 2, dtype=np.float32)
    for y in x + 1, 1 - x, 2.5 * x, x / 3, 2**x, x**2, x**0.5, np.float32(2) * x, x * np.float32(2):
        assert y.dtype == np.float32
        x.grad = None
        y.backward(np.ones(2, np.float32))
        assert x.grad.dtype == np.float32


# --- The walk -------------------------------------------------------------------------------------------------

def test_gradients_accumulate_over_walks():
    x = leaf(1, 2)
    for _ in range(2):
        (x * x).backward(np.array([1.0, 10.0]))
    np.testing.assert_array_equal(x.grad, [4, 80])


def test_a_gradient_is_added_in_place():
    x = leaf(1, 2)
    x.grad = memory = np.array([100.0, 100.0])
    (3 * x).backward(np.ones(2))
    assert x.grad is memory
    np.testing.assert_array_equal(memory, [103, 103])


def test_a_leaf_is_its_own_gradient():
    x, g = leaf(1, 2), np.array([3.0, 4.0])
    assert list(backward(x, g)) == [x]
    np.testing.assert_array_equal(x.grad, g)
    assert x.grad is not g


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_needs_no_gradient(shape):
    x = Tensor(np.full(shape, 3.0))
    (x * x).backward()
    np.testing.assert_array_equal(x.grad, np.full(shape, 6.0))


def test_only_leaves_keep_a_gradient():
    x = leaf(2)
    y = x * 3
    (y * y).backward()
    assert y.grad is None
    np.testing.assert_array_equal(x.grad, [36])


def test_diamonds():
    x = leaf(2)
    y = x * x        # y is used by three, twice by one
    z = y * y + y * x
    w = z + y
    w.backward()     # x**4 + x**3 + x**2
    np.testing.assert_array_equal(x.grad, [4 * 8 + 3 * 4 + 2 * 2])


def test_a_tower_of_diamonds_is_walked_once():
    x = leaf(1)
    y = x
    for _ in range(60):  # 2**60 paths
        y = y + y
    y.backward()
    np.testing.assert_array_equal(x.grad, [2.0**60])


def test_each_leaf_is_yielded_once_and_final():
    """As each is yielded its gradient is what it is at the end, and the early ones do not wait for the late."""
    a, b, c, d = (leaf(v) for v in (2, 3, 5, 7))
    early = a * b + c
    root = early * d * a  # a is used at both ends
    seen = [(x, x.grad.copy()) for x in backward(root)]
    assert [id(x) for x, _ in seen].count(id(a)) == 1
    assert {id(x) for x, _ in seen} == {id(x) for x in (a, b, c, d)}
    for x, g in seen:
        np.testing.assert_array_equal(x.grad, g)
    order = [x.value.item() for x, _ in seen]
    assert order[0] == 7  # the last layer's is ready first: its sum over the ranks overlaps the rest
    np.testing.assert_array_equal([x.grad.item() for x in (a, b, c, d)], [(2 * 2 * 3 + 5) * 7, 28, 14, 22])


def test_a_leaf_is_yielded_before_earlier_layers_are_walked():
    walked = []

    @op
    def watched(x, name):
        return x * 1, (lambda g: walked.append(name) or g,)

    first, last = leaf(1), leaf(1)
    walk = backward(watched(last * watched(first, "first layer"), "last layer"))
    assert next(walk) is last
    assert walked == ["last layer"]
    assert list(walk) == [first]
    assert walked == ["last layer", "first layer"]


@pytest.mark.parametrize("f", [lambda x: x + 1, lambda x: x * 1, lambda x: x + x * 0])
def test_a_chain_of_20000_nodes(f):
    x = leaf(1)
    y = x
    for _ in range(20_000):
        y = f(y)
    y.backward()
    np.testing.assert_array_equal(x.grad, [1])


def test_a_deep_tape_can_be_dropped_unwalked():
    y = leaf(1)
    for _ in range(20_000):
        y = y * 1
    del y
    gc.collect()


def test_gradients_nobody_asked_for_are_not_computed():
    @op
    def product(x, y):
        def forbidden(g):
            raise AssertionError

        return x * y, (lambda g: g * y, forbidden)

    x = leaf(1, 2)
    product(x, np.array([3.0, 4.0])).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [3, 4])


# --- What is refused ------------------------------------------------------------------------------------------

def test_a_tape_is_walked_once():
    x = leaf(2)
    y = x * x
    z = y * 3
    y.backward()
    for root in y, z:
        with pytest.raises(ValueError, match="already walked"):
            root.backward()
    np.testing.assert_array_equal(x.grad, [4])  # the refused walks added nothing


def test_a_gradient_is_needed_for_several_elements():
    with pytest.raises(ValueError, match=r"shape \(2,\).*backward\(gradient\)"):
        (leaf(1, 2) * 2).backward()


@pytest.mark.parametrize("g", [np.ones(3), np.ones((1, 2)), np.ones(2, np.float32), np.ones(2, int)])
def test_the_gradient_has_the_roots_shape_and_dtype(g):
    with pytest.raises(ValueError, match="backward's argument has shape"):
        (leaf(1, 2) * 2).backward(g)


def test_the_gradient_is_an_array():
    with pytest.raises(TypeError, match="is an array, not a float"):
        (leaf(1) * 2).backward(1.0)


@pytest.mark.parametrize(("vjp", "error"), [
    (lambda g: g[:1], ValueError), (lambda g: g.astype(np.float32), ValueError), (lambda g: g[None], ValueError),
    (lambda g: 1.0, TypeError), (lambda g: None, TypeError)])
def test_a_wrong_vjp_is_found_out(vjp, error):
    @op
    def wrong(x):
        return x * 2, (vjp,)

    with pytest.raises(error, match="the gradient from <lambda> "):
        wrong(leaf(1, 2)).backward(np.ones(2))


@pytest.mark.parametrize(("a", "b"), [
    (leaf(1), leaf(1, dtype=np.float32)), (leaf(1, dtype=np.float32), leaf(1)), (leaf(1, dtype=np.float32), np.ones(1)),
    (np.ones(1), leaf(1, dtype=np.float32))])
@pytest.mark.parametrize("f", [add, multiply, lambda a, b: ops.concatenate([a, b])])
def test_float32_and_float64_do_not_mix(f, a, b):
    with pytest.raises(TypeError, match=r"(add|multiply|concatenate) of float.* and float.* gives float64: use one of"):
        f(a, b)


@pytest.mark.parametrize(("name", "position", "f"), [
    ("cross_entropy", 2, lambda t: ops.cross_entropy(np.ones(3), t)),
    ("cross_entropy", 2, lambda t: ops.cross_entropy(t, t)),
    ("mse_loss", 2, lambda t: ops.mse_loss(np.zeros(3), target=t)),
    ("where", 1, lambda t: ops.where(t, t, t)),
    ("clip", 2, lambda t: ops.clip(t, t)),
    ("batch_norm", 3, lambda t: ops.batch_norm(np.ones((2, 3)), np.ones(3), t, np.zeros(()))),
])
def test_no_tensor_where_there_is_no_gradient(name, position, f):
    with pytest.raises(TypeError, match=f"{name} has no gradient for its argument {position}: pass a plain array"):
        f(leaf(0.2, 0.3, 0.5))


# --- Arguments ------------------------------------------------------------------------------------------------

def test_tensors_by_keyword():
    x, weight, bias = Tensor(np.ones((2, 3))), Tensor(np.ones((4, 3))), Tensor(np.ones(4))
    ops.linear(weight=weight, bias=bias, x=x).backward(np.ones((2, 4)))
    np.testing.assert_array_equal(bias.grad, np.full(4, 2.0))
    np.testing.assert_array_equal(weight.grad, np.full((4, 3), 2.0))
    np.testing.assert_array_equal(x.grad, np.full((2, 3), 4.0))


def test_a_tensor_by_keyword_behind_an_argument_left_out():
    bias = Tensor(np.ones(3))
    value = ops.layer_norm(np.eye(3), bias=bias, eps=0.5)
    value.backward(np.ones((3, 3)))
    np.testing.assert_array_equal(bias.grad, np.full(3, 3.0))
    np.testing.assert_array_equal(value.value, ops.layer_norm(np.eye(3), None, np.ones(3), 0.5))


def test_an_op_is_its_rule_documented():
    @op
    def double(x):
        """2 * x."""
        return 2 * x, (lambda g: 2 * g,)

    assert (double.__name__, double.__doc__) == ("double", "2 * x.")
    np.testing.assert_array_equal(double(np.ones(2)), [2, 2])
    x = leaf(1, 2)
    double(x).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [2, 2])


# --- Memory ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", [lambda x, y: x + y, lambda x, y: x + x + y, lambda x, y: y + (x + x),
                               lambda x, y: ops.identity(x) + ops.reshape(y, (2,)), lambda x, y: x + (y + x) + y])
def test_gradients_that_share_memory_do_not_corrupt_each_other(f):
    """A vjp may return the gradient itself, or a view of it, and several leaves may get the same."""
    x, y, g = leaf(1, 2), leaf(3, 4), np.array([1.0, 10.0])
    f(x, y).backward(g)
    first = [x.grad.copy(), y.grad.copy()]
    assert not np.shares_memory(x.grad, y.grad)
    assert not np.shares_memory(x.grad, g)
    f(x, y).backward(g)
    np.testing.assert_array_equal([x.grad, y.grad], np.multiply(2, first))
    np.testing.assert_array_equal(g, [1, 10])
    x.grad[:] = 0  # as an optimizer does
    np.testing.assert_array_equal(y.grad, 2 * first[1])


def test_gradients_of_broadcast_arrays_can_be_written():
    x = Tensor(np.ones((2, 3)))
    ops.sum(x).backward()
    x.grad += 1
    np.testing.assert_array_equal(x.grad, np.full((2, 3), 2.0))


def test_memory_is_freed_during_the_walk():
    """When an early layer is reached, what the later ones had saved is gone, though the root still lives."""
    alive = []

    @op
    def remember(x, saved):
        return x * 1, (lambda g: (alive.append([r() is not None for r in references]), g * saved)[1],)

    saved = [np.ones(2) for _ in range(5)]
    references = [weakref.ref(s) for s in saved]
    y = leaf(1, 2)
    for s in saved:
        y = remember(y, s)
    del s, saved
    y.backward(np.ones(2))
    counts = [sum(a) for a in alive]
    assert counts == [5, 4, 3, 2, 1]
    assert [r() for r in references] == [None] * 5


def test_a_walked_tape_holds_nothing():
    x = leaf(1, 2)
    hidden = x * 2
    reference = weakref.ref(hidden.value)
    y = hidden * hidden
    del hidden
    assert reference() is not None
    y.backward(np.ones(2))
    assert reference() is None
    np.testing.assert_array_equal(x.grad, 8 * x.value)


def test_the_tape_holds_only_what_a_vjp_needs():
    x = Tensor(np.ones((3, 4)))
    hidden = ops.linear(x, Tensor(np.ones((2, 4))))
    value = weakref.ref(hidden.value)
    out = ops.relu(hidden)  # its vjp needs the result, not the argument
    del hidden
    assert value() is None
    out.backward(np.ones((3, 2)))
    np.testing.assert_array_equal(x.grad, np.full((3, 4), 2.0))


@pytest.mark.parametrize("all_at_once", [True, False])
def test_gradients_put_off_are_not_computed_twice(all_at_once):
    calls = []

    @op
    def scaled(x, weight):
        def vjp(g, into):
            calls.append([place is not None for place in into])
            return g * weight, g * x if all_at_once or into[1] is not None else None
        return x * weight, vjp

    x, weight, later = leaf(1, 2), leaf(3, 4), []
    assert list(backward(scaled(x, weight), np.ones(2), wrt=x, later=later)) == [x]
    assert weight.grad is None
    for contribute in later:
        contribute()
    np.testing.assert_array_equal(x.grad, [3, 4])
    np.testing.assert_array_equal(weight.grad, [1, 2])
    assert len(calls) == (1 if all_at_once else 2)


def test_a_gradient_that_serves_two_arguments_is_not_written_to():
    x = Tensor(np.array([1.0, -2.0, 3.0]))
    a, b = 2 * x, 3 * x
    total = a * 5.0 + b * 7.0 + ops.add_relu(a, b)  # both have a gradient already when the shared one comes
    total.backward(np.ones(3))
    np.testing.assert_array_equal(x.grad, 31 + 5 * (x.value > 0))
