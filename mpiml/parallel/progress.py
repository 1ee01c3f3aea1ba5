"""The progress bar, where somebody sees it."""

import os
import sys


def progress(iterable, grid, description=""):
    """``iterable``, with a progress bar from rank 0 if the job's error stream is a terminal; else as it is."""
    if grid.rank or not _terminal():
        return iterable
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, description, leave=False, dynamic_ncols=True)


def _terminal():
    """Whether what this rank writes to stderr ends at a terminal, if need be through the launcher's pipe."""
    if sys.stderr.isatty():
        return True
    launchers = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}
    process = os.getppid()
    try:
        while process > 1:
            with open(f"/proc/{process}/stat") as file:
                name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
            if name in launchers:
                return os.readlink(f"/proc/{process}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            process = int(rest.split()[1])
    except (OSError, ValueError, IndexError):
        pass  # no /proc, or not ours to read
    return False
