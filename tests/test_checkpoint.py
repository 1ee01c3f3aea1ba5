"""Checkpoints: what they hold, on which grids they load, and what becomes of them when something fails.

Passes on any number of ranks; tests marked as launch start jobs themselves.
"""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, environment, mpirun
from mpi4py import MPI

from mpiml.data import batches, share
from mpiml.nn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, Module, Parameter, Sequential, Step, constant
from mpiml.ops import cross_entropy, relu
from mpiml.optim import LAMB, LARS, SGD, Adam, AdamW
from mpiml.parallel import Grid, RankError, gradient, place

safetensors = pytest.importorskip("safetensors.numpy")
from mpiml.save import STOPPED, Checkpoints, load, writing  # noqa: E402
from mpiml.save import folder as disk  # noqa: E402
from mpiml.save.checkpoint import _seal, seal, split  # noqa: E402

GRID = Grid()
LAST = GRID.size - 1
alone = pytest.mark.skipif(GRID.size > 1, reason="has nothing to do with the number of ranks")
SHAPES = [pipe for pipe in (1, 2, 4) if GRID.size % pipe == 0]
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((16, 2, 6, 6)).astype(np.float32), RNG.integers(0, 5, 16)


def network():
    return Sequential(Conv2d(2, 4, 3, padding=1), BatchNorm2d(4, samples=2), relu, Flatten(), Dropout(0.3), Linear(144, 9),
                      relu, Linear(9, 5))


class Training:
    """A model on a grid, or without one, in training."""

    def __init__(self, folder, grid=None, optimizer=Adam, model=network, seed=3, settings=None, **options):
        self.grid = grid
        self.model = place(model(), grid, seed) if grid else model().init(seed)
        self.optimizer = optimizer(self.model, lr=0.01)
        self.checkpoints = Checkpoints(folder, self.optimizer, settings, **({"minutes": None} | options))
        self.gradient = gradient(self.model, cross_entropy, grid, None if grid.lanes else 2) if grid else self.alone

    def alone(self, x, y):
        loss = cross_entropy(self.model(x, training=Step(self.optimizer.steps)), y) / len(y)
        loss.backward()
        return float(loss.value)

    def step(self, times=1):
        grid = self.grid
        start, stop = share(len(X), grid.replica, grid.data, 2, grid.lanes) if grid else (0, len(X))
        for _ in range(times):
            self.gradient(X[start:stop], Y[start:stop])
            self.optimizer.step()
        return self

    def state(self):
        """All numbers that a step changes, of this rank."""
        moments = [getattr(self.optimizer, name) for name in self.optimizer.moments]
        return [vector.copy() for vector in (self.model.vector, *moments)], self.optimizer.steps

    def arrays(self):
        """{name: array} of the same."""
        vectors = {"": self.model.vector} | {name: getattr(self.optimizer, name) for name in self.optimizer.moments}
        return {name + moment: view for moment, vector in vectors.items() for name, view in self.model.views(vector).items()}


def assert_same(state, other):
    assert state[1] == other[1]
    for one, two in zip(state[0], other[0], strict=True):
        np.testing.assert_array_equal(one, two)


def text(path):
    return Path(path).read_text()


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def folder(tmp_path):
    """The same new folder on all ranks; it does not exist yet."""
    return GRID.texts(str(tmp_path / "run"))[0]


def refused(kind, message, function, *args, **kwargs):
    """All ranks raise the same error."""
    with pytest.raises(kind, match=message) as caught:
        function(*args, **kwargs)
    assert len(set(GRID.texts(str(caught.value)))) == 1
    return caught.value


# --- Going on -------------------------------------------------------------------------------------------------

@alone
@pytest.mark.parametrize("optimizer", [
    Adam, AdamW, LARS, LAMB, SGD, lambda model, lr: SGD(model, lr, momentum=0.9, nesterov=True)])
def test_training_goes_on_with_the_same_bits(optimizer, tmp_path):
    whole = Training(tmp_path / "a", optimizer=optimizer).step(6)
    Training(tmp_path / "b", optimizer=optimizer).step(3).checkpoints.save(epoch=2, losses=[0.1, 1 / 3])
    later = Training(tmp_path / "b", optimizer=optimizer, seed=8).step()
    assert later.checkpoints.load(epoch=0, losses=[]) == {"epoch": 2, "losses": [0.1, 1 / 3]}
    assert later.optimizer.steps == 3 and not later.model.gradient.any()
    assert_same(later.step(3).state(), whole.state())


