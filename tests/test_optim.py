"""Optimizers against PyTorch and against their formulas, and the learning-rate schedules."""

import math

import numpy as np
import pytest

from mpiml import kernels
from mpiml.kernels import aligned
from mpiml.nn import BatchNorm2d, Conv2d, Flatten, Linear, Sequential
from mpiml.optim import LAMB, LARS, SGD, Adam, AdamW, clip_norm, constant, cosine, step_decay, warmup

STEPS = 20
CASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.02}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}),
    (SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.02}),
    (Adam, {}),
    (Adam, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.03}),
    (Adam, {"lr": 0.05, "betas": (0.0, 0.0)}),
    (AdamW, {}),
    (AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
]
IDS = [f"{case.__name__}-{'-'.join(options) or 'defaults'}" for case, options in CASES]


def network(dtype=np.float32):
    """A model with running statistics behind its learnt part."""
    return Sequential(Conv2d(1, 2, 3), BatchNorm2d(2), Flatten(), Linear(8, 3)).init(seed=1, dtype=dtype)


def gradients(model):
    """A gradient for each step, of sizes from 1e-3 to 1e3."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(model.learnt) * 10 ** rng.uniform(-3, 3, model.learnt)).astype(model.vector.dtype)
            for _ in range(STEPS)]


def path(optimizer):
    """The learnt part of the vector after each step."""
    model, vectors = optimizer.model, []
    for gradient in gradients(model):
        model.gradient[:model.learnt] = gradient
        optimizer.step()
        vectors.append(model.vector[:model.learnt].copy())
    return np.array(vectors)


def same(ours, theirs, dtype):
    """Both paths agree to a few roundings of the largest number on each weight's way, which may end near 0."""
    error = np.abs(ours - theirs).max(axis=0) / np.abs(theirs).max(axis=0)
    assert ours.dtype == dtype and error.max() < 20 * np.finfo(dtype).eps


def formula(kind, w, g, memory, t, lr=1e-3, momentum=0.0, nesterov=False, weight_decay=None, betas=(0.9, 0.999),
            eps=1e-8):
    """One step as the papers write it."""
    decay = {AdamW: 0.01}.get(kind, 0.0) if weight_decay is None else weight_decay
    if kind is AdamW:
        w = w - lr * decay * w
    else:
        g = g + decay * w
    m, v = memory
    if kind is SGD:
        m = momentum * m + g
        return w - lr * (g + momentum * m if nesterov else m), (m, v)
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    return w - lr * (m / (1 - betas[0]**t)) / (np.sqrt(v / (1 - betas[1]**t)) + eps), (m, v)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_the_formula(kind, options, dtype):
    model = network(dtype)
    w, memory = model.vector[:model.learnt].astype(float), (0.0, 0.0)
    vectors = []
    for t, gradient in enumerate(gradients(model), 1):
        w, memory = formula(kind, w, gradient.astype(float), memory, t, **options)
        vectors.append(w)
    same(path(kind(model, **options)), np.array(vectors), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_against_pytorch(kind, options, dtype):
    torch = pytest.importorskip("torch")
    model = network(dtype)
    parameter = torch.nn.Parameter(torch.tensor(model.vector[:model.learnt]))
    theirs = getattr(torch.optim, kind.__name__)([parameter], **options)
    vectors = []
    for gradient in gradients(model):
        parameter.grad = torch.tensor(gradient)
        theirs.step()
        vectors.append(parameter.detach().numpy().copy())
    same(path(kind(model, **options)), np.array(vectors), dtype)


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_a_step_uses_the_gradient_up_and_leaves_the_statistics(kind, options):
    model = network()
    statistics = model.vector[model.learnt:].copy()
    optimizer = kind(model, **options)
    model.gradient[:model.learnt] = 1
    optimizer.step()
    assert optimizer.steps == 1
    assert not model.sums.any()
    np.testing.assert_array_equal(model.vector[model.learnt:], statistics)
    assert statistics.size == 5 and statistics.any()


def test_a_step_absorbs_what_batch_norm_measured():
    model = network()
    norm = model[1]
    norm.running_mean.grad[...] = 6.0  # two micro-batches of mean 3
    norm.running_var.grad[...] = 10.0
    norm.num_batches_tracked.grad[...] = 2
    SGD(model, lr=0.1).step()
    np.testing.assert_allclose(norm.running_mean.value, 0.3)
    np.testing.assert_allclose(norm.running_var.value, 1.4)
    assert norm.num_batches_tracked.value == 1 and not model.gradient.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_cover_the_learnt_part_in_its_dtype(dtype):
    model = network(dtype)
    adam = Adam(model)
    for moment in SGD(model, 0.1, momentum=0.9).velocity, adam.mean, adam.square:
        assert (moment.shape, moment.dtype) == ((model.learnt,), dtype)
    assert SGD(model, 0.1).velocity.size == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_vectors_of_a_step_begin_at_a_cache_line(dtype):
    model = network(dtype)
    adam = Adam(model)
    for vector in model.vector, model.gradient, adam.mean, adam.square:
        assert vector.ctypes.data % aligned.LINE == 0
    assert not adam.mean.any() and not model.sums.any()


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_nothing_widens_a_float32(kind, options, monkeypatch):
    seen = []
    for name in "sgd", "adam":
        monkeypatch.setattr(kernels, name, lambda *args: seen.extend(args))
    kind(network(), **options).step()
    assert {arg.dtype for arg in seen if isinstance(arg, np.ndarray)} == {np.dtype(np.float32)}  # the kernel rounds numbers


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_the_learning_rate_may_be_a_function_of_the_step(kind):
    model, asked = network(np.float64), []
    optimizer = kind(model, lr=lambda step: asked.append(step) or 0.1 * step)
    before = model.vector[:model.learnt].copy()
    first, second = path(optimizer)[:2]
    assert asked == list(range(STEPS))
    np.testing.assert_array_equal(first, before)  # a rate of 0
    assert (second != before).all()


def test_a_model_without_memory():
    with pytest.raises(RuntimeError, match=r"call model\.init\(seed\), or on a grid use what place\(model, grid\) returned"):
        Adam(Sequential(Linear(2, 2)))


@pytest.mark.parametrize("kind, options, message", [
    (SGD, {"lr": -0.1}, r"the learning rate must be a function or a number lr >= 0, not -0\.1"),
    (Adam, {"lr": math.nan}, r"the learning rate must be a function or a number lr >= 0, not nan"),
    (SGD, {"lr": 0.1, "momentum": -0.5}, r"SGD needs momentum >= 0, not -0\.5"),
    (SGD, {"lr": 0.1, "weight_decay": -1}, r"SGD needs weight_decay >= 0, not -1"),
    (SGD, {"lr": 0.1, "nesterov": True}, r"Nesterov's method is a kind of momentum: give momentum > 0"),
    (Adam, {"betas": (1.0, 0.999)}, r"Adam needs 0 <= beta < 1 for both betas, not \(1\.0, 0\.999\)"),
    (AdamW, {"betas": (0.9, -0.1)}, r"Adam needs 0 <= beta < 1 for both betas, not \(0\.9, -0\.1\)"),
    (Adam, {"eps": -1e-8}, r"Adam needs eps >= 0, not -1e-08"),
    (AdamW, {"weight_decay": -1}, r"Adam needs weight_decay >= 0, not -1"),
])
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(network(), **options)


# --- A rate for each parameter --------------------------------------------------------------------------------

RATIOS = [(LARS, {"lr": 0.5}), (LARS, {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "trust": 0.02, "eps": 0.1}),
          (LARS, {"lr": 0.5, "adapt_vectors": True, "weight_decay": 0.01}), (LAMB, {}),
          (LAMB, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0}),
          (LAMB, {"lr": 0.05, "adapt_vectors": True, "weight_decay": 0.3})]


