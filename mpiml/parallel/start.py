"""Whether the processes that a launcher started belong together: one world, one program, one installation.

Where they do not, nothing fails: processes that the wrong launcher started train alone, each its own model, and ranks
with another learning rate or another NumPy compute another gradient, which is summed all the same. So the first thing
that a :class:`~mpiml.parallel.Grid` does is to look, and it refuses what does not fit.

``MPIML_MAY_DIFFER`` names what may differ, for jobs whose ranks run different programs on purpose:
``MPIML_MAY_DIFFER=script,arguments``, or ``all``. It counts for all ranks if one of them has it.
"""

import functools
import hashlib
import json
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path

import llvmlite
import mpi4py
import numba
import numpy as np
from mpi4py import MPI

from mpiml import __version__

from .error import RankError, names

_SHOWN = 60  # characters of a value in the table of what differs
_WORLD_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SLURM_SIZE = ("SLURM_STEP_NUM_TASKS",)  # also in what an mpirun inside of a step starts, so it counts if it stands alone


def check(comm, **arguments):
    """Make sure that the launcher's processes are one world, and that all ranks run the same.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        A communicator of this library's own, of the ranks that will work together.
    **arguments
        What else must be the same on all ranks.

    Raises
    ------
    RuntimeError
        The launcher belongs to another MPI than the one that was loaded: every process would train alone.
    RankError
        On all ranks, with a table that says who has what: they run different programs, packages or arguments.

    Warns
    -----
    UserWarning
        A Slurm job of several tasks runs one process that no launcher started: on purpose, or srun was forgotten.
    """
    world = MPI.COMM_WORLD.size
    problem = wrong_launcher(world)
    if problem:
        raise RuntimeError(problem)
    tasks = os.environ.get("SLURM_NTASKS", "")
    if world == 1 and tasks.isdigit() and int(tasks) > 1 and not any(name in os.environ for name in _WORLD_SIZE):
        warnings.warn(f"Slurm gave this job {tasks} tasks, but this process runs alone: start it with srun python ..., or "
                      f"with mpirun", stacklevel=3)
    record = _record() | {name: repr(value) for name, value in arguments.items()}
    digest = np.frombuffer(hashlib.blake2b(json.dumps(record).encode(), digest_size=8).digest(), np.uint8)
    digests = np.empty((comm.size, 8), np.uint8)
    comm.Allgather(digest, digests)
    if (digests != digest).any():
        everything = texts(comm, json.dumps([record, MPI.Get_processor_name(), os.environ.get("MPIML_MAY_DIFFER", "")]))
        _compare(*zip(*map(json.loads, everything), strict=True))


def wrong_launcher(size):
    """What is wrong if the launcher started another number of processes than the ``size`` that MPI sees, else None."""
    for variables in _WORLD_SIZE, _SLURM_SIZE:
        started = {name: int(os.environ[name]) for name in variables if os.environ.get(name, "").isdigit()}
        if size in started.values():
            return None  # another launcher around this one left the other number
        if started:
            name, number = next(iter(started.items()))
            return _foreign(f"{number} processes ({name})", size)
    number = os.environ.get("PMIX_RANK", "")  # some launchers tell no more
    return _foreign(f"this process as number {number} (PMIX_RANK)", size) if number.isdigit() and int(number) >= size else None


def _foreign(started, size):
    return (f"the launcher started {started}, but the MPI library that mpi4py loaded ({library()}) sees {size}: use the "
            f"mpirun that belongs to this library, or the mpi4py that belongs to this mpirun (under Slurm: the srun --mpi=... "
            f"that suits it, see srun --mpi=list)")


def library():
    """Name and version of the MPI library."""
    return " ".join(MPI.Get_library_version().strip("\0\n ").splitlines()[0].split(",")[0].replace("Version:", "").split())


def texts(comm, text):
    """Every rank's ``text``, on every rank."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([mine.size], np.int64), lengths)
    everything = np.empty(lengths.sum(), np.uint8)
    comm.Allgatherv(mine, [everything, lengths])
    return [part.tobytes().decode() for part in np.split(everything, np.cumsum(lengths)[:-1])]


@functools.cache
def _record():
    """What must be the same on all ranks, as texts."""
    return {
        "mpiml": f"{__version__}, sources {_digest(_sources(os.path.dirname(os.path.dirname(__file__))))}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "byte order": sys.byteorder,
        **{module.__name__: module.__version__ for module in (np, numba, llvmlite, mpi4py)},
        "MPI library": library(),
        "script": _script(),
        "arguments": shlex.join(sys.argv[1:]),
        "MPIML_WATCHDOG": os.environ.get("MPIML_WATCHDOG", ""),
    }


def _sources(folder):
    found = []
    for path, folders, files in os.walk(folder):
        if "__pycache__" in folders:
            folders.remove("__pycache__")  # perhaps thousands of kernels
        found += [os.path.join(path, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _script():
    """Name of the program, and a digest of its text."""
    if sys.argv[:1] == ["-c"]:
        return f"-c {shlex.quote(sys.orig_argv[sys.orig_argv.index('-c') + 1])}" if "-c" in sys.orig_argv else "-c"
    path = Path(sys.argv[0] if sys.argv else "")
    return f"{path.name} {_digest([path])}" if path.is_file() else path.name


def _digest(paths):
    """Of the contents of files, which copies on several nodes have in common, unlike their times."""
    digest = hashlib.blake2b(digest_size=4)
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        digest.update(os.read(file, os.fstat(file).st_size))
        os.close(file)
    return digest.hexdigest()


def _compare(records, nodes, allowed):
    allowed = {name.strip() for text in allowed for name in text.split(",")}
    lines, differing, odd = [], [], []
    for name in records[0]:
        groups = {}
        for rank, record in enumerate(records):
            groups.setdefault(record[name], []).append(rank)
        if len(groups) > 1 and not {name, "all"} & allowed:
            shown = _shortened(list(groups))
            width = max(map(len, shown))
            for i, (value, ranks) in enumerate(zip(shown, groups.values(), strict=True)):
                lines.append(f"  {'' if i else name:<11}  {value:<{width}}  {ranks_text(ranks, nodes)}")
            differing.append(name)
            odd = odd or min(groups.values(), key=len)
    if differing:
        fix = ("start all ranks with one command line" if {"script", "arguments"} & set(differing) else
               "export it on all nodes" if "MPIML_WATCHDOG" in differing else
               "give all ranks the same installation, on every node" if set(differing) & set(_record()) else
               "give Grid the same arguments on all ranks")
        raise RankError("the ranks of this job differ in\n" + "\n".join(lines) + f"\n{fix}; if they are meant to differ, "
                        f"export MPIML_MAY_DIFFER={shlex.quote(','.join(differing))}", odd)


def _shortened(values):
    """Texts, cut to where they differ."""
    if max(map(len, values)) <= _SHOWN:
        return [value or "(none)" for value in values]
    same = next((i for i, letters in enumerate(zip(*values, strict=False)) if len(set(letters)) > 1), min(map(len, values)))
    start = max(0, same - _SHOWN // 3)
    return ["..." * (start > 0) + value[start:start + _SHOWN] + "..." * (len(value) > start + _SHOWN) for value in values]


def ranks_text(ranks, nodes):
    """Ranks as people write them, ``ranks 0-2, 5``, and their node if they share one of several."""
    here = {nodes[rank] for rank in ranks}
    where = f" on {here.pop()}" if len(here) == 1 < len(set(nodes)) else ""
    return f"{names(ranks)}{where}"
