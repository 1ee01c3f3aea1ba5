"""How long ranks wait for each other: ``MPIML_WATCHDOG``, and the start of MPI, which waits for all ranks.

A rank that waits in ``MPI_Init`` lets no thread of its process run, so another process has to look at the time.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
_TELL = 2  # ranks: one of them may be the one that is missing
_FIRST = 2.0  # seconds that rank 0 is ahead, so that one message is seen where it can
_WATCHER = """
import os, sys, time
parent, *said = sys.argv[1:]
begin = time.monotonic()
for seconds, text in zip(said[::2], said[1::2]):
    while time.monotonic() - begin < float(seconds):
        time.sleep(0.1)
        if os.getppid() != int(parent):
            sys.exit()
    print(text, end="", flush=True)
time.sleep(0.5)
os.kill(int(parent), 9)
"""


def watchdog():
    """``MPIML_WATCHDOG``: seconds until a warning and until the end of the job, (None, None) if it is off."""
    text = os.environ.get("MPIML_WATCHDOG", "")
    if text == "off":
        return None, None
    try:
        warn, limit = (float(part) for part in (text or "60,900").split(","))
        if not 0 < warn <= limit:
            raise ValueError
    except ValueError:
        raise ValueError(f"MPIML_WATCHDOG is WARN,ABORT, two times in seconds such as 60,900, or off; not {text!r}") from None
    return warn, limit


def launched_rank():
    """This process' number, as its launcher says (None without a launcher)."""
    return next((int(os.environ[name]) for name in _RANK if os.environ.get(name, "").isdigit()), None)


@contextmanager
def limited(*said, to=1):
    """End this process, and with it the job, if the block takes too long, whatever keeps it.

    Parameters
    ----------
    *said : (float, str)
        What is printed after so many seconds; after the last of them comes the end.
    to : int
        The descriptor that it is printed to.
    """
    words = [str(word) for pair in said for word in pair]
    watcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), *words],  # noqa: S603
                               stdin=subprocess.DEVNULL, stdout=to)
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()


@contextmanager
def limited_start():
    """A block that starts MPI: a warning and the end, if a rank lets the others wait for too long."""
    (warn, limit), rank = watchdog(), launched_rank()
    if warn is None or rank is None or "mpi4py.MPI" in sys.modules:
        yield
        return
    why = ("one failed before it came to that (see above), is late, or cannot be reached: python -m mpiml check, started in "
           "the same way, looks for the cause")
    texts = (f"mpiml: rank {rank} has waited for all ranks to start MPI for {warn:g} s; {why}\n",
             f"mpiml: rank {rank} has waited for all ranks to start MPI for {limit:g} s and ends the job; {why}; "
             f"MPIML_WATCHDOG={warn:g},SECONDS allows more\n")
    ahead = 0.0 if rank == 0 else _FIRST
    said = [(seconds + ahead, text if rank < _TELL else "") for seconds, text in zip((warn, limit), texts, strict=True)]
    with limited(*said, to=2):
        yield
