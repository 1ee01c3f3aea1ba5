"""The command line of a program that all ranks run."""

import argparse
import time

from mpi4py import MPI

from . import abort


class ArgumentParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser``, of which one rank prints the help, or the error that all find in one command line.

    An error ends the job with status 2, also where one rank alone has found it, such as a folder that its node lacks. The
    lines of the description stay as they are.
    """

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(*args, formatter_class=formatter_class, **options)

    def print_help(self, file=None):
        """As ever, on rank 0."""
        if MPI.COMM_WORLD.rank == 0:
            super().print_help(file)

    def error(self, message):
        """End the job with this message."""
        if MPI.COMM_WORLD.size == 1:
            super().error(message)
        if MPI.COMM_WORLD.rank:
            time.sleep(abort.TURN)  # in which rank 0 ends the job, if it has found the same
        abort.end(f"{self.format_usage()}{self.prog}: error: {message}\n", 2)
