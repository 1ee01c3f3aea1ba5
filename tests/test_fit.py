"""The training loop: the same as one written by hand, on any number of ranks, stopped and taken up again."""

import json
import math

import numpy as np
import pytest

from mpiml.data import batches
from mpiml.fit import Best, EarlyStopping, Training, fit
from mpiml.fit.loop import line
from mpiml.metrics import correct
from mpiml.nn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD, Adam, clip_norm
from mpiml.parallel import Grid, RankError, evaluate, gradient, place

GRID = Grid(lanes=8)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 12)).astype(np.float32)
Y = (X @ RNG.standard_normal((12, 3))).argmax(1)
VALIDATION = RNG.standard_normal((40, 12)).astype(np.float32), RNG.integers(0, 3, 40)


def network():
    return Sequential(Linear(12, 16), relu, Dropout(0.2), Linear(16, 3))


def train(epochs=3, grid=GRID, model=network, optimizer=Adam, **options):
    part = place(model(), grid, seed=1)
    usual = {"batch": 32, "seed": 5, "validation": VALIDATION, "metrics": {"accuracy": correct}, "say": None}
    return part, fit(part, cross_entropy, (X, Y), grid, optimizer(part, lr=0.01), epochs=epochs, **(usual | options))


@pytest.fixture
def folder(tmp_path):
    """The same new folder on all ranks; it does not exist yet."""
    return GRID.texts(str(tmp_path / "run"))[0]


def untimed(history):
    return [{name: value for name, value in epoch.items() if name not in ("seconds", "samples/s")} for epoch in history]


def records(folder):
    GRID.comm.Barrier()
    with open(f"{folder}/log.jsonl") as file:
        return [json.loads(text) for text in file]


def shift(x, samples, epoch):
    return x + (0.01 * epoch * np.sin(samples))[:, None].astype(np.float32)


def test_fit_is_the_loop_that_one_writes_by_hand():
    model = place(network(), GRID, seed=1)
    optimizer = Adam(model, lr=0.01)
    step = gradient(model, cross_entropy, GRID)
    for epoch in range(2):
        total, number = 0.0, 0
        for x, y in batches(X, Y, 32, epoch=epoch, seed=5, grid=GRID, augment=shift, transform=np.tanh):
            total, number = total + step(x, y), number + 1
            clip_norm(model, 0.5)
            optimizer.step()
    found = evaluate(model, *VALIDATION, {"loss": cross_entropy, "accuracy": correct}, GRID, transform=np.tanh)
    fitted, history = train(2, augment=shift, ahead=1, transform=np.tanh, clip=0.5)
    np.testing.assert_array_equal(fitted.vector, model.vector)
    assert [epoch["epoch"] for epoch in history] == [1, 2] and history[-1]["step"] == 2 * number
    assert history[-1]["loss"] == total / number and history[-1]["lr"] == 0.01
    assert {name: history[-1][f"validation {name}"] for name in found} == found
    assert len(set(GRID.texts(str(history)))) == 1


def test_augmentation_sees_the_positions_of_its_samples():
    seen = []

    def augment(x, samples, epoch):
        np.testing.assert_array_equal(x, X[samples])
        seen.extend(samples.tolist())
        return x + epoch

    given = [x for x, _ in batches(X, Y, 32, epoch=3, grid=GRID, augment=augment)]
    np.testing.assert_array_equal(np.concatenate(given), X[seen] + 3)
    everyones = [json.loads(text) for text in GRID.texts(json.dumps(seen))]
    assert sorted(sample for theirs in everyones for sample in theirs) == list(range(100))


def test_lanes_give_the_same_numbers_on_any_grid():
    # One number for all: whatever the number of ranks that runs this, training comes to these bits on this machine.
    _, history = train(2, augment=shift)
    _, expected = train(2, augment=shift, grid=Grid(comm=GRID.comm.Split(GRID.rank), lanes=8))
    assert untimed(history) == untimed(expected)