@pytest.mark.parametrize("pipe", SHAPES)
def test_training_on_a_grid_goes_on_with_the_same_bits(pipe, folder):
    grid = Grid(pipe=pipe)
    first = Training(folder, grid).step(2)
    first.checkpoints.save()
    saved = first.state()
    later = Training(folder, grid, seed=8).step(4)  # as an example loads its kernels
    assert later.checkpoints.load() == {}
    assert_same(later.state(), saved)
    assert later.model.steps == 2  # which dropout depends on
    assert_same(later.step(3).state(), first.step(3).state())
    assert len(set(GRID.texts(str(later.model.steps)))) == 1


@pytest.mark.parametrize("pipe", SHAPES)
def test_with_lanes_training_goes_on_with_the_same_bits_on_another_grid(pipe, folder):
    first = Training(folder, Grid(pipe=pipe, lanes=8)).step(2)
    first.checkpoints.save()
    other = Training(folder, Grid(comm=MPI.COMM_SELF, lanes=8), seed=8).step()
    other.checkpoints.load()
    first, other = first.step(2).arrays(), other.step(2).arrays()
    for name, array in first.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("saved", SHAPES)
def test_a_checkpoint_loads_on_any_grid(saved, folder):
    first = Training(folder, Grid(pipe=saved), settings={"batch": 16}).step(2)
    first.checkpoints.save(total=0.5)
    everything = Training(folder, settings={"batch": 16}, seed=8)  # one process without MPI, on every rank
    assert everything.checkpoints.load(total=0.0) == {"total": 0.5}
    everything = everything.arrays()
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(everything[name], array, err_msg=name)
    for size in range(1, GRID.size + 1):
        comm = MPI.COMM_WORLD.Split(0 if GRID.rank < size else MPI.UNDEFINED)
        for pipe in (pipe for pipe in (1, 2, 4) if size % pipe == 0 and GRID.rank < size):
            other = Training(folder, Grid(pipe=pipe, comm=comm), settings={"batch": 16}, seed=8)
            assert other.checkpoints.load(total=0.0) == {"total": 0.5}
            assert (other.optimizer.steps, other.model.steps) == (2, 2)
            for name, array in other.arrays().items():
                np.testing.assert_array_equal(array, everything[name], err_msg=name)
    GRID.all(True)


