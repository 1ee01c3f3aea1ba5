"""Weights to and from files, PyTorch's among them, and what a broken file or a failing disk must not do."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpiml import nn
from mpiml.nn import BatchNorm2d, Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD

safetensors = pytest.importorskip("safetensors.numpy")
save = pytest.importorskip("mpiml.save")

X = np.random.default_rng(0).standard_normal((6, 1, 8, 8)).astype(np.float32)
Y = np.arange(6) % 3


def network():
    return Sequential(Conv2d(1, 4, 3, padding=1), BatchNorm2d(4), relu, MaxPool2d(2), Flatten(), Linear(64, 3))


def trained(seed=0, dtype=np.float32):
    """A model after three steps, so that its statistics have moved."""
    model = network().init(seed, dtype)
    optimizer = SGD(model, lr=0.1)
    for _ in range(3):
        loss = cross_entropy(model(X.astype(dtype), training=True), Y) / len(Y)
        loss.backward()
        optimizer.step()
    return model


def their_network(torch):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(64, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(dtype, tmp_path):
    model = trained(dtype=dtype)
    save.save(model, tmp_path / "weights.safetensors")
    other = network().init(seed=9, dtype=dtype)
    assert (other.vector != model.vector).any()
    assert save.load(other, tmp_path / "weights.safetensors") is other
    np.testing.assert_array_equal(other.vector, model.vector)
    np.testing.assert_array_equal(other(X.astype(dtype)), model(X.astype(dtype)))


def test_the_counter_is_an_integer_as_in_pytorch(tmp_path):
    save.save(trained(), tmp_path / "weights")
    counter = safetensors.load_file(tmp_path / "weights")["1.num_batches_tracked"]
    assert (counter.dtype, counter.shape, counter) == (np.int64, (), 3)


def test_load_makes_memory_where_there_is_none(tmp_path):
    model = trained()
    save.save(model, str(tmp_path / "weights"))
    np.testing.assert_array_equal(save.load(network(), str(tmp_path / "weights")).vector, model.vector)


def test_other_widths_of_floats_are_converted(tmp_path):
    model = trained()
    save.save(model, tmp_path / "weights")
    wide = save.load(network().init(dtype=np.float64), tmp_path / "weights")
    assert wide.vector.dtype == np.float64
    np.testing.assert_array_equal(wide.vector, model.vector)


class Scaled(nn.Module):
    """x times a learnt number: a parameter without axes."""

    def __init__(self):
        self.factor = nn.Parameter((), nn.constant(3.0))

    def __call__(self, x, training=False):
        return x * nn.given(training, self.factor)[0]


def test_a_parameter_without_axes(tmp_path):
    model = Scaled().init()
    save.save(model, tmp_path / "weights")
    assert safetensors.load_file(tmp_path / "weights")["factor"].shape == ()
    model.vector[...] = 0
    assert save.load(model, tmp_path / "weights").vector == [3]


def test_arrays_of_any_kind_and_layout(tmp_path):
    arrays = {"odd": np.arange(3, dtype=np.int8), "wide": np.arange(6.0).reshape(2, 3).T, "flag": np.array([True, False]),
              "big": np.arange(4, dtype=">f4"), "half": np.float16([1, 2]), "pairs": np.array([1j], np.complex64),
              "none": np.zeros((0, 3)), "every other": np.arange(10)[::2], "number": np.array(3.0, np.float32)}
    save.save(arrays, tmp_path / "arrays")
    found = safetensors.load_file(tmp_path / "arrays")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=") and found[name].shape == array.shape
    header = json.loads((tmp_path / "arrays").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in arrays.items())
    with pytest.raises(TypeError, match=r"names is an array of <U2, which a safetensors file cannot hold: convert it"):
        save.save({"names": np.array(["ab"])}, tmp_path / "names")
    assert os.listdir(tmp_path) == ["arrays"]


# --- PyTorch --------------------------------------------------------------------------------------------------

def test_pytorch_takes_our_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    model = trained()
    save.save(model, tmp_path / "weights.safetensors")
    theirs = their_network(torch).eval()
    theirs.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    assert theirs[1].num_batches_tracked.dtype == torch.int64 and theirs[1].num_batches_tracked == 3
    assert not torch.equal(theirs[1].running_mean, torch.zeros(4))
    np.testing.assert_allclose(model(X), theirs(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_we_take_pytorchs_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    torch.manual_seed(0)
    theirs = their_network(torch)
    for _ in range(5):
        theirs(torch.tensor(X))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    model = save.load(network().init(), tmp_path / "weights.safetensors")
    assert model[1].num_batches_tracked.value == 5
    np.testing.assert_allclose(model(X), theirs.eval()(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-5)


# --- Files that do not fit ------------------------------------------------------------------------------------

def refused(path, message):
    """Loading ``path`` raises a ValueError that matches, and changes nothing."""
    model = trained(seed=4)
    before = model.vector.tobytes()
    with pytest.raises(ValueError, match=message) as caught:
        save.load(model, path)
    assert str(path) in str(caught.value)
    assert model.vector.tobytes() == before
    fresh = network()
    with pytest.raises(ValueError):
        save.load(fresh, path)
    assert not hasattr(fresh, "vector")


def raw(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def whole(tmp_path):
    save.save(trained(), tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: data[:20], lambda data: data[:4],
    lambda data: b"", lambda data: data + b"\0", lambda data: struct.pack("<Q", 10**12) + data[8:],
    lambda data: raw(b"{not json}"), lambda data: data.replace(b'"shape":[4]', b'"shape":[9]'),
    lambda data: raw({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    lambda data: pickle.dumps({"0.weight": np.zeros(3)}), lambda data: b"PK\3\4" + 100 * b"\0"],
    ids=["byte", "half", "in header", "in length", "empty", "trailing", "10^12", "json", "shape", "lie", "pickle", "zip"])
def test_damaged_and_foreign_files(damage, tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(damage(whole(tmp_path)))
    refused(path, r"is not a whole safetensors file \(.+\); pickled files \(\.pt, \.pkl\) are programs and are not read")


def without(name):
    return lambda arrays: {other: array for other, array in arrays.items() if other != name}


@pytest.mark.parametrize("change, message", [
    (without("5.bias"), r"does not fit this model: 5\.bias is missing$"),
    (without("1.num_batches_tracked"), r": 1\.num_batches_tracked is missing$"),
    (lambda a: a | {"7.weight": a["5.bias"]}, r": 7\.weight is not in the model$"),
    (lambda a: a | {"5.weight": a["5.weight"].T.copy()}, r": 5\.weight has shape \(64, 3\) instead of \(3, 64\)$"),
    (lambda a: a | {"5.bias": a["5.bias"][:1]}, r": 5\.bias has shape \(1,\) instead of \(3,\)$"),
    (lambda a: a | {"5.bias": np.array([1, 2, 3])}, r": 5\.bias is of int64, not of floats$"),
    (lambda a: a | {"5.bias": np.array([1, 0, 1], bool)}, r": 5\.bias is of bool, not of floats$"),
    (lambda a: a | {"5.bias": a["5.bias"].astype(np.complex64)}, r": 5\.bias is of complex64, not of floats$"),
    (lambda a: {f"model.{name}": array for name, array in a.items()},
     r": 0\.weight is missing; 0\.bias is missing; 1\.weight is missing; .*; and 13 more$"),
])
def test_weights_of_another_model(change, message, tmp_path):
    whole(tmp_path)
    safetensors.save_file(change(safetensors.load_file(tmp_path / "whole")), tmp_path / "other")
    refused(tmp_path / "other", message)


@pytest.mark.parametrize("dtype, size", [("BF16", 2), ("F8_E4M3", 1)])
def test_a_dtype_that_numpy_lacks(dtype, size, tmp_path):
    header = {"0.bias": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}
    (tmp_path / "brain").write_bytes(raw(header, bytes(4 * size)))
    refused(tmp_path / "brain", r"holds a dtype that NumPy does not know, such as bfloat16 \(.*\): convert it to float32")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save.load(network(), tmp_path / "nowhere")


# --- Writing --------------------------------------------------------------------------------------------------

def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["write", "os.replace", "os.fsync"])
def test_an_error_while_writing_leaves_the_old_file_and_no_litter(step, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    save.save(trained(), path)
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"mpiml.save.weights.{step}", fail)
        with pytest.raises(OSError, match="No space left"):
            save.save(trained(seed=1), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["weights"]
    save.save(trained(seed=1), path)
    assert path.read_bytes() != old and os.listdir(tmp_path) == ["weights"]


def test_the_name_appears_when_the_file_is_complete(tmp_path, monkeypatch):
    def check(source, target):
        assert not os.path.exists(target)
        assert tmp_path in Path(source).parents  # on the same file system, where renaming is one step
        assert safetensors.load_file(source).keys() == network().named().keys()
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr("mpiml.save.weights.os.replace", check)
    save.save(trained(), tmp_path / "weights")
    assert os.listdir(tmp_path) == ["weights"]


def test_a_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save.save(trained(), "weights")
    assert os.listdir(tmp_path) == ["weights"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot save to .*nowhere/weights: the folder .*nowhere does not exist"):
        save.save(trained(), tmp_path / "nowhere" / "weights")


def test_a_model_without_memory(tmp_path):
    with pytest.raises(RuntimeError, match=r"no memory yet: call model\.init\(seed\) before saving it"):
        save.save(network(), tmp_path / "weights")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(mask, mode, tmp_path):
    old = os.umask(mask)
    try:
        save.save(trained(), tmp_path / "weights")
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode


def test_safetensors_is_missing():
    code = "import sys; sys.modules['safetensors'] = None; import mpiml; import mpiml.save"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "ImportError: mpiml.save keeps weights in safetensors files: pip install 'mpiml[save]'" in run.stderr
