"""Models in one file, weights and description: what comes back, and which files are refused before anything is built."""

import json
import os
import struct

import numpy as np
import pytest
from test_save import X, network, raw, their_network, trained

from mpiml.nn import Linear, Module, Sequential
from mpiml.ops import relu

safetensors = pytest.importorskip("safetensors.numpy")
save = pytest.importorskip("mpiml.save")

ABOUT = {"input": {"kind": "pixels", "shape": [1, 8, 8]}, "target": {"classes": ["null", "één", "\n2"]}, "note": None}


class Own(Module):
    def __init__(self, width, inner):
        self.inner, self.last = inner, Linear(width, 2)

    def __call__(self, x, training=False):
        return self.last(self.inner(x, training), training)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(dtype, tmp_path):
    model = trained(dtype=dtype)
    save.save(model, tmp_path / "model.safetensors", ABOUT)
    other, about = save.load_model(tmp_path / "model.safetensors")
    assert about == ABOUT and repr(other) == repr(model) and other.vector.dtype == dtype
    np.testing.assert_array_equal(other.vector, model.vector)
    np.testing.assert_array_equal(other(X.astype(dtype)), model(X.astype(dtype)))
    save.load(network(), tmp_path / "model.safetensors")


def test_a_file_is_a_function_of_the_model(tmp_path):
    for name in "one", "two":
        save.save(trained(), tmp_path / name, ABOUT)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_pytorch_takes_the_weights(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    save.save(trained(), tmp_path / "model", ABOUT)
    theirs = their_network(torch).eval()
    theirs.load_state_dict(load_file(tmp_path / "model"), strict=True)
    np.testing.assert_allclose(trained()(X), theirs(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_layers_of_ones_own(tmp_path):
    model = Own(3, Sequential(Linear(5, 3), relu)).init(seed=1)
    save.save(model, tmp_path / "model", {})
    other, about = save.load_model(tmp_path / "model", layers={"Own": Own})
    assert about == {}
    np.testing.assert_array_equal(other.vector, model.vector)
    with pytest.raises(ValueError, match=r"describes no model that can be built: 'Own' is no layer .*=\{'Own': \.\.\.\}"):
        save.load_model(tmp_path / "model")


def test_place_gives_the_memory(tmp_path):
    save.save(trained(dtype=np.float64), tmp_path / "model", {})
    asked = []

    def place(model, dtype):
        asked.append((hasattr(model, "vector"), dtype))
        return model.init(seed=7, dtype=dtype)

    model, _ = save.load_model(tmp_path / "model", place=place)
    assert asked == [(False, np.float64)]
    np.testing.assert_array_equal(model.vector, trained(dtype=np.float64).vector)


def test_what_cannot_be_saved(tmp_path):
    model = Sequential(Linear(3, 3), lambda x: x).init()
    with pytest.raises(ValueError, match=r"a lambda, .* Without about= the weights alone are saved, which load\(model, path\)"):
        save.save(model, tmp_path / "model", {})
    save.save(model, tmp_path / "weights")
    with pytest.raises(ValueError, match="the entries of about are text, finite numbers, lists and dicts of these"):
        save.save(trained(), tmp_path / "model", {"mean": np.ones(3)})
    with pytest.raises(ValueError, match=r"arrays cannot describe .*: save\(model, path, about, weights=arrays\)"):
        save.save({"a": np.ones(3)}, tmp_path / "model", {})
    with pytest.raises(ValueError, match=r"other ranks hold 0\.bias: weights = model\.collect\(\)"):
        save.save(trained(), tmp_path / "model", weights={"5.weight": np.ones(3)})
    with pytest.raises(RuntimeError, match="no memory yet"):
        save.save(network(), tmp_path / "model", {})
    assert os.listdir(tmp_path) == ["weights"]
    with pytest.raises(ValueError, match=r"holds weights, but no description .*: load\(model, path\) takes them, and"):
        save.load_model(tmp_path / "weights")


# --- Files that are refused -------------------------------------------------------------------------------------------

def written(tmp_path):
    save.save(trained(), tmp_path / "whole", ABOUT)
    return bytearray((tmp_path / "whole").read_bytes())


def never(*args, **options):
    raise AssertionError("something was given memory")


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        save.load_model(path, place=never)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    whole = written(tmp_path)
    rng = np.random.default_rng(0)
    for at in [*rng.integers(8, len(whole), 100), len(whole) - 1, whole.index(b"relu"), whole.index(b"Linear")]:
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(8)
        (tmp_path / "flipped").write_bytes(data)
        refused(tmp_path / "flipped", "flipped")


def test_damaged_files(tmp_path):
    whole = written(tmp_path)
    for data in whole[:-1], whole[:100], b"", whole + b"\0":
        (tmp_path / "damaged").write_bytes(data)
        refused(tmp_path / "damaged", "is not a whole safetensors file")
    whole[-1] ^= 1
    (tmp_path / "damaged").write_bytes(whole)
    refused(tmp_path / "damaged", "is damaged, or another program has changed it: its SHA-256 is not the one that it was saved")
    with pytest.raises(FileNotFoundError):
        save.load_model(tmp_path / "nowhere")
    refused(tmp_path, r"is a folder: if it is a checkpoint, it holds weights, but no .*, and load\(model, path\) takes them")


@pytest.mark.parametrize("change, message", [
    (lambda d: "not json", r"describes no model that can be built: Expecting value"),
    (lambda d: [], r"describes no model that can be built: TypeError"),
    (lambda d: "[" * 100_000, r"describes no model that can be built: "),
    (lambda d: {}, r"describes no model that can be built: KeyError: 'format'"),
    (lambda d: d | {"format": "mpiml model 2"}, "it is of the format .mpiml model 2., but this .* reads 'mpiml model 1'"),
    (lambda d: d | {"about": 3}, r"describes no model that can be built: TypeError"),
    (lambda d: d | {"model": ["os.system", ["str", "true"]]}, r"'os\.system' is no layer of mpiml\.nn"),
    (lambda d: d | {"model": d["model"][:-1]}, r"does not fit this model: 5\.bias is not in the model; 5\.weight is not"),
    (lambda d: d | {"model": [*d["model"], ["Linear", 10**15, 10**15]]}, r"does not fit this model: 6\.weight is missing"),
    (lambda d: d | {"model": [*d["model"][:-1], ["Linear", 10**15, 10**15]]}, r"5\.weight has shape \(3, 64\) instead"),
])
def test_descriptions_that_do_not_fit(change, message, tmp_path):
    from mpiml.save.file import write
    length = struct.unpack("<Q", written(tmp_path)[:8])[0]
    header = json.loads((tmp_path / "whole").read_bytes()[8:8 + length])
    changed = change(json.loads(header["__metadata__"]["mpiml"]))
    write(tmp_path / "other", safetensors.load_file(tmp_path / "whole"),
          changed if isinstance(changed, str) else json.dumps(changed))
    refused(tmp_path / "other", message)


def test_metadata_of_other_programs(tmp_path):
    for metadata in {"format": "pt"}, {}:
        (tmp_path / "theirs").write_bytes(raw({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [0],
                                                                               "data_offsets": [0, 0]}}))
        refused(tmp_path / "theirs", "holds weights, but no description of their model")
    (tmp_path / "theirs").write_bytes(raw({"__metadata__": {"mpiml": "{}"}}))
    refused(tmp_path / "theirs", "is damaged, or another program has changed it")