@pytest.mark.parametrize("pipe", SHAPES)
def test_every_number_is_written_once_and_readable_without_mpiml(pipe, folder):
    first = Training(folder, Grid(pipe=pipe)).step()
    first.checkpoints.save()
    files = [safetensors.load_file(f"{folder}/step_1/{rank}.safetensors") for rank in range(GRID.size)]
    sizes = [sum(a.size for a in file.values()) for file in files]
    assert sum(sizes) == 3 * (4 * 2 * 9 + 4 + 4 + 4 + 144 * 9 + 9 + 9 * 5 + 5) + 9  # and the statistics once
    if pipe == 1:
        assert max(sizes) - min(sizes) <= 3 * 2 * 144  # a row more or less
    manifest = json.loads(text(f"{folder}/step_1/manifest.json"))
    assert manifest["grid"] == {"data": GRID.size // pipe, "pipe": pipe, "microbatches": 2, "lanes": None}
    rows = [(int(file.split(".")[0]), start, stop) for file, start, stop in manifest["arrays"]["5.weight/mean"]["rows"]]
    mean = np.concatenate([files[rank]["5.weight/mean"] for rank, _, _ in rows])
    assert [(stop, start) for (_, _, stop), (_, start, _) in pairwise(rows)] == [(stop, stop) for _, _, stop in rows[:-1]]
    if "5.weight" in first.model.named():
        np.testing.assert_array_equal(mean, first.model.views(first.optimizer.mean)["5.weight"])


@pytest.mark.parametrize("writers", [1, 2, 3, 7])
def test_the_split(writers):
    shapes = {"a": (5, 3), "b": (), "c": (4, 0), "d": (0, 3), "e": (7,), "f": (2, 100)}
    parts = [split(shapes, writer, writers) for writer in range(writers)]
    for name, shape in shapes.items():
        if np.prod(shape):
            rows = [row for part in parts for row in range(*part[name])]
            assert rows == list(range(shape[0] if shape else 1)), name


class Odd(Module):
    """Parameters without axes, or without elements."""

    def __init__(self):
        self.factor, self.none, self.rows = (Parameter(shape, constant(3.0)) for shape in ((), (0, 3), (3, 0)))


@alone
def test_parameters_without_axes_or_elements(tmp_path):
    first = Training(tmp_path, model=Odd, optimizer=SGD)
    first.model.vector[...] = 7
    first.checkpoints.save()
    later = Training(tmp_path, model=Odd, optimizer=SGD)
    later.checkpoints.load()
    assert later.model.factor.value == 7


def test_a_part_of_an_epoch():
    whole = [y.tolist() for _, y in batches(X, Y, 3, epoch=2)]
    for start in range(6):
        rest = batches(X, Y, 3, epoch=2, start=start)
        assert len(rest) == 6 - start and [y.tolist() for _, y in rest] == whole[start:]
    for start in -1, 6, 1.0:
        with pytest.raises(ValueError, match=r"start is the number of a batch, from 0 to 5, not"):
            batches(X, Y, 3, start=start)


@alone
def test_the_weights_alone(tmp_path):
    first = Training(tmp_path).step()
    first.checkpoints.save()
    np.testing.assert_array_equal(load(network(), tmp_path / "step_1").vector, first.model.vector)
    with pytest.raises(ValueError, match=r"step_1 does not fit this model: 7\.weight has shape \(5, 9\) instead of \(6, 9\)"):
        load(wider(), tmp_path / "step_1")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: No such file"):
        load(network(), tmp_path)


# --- The folder -----------------------------------------------------------------------------------------------

def test_older_checkpoints_are_deleted(folder):
    training = Training(folder, GRID, every=2, keep=2)
    for _ in range(9):
        training.step()
        training.checkpoints.step()
    training.checkpoints.save()
    assert names(folder) == ["latest", "step_8", "step_9"] and text(f"{folder}/latest") == "step_9\n"
    GRID.all(True)
    training.checkpoints.save()  # over what is there
    assert names(folder) == ["latest", "step_8", "step_9"]
    GRID.all(True)
    Training(folder, GRID).checkpoints.load()


def test_two_trainings_do_not_mix(folder):
    Training(folder, GRID).step().checkpoints.save()
    other = Training(folder, GRID).step(2)
    for method in other.checkpoints.step, other.checkpoints.save:
        refused(RankError, r"holds checkpoints, up to step 1: call load\(\) to go on from there .*or save to another", method)
    other.checkpoints.load()
    other.step().checkpoints.save()
    assert names(folder) == ["latest", "step_1", "step_2"]


@alone
def test_an_older_checkpoint_is_gone_on_from(tmp_path):
    first = Training(tmp_path)
    for _ in range(3):
        first.step().checkpoints.save()
    later = Training(tmp_path)
    later.checkpoints.load(step=1)
    later.step().checkpoints.save()
    assert names(tmp_path) == ["latest", "step_1", "step_2", "step_3"] and text(tmp_path / "latest") == "step_2\n"
    last = Training(tmp_path)
    last.checkpoints.load()
    assert last.optimizer.steps == 2
    with pytest.raises(ValueError, match=r"holds no checkpoint 'step_7', only those of the steps 1, 2, 3: load\(step=3\)"):
        last.checkpoints.load(step=7)


@alone
@pytest.mark.parametrize("content", ["", "step_7\n", "../step_1\n", "/etc/passwd", "step_1/../step_1", 1000 * "x"])
def test_a_pointer_to_nowhere(content, tmp_path):
    Training(tmp_path).step().checkpoints.save()
    (tmp_path / "latest").write_text(content)
    with pytest.raises(ValueError, match=r"latest names '.{0,100}', but .* only those of the steps 1: load\(step=1\)"):
        Training(tmp_path).checkpoints.load()
    (tmp_path / "latest").unlink()  # as if the job had been killed before there was one
    Training(tmp_path).checkpoints.load()


def test_nothing_to_load(folder):
    training = Training(folder, GRID)
    assert training.checkpoints.load(epoch=7) == {"epoch": 7} and not os.path.exists(folder)
    training.checkpoints.finish()
    assert not os.path.exists(folder)


@alone
@pytest.mark.parametrize("options, message", [
    ({"keep": 0}, "keep is a whole number above 0, not 0"), ({"every": 2.5}, "every is a whole number above 0, not 2.5"),
    ({"minutes": 0}, "minutes a time above 0"), ({"settings": {"lr": np.nan}}, "settings of a checkpoint are text, finite"),
    ({"settings": {"model": Linear}}, "settings of a checkpoint are text, finite numbers")])
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Training(tmp_path, **options)


def test_values_are_checked_and_must_agree(folder):
    training = Training(folder, GRID)
    refused(ValueError, "values of a checkpoint are text, finite numbers", training.checkpoints.save, total=float("nan"))
    if GRID.size > 1:
        refused(RankError, "what is saved must be the same on all ranks", training.checkpoints.save, total=GRID.rank)
    assert not os.path.exists(folder)
    training.checkpoints.load(epoch=0)
    for method in training.checkpoints.step, training.checkpoints.save:
        refused(ValueError, "the values of no name go along, but at first they were epoch: give load, step and save", method)


# --- Damage ---------------------------------------------------------------------------------------------------

def untouched(training, message, **at):
    """Loading raises a ValueError that matches, and changes nothing."""
    before = training.state()
    with pytest.raises(ValueError, match=message) as caught:
        training.checkpoints.load(**at)
    assert_same(training.state(), before)
    return caught.value


@alone
def test_damage_is_seen_and_another_checkpoint_named(tmp_path):
    seed = time.time_ns() % 10**6
    print("seed", seed)
    rng = np.random.default_rng(seed)
    first = Training(tmp_path)
    for _ in range(3):
        first.step().checkpoints.save()
    later = Training(tmp_path)
    files = sorted((tmp_path / "step_3").iterdir())
    assert len(files) == 2
    for trial in range(200):
        path = files[rng.integers(2)]
        whole = path.read_bytes()
        data = bytearray(whole)
        if trial % 4 == 0:
            data = data[:rng.integers(len(data))]
        elif trial % 25 == 1:
            data = pickle.dumps({"0.weight": np.zeros(3)})
        elif trial % 25 == 2:
            data += b"\n"
        else:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        untouched(later, rf"step_3/{path.name} .*; step_2 is whole: load\(step=2\) goes on from there$")
        path.write_bytes(whole)
    files[0].unlink()
    untouched(later, r"step_3/0\.safetensors cannot be read: No such file or directory; step_2 is whole")
    (tmp_path / "step_2" / "manifest.json").unlink()
    untouched(later, r"step_1 is whole")
    (tmp_path / "step_1" / "0.safetensors").write_bytes(b"")
    untouched(later, r"no older checkpoint is whole: begin anew in another folder$")


def test_damage_is_reported_by_all_ranks(folder):
    training = Training(folder, GRID)
    for _ in range(2):
        training.step().checkpoints.save()
    path = Path(folder, "step_2", f"{LAST}.safetensors")
    if GRID.rank == 0:
        path.write_bytes(path.read_bytes()[:-1])
    GRID.all(True)
    before = training.state()
    error = refused(RankError, rf"{LAST}\.safetensors has \d+ bytes instead of \d+; step_1 is whole: load\(step=1\)",
                    training.checkpoints.load)
    assert error.ranks
    assert_same(training.state(), before)
    training.checkpoints.load(step=1)
    assert training.optimizer.steps == 1


def array(name, **change):
    return lambda content: content["arrays"][name].update(change)


def moved(name):
    def change(content):
        content["files"][name] = content["files"].pop("0.safetensors")
        for entry in content["arrays"].values():
            entry["rows"] = [[name, *rest] for _, *rest in entry["rows"]]
    return change


HOSTILE = {
    "format": (lambda c: c.update(format="zip"), "its format is 'zip', and not 'mpiml checkpoint 1'"),
    "no step": (lambda c: c.pop("step"), "KeyError: 'step'"),
    "step": (lambda c: c.update(step=-1), "its steps and seed are no whole numbers"),
    "seed": (lambda c: c.update(seed="0"), "its steps and seed are no whole numbers"),
    "bool": (lambda c: c.update(next_step=True), "its steps and seed are no whole numbers"),
    "settings": (lambda c: c.update(settings=[]), "its optimizer, settings and values"),
    "up": (moved("../0.safetensors"), r"'\.\./0\.safetensors' is no name of a file in a checkpoint"),
    "root": (moved("/etc/passwd"), r"'/etc/passwd' is no name of a file in a checkpoint"),
    "newline": (moved("0.safetensors\n"), "is no name of a file in a checkpoint"),
    "files": (lambda c: c.update(files=[]), "AttributeError"),
    "size": (lambda c: c["files"]["0.safetensors"].update(bytes=-5), "no size and SHA-256"),
    "digest": (lambda c: c["files"]["0.safetensors"].update(sha256="x"), "no size and SHA-256"),
    "shape": (array("0.bias", shape=[2**70]), r"the shape of 0\.bias"),
    "text": (array("0.bias", shape=["x", 10**9]), r"the shape of 0\.bias"),
    "axes": (array("0.bias", shape=[1] * 1000), r"the shape of 0\.bias"),
    "larger": (array("0.bias", shape=[9]), r"4 of the 9 rows of 0\.bias are there"),
    "dtype": (array("0.bias", dtype="object"), r"0\.bias is of object"),
    "overlap": (array("0.bias", rows=[["0.safetensors", 0, 4], ["0.safetensors", 0, 4]]), "do not follow each other"),
    "gap": (array("0.bias", rows=[["0.safetensors", 1, 4]]), r"the rows of 0\.bias do not follow each other"),
    "other file": (array("0.bias", rows=[["1.safetensors", 0, 4]]), "KeyError"),
    "rows": (array("0.bias", rows=5), "TypeError"),
}


@alone
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests(what, tmp_path):
    change, message = HOSTILE[what]
    Training(tmp_path).step().checkpoints.save()
    path = tmp_path / "step_1" / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    content.pop("sha256")
    path.write_bytes(seal(content))
    untouched(Training(tmp_path), rf"step_1/manifest\.json is no manifest of a checkpoint \(.*{message}")


@alone
@pytest.mark.parametrize("body, message", [
    (b'{"format": NaN', "NaN is no number"), (b'{"format": -Infinity', "-Infinity is no number"), (b"[1", ""), (b"\xff{", ""),
    (b"[" * 200000, ""), (b"", "")])
def test_hostile_json(body, message, tmp_path):
    Training(tmp_path).step().checkpoints.save()
    path = tmp_path / "step_1" / "manifest.json"
    path.write_bytes(body + _seal(body))
    untouched(Training(tmp_path), rf"step_1/manifest\.json is no manifest of a checkpoint \(.*{message}")


def replaced(path, data):
    """Put other data in the place of a file of a checkpoint, and a manifest that says so."""
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_bytes())
    content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("sha256")
    path.write_bytes(data)
    manifest.write_bytes(seal(content))