@pytest.mark.parametrize("pipe", [pipe for pipe in (1, 2, 4) if GRID.size % pipe == 0])
def test_pipelines(pipe, folder):
    grid = Grid(pipe=pipe, lanes=8)
    _, history = train(2, grid=grid, run=folder, callbacks=[Best()])
    _, expected = train(2)
    assert untimed(history) == untimed(expected)
    with open(f"{folder}/timeline.json") as file:
        assert len(json.load(file)["spans"]) == pipe


def test_batch_normalisation_gets_shares_that_suit_it():
    x, y = RNG.standard_normal((64, 2, 4, 4)).astype(np.float32), RNG.integers(0, 3, 64)
    grid = Grid()
    model = place(Sequential(Conv2d(2, 4, 3), BatchNorm2d(4, samples=4), relu, Flatten(), Linear(16, 3)), grid, seed=0)
    history = fit(model, cross_entropy, (x, y), grid, SGD(model, 0.01), batch=48, epochs=1, say=None)
    assert math.isfinite(history[0]["loss"])


# --- Callbacks ------------------------------------------------------------------------------------------------

def after(*values, name="validation loss"):
    return Training(None, None, None, None, [{name: value} for value in values])


@pytest.mark.parametrize(("values", "stops"), [
    ([3, 2, 1, 0], False), ([1, 2], False), ([1, 2, 2], True), ([1, 2, 0.5, 2], False), ([1, 1, 1], True),
    ([math.nan, math.nan, math.nan], True), ([math.inf, 3, 2], False), ([1, math.nan, 0.9], False)])
def test_early_stopping_is_a_function_of_the_history(values, stops):
    assert bool(EarlyStopping(patience=2)(after(*values))) == stops
    assert bool(EarlyStopping("a", patience=2, higher=True)(after(*(-v for v in values), name="a"))) == stops


def test_early_stopping_wants_a_least_improvement():
    stop = EarlyStopping("loss", patience=2, least=0.1)
    assert stop(after(1, 0.95, 0.91, name="loss")).startswith("loss has not become better than 1 for 2 epochs")
    assert not stop(after(1, 0.95, 0.85, name="loss"))


@pytest.mark.parametrize(("values", "best"), [([3, 1, 1, 2], 1), ([math.nan, 5, 6], 1), ([math.inf, math.nan], 0)])
def test_the_best_epoch(values, best):
    assert after(*values).best("validation loss") == best


