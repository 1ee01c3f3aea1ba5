"""The part of ``python -m mpiml check`` that takes all ranks: what each says, compared, and whether they can work together."""

import json
import os
import threading
import warnings
from contextlib import contextmanager
from time import perf_counter, sleep

import numpy as np
from mpi4py import MPI

from mpiml import check, cores
from mpiml.check import Finding, ok, problem, show, too_late, warning

from . import start
from .error import RankError, spans
from .grid import Grid
from .sum import AllReduce, PlainSum, summation

_LEVELS = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized",
           MPI.THREAD_MULTIPLE: "multiple"}
_SLOW = 0.5  # seconds for a sum of 4 MB, which even a slow network does in a tenth of a second
_LINES = 6  # nodes in a line
_ALIKE = ("Python", "CPU", "MPI")  # topics in which nodes seldom differ


def job(mine, speaks):
    """Examine the job that this process is a rank of, print what was found, and end MPI.

    Parameters
    ----------
    mine : list of Finding
        What this rank found out before it started MPI. Those of rank 0 were printed.
    speaks : bool
        Whether this process may print, if it is alone in its world.

    Returns
    -------
    findings : list of Finding
        On rank 0 those that were added here; on other ranks nothing.
    """
    with time_limit("an answer of all ranks"):
        comm = MPI.COMM_WORLD.Dup()
    found = []

    def report(findings):
        if comm.rank == 0:
            found.extend(findings)
            if speaks or comm.size > 1:
                show(findings)

    report(world(comm.size))
    with time_limit("the reports of the ranks"):
        everyone = [json.loads(text) for text in start.texts(comm, json.dumps([mine, _place()]))]
    places = [place for _, place in everyone]
    nodes = [place["node"] for place in places]
    report(nodes_and_ranks(nodes) if comm.size > 1 else [])
    report(differences([[Finding(*fields) for fields in findings] for findings, _ in everyone], nodes))
    report(shared_cores(places) if comm.size > 1 else [])
    with time_limit("the first Grid"):
        grid, findings = agreement()
    report(findings)
    if grid is not None and comm.size > 1:
        with time_limit("the sum over all ranks"):
            findings = sums(grid)
        report(findings)
    MPI.Finalize()
    return found


@contextmanager
def time_limit(what):
    """End the job if the block takes too long: a rank that MPI keeps waiting cannot raise an exception itself."""
    def end():
        if MPI.COMM_WORLD.rank == 0:
            show(too_late(what, check.PATIENCE))
            sleep(0.5)  # the launcher passes on what was printed, if it is let
        MPI.COMM_WORLD.Abort(1)

    timer = threading.Timer(check.PATIENCE + MPI.COMM_WORLD.rank / MPI.COMM_WORLD.size, end)  # rank 0 has the first word
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _place():
    """Where this rank runs."""
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {"node": MPI.Get_processor_name(), "cores": bound, "of": cores.cores_of_node(), "threads": cores.threads()}


def world(size):
    """The MPI library as it runs, and whether its world is that of the launcher."""
    level = _LEVELS[MPI.Query_thread()]
    wrong = start.wrong_launcher(size)
    if wrong:
        text, fix = wrong.rsplit(": use ", 1)
        return problem("MPI", text, f"use {fix}")
    text = f"{start.library()} has started, thread level {level}"
    return ok("MPI", text if size > 1 else f"{text}; one rank (mpirun -n 4 python -m mpiml check examines a job)")


def nodes_and_ranks(nodes):
    """How many ranks there are on each node."""
    counts = {node: nodes.count(node) for node in nodes}
    if len(counts) == 1:
        return ok("ranks", f"{len(nodes)}, all on {nodes[0]}")
    if len(set(counts.values())) == 1:
        return ok("ranks", f"{len(nodes)}, {nodes.count(nodes[0])} on each of {len(counts)} nodes: {_few(list(counts))}")
    uneven = _few([f"{count} on {node}" for node, count in counts.items()])
    return warning("ranks", f"{len(nodes)}: {uneven}; gradients are summed by MPI alone, not in shared memory",
                   "start as many ranks on every node")


def _few(texts):
    return ", ".join(texts[:_LINES]) + (f" and {len(texts) - _LINES} more" if len(texts) > _LINES else "")


def differences(findings, nodes):
    """What other ranks found wrong that rank 0, whose findings were printed, did not; and what hardly should differ."""
    known, others = set(findings[0]), {}
    for rank, theirs in enumerate(findings):
        for finding in theirs:
            if finding not in known and (finding.mark != "ok" or finding.topic in _ALIKE):
                others.setdefault(finding, []).append(rank)
    return [finding._replace(text=f"on {start.ranks_text(ranks, nodes)}: {finding.text}") for finding, ranks in others.items()]


