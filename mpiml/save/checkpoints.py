"""The checkpoints of a training: written beside it, agreed by all ranks, and loaded to go on.

What the ranks do together is here, and happens in the training's own thread, when a step asks for it. The rest has files of
its own: what is saved (state.py), the thread that writes it (writing.py), the folder that it gets its name in (folder.py), and
the signals that ask a training to stop (signals.py).

Ranks may die meanwhile, where the grid is elastic. So what all ranks must end alike is one piece of work for ``grid.again``,
which those that are left do anew, under new numbers: all that depends on a rank's number is looked up within it.
"""

import json
import os
import signal
import sys
from time import monotonic

import numpy as np

from mpiml.alone import Alone
from mpiml.restart import STOPPED

from .checkpoint import MANIFEST, Checkpoint, contents, plain
from .folder import Folder
from .signals import Signals
from .state import State
from .writing import Writing

_SECONDS, _STEPS = 0.1, 100  # the ranks talk after so much time, and after so many steps at the latest


class Checkpoints:
    """Keeps the state of a training in a folder, and brings it back.

    A checkpoint holds the model's parameters and statistics, the optimizer's moments and number of steps, the seed and the
    number of the step that dropout depends on, and what you add to it. Loaded on the same grid, training goes on with the bits
    that it would have had; it can be loaded on any other: more ranks or fewer, other stages, or one process without MPI.

    In a parallel program all methods are to be called on all ranks together, and the folder is one that all nodes share.
    What fails on one rank raises a :class:`~mpiml.parallel.RankError` on all; without MPI it raises the error itself.

    Parameters
    ----------
    folder : str or path
        Made when there is something to save.
    optimizer : mpiml.optim.Optimizer
        Of the model that is trained: what ``place`` returned, or a Module after ``init``.
    settings : dict, optional
        What must not change when the training goes on, such as ``{"seed": 0, "batch": 128}``; text, numbers, lists and
        dicts of these. To load a checkpoint of other settings is an error.
    minutes : float or None
        :meth:`step` saves when so much time has passed.
    every : int, optional
        :meth:`step` saves after so many steps.
    keep : int
        Checkpoints that stay; older ones are deleted when a new one is complete. Later ones, of a training that was
        given up when an earlier checkpoint was loaded, are left alone until they are overwritten.

    Examples
    --------
    ::

        checkpoints = Checkpoints("run", optimizer, settings={"seed": 0, "batch": 128})
        checkpoints.load()                                  # goes on where the last run was stopped, if there was one
        steps = len(batches(x, y, 128, grid=grid))          # in an epoch
        for epoch in range(optimizer.steps // steps, 5):
            for images, labels in batches(x, y, 128, epoch=epoch, start=optimizer.steps % steps, grid=grid):
                step(images, labels)
                optimizer.step()
                checkpoints.step()
        checkpoints.save()
    """

    def __init__(self, folder, optimizer, settings=None, *, minutes=10.0, every=None, keep=3):
        for name, value in ("keep", keep), ("every", every):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"{name} is a whole number above 0, not {value!r}")
        if keep is None or (minutes is not None and not minutes > 0):
            raise ValueError(f"keep is a whole number and minutes a time above 0, or None, not {keep!r} and {minutes!r}")
        self.folder = os.fspath(folder)
        self.optimizer, self.model = optimizer, optimizer.model
        self._folder, self._state, self._signals = Folder(self.folder), State(optimizer), Signals()
        self._grid = Alone() if self._state.alone else self.model.grid
        self._settings = plain("settings of a checkpoint", settings or {})
        self._minutes, self._every, self._keep = minutes, every, keep
        self._loaded, self._names = False, None  # whether the folder is this training's, and what goes along
        self._job = None  # what is being written
        self._begun, self._last = None, monotonic()  # the step that was saved last (None: it was given up), and when
        self._pace = self._left = 1  # steps from one talk to the next, and to the next one from here
        self._talked = monotonic()

    def step(self, **at):
        """Save if it is time to; to be called after every ``optimizer.step()``.

        The training waits for copies of the arrays alone: a thread writes them, and one of the next steps gives the
        checkpoint its name, when all ranks have written. (A checkpoint that is due before that waits for it.)

        SIGTERM and SIGUSR1, as a cluster sends them to a job that has to go, do not end the process any more: they
        make all ranks save after the same step and exit with status 75 (``STOPPED``): start the program again to go
        on. The ranks ask each other about ten times a second, and after 100 steps at the latest.

        Parameters
        ----------
        **at : text, numbers, lists and dicts of these
            Is saved, and returned by :meth:`load`. Must be the same on all ranks.

        Raises
        ------
        SystemExit
            The training was told to stop, and is saved.
        RankError, OSError
            Some rank could not write. Nothing is left of this checkpoint, earlier ones are untouched, and training may
            go on.
        ValueError
            The folder holds checkpoints, but none of them was loaded; or the values are others than before.
        """
        self._claim(at)
        self._signals.listen()
        due = self._every and self.optimizer.steps % self._every == 0
        self._left -= 1
        if self._left <= 0:
            asked, writing, late = self._talk()
            if asked:
                self._stop(asked, at)
            if self._job and not writing:
                self._publish()
            due = due or late
        if due:
            self._begin(at)

    def save(self, **at):
        """Save now, and return when the checkpoint is complete. Parameters and errors are those of :meth:`step`."""
        self._claim(at)
        self._begin(at)
        self._finish(at)

    def finish(self):
        """Wait for the checkpoint that is being written, if there is one. Signals have their old meaning again."""
        self._finish()

    def _finish(self, at=None):
        """The same; if ranks died before the checkpoint was complete, and ``at`` is given, those that are left save anew."""
        try:
            self._publish()
            while at is not None and self._begun is None:
                self._begin(at)
                self._publish()
        finally:
            self._signals.leave()

    def _talk(self):
        """The ranks agree whether one was asked to stop, one is still writing, and it is time to save."""
        now = monotonic()
        late = self._minutes is not None and now - self._last >= 60 * self._minutes
        reach = int(self._pace * _SECONDS / max(now - self._talked, 1e-6))
        pace = 0 if self._grid.rank else max(1, min(reach, 2 * self._pace, _STEPS))
        writing = self._job is not None and not self._job.done()
        asked, writing, late, self._pace = self._grid.maximum(self._signals.asked, writing, late, pace)
        self._left, self._talked = self._pace, monotonic()
        return asked, writing, late

    def _stop(self, asked, at):
        if self._begun != self.optimizer.steps:
            self._begin(at)
        self._signals.forget()
        self._finish(at)
        if self._grid.rank == 0:
            saved = self._folder.of(self._begun)
            sys.stderr.write(f"mpiml: {signal.Signals(asked).name}: saved {saved}; exit status {STOPPED}\n")
            sys.stderr.flush()
        sys.exit(STOPPED)

    def claim(self, **at):
        """Refuse a folder with the checkpoints of another training; :meth:`step` and :meth:`save` do so too, but later."""
        self._claim(at)

    def _claim(self, at):
        """Refuse to mix with the checkpoints of another training, or what load would refuse."""
        self._names = at.keys() if self._names is None else self._names
        if at.keys() != self._names:
            raise ValueError(f"the values {', '.join(at) or 'of no name'} go along, but at first they were "
                             f"{', '.join(self._names) or 'none'}: give load, step and save the same names")
        if not self._loaded:
            self._on_first("saving", self._folder.refuse_to_mix)
            self._loaded = True

    def _begin(self, at):
        """Copy the arrays, and let a thread write them."""
        self._publish()
        job = self._grid.again(self._prepare, plain("values of a checkpoint", at))
        job.start()
        self._job, self._begun, self._last = job, job.steps, monotonic()

    def _prepare(self, at):
        """What this rank has to write, and the folder to write it to."""
        grid, state, steps = self._grid, self._state, self.optimizer.steps
        grid.same("what is saved", (steps, state.next_step, at, self._settings))
        pieces = {} if state.alone else {"microbatches": self.model.microbatches, "lanes": grid.lanes}
        content = state.content() | {"settings": self._settings, "at": at,
                                     "grid": {"data": grid.data, "pipe": grid.pipe} | pieces}
        part = self._folder.part(steps)
        self._on_first(f"making {part}", self._folder.make, steps)
        arrays, rows = grid.together("copying the arrays", state.copies, grid.replica, grid.data)
        return Writing(part, content, grid.rank, grid.generation, arrays, rows)

    def _publish(self):
        """If something is being written: wait for it, and give it its name."""
        if self._job is None:
            return
        job, self._job = self._job, None
        try:
            if not self._grid.again(self._complete, job):
                self._begun = None
        except Exception:
            if self._grid.rank == 0:
                self._folder.drop(job.steps)
            raise

    def _complete(self, job):
        """Give it its name. False if ranks died since it was begun: what was written of it is then removed."""
        grid, what = self._grid, f"writing {self._folder.of(job.steps)}"
        # Its writers had other numbers then, and the share of the dead is missing.
        if job.generation != grid.generation:
            grid.together(what, job.wait)  # or a thread might write to the next one, which may have the same name
            self._on_first(what, self._folder.drop, job.steps)
            return False
        reports = [json.loads(text) for text in grid.texts(json.dumps(grid.together(what, job.report)))]
        self._on_first(what, lambda: self._folder.name(job.steps, job.manifest(reports, self._state.expected()), self._keep))
        return True

    def load(self, step=None, **at):
        """Fill model and optimizer from the newest checkpoint, if there is one.

        Everything is read and verified before anything is changed, which takes the memory of a second copy and of the
        largest file. Call it last, when the model, the optimizer and the step function are there; steps that were taken
        before (to load the kernels, say) then leave no trace. Without MPI dropout is told its step by the program: let it
        be ``optimizer.steps``.

        Parameters
        ----------
        step : int, optional
            An older checkpoint: that after so many steps of the optimizer.
        **at
            The values that :meth:`step` or :meth:`save` is given, as they are at the beginning.

        Returns
        -------
        dict
            The values that were saved; ``at`` itself if the folder holds no checkpoint.

        Raises
        ------
        ValueError, RankError
            The checkpoint is damaged (the message says which older one is whole), or of another model, optimizer or
            settings. Model and optimizer are as they were.
        """
        self.finish()
        at = plain("values of a checkpoint", at)
        self._names = at.keys()
        kept, staged = self._grid.again(self._read, step, at)
        self._loaded = True
        if kept is None:
            return at
        self._state.put(kept, staged)
        self._begun, self._last = None, monotonic()
        return kept.content["at"]

    def _read(self, step, at):
        """A verified Checkpoint that fits, and the vectors in it; or nothing, if there is none."""
        grid = self._grid
        grid.same("what is to be loaded", (step, at, self._settings))
        path = self._first("loading", self._folder.find, step)
        if not path:
            return None, None
        manifest = self._undamaged(path, lambda: "" if grid.rank else contents(os.path.join(path, MANIFEST)).decode("latin-1"))
        kept = self._undamaged(path, Checkpoint, path, grid.texts(manifest)[0].encode("latin-1"))
        grid.together(f"loading {path}", self._state.compare, kept, self._settings, at)
        return kept, self._undamaged(path, self._state.read, kept)

    def _undamaged(self, path, function, *args):
        """``function(*args)``; if that is a ValueError on any rank, all are told which older checkpoint is whole."""
        result, problem = None, ""
        try:
            result = function(*args)
        except ValueError as error:
            problem = str(error)
        if any(self._grid.texts(problem)):
            advice = self._first("loading", self._folder.advise, path)
            self._grid.together(f"loading {path}", _raise_if, problem and f"{problem}; {advice}")
        return result

    def _on_first(self, what, function, *args):
        """What ``function`` returns on rank 0, and nothing on the others, who raise its error too."""
        grid = self._grid
        return grid.again(lambda: grid.together(what, (lambda *_: "") if grid.rank else function, *args))

    def _first(self, what, function, *args):
        """The text that ``function`` returns on rank 0, on all ranks."""
        return self._grid.texts(self._on_first(what, function, *args))[0]


def _raise_if(problem):
    if problem:
        raise ValueError(problem)