def other_arrays(change):
    return lambda data: safetensors.save(change(safetensors.load(data)))


@alone
@pytest.mark.parametrize("change, message", [
    (lambda data: pickle.dumps({"0.weight": np.zeros(3)}), r"is not a whole safetensors file \(.*\); pickled files"),
    (lambda data: (10**12).to_bytes(8, "little") + data[8:], "is not a whole safetensors file"),
    (lambda data: data.replace(b'"shape":[4]', b'"shape":[9]'), "is not a whole safetensors file"),
    (other_arrays(lambda a: a | {"more": np.zeros(2)}), "does not hold the arrays that the manifest says"),
    (other_arrays(lambda a: {name: a[name] for name in a if name != "0.bias"}), "does not hold the arrays"),
    (other_arrays(lambda a: a | {"0.bias": a["0.bias"].astype(np.float64)}), "does not hold the arrays"),
    (other_arrays(lambda a: a | {"0.bias": a["0.bias"][:3]}), "does not hold the arrays")])
def test_hostile_files(change, message, tmp_path):
    Training(tmp_path).step().checkpoints.save()
    path = tmp_path / "step_1" / "0.safetensors"
    replaced(path, change(path.read_bytes()))
    untouched(Training(tmp_path), message)


@alone
@pytest.mark.parametrize("name", ["step_1/0.safetensors", "step_1/manifest.json", "latest", "step_1"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file(kind, name, tmp_path):
    Training(tmp_path).step().checkpoints.save()
    path, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    untouched(Training(tmp_path), "cannot be read|is no plain file|is a link")


# --- What does not fit ----------------------------------------------------------------------------------------

def smaller():
    return network()[:7]


def longer():
    return Sequential(*network().layers, Linear(5, 5))


def wider():
    return Sequential(*network().layers[:-1], Linear(9, 6))


def plain_sgd(model, lr):
    return SGD(model, lr)


@alone
@pytest.mark.parametrize("options, message", [
    ({"model": smaller}, r"step_1 does not fit this model: 7\.weight is not in the model; 7\.bias is not in .*; and 1 more$"),
    ({"model": longer}, r": 8\.weight is missing; 8\.bias is missing; 8\.weight/mean is missing; .*; and 1 more$"),
    ({"model": wider}, r": 7\.weight has shape \(5, 9\) instead of \(6, 9\); 7\.bias has shape"),
    ({"optimizer": AdamW}, r"was saved with Adam and cannot go on with AdamW: use the same .* mpiml\.save\.load\(model, '"),
    ({"settings": {"batch": 8, "lr": 1}},
     r"was saved with other settings: batch was 16 and is 8; lr was None and is 1: go on with the same ones"),
])
def test_another_training(options, message, tmp_path):
    Training(tmp_path, settings={"batch": 16}).step().checkpoints.save()
    untouched(Training(tmp_path, **({"settings": {"batch": 16}} | options)), message)


@alone
def test_another_dtype_momentum_and_values(tmp_path):
    first = Training(tmp_path, optimizer=plain_sgd).step()
    first.checkpoints.save(epoch=1)
    wide = network().init(dtype=np.float64)
    with pytest.raises(ValueError, match=r"0\.weight is of float32 instead of float64"):
        Checkpoints(tmp_path, SGD(wide, 0.1)).load(epoch=0)
    with pytest.raises(ValueError, match=r"0\.weight/velocity is missing"):
        Checkpoints(tmp_path, SGD(network().init(), 0.1, momentum=0.9)).load(epoch=0)
    untouched(first, "holds the values epoch, but load was asked for none: give load the names that")
    untouched(first, "holds the values epoch, but load was asked for batch", batch=0)


# --- Failing writers ------------------------------------------------------------------------------------------

def failing_on_the_last_rank(monkeypatch, error):
    def fail(path, arrays):
        raise error
    if GRID.rank == LAST:
        monkeypatch.setattr(writing, "write", fail)


def still_whole(folder, training):
    """Nothing is left of the checkpoint that failed, and the next one succeeds."""
    GRID.all(True)
    assert names(folder) == ["latest", "step_1"] and text(f"{folder}/latest") == "step_1\n"
    Training(folder, training.grid).checkpoints.load()
    GRID.all(True)
    training.checkpoints.save()
    assert names(folder) == ["latest", "step_1", "step_2"]


def broken_sync(path):
    if path.endswith("run"):
        raise OSError(5, "Input/output error")


def test_a_checkpoint_that_cannot_be_replaced_stays(folder, monkeypatch):
    training = Training(folder, GRID).step()
    training.checkpoints.save()
    saved = training.state()
    with monkeypatch.context() as patch:
        patch.setattr("mpiml.save.folder._sync", broken_sync)
        training.model.vector[...] = 5
        refused(RankError, "rank 0 failed in writing .*step_1: OSError", training.checkpoints.save)
    GRID.all(True)
    assert names(folder) == ["latest", "step_1"]
    later = Training(folder, GRID)
    later.checkpoints.load()
    assert_same(later.state(), saved)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device"),
                                   MemoryError("no memory")])
