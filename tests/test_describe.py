"""Models as JSON and back: every layer, what cannot be described, and descriptions from strangers."""

import functools
import json
import re
import tracemalloc

import numpy as np
import pytest
from test_nn import MODELS, Scaled, Tied

from mpiml import nn, ops
from mpiml.describe import build, describe
from mpiml.nn import Concatenate, Conv2d, Dropout, Flatten, LayerNorm, Linear, MaxPool2d, Module, Residual, Sequential

LAYERS = {name for name, thing in vars(nn).items() if isinstance(thing, type) and issubclass(thing, Module)} - {"Module"}
OWN = {"Scaled": Scaled, "Tied": Tied}


def swish(x):
    return x * ops.sigmoid(x)


class Block(Module):
    """A layer of one's own that takes all kinds of arguments."""

    def __init__(self, sizes, layers, *, activation=ops.relu, norm=LayerNorm, mode="plain", options=None):
        self.layers, self.activation, self.mode, self.options = layers, activation, mode, options
        self.norm = norm(sizes[-1])

    def __call__(self, x, training=False):
        for layer in self.layers:
            x = self.activation(nn.run(layer, x, training))
        return self.norm(x, training) if self.mode == "plain" else x


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name):
    make, _, x = MODELS[name]
    model = make().init(seed=3)
    twin = build(json.loads(json.dumps(describe(model))), OWN)
    assert not hasattr(twin, "vector")
    assert repr(twin) == repr(model) and describe(twin) == describe(model)
    twin.init(seed=3)
    np.testing.assert_array_equal(twin.vector, model.vector)
    x = np.ones(x, np.float32) if isinstance(x, tuple) else x
    np.testing.assert_array_equal(twin(x), model(x))


def test_every_layer_makes_the_round_trip_above():
    used = {type(layer).__name__ for make, *_ in MODELS.values() for layer in make().named(Module).values()}
    assert LAYERS <= used, "a new layer needs a line in MODELS of tests/test_nn.py"


def test_how_it_reads():
    model = Sequential(
        Conv2d(1, 8, (3, 5), padding=1, bias=False), ops.relu, Residual(Dropout(0.1), shortcut=ops.identity),
        Concatenate(ops.tanh, Flatten(), axis=-1), functools.partial(ops.gelu, approximate="tanh"), Linear(np.int64(3), 2))
    assert describe(model) == [
        "Sequential", ["Conv2d", 1, 8, ["tuple", 3, 5], {"padding": 1, "bias": False}], "relu",
        ["Residual", ["Dropout", 0.1], {"shortcut": "identity"}], ["Concatenate", "tanh", ["Flatten"], {"axis": -1}],
        ["partial", "gelu", {"approximate": ["str", "tanh"]}], ["Linear", 3, 2]]


def test_a_slice_keeps_its_names():
    part = Sequential(Linear(3, 4), ops.relu, Linear(4, 2))[1:]
    assert build(describe(part)).named().keys() == {"2.weight", "2.bias"}


def test_layers_and_functions_of_ones_own():
    model = Sequential(Block([4, 3], [Linear(4, 3), (swish)], activation=swish, options={"low": None, "pair": (1, "two")}),
                       Block((3, 3), (Linear(3, 3),), mode="other", norm=nn.LayerNorm)).init()
    found = json.loads(json.dumps(describe(model)))
    own = {"Block": Block, "swish": swish}
    twin = build(found, own).init()
    assert twin[0].options == {"low": None, "pair": (1, "two")} and twin[1].mode == "other" and twin[0].norm.eps == 1e-5
    np.testing.assert_array_equal(twin(np.ones((2, 4), np.float32)), model(np.ones((2, 4), np.float32)))
    with pytest.raises(ValueError, match=r"'swish' is no function of mpiml\.ops: if it is your own, .*=\{'swish': \.\.\.\}"):
        build(found, {"Block": Block})
    with pytest.raises(ValueError, match=r"'Block' is no layer of mpiml\.nn: if it is your own, .*=\{'Block': \.\.\.\}"):
        build(found, {"swish": swish})
    with pytest.raises(ValueError, match="Linear is a name of mpiml's own"):
        build(found, own | {"Linear": Block})


# --- What has no description ----------------------------------------------------------------------------------------

def relu(x):
    return x


class Counted(Module):
    made = 0

    def __init__(self):
        Counted.made += 1
        self.inner = Linear(Counted.made, 1)


def shared():
    layer = Linear(3, 3)
    return Sequential(layer, ops.relu, layer)


def changed(index, **attributes):
    def make():
        model = Sequential(Linear(3, 3), Dropout(0.5), LayerNorm(3), Residual(ops.tanh))
        for name, value in attributes.items():
            setattr(model[index] if index is not None else model, name, value)
        return model
    return make


