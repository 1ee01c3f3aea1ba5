"""Layers and models: gradients, PyTorch's numbers and names, weights from (seed, name), dropout, statistics."""

import itertools

import numpy as np
import pytest

from mpiml import Tensor, ops
from mpiml.nn import (
    AvgPool2d,
    BatchNorm2d,
    Concatenate,
    Conv1d,
    Conv2d,
    Dropout,
    Embedding,
    EmbeddingBag,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    Positions,
    Residual,
    SelfAttention,
    Sequential,
    Statistic,
    Step,
    constant,
    normal,
    run,
    uniform,
)
from mpiml.optim import SGD
from mpiml.random import generator
from mpiml.tensor import value_of

IDS = np.array([[0, 4, 4], [2, 0, 1]])


class Scaled(Module):
    """A user's own module: a layer, a list of layers and a bare parameter."""

    def __init__(self):
        self.first = Linear(3, 4)
        self.blocks = [Linear(4, 4), ops.tanh, Linear(4, 4, bias=False)]
        self.scale = Parameter((4,), uniform(1.0))

    def __call__(self, x, training=False):
        x = self.first(x, training)
        for block in self.blocks:
            x = block(x, training) if isinstance(block, Module) else block(x)
        return x * (self.scale if training else self.scale.value)


class Tied(Module):
    """Two layers that share their weight."""

    def __init__(self):
        self.encode = Linear(3, 3)
        self.decode = Linear(3, 3)
        self.decode.weight = self.encode.weight

    def __call__(self, x, training=False):
        return self.decode(ops.tanh(self.encode(x, training)), training)