def test_one_rank_cannot_write(error, folder, monkeypatch):
    training = Training(folder, GRID).step()
    training.checkpoints.save()
    with monkeypatch.context() as patch:
        failing_on_the_last_rank(patch, error)
        training.step()
        caught = refused(RankError, rf"rank {LAST} failed in writing .*step_2: {type(error).__name__}: .*{error.args[-1]}",
                         training.checkpoints.save)
        assert caught.ranks == [LAST]
        assert caught.__cause__ is (error if GRID.rank == LAST else None)
    still_whole(folder, training)


@pytest.mark.parametrize("kind", ["manifest", "pointer", "rename", "publish", "folder"])
def test_the_first_rank_cannot_complete_it(kind, folder, monkeypatch):
    training = Training(folder, GRID).step()
    training.checkpoints.save()
    training.step()

    def failing(function, bad):
        def call(path, *args):
            if bad(os.fspath(path)):
                raise OSError(5, "Input/output error")
            return function(path, *args)
        return call

    bad = {"manifest": ("_put", lambda path: path.endswith("manifest.json")),
           "pointer": ("_put", lambda path: path.endswith("latest.tmp")),
           "rename": ("os.replace", lambda path: path.endswith("step_2.tmp")),
           "publish": ("os.replace", lambda path: path.endswith("latest.tmp")),
           "folder": ("os.mkdir", lambda path: path.endswith("step_2.tmp"))}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(f"mpiml.save.folder.{bad[0]}",
                      failing(disk._put if bad[0] == "_put" else getattr(os, bad[0][3:]), bad[1]))
        refused(RankError, r"rank 0 failed in (writing|making) .*step_2.*: OSError: \[Errno 5\] Input/output error",
                training.checkpoints.save)
    still_whole(folder, training)