@pytest.mark.parametrize("make, message", [
    (lambda: Sequential(Linear(3, 3), lambda x: x), r"a lambda, an argument of Sequential, has no description: use layers of"),
    (lambda: Residual(Linear(3, 3), functools.partial(lambda x: x)), "a lambda, an argument of Residual"),
    (lambda: Sequential(np.ones(3)), r"array\(\[1\., 1\., 1\.\]\), of ndarray, an argument of Sequential"),
    (lambda: Sequential(Dropout(0.5), functools.partial(ops.clip, high=np.inf)), "inf, of float, an argument of Sequential"),
    (lambda: Sequential(functools.partial(Linear(3, 3), training=True)), "of partial, an argument of Sequential"),
    (lambda: Sequential(relu), r"test_describe\.relu, in Sequential, has the name of mpiml's own: give it another one"),
    (lambda: Sequential(type("Linear", (Flatten,), {})()), r"Linear, in Sequential, has the name of mpiml's own"),
    (lambda: Sequential(type("A", (Flatten,), {})(), type("A", (Flatten,), {})()), "has the name of another part of the model"),
    (shared, r"2\.bias is shared with another layer, or was removed; only what is said when a layer is made"),
    (Counted, r"inner\.weight has the shape \(1, \d+\) instead of \(1, \d+\)"),
    (changed(1, p=0.25), r"1\.p is 0\.25 instead of 0\.5"), (changed(2, eps=0.1), r"2\.eps is 0\.1 instead of 1e-05"),
    (changed(0, bias=None), r"0\.bias is shared with another layer, or was removed"),
    (changed(None, layers=()), r"layers is \(\) instead of"), (changed(3, body=ops.relu), r"3\.body is <function relu"),
    (changed(3, shortcut=Flatten()), r"3\.shortcut is "), (changed(3, body=lambda x: x), "a lambda, an argument of 3"),
], ids=range(17))
def test_what_cannot_be_described(make, message):
    with pytest.raises(ValueError, match=message):
        describe(make())


# --- Descriptions from strangers --------------------------------------------------------------------------------------

HUGE = 10**15


STRANGE = {
    "describes no model, but": [None, "relu", ["tuple"], 3],
    "is neither a number, the name of a function nor a list that begins with a name": [
        [], {}, [["Sequential"]], [3], ["Sequential", {"a": 1}, 2], ["Sequential", []]],
    "is no layer of mpiml.nn: if it is your own": [
        ["Module"], ["Parameter", 3], ["np"], ["ops"], ["relu", 1], ["__import__", ["str", "os"]], ["eval", ["str", "1"]],
        ["os.system", ["str", "true"]], ["_WITH_RELU"], ["str"], ["str", 3], ["str", ["str", "a"]]],
    "is no function of mpiml.ops: if it is your own": [
        ["Sequential", "os.system"], ["Sequential", "check"], ["Sequential", "__class__"], ["Sequential", "eval"],
        ["Linear", 3, "four"]],
    "cannot be made: ": [
        ["Linear"], ["Linear", 3], ["Linear", 3, 4, {"eval": 1}], ["Linear", 10**4000, 1], ["partial", 3], ["dict", 3],
        ["Dropout", 2], ["Conv1d", HUGE, 8, ["tuple", 1]], ["Conv1d", HUGE, 8, ["list", 1]]],
    "weight cannot have the shape": [["Linear", 3, -4], ["Linear", 3, 4.0], ["LayerNorm", ["list", 2.5]]],
    # Arguments that a constructor would multiply, and a format that asks for a text of 10**15 letters.
    "the layers of mpiml.nn take numbers, tuples of numbers, layers and functions": [
        ["Conv2d", ["str", f"%{HUGE}d"], 8, 3], ["Conv2d", HUGE, 8, ["tuple", ["str", "a"], 1]], ["Linear", ["dict"], 3],
        ["Conv2d", HUGE, 8, ["tuple", ["tuple", 1], 1]], ["Conv2d", HUGE, 8, {"kernel_size": ["list", ["list"], 1]}]],
    "is nested too deeply": [functools.reduce(lambda inner, _: ["Sequential", inner], range(50_000), "relu")],
}


@pytest.mark.parametrize("message", STRANGE)
def test_a_stranger_can_build_nothing_but_layers(message):
    for description in STRANGE[message]:
        tracemalloc.start()
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            build(description)
        assert tracemalloc.get_traced_memory()[1] < 50e6 and len(str(caught.value)) < 1000
        tracemalloc.stop()


def test_what_is_built_takes_no_memory():
    tracemalloc.start()
    model = build(["Sequential", ["Linear", HUGE, HUGE], ["Embedding", HUGE, HUGE], ["Conv2d", HUGE, HUGE, HUGE]])
    assert model.named()["0.weight"].shape == (HUGE, HUGE) and tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_max_pool_is_a_layer_like_any_other():
    assert build(["MaxPool2d", 2, {"stride": ["tuple", 1, 2]}]).options == MaxPool2d(2, (1, 2)).options