def ratio_formula(kind, w, g, memory, t, lr=1e-3, momentum=0.9, weight_decay=None, trust=0.001, eps=None,
                  betas=(0.9, 0.999), adapt_vectors=False):
    """One step of one parameter as the papers write it."""
    length = np.linalg.norm
    adapted = adapt_vectors or w.ndim > 1
    if kind is LARS:
        decay = (weight_decay or 0.0) * adapted
        scaled = adapted and length(w) and length(g)
        ratio = trust * length(w) / (length(g) + decay * length(w) + (eps or 0.0)) if scaled else 1
        v = momentum * memory[0] + lr * ratio * (g + decay * w)
        return w - v, (v, None)
    decay = (0.01 if weight_decay is None else weight_decay) * adapted
    m, v = betas[0] * memory[0] + (1 - betas[0]) * g, betas[1] * memory[1] + (1 - betas[1]) * g**2
    u = m / (1 - betas[0]**t) / (np.sqrt(v / (1 - betas[1]**t)) + (1e-6 if eps is None else eps)) + decay * w
    return w - lr * (length(w) / length(u) if adapted and length(w) and length(u) else 1) * u, (m, v)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind, options", RATIOS)
def test_the_formula_of_each_parameter(kind, options, dtype):
    model = network(dtype)
    before = model.vector[:model.learnt].copy()
    optimizer = kind(model, **options)
    ours = path(optimizer)
    shapes = [p.shape for p in model.layout().values()][:-3]
    assert len(shapes) == 6 and optimizer.bounds[-1] == model.learnt
    for start, stop, shape in zip(optimizer.bounds[:-1], optimizer.bounds[1:], shapes, strict=True):
        w, memory = before[start:stop].astype(float).reshape(shape), (0.0, 0.0)
        for t, gradient in enumerate(gradients(model), 1):
            w, memory = ratio_formula(kind, w, gradient[start:stop].astype(float).reshape(shape), memory, t, **options)
            np.testing.assert_allclose(ours[t - 1, start:stop], w.reshape(-1), rtol=0,
                                       atol=40 * np.finfo(dtype).eps * max(1, np.abs(w).max()))