def test_a_limit_to_the_size_of_files(folder):
    training = Training(folder, GRID).step()
    training.checkpoints.save()
    training.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if GRID.rank == LAST:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        refused(RankError, rf"rank {LAST} failed in writing .*step_2: OSError: \[Errno 27\] File too large",
                training.checkpoints.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    still_whole(folder, training)


@pytest.mark.launch
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=92k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    try:
        training = Training(disk / "run", GRID, keep=9).step()
        with pytest.raises(RankError, match=r"rank 0 failed in writing .*: OSError: \[Errno 28\] No space left on device"):
            while True:
                training.checkpoints.save()
                training.step()
        kept = len(names(disk / "run")) - 1
        assert kept >= 1 and text(disk / "run" / "latest") == f"step_{kept}\n"
        Training(disk / "run", GRID).checkpoints.load()
        training.checkpoints._keep = 1
        shutil.rmtree(disk / "run" / "step_1")  # the user makes room
        training.checkpoints.save()
        assert names(disk / "run") == ["latest", f"step_{kept + 1}"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@alone
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to see which file is meant")
def test_names_appear_when_what_they_name_is_on_the_disk(tmp_path, monkeypatch):
    training, events, replace = Training(tmp_path / "run").step(), [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "replace", lambda source, target: events.append(f"-> {target}") or replace(source, target))
    training.checkpoints.save()
    run = str(tmp_path / "run")
    first = {str(tmp_path), f"{run}/step_1.tmp/0.safetensors"}  # by two threads
    assert set(events[:2]) == first and events[2:] == [
        f"{run}/step_1.tmp/manifest.json", f"{run}/step_1.tmp", f"{run}/latest.tmp", f"-> {run}/step_1", run,
        f"-> {run}/latest", run]


class PowerCut(BaseException):
    """Nobody tidies up after it."""


def until(countdown, function):
    """``function``, until the countdown comes to 0."""
    def call(path, *args, **kwargs):
        if next(countdown, -1) == 0:
            if function.__name__ in ("_put", "write"):
                Path(path).write_bytes(b"half")
            raise PowerCut
        return function(path, *args, **kwargs)
    return call


@alone
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_crash_before_any_operation_of_the_disk(again, tmp_path, monkeypatch):
    operations = [(writing, "write"), (disk, "_put"), (disk, "_sync"), (os, "mkdir"), (os, "replace"),
                  (shutil, "rmtree")]
    crash_at, survived = 0, []
    while len(survived) == crash_at:
        folder = tmp_path / str(crash_at)
        training = Training(folder, keep=1).step()
        training.checkpoints.save()
        training.step(0 if again else 1)
        if again:
            training.model.vector[...] = 2
        countdown = iter(range(crash_at, -1, -1))
        with monkeypatch.context() as patch:
            for where, name in operations:
                patch.setattr(where, name, until(countdown, getattr(where, name)))
            try:
                training.checkpoints.save()
            except PowerCut:
                later = Training(folder, keep=1)
                later.checkpoints.load()
                survived.append(bool((later.model.vector == training.model.vector).all()))
        crash_at += 1
    assert survived == sorted(survived) and len(survived) >= 9  # first the old one, and from some operation on the new one
    assert survived[0] is False and survived[-1] is True
    for crashed in range(len(survived)):
        later = Training(tmp_path / str(crashed), keep=1)
        later.checkpoints.load()
        later.step().checkpoints.save()
        assert names(tmp_path / str(crashed)) == ["latest", f"step_{later.optimizer.steps}"]


@pytest.mark.launch
def test_a_writer_killed_at_any_moment(tmp_path):
    seed = time.time_ns() % 10**6
    run = subprocess.run([sys.executable, "tests/killed_writer.py", str(tmp_path / "run"), str(seed)], cwd=ROOT,
                         capture_output=True, text=True, timeout=100, env=environment())
    print(run.stdout)
    assert run.returncode == 0, f"seed {seed}\n{run.stderr}"


# --- In the background ----------------------------------------------------------------------------------------

def test_training_goes_on_while_a_thread_writes(folder, monkeypatch):
    training = Training(folder, GRID, every=2).step(2)
    saved, write, go = training.state(), writing.write, threading.Event()

    def patient(path, arrays):
        assert GRID.rank < LAST or go.wait(60)
        return write(path, arrays)

    monkeypatch.setattr(writing, "write", patient)
    training.checkpoints.step()
    training.checkpoints._every = None
    for _ in range(9):
        training.step()
        training.checkpoints.step()  # waits for no writer
    assert not os.path.exists(f"{folder}/latest")
    GRID.all(True)
    go.set()
    limit = time.perf_counter() + 60
    while not GRID.all(os.path.exists(f"{folder}/latest")):  # one of the next steps completes it
        training.step()
        training.checkpoints.step()
        assert time.perf_counter() < limit
    assert names(folder) == ["latest", "step_2"]
    later = Training(folder, GRID)
    later.checkpoints.load()
    assert_same(later.state(), saved)
    training.checkpoints.finish()


def test_a_failure_in_the_background_is_raised_by_a_later_step(folder, monkeypatch):
    training = Training(folder, GRID, every=1).step()
    failing_on_the_last_rank(monkeypatch, OSError(28, "No space left on device"))
    training.checkpoints.step()
    training.step()
    refused(RankError, rf"rank {LAST} failed in writing .*step_1: OSError: .*No space left", training.checkpoints.step)
    GRID.all(True)
    assert names(folder) == []
    training.checkpoints.finish()


def test_it_saves_when_time_has_passed(folder):
    training = Training(folder, GRID, minutes=1e-9)
    training.checkpoints._left = 3  # as if the steps were short: the ranks talk after every third
    for _ in range(4):
        training.step()
        training.checkpoints.step()
    training.checkpoints.finish()
    assert "step_3" in names(folder) and "step_1" not in names(folder)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_on_one_rank_stops_all_at_the_same_step(number, folder, capfd):
    training = Training(folder, GRID)
    for step in range(1000):
        training.step()
        if step == 3 and GRID.rank == LAST:
            signal.raise_signal(number)
        try:
            training.checkpoints.step(epoch=1)
        except SystemExit as end:
            assert end.code == STOPPED == 75
            break
    else:
        raise AssertionError("nobody stopped")
    stopped = training.optimizer.steps
    assert 3 < stopped < 300 and len(set(GRID.texts(str(stopped)))) == 1
    assert signal.getsignal(number) == signal.SIG_DFL
    assert names(folder) == ["latest", f"step_{stopped}"]
    said = capfd.readouterr().err
    assert (GRID.rank > 0) or f"{number.name}: saved {folder}/step_{stopped}; exit status 75" in said
    later = Training(folder, GRID)
    assert later.checkpoints.load(epoch=0) == {"epoch": 1}
    assert_same(later.state(), training.state())


@alone
def test_signals_of_others_are_left_alone(tmp_path):
    heard = []
    old = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        training = Training(tmp_path)
        training.step().checkpoints.step()
        signal.raise_signal(signal.SIGUSR1)
        training.checkpoints.step()
        training.checkpoints.finish()
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, old)


# --- Whole jobs -----------------------------------------------------------------------------------------------

@pytest.mark.launch
def test_this_suite_on_several_ranks():
    run = mpirun(4, "-m", "pytest", "-q", "tests/test_checkpoint.py", timeout=200)
    assert run.code == 0, run.out + run.err


@pytest.mark.launch
def test_signals_to_mpirun(tmp_path):
    patient = "Open MPI" not in MPI.Get_library_version()  # which kills its ranks half a second after SIGTERM
    for name in "SIGUSR1", "SIGTERM" if patient else "SIGUSR1":
        run = mpirun(2, "tests/stopped.py", str(tmp_path / "run"), name, timeout=60)
        assert run.code == STOPPED, run.out + run.err
        assert re.search(rf"^mpiml: {name}: saved .*/run/step_\d+; exit status 75$", run.err, re.M), run.err
        assert "failed" not in run.err and "Traceback" not in run.err
        assert not run.left
    assert re.search(r"goes on after \d\d+ steps", run.out), run.out


@pytest.mark.launch
@pytest.mark.parametrize("example", ["mnist_dp.py", "mnist_hybrid.py"])
def test_an_example_goes_on_with_the_same_bits(example, tmp_path):
    (tmp_path / "file").touch()
    env = environment(XDG_CACHE_HOME=str(tmp_path / "file"), NO_PROXY="", HTTPS_PROXY="http://127.0.0.1:9")
    outputs = []
    for name, more in ("whole", ["--every", "4"]), ("rest", ["--resume", "20"]):
        run = mpirun(2, f"examples/{example}", "--epochs", "2", "--run", str(tmp_path / "run"), "--save",
                     str(tmp_path / name), *more, env=env)
        assert run.code == 0, run.err
        outputs.append(re.findall(r"epoch 2: loss [\d.]+, validation loss [\d.]+, validation accuracy [\d.]+", run.out))
    assert "20 of 24 steps are done" in run.out
    assert outputs[0] == outputs[1] and len(outputs[0]) == 1
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "rest").read_bytes()
