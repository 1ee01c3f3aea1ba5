"""What TensorBoard is given of a training."""

import struct
import sys

import numpy as np
import pytest

from mpiml.fit import TensorBoard, fit
from mpiml.nn import Linear
from mpiml.ops import mse_loss
from mpiml.optim import SGD
from mpiml.parallel import Grid, place

GRID = Grid()
X = np.arange(12, dtype=np.float32).reshape(6, 2) / 12


def train(folder, epochs):
    model = place(Linear(2, 1), GRID, seed=0)
    data = X, X[:, :1]
    return fit(model, mse_loss, data, GRID, SGD(model, lr=0.1), batch=3 * GRID.data, epochs=epochs, validation=data, say=None,
               metrics={"largest error": lambda output, y: float(np.abs(output - y).max())}, run=f"{folder}/run", resume=True,
               callbacks=[TensorBoard(f"{folder}/board")])


def scalars(path):
    """{tag: [(step, value), ...]} of an event file: records of a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event
    data, found, starts, at = path.read_bytes(), {}, [], 0
    while at < len(data):
        length, = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12:at + 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        starts += [event.step] * event.HasField("session_log")
        at += length + 16
    return found, starts


def test_each_epoch_is_seen_once(tmp_path):
    pytest.importorskip("tensorboardX")
    folder = GRID.texts(str(tmp_path))[0]
    train(folder, 2)
    history = train(folder, 3)
    GRID.comm.Barrier()
    if GRID.rank:
        return
    first, second = sorted((tmp_path / "board").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    steps = [epoch["step"] for epoch in history]
    found, _ = scalars(first)
    assert [step for step, _ in found["training/loss"]] == steps[:2]
    assert {"training/lr", "training/samples_per_s", "validation/loss", "validation/largest_error"} <= found.keys()
    found, starts = scalars(second)
    assert starts == steps[1:2]  # what was written of this step and later ones is hidden
    assert found["training/loss"] == [(epoch["step"], pytest.approx(epoch["loss"])) for epoch in history[1:]]


def test_without_tensorboardx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'mpiml\[tensorboard\]'"):
        TensorBoard("board")