# (model, the same of torch.nn or None, shape of x or x itself)
MODELS = {
    "Linear": (lambda: Linear(3, 4), lambda n: n.Linear(3, 4), (5, 3)),
    "Linear without bias": (lambda: Linear(3, 4, bias=False), lambda n: n.Linear(3, 4, bias=False), (2, 5, 3)),
    "Conv2d": (lambda: Conv2d(2, 4, 3), lambda n: n.Conv2d(2, 4, 3), (2, 2, 5, 4)),
    "Conv2d with options": (
        lambda: Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        lambda n: n.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        (2, 4, 5, 4)),
    "Conv2d depthwise": (lambda: Conv2d(3, 6, 3, padding=1, groups=3), lambda n: n.Conv2d(3, 6, 3, 1, 1, groups=3),
                         (1, 3, 4, 4)),
    "MaxPool2d": (lambda: MaxPool2d(3, 2, 1), lambda n: n.MaxPool2d(3, 2, 1), (2, 2, 5, 7)),
    "AvgPool2d": (lambda: AvgPool2d((2, 3)), lambda n: n.AvgPool2d((2, 3)), (2, 2, 5, 7)),
    "Flatten": (lambda: Flatten(), lambda n: n.Flatten(), (2, 3, 4)),
    "LayerNorm": (lambda: LayerNorm(6), lambda n: n.LayerNorm(6), (2, 3, 6)),
    "LayerNorm of two axes": (lambda: LayerNorm((2, 3), eps=0.1), lambda n: n.LayerNorm((2, 3), 0.1), (4, 2, 3)),
    "GroupNorm": (lambda: GroupNorm(2, 4, eps=0.1), lambda n: n.GroupNorm(2, 4, 0.1), (3, 4, 2, 2)),
    "BatchNorm2d": (lambda: BatchNorm2d(3), lambda n: n.BatchNorm2d(3), (4, 3, 2, 3)),
    "BatchNorm2d of blocks": (lambda: BatchNorm2d(3, samples=2), None, (5, 3, 2, 3)),
    "Embedding": (lambda: Embedding(5, 3), lambda n: n.Embedding(5, 3), IDS),
    "Conv1d": (lambda: Conv1d(2, 4, 3), lambda n: n.Conv1d(2, 4, 3), (2, 2, 5)),
    "Conv1d with options": (lambda: Conv1d(3, 4, 2, stride=2, padding=1, dilation=3, bias=False),
                            lambda n: n.Conv1d(3, 4, 2, stride=2, padding=1, dilation=3, bias=False), (2, 3, 9)),
    "EmbeddingBag": (lambda: EmbeddingBag(5, 3, padding_idx=2),
                     lambda n: n.EmbeddingBag(5, 3, mode="mean", padding_idx=2), IDS),
    "Positions": (lambda: Positions(4, 3), None, (2, 4, 3)),
    "Positions of short sequences": (lambda: Positions(4, 3), None, (2, 3, 3)),
    "SelfAttention": (lambda: SelfAttention(6, 2), None, (2, 5, 6)),
    "SelfAttention that is causal": (lambda: SelfAttention(6, 3, is_causal=True), None, (2, 5, 6)),
    "Dropout": (lambda: Dropout(0.3), None, (3, 5)),
    "Residual": (lambda: Residual(Linear(3, 3)), None, (4, 3)),
    "Residual with a shortcut": (lambda: Residual(Linear(3, 2), Linear(3, 2)), None, (4, 3)),
    "Concatenate": (lambda: Concatenate(ops.identity, Linear(3, 2), Sequential(Linear(3, 4), ops.tanh)), None, (4, 3)),
    "Concatenate along the last axis": (lambda: Concatenate(Linear(3, 2), ops.tanh, axis=-1), None, (4, 2, 3)),
    "own Module": (Scaled, None, (4, 3)),
    "shared weight": (Tied, None, (4, 3)),
    "network": (
        lambda: Sequential(Conv2d(1, 4, 3, padding=1), BatchNorm2d(4), ops.tanh, MaxPool2d(2),
                           Conv2d(4, 4, 3), GroupNorm(2, 4), ops.silu, Flatten(), Linear(16, 8), LayerNorm(8),
                           ops.gelu, Linear(8, 3)),
        lambda n: n.Sequential(n.Conv2d(1, 4, 3, padding=1), n.BatchNorm2d(4), n.Tanh(), n.MaxPool2d(2),
                               n.Conv2d(4, 4, 3), n.GroupNorm(2, 4), n.SiLU(), n.Flatten(), n.Linear(16, 8),
                               n.LayerNorm(8), n.GELU(), n.Linear(8, 3)), (6, 1, 8, 8)),
    "nested network": (
        lambda: Sequential(Sequential(Linear(3, 4), ops.tanh), Sequential(ops.tanh, Sequential(Linear(4, 2)))),
        lambda n: n.Sequential(n.Sequential(n.Linear(3, 4), n.Tanh()), n.Sequential(n.Tanh(), n.Sequential(
            n.Linear(4, 2)))), (5, 3)),
    "no layers": (lambda: Sequential(), lambda n: n.Sequential(), (2, 3)),
}
every_model = pytest.mark.parametrize(("make", "like", "x"), MODELS.values(), ids=MODELS.keys())
every_torch = pytest.mark.parametrize(("make", "like", "x"), [m for m in MODELS.values() if m[1]],
                                      ids=[name for name, m in MODELS.items() if m[1]])


def setup(make, x, dtype):
    """The model, with all its parameters away from their special initial values, and x."""
    model, rng = make().init(seed=3, dtype=dtype), np.random.default_rng(0)
    model.vector += rng.uniform(0.1, 0.3, model.vector.size)
    return model, (rng.standard_normal(x).astype(dtype) if isinstance(x, tuple) else x)


def project(model, x, training=False):
    """sum(u * model(x)) for constant numbers u: a Tensor if it is to be differentiated."""
    y = model(x, training)
    return ops.sum(y * np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype))


# --- Gradients ------------------------------------------------------------------------------------------------