def test_wrong_arguments():
    with pytest.raises(ValueError, match="patience is a number of epochs, a whole number above 0, not 0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="least is a difference, 0 or more, not -1"):
        EarlyStopping(least=-1)
    with pytest.raises(ValueError, match=r"epochs is a whole number above 0, not 1\.5"):
        train(1.5)
    with pytest.raises(ValueError, match="need a folder: give run=FOLDER"):
        train(1, resume=True)
    with pytest.raises(ValueError, match=r"EarlyStopping looks at 'validation loss', but the history will have .*call fit"):
        train(1, validation=None, callbacks=[EarlyStopping()])
    with pytest.raises(ValueError, match=r"a callback is a function or an object: Best\(\), not Best"):
        train(1, callbacks=[Best])
    with pytest.raises(ValueError, match=r"validation is a pair, \(x, y\), not ndarray of length 40"):
        train(1, validation=VALIDATION[0])
    other = network().init(seed=0)
    with pytest.raises(ValueError, match=r"the optimizer is one of another model: make it of what place"):
        train(1, optimizer=lambda model, lr: Adam(other, lr))
    with pytest.raises(ValueError, match="the history has no 'validation loss', it has 'loss'"):
        after(1, name="loss").best("validation loss")


@pytest.mark.skipif(GRID.size > 1, reason="ends the job: one rank alone sees it")
def test_validation_data_are_looked_at_before_the_first_epoch():
    with pytest.raises(ValueError, match="linear takes 12 features"):
        train(1, validation=(VALIDATION[0][:, :5], VALIDATION[1]), callbacks=[lambda training: pytest.fail("it trains")])


def test_training_stops_and_the_best_weights_come_back():
    kept = []

    def keep(training):
        kept.append(training.model.vector.copy())

    model, history = train(50, optimizer=lambda model, lr: SGD(model, 1.0), callbacks=[keep, Best(), EarlyStopping(patience=3)])
    losses = [epoch["validation loss"] for epoch in history]
    assert len(history) < 50 and losses.index(min(losses)) == len(losses) - 4
    np.testing.assert_array_equal(model.vector, kept[-4])


@pytest.mark.skipif(GRID.size == 1, reason="one rank agrees with itself")
def test_callbacks_that_disagree_are_refused():
    with pytest.raises(RankError, match="what the callbacks return must be the same on all ranks"):
        train(2, callbacks=[lambda training: "I am tired" if GRID.rank else None])


# --- The folder of a run --------------------------------------------------------------------------------------

def test_a_run_that_goes_on_ends_like_one_that_did_not_stop(folder):
    pytest.importorskip("safetensors")
    expected_model, expected = train(5, callbacks=[Best("validation accuracy", higher=True)], run=f"{folder}-whole")
    taken = []

    class Stop(Exception):
        pass

    def stop(x, samples, epoch):
        taken.append(epoch)
        if taken.count(2) == 3:  # in the middle of the third epoch
            raise Stop
        return x

    with pytest.raises(Stop):
        train(5, augment=stop, callbacks=[Best("validation accuracy", higher=True)], run=folder, every=5)
    with pytest.raises(RankError, match=r"holds checkpoints, up to step (5|10): .*resume=True"):
        train(5, run=folder)
    model, history = train(5, callbacks=[Best("validation accuracy", higher=True)], run=folder, resume=True, every=5)
    np.testing.assert_array_equal(model.vector, expected_model.vector)
    assert untimed(history) == untimed(expected)
    lines = [record for record in records(folder) if record["kind"] != "step"]
    later = [r["epoch"] for r in lines[5:-1]]
    assert later in ([2, 3, 4, 5], [3, 4, 5])  # whether or not the checkpoint of step 10 was complete
    assert [r["kind"] for r in lines] == ["run", "epoch", "epoch", "end", "run", *["epoch"] * len(later), "end"]
    ends = [r["reason"] for r in lines if r["kind"] == "end"]
    assert ends[0].startswith("Stop") and ends[1] == "all epochs are done"
    epochs = [r for r in lines if r["kind"] == "epoch"]
    assert [{name: epoch[name] for name in expected[0]} for epoch in epochs[-3:]] == history[2:]
    for part in "compute", "communicate", "wait", "other":
        assert all(len(epoch["ranks"][part]) == GRID.size for epoch in epochs)
    # Once more: all is done, and nothing is trained.
    again, history_again = train(5, callbacks=[Best("validation accuracy", higher=True)], run=folder, resume=True)
    assert history_again == history
    np.testing.assert_array_equal(again.vector, expected_model.vector)


def test_the_log_carries_numbers_that_are_not_finite(folder):
    pytest.importorskip("safetensors")
    options = {"metrics": {"wild": lambda output, target: math.inf}, "run": folder}
    train(1, **options)
    _, history = train(2, resume=True, **options)
    assert [epoch["validation wild"] for epoch in history] == [math.inf, math.inf]
    assert [r["validation wild"] for r in records(folder) if r["kind"] == "epoch"] == ["inf", "inf"]


def test_a_log_that_was_cut_off_is_continued_on_a_new_line(folder):
    pytest.importorskip("safetensors")
    train(1, run=folder)
    if GRID.rank == 0:
        with open(f"{folder}/log.jsonl", "a") as file:
            file.write('{"kind": "st')
    train(2, run=folder, resume=True)
    GRID.comm.Barrier()
    with open(f"{folder}/log.jsonl") as file:
        lines = file.read().splitlines()
    assert '{"kind": "st' in lines and json.loads(lines[lines.index('{"kind": "st') + 1])["kind"] == "run"


def test_what_an_epoch_says(capsys):
    said = []
    _, history = train(1, say=said.append)
    assert said == ([line(history[0])] if GRID.rank == 0 else [])
