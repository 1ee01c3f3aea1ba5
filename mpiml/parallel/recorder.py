"""The flight recorder: what each rank of a node is doing, for the others to see, and a watchdog that looks at it.

A rank that waits for the others writes down for whom and in what, in memory that the ranks of its node share. A
thread of each rank looks at these notes a few times a second. It ends the job with a table of them as soon as nothing can
come any more: a rank that is waited for has left the program or its process has died, or all ranks of a circle wait for
each other in different places. Where it only takes long, it warns, names the rank that is late and shows what that rank is
at, and after a longer time ends the job too. ``MPIML_WATCHDOG=WARN,ABORT`` sets both times in seconds (60,900 if it is not
set), and ``MPIML_WATCHDOG=off`` switches the recorder off.

The notes of ranks on other nodes cannot be read, nor can anybody's before the first Grid is made. Each node's watchdog tells of
its own; what ends the job, and the question who is late, are sent to the other nodes (news.py).
"""

import contextlib
import faulthandler
import os
import signal
import struct
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpiml.patience import watchdog

from . import abort, shared
from .error import names
from .news import News

ELASTIC = os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # mpirun --with-ft ulfm: MPI itself tells of ranks that died
RUNNING, WAITING, LEFT, FAILED, TOLD = range(5)  # TOLD: has said where it was when another failed
_NOTE = struct.Struct("<qqqd32s?183s")  # state, number of the note, process, time, for whom, others too, in what: 248 bytes
_ROOM = 256  # bytes for a note; and as many ranks of a node are told apart, by the 256 bits of a mask
_LOOK = 0.2  # seconds between two looks
_LEFT, _CIRCLE = 1.0, 3.0  # seconds until a wait for somebody who left, or a circle, is taken for what it is
_WORDS, _POST = 2.0, 1.2  # seconds that a rank that ends the job grants those of its node, and of others, for a word on it
_LATER = 2.0  # seconds that a node without a culprit waits for one that has
_QUESTION = "who is late?"
_SIGNAL = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else None  # shows a rank's stack; nobody else's, one hopes