@pytest.mark.parametrize("kind, options", RATIOS)
def test_a_rate_for_each_parameter_uses_the_gradient_up(kind, options):
    model = network()
    model.vector[:model.learnt // 2] = 0  # norms of 0
    optimizer = kind(model, **options)
    model.gradient[:model.learnt] = 1
    optimizer.step()
    assert not model.sums.any() and np.isfinite(model.vector).all()
    optimizer.step()  # without a gradient
    assert np.isfinite(model.vector).all()


@pytest.mark.parametrize("kind, options, message", [
    (LARS, {"lr": 0.1, "momentum": -1}, "LARS needs momentum >= 0, not -1"),
    (LARS, {"lr": 0.1, "weight_decay": -1}, "LARS needs weight_decay >= 0, not -1"),
    (LARS, {"lr": 0.1, "trust": 0}, "LARS needs trust > 0, not 0"),
    (LARS, {"lr": 0.1, "eps": -1}, "LARS needs eps >= 0, not -1"),
    (LAMB, {"eps": -1}, "Adam needs eps >= 0, not -1")])
def test_bad_arguments_of_ratios(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(network(), **options)


# --- Clipping -------------------------------------------------------------------------------------------------

def long_gradient(dtype):
    model = network(dtype)
    model.gradient[:model.learnt] = gradients(model)[0]
    model.gradient[model.learnt:] = 7  # statistics are not clipped
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [0.01, 0.5, 2.0])
def test_clip_norm_against_pytorch(factor, dtype):
    torch = pytest.importorskip("torch")
    model = long_gradient(dtype)
    max_norm = factor * float(np.linalg.norm(model.gradient[:model.learnt]))
    parameter = torch.nn.Parameter(torch.zeros(model.learnt))
    parameter.grad = torch.tensor(model.gradient[:model.learnt]).float()
    theirs = torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    np.testing.assert_allclose(clip_norm(model, max_norm), theirs, rtol=1e-6)
    np.testing.assert_allclose(model.gradient[:model.learnt], parameter.grad, rtol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clip_norm(dtype):
    model = long_gradient(dtype)
    before = model.gradient.copy()
    norm = np.linalg.norm(before[:model.learnt].astype(float))
    assert clip_norm(model, 2 * norm) == pytest.approx(norm, rel=1e-12)
    np.testing.assert_array_equal(model.gradient, before)  # short enough: not a bit changes
    assert clip_norm(model, 1.0) == pytest.approx(norm, rel=1e-12)
    np.testing.assert_allclose(model.gradient[:model.learnt], before[:model.learnt] / norm, rtol=1e-6)
    np.testing.assert_array_equal(model.gradient[model.learnt:], 7)


def test_clip_norm_shows_what_is_not_finite():
    model = long_gradient(np.float32)
    model.gradient[3] = np.nan
    assert math.isnan(clip_norm(model, 1.0)) and math.isnan(model.gradient[3])


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_clip_norm_to_nothing(max_norm):
    with pytest.raises(ValueError, match=f"clip_norm needs max_norm > 0, not {max_norm}"):
        clip_norm(network(), max_norm)


# --- Schedules ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, values", [
    (constant(0.3), {0: 0.3, 1000: 0.3}),
    (step_decay(1.0, every=10), {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 0.01}),
    (step_decay(1.0, every=1, factor=0.5), {0: 1, 1: 0.5, 3: 0.125}),
    (cosine(2.0, steps=100), {0: 2, 25: 1 + math.sqrt(0.5), 50: 1, 100: 0, 101: 0, 10**6: 0}),
    (cosine(2.0, steps=100, final=1.0), {0: 2, 50: 1.5, 100: 1, 10**6: 1}),
    (warmup(0.8, steps=4), {0: 0.2, 1: 0.4, 3: 0.8, 4: 0.8, 100: 0.8}),
    (warmup(0.8, steps=1), {0: 0.8, 1: 0.8}),
    (warmup(cosine(0.8, steps=10), steps=4), {0: 0.2, 3: 0.8, 4: 0.8, 9: 0.4, 14: 0, 15: 0}),
])
def test_schedules(schedule, values):
    assert [schedule(step) for step in values] == pytest.approx(list(values.values()), abs=1e-15)


@pytest.mark.parametrize("make, message", [
    (lambda n: cosine(0.1, n), "cosine needs steps > 0, not"), (lambda n: warmup(0.1, n), "warmup needs steps > 0, not"),
    (lambda n: step_decay(0.1, n), "step_decay needs every > 0, not")])
@pytest.mark.parametrize("steps", [0, -1])
def test_schedules_without_steps(make, message, steps):
    with pytest.raises(ValueError, match=f"{message} {steps}"):
        make(steps)
