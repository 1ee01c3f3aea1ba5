"""How many cores this process may use, and keeping its threads within them.

Several ranks share a node. Left alone, the BLAS of each rank starts one thread for every core, and eight
ranks on two cores then run 40 to 200 times slower than they should. The caps below only work if they are
set before NumPy loads, so this module uses the standard library alone and is the first thing that
``import mpiml`` runs. It never starts MPI: what it needs to know stands in the launcher's environment.
"""

import os
import re
import sys
import warnings

# Ranks on this node and this rank's number among them, as the launchers tell them:
# Hydra (MPICH, Intel MPI), Open MPI, MVAPICH, Slurm.
_LOCAL_SIZE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
               "SLURM_STEP_TASKS_PER_NODE")
_LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

THREAD_CAPS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")


def _launcher(names, default):
    # Slurm writes a list such as "4(x2),3"; the largest count is the safe one to plan for.
    for name in names:
        numbers = re.findall(r"(?<!x)\b\d+", os.environ.get(name, ""))
        if numbers:
            return max(map(int, numbers))
    return default


def ranks_on_node():
    """Number of ranks the launcher started on this node (1 without a launcher)."""
    return _launcher(_LOCAL_SIZE, 1)


def rank_on_node():
    """This rank's number on its node, from 0 (0 without a launcher)."""
    return _launcher(_LOCAL_RANK, 0)


def cores():
    """Number of cores this process may run on: its CPU affinity, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_node():
    """Number of cores that this node's ranks may run on together: the launcher's, whose children may be bound to fewer."""
    try:
        return max(cores(), len(os.sched_getaffinity(os.getppid())))
    except (AttributeError, OSError):
        return cores()


def threads():
    """Number of threads this rank may use without taking a core from a neighbour.

    The user's own ``OMP_NUM_THREADS`` or Slurm's ``--cpus-per-task`` if given, else the cores divided by
    the ranks on the node. A rank that is bound to several cores of its own gets fewer than it could: one
    process cannot tell a private binding from a shared one, and too few threads cost little, too many
    cost everything.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        count = int(os.environ["SLURM_CPUS_PER_TASK"])
        if any(os.environ.get(name) for name in _LOCAL_SIZE[:-1]):  # the ranks of an mpirun may share one task of Slurm's
            count = min(count, cores_of_node() // ranks_on_node())
        return max(1, count)
    return max(1, cores() // ranks_on_node())


def share_cores():
    """Cap the threads of this rank and make its MPI yield the core while it waits, where ranks share cores.

    Sets environment variables that the user has not set; alone on its node, a process is left as it is.
    """
    if ranks_on_node() == 1:
        return
    late = "numpy" in sys.modules and "OMP_NUM_THREADS" not in os.environ
    count = threads()
    for name in THREAD_CAPS:
        os.environ.setdefault(name, str(count))
    if late:
        _cap_loaded_blas(count)
    if ranks_on_node() > cores_of_node():
        # MPICH's wait loop spins, then sleeps with this (about 100 us a wait, so only when oversubscribed);
        # Open MPI yields by itself if its own mpirun knows that it oversubscribes, and by the second always.
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if "mpi4py.MPI" in sys.modules:
            warnings.warn(f"{ranks_on_node()} ranks share {cores_of_node()} cores and MPI was started before mpiml was "
                          f"imported, so idle ranks may spin: import mpiml before mpi4py", stacklevel=3)


def _cap_loaded_blas(count):
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        warnings.warn(f"NumPy was imported before mpiml, so its BLAS threads cannot be capped at {count} for "
                      f"{ranks_on_node()} ranks on {cores()} cores: import mpiml first, export "
                      f"OMP_NUM_THREADS={count}, or pip install threadpoolctl", stacklevel=4)
    else:
        threadpool_limits(count)