def shared_cores(places):
    """Whether every rank has a core to itself."""
    found = [finding for node in dict.fromkeys(place["node"] for place in places) for finding in _crowd(node, places)]
    if found:
        more = f" (and on {len(found) - 1} more nodes it is alike)" if len(found) > 1 else ""
        return [found[0]._replace(text=found[0].text + more)]
    counts = sorted({len(place["cores"]) for place in places})
    text = " to ".join(map(str, counts[:1] + counts[1:][-1:])) + f" core{'s' * (counts[-1] > 1)}"
    if all(len(place["cores"]) == place["of"] for place in places):
        return ok("cores", f"not bound: each rank may run on all {text} of its node")
    return ok("cores", f"bound: each rank has {text} of its own")


def _crowd(node, places):
    """What is wrong with the cores of the ranks on one node."""
    ranks = [rank for rank, place in enumerate(places) if place["node"] == node]
    bounds = sorted({tuple(places[rank]["cores"]) for rank in ranks}, key=len)
    total, threads = max(places[rank]["of"] for rank in ranks), sum(places[rank]["threads"] for rank in ranks)
    if len(ranks) > total:
        return warning("cores", f"{len(ranks)} ranks share {total} core{'s' * (total > 1)} of {node}: good for a test, slow "
                                f"for training", f"mpirun -n {total}")
    for bound in bounds:
        inside = [rank for rank in ranks if set(places[rank]["cores"]) <= set(bound)]
        if len(inside) > len(bound):
            return problem("cores", f"{start.ranks_text(inside, [place['node'] for place in places])} are bound to "
                                    f"core{'s' * (len(bound) > 1)} {spans(bound)} of {node}, which has {total}: they "
                                    "take turns", "srun --cpu-bind=cores; mpirun -bind-to core (MPICH); mpirun --bind-to core "
                                    "(Open MPI); or none instead of core")
    if threads > total:
        return warning("cores", f"{len(ranks)} ranks with {places[ranks[0]]['threads']} threads each share {total} cores of "
                                f"{node}", f"export OMP_NUM_THREADS={total // len(ranks)}, or unset it")
    return []


def agreement():
    """A Grid of all ranks and the finding that they fit; None and why not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            grid = Grid()
        except RankError as error:
            *table, fix = str(error).splitlines()
            return None, problem("ranks", "\n".join(table), fix)
        except RuntimeError:  # the launcher, told by world()
            return None, []
    found = [finding for said in caught for finding in warning("ranks", *str(said.message).split(": ", 1))]
    return grid, found or (ok("ranks", "all run the same program with the same packages") if grid.size > 1 else [])


def sums(grid):
    """Whether gradients are summed right, and how fast."""
    times = {}
    for size in 2, 1_000_000:
        by_mpi = PlainSum(AllReduce(grid.comm), 1, size, np.float32)
        for name, total in ("mpi", by_mpi), ("mpiml", summation(grid, size, np.float32)):
            times[name, size], right = _sum(total, grid, rounds=20 if size == 2 else 4)
            if not grid.all(right):
                return problem("sum", f"a sum of {size} numbers over {grid.size} ranks by {name} is wrong",
                               "update MPI, or use another: this one cannot be trusted")
    how = "by MPI" if isinstance(summation(grid, 2, np.float32), PlainSum) else "in shared memory"
    text = (f"right; {_time(times['mpiml', 2])} for 8 bytes, {_time(times['mpiml', 1_000_000])} for 4 MB ({how}; MPI alone "
            f"{_time(times['mpi', 2])} and {_time(times['mpi', 1_000_000])})")
    if times["mpiml", 1_000_000] > _SLOW:
        return warning("sum", text, "slow: more ranks than cores, busy nodes, or an MPI that does not know the fast network "
                                    "(your site has a module for one that does)")
    return ok("sum", text)


def _sum(total, grid, rounds):
    """(median seconds for a sum, whether it was right)."""
    row, seconds, right = total.rows[0], [], True
    pattern = np.arange(len(row)) % 7
    for _ in range(rounds + 1):  # the first is for warming up
        row[:] = pattern + grid.rank
        grid.comm.Barrier()
        begin = perf_counter()
        total()
        seconds.append(perf_counter() - begin)
        right &= bool((row == pattern * grid.size + grid.size * (grid.size - 1) // 2).all())
    return float(np.median(seconds[1:])), right


def _time(seconds):
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
