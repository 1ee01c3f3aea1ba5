"""Training on many ranks: the only folder that imports mpi4py.

Importing it starts MPI, and from then on an exception on one rank ends the whole job.
"""

from mpiml.patience import limited_start

try:
    with limited_start():
        from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # mpi4py missing; mpi4py there, but no MPI library
    raise ImportError("mpiml.parallel needs mpi4py and an MPI library: pip install 'mpiml[mpi]' brings MPICH with its "
                      "mpirun; on a cluster, load its MPI module first and pip install mpi4py. (The rest of mpiml runs "
                      f"without.) mpi4py said: {error}") from error

from . import abort

abort.install(MPI.COMM_WORLD)

from .abort import leave  # noqa: E402
from .arguments import ArgumentParser  # noqa: E402
from .error import RankError, RanksLost  # noqa: E402
from .evaluate import evaluate  # noqa: E402
from .gradient import gradient  # noqa: E402
from .grid import Grid  # noqa: E402
from .place import Part, place  # noqa: E402
from .predict import predict  # noqa: E402
from .profile import Profile, profile  # noqa: E402
from .progress import progress  # noqa: E402
from .watch import Watch  # noqa: E402

__all__ = ["ArgumentParser", "Grid", "Part", "Profile", "RankError", "RanksLost", "Watch", "evaluate", "gradient", "leave",
           "place", "predict", "profile", "progress"]
