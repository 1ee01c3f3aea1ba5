"""Starting a job under mpirun that cannot outlive its time limit, whatever its processes do."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parent.parent
# What Open MPI needs to start many ranks on few cores, as root; MPICH does so by itself.
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


class Run(NamedTuple):
    code: int
    out: str
    err: str
    end: float  # time.time() when mpirun returned
    left: list  # processes of the job that were still alive two seconds later


def launcher(python=sys.executable):
    """The mpirun of this Python's environment, else the one on the PATH."""
    beside = Path(python).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"


def environment(**more):
    # Without the MPIML_DATA of the developer, so that a test sees what it asks for.
    clean = {name: value for name, value in os.environ.items() if name != "MPIML_DATA"}
    return clean | OPEN_MPI | more


def start(ranks, *command, env=None, python=sys.executable, flags=()):
    """Start ``python *command`` on ``ranks`` ranks: the launcher's process, and what :func:`alive` knows the job's by."""
    token = uuid.uuid4().hex
    return subprocess.Popen([launcher(python), *flags, "-n", str(ranks), python, *command], cwd=ROOT, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True, env=(env or environment()) | {"MPIML_TEST_JOB": token}), token


def mpirun(ranks, *command, timeout=120, env=None, python=sys.executable, flags=()):
    """Run ``python *command`` on ``ranks`` ranks; after ``timeout`` seconds all its processes are killed."""
    job, token = start(ranks, *command, env=env, python=python, flags=flags)
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for process in alive(token):
            process.kill()
        out, err = job.communicate()
        raise AssertionError(f"{' '.join(command)} on {ranks} ranks did not end within {timeout} s\n{out}\n{err}") from None
    end = time.time()
    psutil.wait_procs(alive(token), timeout=2)
    left = alive(token)
    for process in left:
        process.kill()
    return Run(job.returncode, out, err, end, left)


def alive(token):
    """The processes of a job."""
    # Launchers start their processes in sessions of their own; what all have is this job's environment.
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MPIML_TEST_JOB") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found