class Recorder:
    """This process's notes, and those of the other ranks on its node.

    Attributes
    ----------
    on : bool
        Whether it records at all.
    task : str
        What the program is at, such as "step 12": part of every note.
    """

    def __init__(self):
        self.task = ""
        self._comm, self._news, self._thread = None, None, None
        self._wake, self._over = threading.Event(), False
        self._memory, self._at, self._ranks = memoryview(bytearray(_ROOM)), 0, [0]
        self._number, self._state, self._note = 0, RUNNING, ""
        self._pid = os.getpid()
        self._told = set()
        self.warn, self.limit = watchdog()
        self.on = self.warn is not None

    def start(self, comm):
        """Share the notes of this job's ranks; to be called on all ranks of ``comm``, the whole job, together."""
        if self._comm is not None or comm.size == 1:
            return
        self._comm, self._ranks = comm, [comm.rank]
        if self.on:
            self._thread = threading.Thread(target=self._watch, name="mpiml watchdog", daemon=True)
            self._thread.start()
        with self.waiting("making the first Grid", range(comm.size)):
            on = np.array([self.on], np.int64)
            comm.Allreduce(MPI.IN_PLACE, on, MPI.MIN)
            if not on[0]:  # if on some ranks alone, they are told when the ranks compare what they run
                self.on, self._over = False, True
                return
            abort.farewells.append(self.failed)
            abort.partings.append(self._leave)
            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
            ranks = np.empty(node.size, np.int64)
            node.Allgather(np.array([comm.rank], np.int64), ranks)
            abort.forget_segments()
            memory = shared.allocate(node, node.size * _ROOM) if 1 < node.size <= _ROOM else None
            if memory is not None:
                self._memory, self._at, self._ranks = memoryview(memory), node.rank * _ROOM, ranks.tolist()
                self._write(WAITING, self._note, *self.whom(range(comm.size)))
                node.Barrier()
            others = sorted(set(range(comm.size)).difference(self._ranks))
            several = np.array([bool(others)], np.int64)
            comm.Allreduce(MPI.IN_PLACE, several, MPI.MAX)  # a node whose ranks share no memory is several
            if several[0] and not ELASTIC:
                self._news = News(comm, others)
        if _SIGNAL:
            # To the descriptor: without a handler, where the program has no sys.stderr, the signal would end the process.
            faulthandler.register(_SIGNAL, file=2, all_threads=False)

    def whom(self, ranks):
        """How a note tells of some ranks of the job: a mask of those on this node, and whether there are others."""
        mask, others = 0, False
        for rank in ranks:
            if rank in self._ranks:
                mask |= 1 << self._ranks.index(rank)
            else:
                others = True
        return mask.to_bytes(32, "little"), others

    def told(self, what):
        """``what``, and which task it belongs to."""
        return f"{what} in {self.task}" if self.task else what

    def waiting(self, what, ranks):
        """A context in which this process waits for these ranks of the job."""
        return Wait(self, self.told(what), self.whom(ranks))

    @contextlib.contextmanager
    def at(self, task):
        """A context in which the program is at this task."""
        before, self.task = self.task, task
        try:
            yield
        finally:
            self.task = before

    def _write(self, state, what, mask=b"", others=False):
        self._number += 1
        self._state, self._note = state, what
        _NOTE.pack_into(self._memory, self._at, state, self._number, self._pid, time.monotonic(), mask, others,
                        what.encode(errors="replace"))

    def _leave(self):
        """Wait for the other ranks of the node: in MPI_Finalize, which waits for all, nobody could look at them any more."""
        if self._state != FAILED:
            self._write(LEFT, self._note)
            while any(note.state != LEFT and _process(note.pid) is not None for note in self._notes()):
                time.sleep(0.005)
            self._over = True
            self._wake.set()
            if self._news:  # which must not be in MPI when that ends
                self._thread.join()

    def failed(self, what):
        """Tell the other ranks what ends the job here, and give them a moment to say where they were."""
        self._write(FAILED, what if len(what) < 120 else what[:117] + "...")
        self._wake.set()
        if threading.current_thread() is self._thread:
            self._tell(self._note)
        begin = time.monotonic()
        while time.monotonic() < begin + _WORDS and any(
                note.state not in (FAILED, TOLD) and _process(note.pid) not in (None, "T", "t") for note in self._notes()):
            time.sleep(0.02)
        if self._news:
            time.sleep(max(0.0, begin + _POST - time.monotonic()))

    def _tell(self, text):
        if self._news:
            with contextlib.suppress(MPI.Exception):
                self._news.tell(text)

    # What the watchdog sees and says.

    def _notes(self):
        # Somebody may write his note meanwhile. One that is half old does no harm: only what has lasted for seconds counts.
        notes = []
        for i, rank in enumerate(self._ranks):
            state, number, pid, since, mask, others, what = _NOTE.unpack_from(self._memory, i * _ROOM)
            notes.append(_Note(rank, state, number, pid, since, int.from_bytes(mask, "little"), others,
                               what.rstrip(b"\0").decode(errors="replace")))
        return notes

    def _watch(self):
        while self._state != FAILED and not self._over:
            with contextlib.suppress(ValueError, MPI.Exception):  # the memory, or MPI, is going away: so is the process
                if self._look():
                    return
            self._wake.wait(_LOOK)
        if self._state == FAILED:
            self._tell(self._note)

    def _look(self):
        """Look once; whether the watch is over."""
        notes, now = self._notes(), time.monotonic()
        mine = notes[self._at // _ROOM] if len(notes) > 1 else notes[0]
        if mine.state == FAILED:
            return False
        culprits = [(note.rank, note.what) for note in notes if note.state == FAILED]
        for rank, text in self._news.heard() if self._news else ():
            if text == _QUESTION:
                self._answer(mine, rank)
            else:
                culprits.append((rank, text))
        if culprits:
            doing = {RUNNING: "busy after", WAITING: "waiting in", LEFT: "at the end of the program, after"}[mine.state]
            abort.say("mpiml: rank {} was {} {} when rank {} failed: {}\n".format(
                mine.rank, doing, mine.what or "nothing of mpiml yet", *culprits[0]))
            self._write(TOLD, mine.what)
            return True
        if mine.state == RUNNING:
            return False
        # The first of those who wait speaks for all.
        turn = 1.0 if any(note.state == mine.state and not note.stopped() for note in notes[:notes.index(mine)]) else 0.0
        if mine.state == LEFT:  # others may still have something to do, unless they cannot
            stopped = [note.rank for note in notes if note.state != LEFT and note.stopped()]
            if stopped and now - mine.since - turn > self.limit:
                self._end(notes, f"rank {mine.rank} has waited for {names(stopped)} for {self.limit:g} s at the end of the "
                                 f"program; MPIML_WATCHDOG={self.warn:g},SECONDS allows more")
            return all(note.state == LEFT for note in notes)
        late = [note for i, note in enumerate(notes) if mine.mask >> i & 1 and note is not mine]
        waited = now - mine.since - turn
        for note in late:
            gone = note.pid and not ELASTIC and _process(note.pid) is None
            if (note.state == LEFT or gone) and waited > _LEFT and now - note.since > _LEFT:
                how = "has left the program" if note.state == LEFT else "is gone: its process has vanished"
                self._end(notes, f"rank {note.rank} {how}, but rank {mine.rank} waits for it in {mine.what}")
                return True
        needed = self._needed(notes, mine)
        if now - max(note.since for note in needed) - turn > _CIRCLE and _circle(needed):
            self._end(notes, f"the ranks wait for each other, for ever: {apart({note.rank: note.what for note in needed})[0]}")
            return True
        busy = [note for note in needed if note.state == RUNNING or note.stopped()]
        if waited > self.limit + (_LATER if self._news and not busy else 0.0):
            self._end(notes, f"rank {mine.rank} has waited for {self._names(busy)} for {self.limit:g} s in {mine.what}; "
                             f"MPIML_WATCHDOG={self.warn:g},SECONDS allows more")
            return True
        if waited > self.warn and not turn and mine.number not in self._told:
            self._told.add(mine.number)
            abort.say(f"mpiml: rank {mine.rank} waits for {self._names(busy)} in {mine.what}\n{self._table(notes)}")
            self._show([note for note in busy if note.state == RUNNING])
            if not busy:
                self._tell(_QUESTION)
        return False

    def _needed(self, notes, mine):
        """This rank, all on its node that it waits for, those that they wait for, and so on, in their order."""
        found, new = {mine}, {mine}
        while new:
            new = {note for other in new for i, note in enumerate(notes) if other.mask >> i & 1} - found
            found |= new
        return sorted(found)

    def _names(self, notes):
        return names([note.rank for note in notes]) if notes else "ranks of other nodes" if self._news else "the others"

    def _answer(self, mine, asking):
        """Say, once, that a rank of another node waits for this one, if it may."""
        if mine.state == RUNNING and mine.number not in self._told:
            self._told.add(mine.number)
            abort.say(f"mpiml: rank {mine.rank} lets rank {asking} wait, on another node\n{self._table([mine])}")
            self._show([mine])

    def _table(self, notes):
        now, lines = time.monotonic(), []
        for note in notes:
            state = _process(note.pid)
            doing = {RUNNING: "runs, after", WAITING: "waits in", LEFT: "has left, after", FAILED: "failed:",
                     TOLD: "was at"}[note.state]
            odd = " (its process has vanished)" if state is None else " (stopped by a signal)" if state in "Tt" else ""
            lines.append(f"  rank {note.rank} {doing} {note.what or 'nothing of mpiml'}, since {now - note.since:.1f} s{odd}\n")
        return "".join(lines[:64]) + (f"  ... {len(lines) - 64} more\n" if len(lines) > 64 else "")

    def _show(self, notes):
        """Let processes show where they are."""
        for note in notes[:4]:
            if _SIGNAL and _process(note.pid) not in (None, "T", "t"):
                abort.say(f"mpiml: rank {note.rank} is here:\n")
                with contextlib.suppress(OSError):
                    os.kill(note.pid, _SIGNAL)
                time.sleep(_LOOK)

    def _end(self, notes, text):
        self._show([note for note in notes if note.state == RUNNING])
        abort.end(f"{text}\n{self._table(notes)}", 1, text)


class _Note(NamedTuple):
    """One rank's note, as the others of its node see it."""

    rank: int
    state: int
    number: int
    pid: int
    since: float  # time.monotonic, which the processes of a node share
    mask: int  # a bit for each rank of this node that it waits for
    others: bool  # waits for ranks of other nodes too
    what: str

    def stopped(self):
        """Whether a signal has stopped the process: then it may have got what it waits for."""
        return _process(self.pid) in ("T", "t")


class Wait:
    """A context in which this process waits; see :meth:`Recorder.waiting`."""

    __slots__ = ("recorder", "what", "whom")

    def __init__(self, recorder, what, whom):
        self.recorder, self.what, self.whom = recorder, what, whom

    def __enter__(self):
        self.recorder._write(WAITING, self.what, *self.whom)
        return self

    def __exit__(self, *_):
        self.recorder._write(RUNNING, self.what)


def _circle(notes):
    """Whether none of these ranks can go on, which are all that any of them waits for."""
    return (len({note.what for note in notes}) > 1
            and all(note.state in (WAITING, LEFT) and not note.others and not note.stopped() for note in notes))


def apart(texts):
    """Which ranks are at what, as text, and those with the rarest of the texts; of {rank: text}."""
    groups = {}
    for rank, text in texts.items():
        groups.setdefault(text, []).append(rank)
    odd = min(groups.values(), key=len)
    parts = (f"{names(ranks)} in {text}" for text, ranks in sorted(groups.items(), key=lambda item: len(item[1])))
    return f"{', but '.join(parts)}. All ranks must do the same, in the same order, as often", odd


def _process(pid):
    """The state of a process as Linux abbreviates it, "T" for stopped, "" where that is not known; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        return None if state in "ZX" else state
    except FileNotFoundError:
        return None if sys.platform == "linux" else ""
    except OSError:
        return ""


recorder = Recorder()