@every_model
def test_gradient_against_finite_differences(make, like, x):
    model, x = setup(make, x, np.float64)
    step = Step(5, 2)
    leaf = Tensor(x) if x.dtype.kind == "f" else x
    project(model, leaf, step).backward()
    places = [(model.vector, model.gradient, i) for i in range(model.learnt)]
    if leaf is not x:
        places += [(x.reshape(-1), leaf.grad.reshape(-1), i) for i in range(x.size)]
    assert places
    eps = 1e-6
    for array, gradient, i in places:
        before = array[i]
        values = []
        for array[i] in before + eps, before - eps:
            values.append(float(project(model, x, step)))
        array[i] = before
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(gradient[i] - numeric) <= 1e-6 * max(1, np.abs(gradient).max())


@every_torch
def test_against_pytorch(make, like, x):
    """With PyTorch's weights: values, gradients of all parameters and of x, in training and in inference."""
    t = pytest.importorskip("torch")
    model, x = setup(make, x, np.float32)
    other = like(t.nn)
    other.load_state_dict({name: t.from_numpy(p.value.copy()) for name, p in model.named().items()})
    theirs = t.from_numpy(x.copy())
    ours = Tensor(x) if x.dtype.kind == "f" else x
    if ours is not x:
        theirs.requires_grad_()
    value = other(theirs)
    u = t.cos(t.arange(value.numel())).reshape(value.shape)
    (value * u).sum().backward()
    result = model(ours, Step(0))
    project(model, ours, Step(0)).backward()
    np.testing.assert_allclose(value_of(result), value.detach().numpy(), rtol=0, atol=1e-5 * value.abs().max().item())
    pairs = [(p.grad, q.grad) for (_, p), (_, q) in zip(
        ((n, p) for n, p in model.named().items() if not isinstance(p, Statistic)), other.named_parameters(),
        strict=True)]
    if ours is not x:
        pairs.append((ours.grad, theirs.grad))
    largest = max((yours.abs().max().item() for _, yours in pairs), default=0)
    for mine, yours in pairs:
        np.testing.assert_allclose(mine, yours.numpy(), rtol=0, atol=1e-5 * largest)
    before = {name: p.value.copy() for name, p in model.named().items()}
    other.load_state_dict({name: t.from_numpy(value) for name, value in before.items()})
    expected = other.eval()(theirs).detach().numpy()
    np.testing.assert_allclose(model(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@every_torch
def test_names_and_shapes_are_pytorchs(make, like, x):
    t = pytest.importorskip("torch")
    assert [(name, p.shape) for name, p in make().named().items()] == [
        (name, tuple(p.shape)) for name, p in like(t.nn).state_dict().items()]


@every_model
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(make, like, x, dtype):
    model, x = setup(make, x, dtype)
    y = model(x, Step(0))
    assert model(x).dtype == y.dtype == model.vector.dtype == model.gradient.dtype == dtype


@every_model
def test_inference_records_nothing(make, like, x):
    model, x = setup(make, x, np.float32)
    assert type(model(x)) is np.ndarray
    np.testing.assert_array_equal(model(x), model(x, training=False))


@every_model
def test_an_empty_batch_is_a_batch(make, like, x):
    model, x = setup(make, x, np.float32)
    whole, y = model(x), model(x[:0], Step(0))
    assert y.shape == (0, *whole.shape[1:])
    if isinstance(y, Tensor):
        y.backward(np.zeros(y.shape, y.dtype))
    assert not model.gradient.any()


# --- The model's vector ---------------------------------------------------------------------------------------

def network():
    return Sequential(Conv2d(1, 2, 3), BatchNorm2d(2), ops.relu, Flatten(), Residual(Linear(8, 8)), Dropout(0.4),
                      Linear(8, 3))


def test_parameters_are_views_of_the_vector():
    model = network().init(seed=1)
    named = model.named()
    learnt = [p for p in named.values() if not isinstance(p, Statistic)]
    assert model.learnt == sum(p.size for p in learnt) == model.vector.size - 5
    order = learnt + [p for p in named.values() if isinstance(p, Statistic)]
    np.testing.assert_array_equal(model.vector, np.concatenate([p.value.ravel(p.order) for p in order]))
    model.vector[:] = np.arange(model.vector.size)
    model.gradient[:] = -model.vector
    start = 0
    for p in order:
        expected = np.arange(start, start + p.size).reshape(p.shape, order=p.order)
        np.testing.assert_array_equal(p.value, expected)
        np.testing.assert_array_equal(p.grad, -expected)
        start += p.size


def test_the_sums_hold_the_gradient_and_two_numbers():
    model = network().init()
    model.sums[:] = 7
    assert model.sums.size == model.vector.size + 2
    assert model.gradient.size == model.vector.size
    assert (model.gradient == 7).all()


def test_gradients_accumulate_in_the_vector():
    model = Sequential(Linear(3, 2)).init(dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((4, 3))
    memory = model.gradient
    project(model, x, True).backward()
    first = memory.copy()
    assert first.any()
    project(model, x, True).backward()
    np.testing.assert_allclose(memory, 2 * first)
    assert model.gradient is memory


def test_gradients_can_be_moved_to_other_memory():
    model = Sequential(Linear(3, 2)).init()
    sums = np.zeros(model.vector.size + 2, np.float32)
    model.accumulate_in(sums)
    project(model, np.ones((1, 3), np.float32), True).backward()
    assert sums[:-2].any()
    assert np.shares_memory(model[0].weight.grad, sums)
    np.testing.assert_array_equal(model.gradient, sums[:-2])


def test_a_shared_parameter_is_counted_once():
    model = Tied()
    assert list(model.named()) == ["encode.weight", "encode.bias", "decode.bias"]
    assert model.init().vector.size == 9 + 3 + 3
    assert model.decode.weight is model.encode.weight


def test_a_shared_layer_is_counted_once():
    layer = Linear(3, 3)
    model = Sequential(layer, ops.tanh, layer).init(dtype=np.float64)
    assert list(model.named()) == ["0.weight", "0.bias"]
    x = np.random.default_rng(0).standard_normal((2, 3))
    project(model, x, True).backward()
    both = Sequential(Linear(3, 3), ops.tanh, Linear(3, 3)).init(dtype=np.float64)
    both.vector[:] = np.tile(model.vector, 2)
    project(both, x, True).backward()
    np.testing.assert_allclose(model.gradient, both.gradient[:12] + both.gradient[12:])


def test_named_modules():
    assert list(network().named(BatchNorm2d)) == ["1"]
    assert list(network().named(Module)) == ["", "0", "1", "3", "4", "4.body", "5", "6"]
    assert list(Scaled().named()) == ["first.weight", "first.bias", "blocks.0.weight", "blocks.0.bias",
                                      "blocks.2.weight", "scale"]


def test_a_model_is_written_down_without_memory():
    model = Linear(10**6, 10**6)  # 4 TB
    assert sum(p.size for p in model.named().values()) == 10**12 + 10**6
    assert model.weight.value is None


# --- Weights from (seed, name) --------------------------------------------------------------------------------

def weights(model):
    return {name: p.value.copy() for name, p in model.named().items()}


def test_a_slice_keeps_names_and_weights():
    whole = weights(network().init(seed=5))
    part = network()[1:5]
    assert list(part.named()) == [name for name in whole if name[0] in "14"]
    for name, value in weights(part.init(seed=5)).items():
        np.testing.assert_array_equal(value, whole[name])


def test_a_slice_of_a_slice():
    part = network()[1:][2:]
    assert list(part.named()) == ["4.body.weight", "4.body.bias", "6.weight", "6.bias"]
    assert len(part) == 4
    assert isinstance(part[-1], Linear)
    assert list(network()[-1:].named()) == ["6.weight", "6.bias"]
    assert len(network()[5:2]) == 0


def test_the_parts_of_a_model_compute_what_the_model_does():
    model = network().init(dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4))
    for training in False, Step(3, first=5):
        expected = model(x, training)
        parts = [network()[a:b].init(dtype=np.float64) for a, b in [(0, 2), (2, 2), (2, 6), (6, 7)]]
        y = x
        for part in parts:
            y = part(y, training)
        np.testing.assert_array_equal(value_of(y), value_of(expected))


def test_a_slice_with_a_step_is_refused():
    with pytest.raises(ValueError, match="without a step of 2"):
        network()[::2]


def test_weights_depend_on_seed_and_name_alone():
    one, same, other = (weights(network().init(seed=s)) for s in (1, 1, 2))
    bigger = weights(Sequential(*network().layers, Linear(3, 3)).init(seed=1))
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        np.testing.assert_array_equal(value, bigger[name])
    assert not np.array_equal(one["6.weight"], other["6.weight"])


def test_layers_of_one_shape_get_different_weights():
    first, second = (layer.value for layer in Sequential(Linear(8, 8, False), Linear(8, 8, False)).init().named().values())
    assert not np.intersect1d(first, second).size


def test_float64_weights_are_the_float32_ones_unrounded():
    single, double = network().init(seed=1), network().init(seed=1, dtype=np.float64)
    assert double.vector.dtype == np.float64
    np.testing.assert_array_equal(double.vector.astype(np.float32), single.vector)
    assert not np.array_equal(double.vector, single.vector)


@pytest.mark.parametrize("dtype", [np.float16, int, bool])
def test_parameters_are_floats(dtype):
    with pytest.raises(TypeError, match="parameters are float32 or float64, not"):
        Linear(2, 2).init(0, dtype)


@pytest.mark.parametrize(("make", "bound"), [
    (lambda: Linear(100, 300), 0.1), (lambda: Conv2d(8, 200, (5, 3)), (8 * 15) ** -0.5),
    (lambda: Conv2d(8, 400, 5, groups=4), 50**-0.5)])
def test_weights_and_biases_are_uniform(make, bound):
    model = make().init(seed=0)
    for p in model.weight, model.bias:
        assert 0.97 * bound < p.value.max() <= bound * (1 + 1e-6)
        assert 0.97 * bound < -p.value.min() <= bound * (1 + 1e-6)
        slack = 5 / p.size**0.5
        assert abs(p.value.mean()) < slack * bound / 3**0.5
        assert p.value.var() == pytest.approx(bound**2 / 3, rel=slack)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_pytorchs(causal):
    t = pytest.importorskip("torch")
    model = SelfAttention(12, 3, is_causal=causal).init(seed=1, dtype=np.float64)
    theirs = t.nn.MultiheadAttention(12, 3, batch_first=True, dtype=t.float64)
    own = weights(model)
    theirs.load_state_dict({name: t.tensor(value) for name, value in {
        "in_proj_weight": np.concatenate([own[f"{part}.weight"] for part in ("query", "key", "value")]),
        "in_proj_bias": np.concatenate([own[f"{part}.bias"] for part in ("query", "key", "value")]),
        "out_proj.weight": own["out.weight"], "out_proj.bias": own["out.bias"]}.items()})
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    after = t.ones(5, 5, dtype=bool).triu(1) if causal else None
    expected, _ = theirs(*[t.tensor(x)] * 3, key_padding_mask=t.tensor(~mask), attn_mask=after)
    np.testing.assert_allclose(model(x, mask=mask), expected.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_layers_of_sequences_refuse():
    for message, layer, x in [
            ("a sequence of 4 is too long for a model of 3 positions", Positions(3, 2), np.zeros((1, 4, 2), np.float32)),
            (r"\(n, channels, length\), not \(2, 3\)", Conv1d(3, 2, 1), np.zeros((2, 3), np.float32))]:
        with pytest.raises(ValueError, match=message):
            layer.init()(x)
    with pytest.raises(ValueError, match="cannot split 6 features into 4 equal heads"):
        SelfAttention(6, 4)


@pytest.mark.parametrize(("make", "like"), [
    (lambda: Linear(50, 400), lambda n: n.Linear(50, 400)),
    (lambda: Conv2d(4, 400, 3, groups=2), lambda n: n.Conv2d(4, 400, 3, groups=2)),
    (lambda: Conv1d(10, 400, 3), lambda n: n.Conv1d(10, 400, 3)),
    (lambda: Embedding(100, 60), lambda n: n.Embedding(100, 60)),
    (lambda: EmbeddingBag(100, 60), lambda n: n.EmbeddingBag(100, 60)),
    (lambda: LayerNorm(40), lambda n: n.LayerNorm(40)), (lambda: BatchNorm2d(40), lambda n: n.BatchNorm2d(40))])
def test_initial_weights_are_spread_as_pytorchs(make, like):
    t = pytest.importorskip("torch")
    t.manual_seed(0)
    theirs = like(t.nn).state_dict()
    for name, value in weights(make().init(seed=0)).items():
        other = theirs[name].double().numpy()
        slack = 6 / value.size**0.5
        assert value.std() == pytest.approx(other.std(), rel=slack)
        assert value.mean() == pytest.approx(other.mean(), abs=slack * max(other.std(), 1e-6) + 1e-12)
        for q in 0, 0.25, 0.75, 1:
            if name != "weight" or 0 < q < 1:
                assert np.quantile(value, q) == pytest.approx(np.quantile(other, q), abs=2 * slack * other.std())


def test_rules():
    rng = generator(0, "rules")
    for rule, mean, std in (uniform(3.0), 0, 3**0.5), (normal(2.0), 0, 2), (constant(4.0), 4, 0):
        value = rule(rng, (200, 100))
        assert value.shape == (200, 100)
        assert value.mean() == pytest.approx(mean, abs=0.1)
        assert value.std() == pytest.approx(std, rel=0.05)


# --- Dropout --------------------------------------------------------------------------------------------------

def masks(training, name=0, seed=0, n=8, size=500, p=0.3):
    """Which elements a dropout layer under this name drops."""
    model = Sequential(Dropout(p), first=name).init(seed)
    return model(np.ones((n, size), np.float32), training) == 0


def test_dropout_in_inference_is_the_identity():
    x = np.ones((2, 3), np.float32)
    layer = Dropout(0.5).init()
    assert layer(x) is x
    assert layer(x, training=False) is x
    assert Dropout(0.0).init()(x, Step(0)) is x


def test_dropout_drops_its_share_and_scales_the_rest():
    x = np.full((100, 1000), 3.0, np.float32)
    y = Dropout(0.3).init()(x, Step(0))
    assert np.mean(y == 0) == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(y[y != 0], 3 / 0.7, rtol=1e-6)


def test_dropout_of_a_batch_in_parts():
    whole = masks(Step(4, first=10))
    for cut in 1, 3, 8:
        parts = masks(Step(4, first=10), n=cut), masks(Step(4, first=10 + cut), n=8 - cut)
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_dropout_masks_differ():
    first = masks(Step(0))
    np.testing.assert_array_equal(first, masks(Step(0)))
    assert len({row.tobytes() for row in first}) == 8  # each sample its own
    for other in masks(Step(1)), masks(Step(0), name=1), masks(Step(0), seed=1), masks(Step(0, first=8)):
        agreement = np.mean(first == other)  # 0.3**2 + 0.7**2 if independent
        assert agreement == pytest.approx(0.58, abs=0.05)


def test_dropouts_of_one_model_differ():
    x = np.ones((4, 200), np.float32)
    model = Concatenate(Dropout(0.5), Dropout(0.5)).init()
    left, right = np.split(model(x, Step(0)), 2, axis=1)
    assert np.mean(left == right) == pytest.approx(0.5, abs=0.1)


def test_dropout_needs_the_step():
    with pytest.raises(TypeError, match=r"training=Step\(number\)"):
        Dropout(0.5).init()(np.ones((2, 3), np.float32), training=True)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, np.nan])
def test_dropout_needs_a_probability(p):
    with pytest.raises(ValueError, match="0 <= p < 1"):
        Dropout(p)


# --- Batch normalisation --------------------------------------------------------------------------------------

def test_running_statistics_are_pytorchs():
    t = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    model = Sequential(Conv2d(2, 3, 3), BatchNorm2d(3, momentum=0.2), ops.relu, Flatten(), Linear(12, 2)).init(seed=0)
    other = t.nn.Sequential(t.nn.Conv2d(2, 3, 3), t.nn.BatchNorm2d(3, momentum=0.2), t.nn.ReLU(), t.nn.Flatten(),
                            t.nn.Linear(12, 2))
    other.load_state_dict({name: t.from_numpy(p.value.copy()) for name, p in model.named().items()})
    ours, theirs = SGD(model, lr=0.1), t.optim.SGD(other.parameters(), lr=0.1)
    for number in range(5):
        x = (3 + 2 * rng.standard_normal((4 + number, 2, 4, 4))).astype(np.float32)
        y = rng.integers(0, 2, len(x))
        (ops.cross_entropy(model(x, Step(number)), y) / len(y)).backward()
        ours.step()
        theirs.zero_grad()
        t.nn.functional.cross_entropy(other(t.from_numpy(x)), t.from_numpy(y)).backward()
        theirs.step()
    assert not model.gradient.any()
    for name, value in other.state_dict().items():
        np.testing.assert_allclose(model.named()[name].value, value.numpy(), rtol=1e-4, atol=1e-5)
    assert model[1].num_batches_tracked.value == 5
    x = rng.standard_normal((3, 2, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(model(x), other.eval()(t.from_numpy(x)).detach().numpy(), rtol=1e-3, atol=1e-5)


def test_running_statistics_of_known_numbers():
    """Over samples, rows and columns; the variance is the unbiased one."""
    layer = BatchNorm2d(1, momentum=0.5).init(dtype=np.float64)
    optimizer = SGD(layer, lr=0.0)
    x = np.array([1.0, 2.0, 3.0, 6.0]).reshape(2, 1, 1, 2)
    layer(x, True).backward(np.ones(x.shape))
    assert (layer.running_mean.value, layer.running_var.value) == (0, 1)  # until the step is taken
    optimizer.step()
    np.testing.assert_allclose(layer.running_mean.value, [0.5 * 0 + 0.5 * 3])
    np.testing.assert_allclose(layer.running_var.value, [0.5 * 1 + 0.5 * 14 / 3])
    np.testing.assert_allclose(layer(x), (x - 1.5) / np.sqrt(0.5 + 7 / 3 + 1e-5))
    optimizer.step()  # nothing was measured since
    np.testing.assert_allclose(layer.running_mean.value, [1.5])
    assert layer.num_batches_tracked.value == 1


def test_running_statistics_of_micro_batches_are_those_of_the_batch():
    x = np.random.default_rng(0).standard_normal((8, 3, 2, 2))
    layers = [BatchNorm2d(3, samples=2).init(dtype=np.float64) for _ in range(2)]
    for layer, cuts in zip(layers, [(0, 8), (0, 2, 6, 8)], strict=True):
        for a, b in itertools.pairwise(cuts):
            layer(x[a:b], True).backward(np.ones((b - a, 3, 2, 2)))
        SGD(layer, lr=0.0).step()
    np.testing.assert_allclose(layers[0].vector, layers[1].vector, rtol=1e-14)


def test_batch_norm_takes_images():
    with pytest.raises(ValueError, match="BatchNorm2d takes images"):
        BatchNorm2d(3).init()(np.ones((2, 3), np.float32))


# --- Combinators ----------------------------------------------------------------------------------------------

def test_combinators():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    body, shortcut = Linear(3, 3), Linear(3, 3)
    Sequential(body, shortcut).init()
    for model, expected in [
            (Residual(body), x + body(x)), (Residual(body, shortcut), shortcut(x) + body(x)),
            (Residual(np.tanh), x + np.tanh(x)), (Sequential(body, ops.relu, shortcut), shortcut(ops.relu(body(x)))),
            (Concatenate(ops.identity, body), np.hstack([x, body(x)])),
            (Concatenate(body, np.tanh, axis=0), np.vstack([body(x), np.tanh(x)]))]:
        np.testing.assert_array_equal(model(x), expected)


@pytest.mark.parametrize("layer", [
    Linear(6, 6), Conv2d(3, 3, 1), GroupNorm(3, 3), BatchNorm2d(3), Residual(BatchNorm2d(3)),
    Residual(lambda x: x[:1], shortcut=lambda x: x)])
def test_a_relu_behind_a_layer_is_part_of_it(layer):
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 6)).astype(np.float32)
    model = Sequential(layer, ops.relu).init()
    for training in False, Step(0):
        apart = ops.relu(run(layer, x, training))
        np.testing.assert_array_equal(value_of(model(x, training)), value_of(apart))
    if training and model.learnt:
        gradients = []
        for y in model(x, training), apart:
            model.gradient[:] = 0
            y.backward(x)
            gradients.append(model.gradient.copy())
        np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("layer", [Conv2d(3, 4, 3), BatchNorm2d(3), Residual(BatchNorm2d(3))])
def test_max_pooling_applies_the_relu_before_it(layer):
    """Bit for bit what a model cut between the two computes, as the stages of a pipeline may be."""
    x = np.random.default_rng(0).standard_normal((20, 3, 7, 8)).astype(np.float32)
    model = Sequential(layer, ops.relu, MaxPool2d(2)).init()
    gradients = []
    for run_ in (lambda: model(x, Step(0))), (lambda: model[2:](model[:2](x, Step(0)), Step(0))):
        model.gradient[:] = 0
        y = run_()
        y.backward(np.cos(y.value))
        gradients.append((y.value, model.gradient.copy()))
    for together, apart in zip(*gradients, strict=True):
        np.testing.assert_array_equal(together, apart)


def test_training_reaches_every_layer():
    """A combinator that did not hand `training` on would leave a parameter without a gradient."""
    model = Sequential(Residual(Sequential(Linear(3, 3)), Linear(3, 3)), Concatenate(Linear(3, 2), Linear(3, 2))).init()
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    project(model, x, Step(0)).backward()
    assert all(p.grad.any() for p in model.named().values())


def test_names_in_combinators():
    model = Sequential(Residual(Sequential(Linear(1, 1)), Linear(1, 1)), Concatenate(ops.identity, Linear(1, 1)))
    assert list(model.named()) == ["0.body.0.weight", "0.body.0.bias", "0.shortcut.weight", "0.shortcut.bias",
                                   "1.branches.1.weight", "1.branches.1.bias"]


# --- Messages -------------------------------------------------------------------------------------------------

def test_repr():
    assert repr(Linear(2, 3)) == "Linear of 9 parameters: weight (3, 2), bias (3,)"
    assert repr(Sequential(Flatten(), Linear(2, 1, bias=False))) == "Sequential of 2 parameters: 1.weight (1, 2)"
    assert repr(Linear(2, 3).weight) == "Parameter(3, 2)"
    assert repr(Flatten()) == "Flatten of 0 parameters"


@pytest.mark.parametrize("make", [lambda: Linear(3, 2), lambda: LayerNorm(3), lambda: Sequential(Flatten(), Linear(3, 2)),
                                  lambda: Dropout(0.5), lambda: Residual(Linear(3, 3))])
def test_a_model_without_memory_says_so(make):
    with pytest.raises(RuntimeError, match=r"model\.init\(seed\)"):
        make()(np.ones((1, 3), np.float32), Step(0))


@pytest.mark.parametrize(("words", "f"), [
    ("cannot split 3 input and 4 output channels into 2", lambda: Conv2d(3, 4, 3, groups=2)),
    ("cannot split 4 input and 3 output channels into 2", lambda: Conv2d(4, 3, 3, groups=2)),
    ("cannot split 4 input and 4 output channels into 0", lambda: Conv2d(4, 4, 3, groups=0)),
    ("takes 3 features", lambda: Linear(3, 2).init()(np.ones((2, 4), np.float32))),
    ("cannot split 5 channels into 2", lambda: GroupNorm(2, 5).init()(np.ones((2, 5), np.float32))),
])
def test_errors_say_what_is_wrong(words, f):
    with pytest.raises(ValueError, match=words):
        f()
