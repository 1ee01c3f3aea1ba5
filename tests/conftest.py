"""The suite runs on one rank (``make test``) and, test by test, on many at once (``make test-4``)."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from mpiml.cores import rank_on_node, ranks_on_node

RANKS = ranks_on_node()
if RANKS > 1:
    # Ranks that tidy up one folder at once trip over each other.
    folder = Path(tempfile.gettempdir(), f"mpiml-tests-{os.getuid()}-{rank_on_node()}")
    folder.mkdir(exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if RANKS > 1 and rank_on_node():
        # One report is enough; failures are told by the hook below.
        config.pluginmanager.unregister(name="terminalreporter")
    config.addinivalue_line("markers", "launch: starts mpirun itself, so it is left out when the suite runs under mpirun")


def pytest_collection_modifyitems(config, items):
    if RANKS > 1:
        items[:] = [item for item in items if not item.get_closest_marker("launch")]


def pytest_runtest_logreport(report):
    # A rank that leaves a test would let the others wait for it in the next sum.
    if RANKS > 1 and report.failed:
        from mpi4py import MPI
        sys.stderr.write(f"\nrank {MPI.COMM_WORLD.rank} failed {report.nodeid}\n{report.longreprtext}\n")
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


@pytest.fixture(scope="session")
def mnist_folder():
    """The real MNIST files, for the tests that need them."""
    folder = os.environ.get("MPIML_DATA")
    if not folder:
        pytest.skip("MPIML_DATA names no folder with MNIST")
    return folder
