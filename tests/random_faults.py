"""Disturbs jobs at random moments, and looks whether they keep what README.md promises ("If something goes wrong").

::

    python tests/random_faults.py KIND --times 20 --seed 7 --python .venv-openmpi/bin/python

Each time a job of tests/train_checkpoints.py is disturbed, on a random grid, rank and moment, from the start of MPI to the end
of the program. It must not hang; it ends with a message that names the rank and leaves nothing behind, or goes on, if it is
said to, with the bits of a job that nobody disturbed. Then all checkpoints are whole, none that was complete is lost, and a
job on another grid that goes on from the newest ends with the same bits, too.

============  ========================================================================================
``raise``     an exception
``skip``      a rank leaves out a step, a checkpoint, or one message to all inside of mpiml
``stop``      SIGSTOP, past the watchdog's limit
``pause``     SIGSTOP, and SIGCONT before the limit: the job goes on
``full``      a disk without room
``crowded``   a disk without room for a while; the program catches the error, and goes on
``kill``      SIGKILL of all ranks and their launcher
============  ========================================================================================
"""

import argparse
import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from launch import environment, mpirun
from train_checkpoints import EVERY, LANES, digest, train
from train_lanes import mlp

from mpiml import lanes
from mpiml.ops import cross_entropy
from mpiml.optim import Adam
from mpiml.save import Checkpoints

SCRIPT = "tests/train_checkpoints.py"
STEPS = 42
LIMIT = 3  # seconds of MPIML_WATCHDOG where a rank is stopped


def alone():
    """The same training without MPI: its step function and its optimizer."""
    model = mlp().init(seed=1)
    return lanes.gradient(model, cross_entropy, LANES), Adam(model, lr=0.01)


@functools.cache
def undisturbed():
    """{steps: digest} of a training that nobody disturbs."""
    step, optimizer = alone()
    return dict(enumerate((digest(optimizer) for _ in train(step, optimizer, STEPS)), 1))


def kept(folder):
    """{steps: digest} of all checkpoints in a folder, each loaded without MPI."""
    _, optimizer = alone()
    checkpoints, found = Checkpoints(folder, optimizer), {}
    for path in Path(folder).glob("step_*"):
        name = re.fullmatch(r"step_(\d+)", path.name)
        if name:
            checkpoints.load(step=int(name[1]))
            found[optimizer.steps] = digest(optimizer)
    return found


@contextlib.contextmanager
def small_disk(folder):
    """A disk of 16 MB, where this process may mount one; else it yields False."""
    os.mkdir(folder)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


FAULTS = {"raise": ["raise"], "skip": ["step", "save", "collective"], "stop": ["stop"], "pause": ["stop"], "full": ["fill"],
          "crowded": ["fill"], "kill": ["kill"]}
SAID = {  # by the job that the fault has ended
    "raise": r"rank {rank}\b.*(\n.*)*LookupError: this rank cannot go on",
    "skip": r"ranks? (\d[-, \d]*)?\b{rank}\b",
    "stop": r"rank {rank}\b.*\(stopped by a signal\)(.*\n)*.*has waited for rank {rank} for 3 s|"
            r"rank \d has waited for the others for 3 s in making the first Grid",  # where nobody sees another yet
    "full": r"RankError: rank \d.* failed in (writing|making) .*: OSError: \[Errno 28\] No space left on device",
    "kill": "",
}


def disturb(kind, rng, folder, python=sys.executable):
    """Disturb a job, and let another go on.

    Parameters
    ----------
    kind : str
    rng : numpy.random.Generator
    folder : str
        A new one.
    python : str
        Whose environment has the MPI.

    Returns
    -------
    str
        What happened, in a line; None if a small disk is needed and cannot be mounted.
    """
    ranks = int(rng.choice([2, 4]))
    pipe = int(rng.choice([pipe for pipe in (1, 2, 4) if ranks % pipe == 0]))
    at = int(rng.choice([rng.integers(1, STEPS), -1, STEPS], p=[0.8, 0.1, 0.1]))
    rank, fault = int(rng.integers(ranks)), str(rng.choice(FAULTS[kind]))
    delay = rng.uniform(0, 0.01 if 0 < at < STEPS else 0.2)
    passes = rng.uniform(0, LIMIT / 2) if kind in ("pause", "crowded") else None
    job = f"{ranks} ranks, {pipe} stages: {fault} on rank {rank}, {1000 * delay:.1f} ms after step {at}"
    options = ["--pipe", str(pipe), "--fault", fault, str(rank), str(at), str(delay)]
    options += ["--passes", str(passes)] if passes else []
    options += ["--patient"] if kind == "crowded" else []
    watchdog = {"MPIML_WATCHDOG": f"1,{LIMIT}"} if kind in ("stop", "pause") else {}
    with small_disk(folder) as mounted:
        if not mounted and kind in ("full", "crowded"):
            return None
        run = mpirun(ranks, SCRIPT, f"{folder}/run", str(STEPS), *options, python=python, timeout=120,
                     env=environment(**watchdog))
        said = f"{job}\n{run.out}{run.err}"
        begun = re.search(r"FAULT (\S+)", run.err)
        ended = f"status {run.code}" + (f" {run.end - float(begun[1]):.1f} s later" if begun else "")
        assert not run.left, f"left processes: {run.left}; {said}"
        segments = re.search(r"SEGMENTS (.*)", run.err)
        memory = [name for name in (segments[1].split() if segments else []) if os.path.exists(name)]
        assert not memory, f"left memory: {memory}; {said}"
        if run.code:
            assert kind in SAID, said
            assert re.search(SAID[kind].format(rank=rank), run.err), said
        else:
            assert f"ends on {ranks}" in run.out, said
        found = kept(f"{folder}/run")
        assert found == {steps: undisturbed()[steps] for steps in found}, said
        newest = max(found, default=0)
        # All that were complete are there: the one before the last that was begun is, when that is begun.
        assert newest >= (STEPS if not run.code else at // EVERY * EVERY - EVERY), f"newest is {newest}; {said}"
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{folder}/full")
        more = int(rng.integers(1, 5))
        run = mpirun(more, SCRIPT, f"{folder}/run", str(STEPS), python=python, timeout=120)
        assert run.code == 0 and run.out.split("\n")[0] == f"begins after {newest}", f"{said}\nand then\n{run.out}{run.err}"
        assert f"ends on {more} {undisturbed()[STEPS]}" in run.out.splitlines(), f"{said}\nand then\n{run.out}{run.err}"
        found = kept(f"{folder}/run")
        assert found[STEPS] == undisturbed()[STEPS], said
        pieces = ["latest", *(f"step_{steps}" for steps in sorted(found))]
        assert sorted(os.listdir(f"{folder}/run")) == pieces, said
        return f"{job}: {ended}; went on after step {newest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=FAULTS)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"), help="of the first")
    parser.add_argument("--python", default=sys.executable, help="of the environment whose MPI is to be used")
    args = parser.parse_args()
    failures = 0
    for seed in range(args.seed, args.seed + args.times):
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = disturb(args.kind, np.random.default_rng(seed), f"{folder}/disk", args.python)
            except AssertionError:
                failures += 1
                said = f"FAILED {traceback.format_exc()}"
        print(f"seed {seed}: {said}", flush=True)
    sys.exit(f"{failures} of {args.times} failed" if failures else 0)
