"""The checkpoints of a training: written beside it, agreed by all ranks, and loaded to go on.

::

    run/step_200/    whole: a folder gets this name when all of it is on the disk
    run/step_300/
    run/latest       the name of the one to go on from
    run/step_400.tmp/    being written; what a killed job leaves of it is removed when the next one saves

Ranks write their files by themselves, each in a thread that knows nothing of MPI. All that the ranks do together
happens in the training's own thread, when a step asks for it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import numpy as np

from mpiml.nn import Module, Statistic

from .checkpoint import FORMAT, MANIFEST, Checkpoint, contents, seal, split
from .file import write
from .weights import misfits, refuse

STOPPED = 75  # EX_TEMPFAIL of <sysexits.h>: not done, start it again
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_SECONDS, _STEPS = 0.1, 100  # the ranks talk after so much time, and after so many steps at the latest


class _Asked:
    """What this process was asked by a signal, which belongs to no training in it."""

    signal = 0


def _ask(number, frame):
    _Asked.signal = number


class _Alone:
    """What a Grid offers, for one process without MPI."""

    rank = replica = 0
    size = data = pipe = 1
    generation = 0

    def texts(self, text):
        return [text]

    def same(self, what, value):
        pass

    def maximum(self, *numbers):
        return numbers

    def together(self, what, function, *args):
        return function(*args)


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
        self._grid = _Alone() if self.model.whole() is self.model else self.model.grid
        self._settings = _json("settings", settings or {})
        self._minutes, self._every, self._keep = minutes, every, keep
        self._loaded, self._names = False, None  # whether the folder is this training's, and what goes along
        self._job = None  # what is being written
        self._begun, self._last = None, monotonic()  # the step that was saved last, and when
        self._listening = False
        self._pace = self._left = 1  # steps from one talk to the next, and to the next one from here
        self._talked = monotonic()

    # --- Saving ---------------------------------------------------------------------------------------------------

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
        self._listen()
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
        self.finish()

    def finish(self):
        """Wait for the checkpoint that is being written, if there is one. Signals have their old meaning again."""
        try:
            self._publish()
        finally:
            if self._listening:
                self._listening = False
                for number in _SIGNALS:
                    if signal.getsignal(number) == _ask:
                        signal.signal(number, signal.SIG_DFL)
                asked = _Asked.signal
                _Asked.signal = 0
                if asked:
                    signal.raise_signal(asked)

    def _talk(self):
        """The ranks agree whether one was asked to stop, one is still writing, and it is time to save."""
        now = monotonic()
        late = self._minutes is not None and now - self._last >= 60 * self._minutes
        reach = int(self._pace * _SECONDS / max(now - self._talked, 1e-6))
        pace = 0 if self._grid.rank else max(1, min(reach, 2 * self._pace, _STEPS))
        writing = self._job is not None and not self._job["written"].done()
        asked, writing, late, self._pace = self._grid.maximum(_Asked.signal, writing, late, pace)
        self._left, self._talked = self._pace, monotonic()
        return asked, writing, late

    def _listen(self):
        if not self._listening and threading.current_thread() is threading.main_thread():
            self._listening = True
            for number in _SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:  # else somebody has other plans for it
                    signal.signal(number, _ask)

    def _stop(self, asked, at):
        if self._begun != self.optimizer.steps:
            self._begin(at)
        _Asked.signal = 0
        self.finish()
        if self._grid.rank == 0:
            sys.stderr.write(f"mpiml: {signal.Signals(asked).name}: saved {self._path(self._begun)}; exit status {STOPPED}\n")
            sys.stderr.flush()
        raise SystemExit(STOPPED)

    def _claim(self, at):
        """Refuse to mix with the checkpoints of another training, or what load would refuse."""
        self._names = at.keys() if self._names is None else self._names
        if at.keys() != self._names:
            raise ValueError(f"the values {', '.join(at) or 'of no name'} go along, but at first they were "
                             f"{', '.join(self._names) or 'none'}: give load, step and save the same names")
        if not self._loaded:
            self._on_first("saving", self._refuse_to_mix)
            self._loaded = True

    def _refuse_to_mix(self):
        steps = self._steps()
        if steps:
            raise ValueError(f"{self.folder} holds checkpoints, up to step {steps[-1]}: call load() to go on from there, or "
                             f"save to another folder")

    def _begin(self, at):
        """Copy the arrays, and let a thread write them."""
        self._publish()
        grid, steps = self._grid, self.optimizer.steps
        next_step = steps if isinstance(grid, _Alone) else self.model.steps
        at = _json("values", at)
        grid.same("what is saved", (steps, next_step, at, self._settings))
        pieces = {} if isinstance(grid, _Alone) else {"microbatches": self.model.microbatches, "lanes": grid.lanes}
        content = {"format": FORMAT, "step": steps, "next_step": next_step, "seed": int(self._modules()[0].place[0]),
                   "optimizer": type(self.optimizer).__name__, "settings": self._settings, "at": at,
                   "grid": {"data": grid.data, "pipe": grid.pipe} | pieces}
        part = f"{self._path(steps)}.tmp"
        self._on_first(f"making {part}", self._make, part)
        arrays, rows = grid.together("copying the arrays", self._copies)
        pool = ThreadPoolExecutor(1)
        written = pool.submit(write, os.path.join(part, f"{grid.rank}.safetensors"), arrays)
        pool.shutdown(wait=False)
        self._job = {"steps": steps, "part": part, "content": content, "rows": rows, "written": written,
                     "generation": grid.generation}
        self._begun, self._last = steps, monotonic()

    def _modules(self):
        """The layers of this rank, which know the model's seed."""
        return list(self.model.named(Module).values())

    def _vectors(self):
        """{suffix of the names: flat vector} of all that is kept."""
        return {"": self.model.vector} | {f"/{name}": getattr(self.optimizer, name) for name in self.optimizer.moments}

    def _expected(self):
        """{name: (shape, dtype)} of all arrays in a checkpoint of the whole model."""
        parameters = self.model.whole().named().items()
        return {name + suffix: (p.shape, vector.dtype) for suffix, vector in self._vectors().items()
                for name, p in parameters if not (suffix and isinstance(p, Statistic))}

    def _copies(self):
        """This rank's share of the arrays of its stage, and which rows these are."""
        shapes = {name: p.shape for name, p in self.model.named().items()}
        mine = split(shapes, self._grid.replica, self._grid.data)
        arrays, rows = {}, {}
        for suffix, vector in self._vectors().items():
            for name, view in self.model.views(vector).items():
                start, stop = mine[name]
                if start < stop:
                    arrays[name + suffix] = np.array(np.atleast_1d(view)[start:stop], order="K")
                    rows[name + suffix] = start, stop
        return arrays, rows

    def _make(self, part):
        """An empty folder ``part``; what a killed job has left is swept away."""
        if not os.path.isdir(self.folder):
            os.makedirs(self.folder)
            _sync(os.path.dirname(os.path.abspath(self.folder)))
        for entry in os.scandir(self.folder):
            left = re.fullmatch(r"(step_\d+)\.(tmp|old)", entry.name)
            if left and entry.is_dir(follow_symlinks=False) and (left[2] == "tmp" or os.path.isdir(self._in(left[1]))):
                shutil.rmtree(entry.path)
        os.mkdir(part)

    def _publish(self):
        """If something is being written: wait for it, and give it its name."""
        if self._job is None:
            return
        job, self._job = self._job, None
        grid, path = self._grid, self._path(job["steps"])
        if job["generation"] != grid.generation:  # it was being written by ranks that died
            if grid.rank == 0:
                shutil.rmtree(job["part"], ignore_errors=True)
            self._begun = None
            return
        try:
            size, digest = grid.together(f"writing {path}", job["written"].result)
            reports = grid.texts(json.dumps([size, digest, job["rows"]]))
            self._on_first(f"writing {path}", self._name, job, [json.loads(text) for text in reports])
        except Exception:
            if grid.rank == 0:
                shutil.rmtree(job["part"], ignore_errors=True)
            raise

    def _name(self, job, reports):
        """Complete what all ranks have written, and give it its name."""
        part, path = job["part"], self._path(job["steps"])
        content = job["content"]
        content["files"] = {f"{rank}.safetensors": {"bytes": size, "sha256": digest}
                            for rank, (size, digest, _) in enumerate(reports)}
        content["arrays"] = {name: {"dtype": dtype.name, "shape": shape, "rows": []}
                             for name, (shape, dtype) in self._expected().items()}
        for rank, (size, _, rows) in enumerate(reports):
            file = os.path.join(part, f"{rank}.safetensors")
            if not os.path.isfile(file) or os.path.getsize(file) != size:
                raise FileNotFoundError(f"rank 0 does not see what rank {rank} wrote to {file}: the folder must be on a file "
                                        f"system that all nodes share")
            for name, (start, stop) in rows.items():
                content["arrays"][name]["rows"].append([f"{rank}.safetensors", start, stop])
        pointer, old = self._in("latest"), f"{path}.old"
        try:
            _put(os.path.join(part, MANIFEST), seal(content))
            _sync(part)
            _put(f"{pointer}.tmp", f"{os.path.basename(path)}\n".encode())
            if os.path.isdir(path):
                os.replace(path, old)  # where load looks for it, should this be the end
            os.replace(part, path)
            _sync(self.folder)
            os.replace(f"{pointer}.tmp", pointer)
        except OSError:
            if not os.path.isdir(part):
                os.replace(path, part)
            if os.path.isdir(old) and not os.path.isdir(path):
                os.replace(old, path)
            if os.path.exists(f"{pointer}.tmp"):
                os.remove(f"{pointer}.tmp")
            raise
        _sync(self.folder)
        self._prune(job["steps"])

    def _prune(self, newest):
        shutil.rmtree(f"{self._path(newest)}.old", ignore_errors=True)
        for steps in [steps for steps in self._steps() if steps <= newest][:-self._keep]:
            with contextlib.suppress(OSError):
                os.replace(self._existing(steps), f"{self._path(steps)}.tmp")  # half of it is never taken for a checkpoint
                shutil.rmtree(f"{self._path(steps)}.tmp")

    # --- Loading --------------------------------------------------------------------------------------------------

    def load(self, step=None, **at):
        """Fill model and optimizer from the newest checkpoint, if there is one.

        Everything is read and verified before anything is changed, which takes the memory of a second copy and of the
        largest file. Call it last, when the model, the optimizer and the
        step function are there; steps that were taken before (to load the kernels, say) then leave no trace. Without MPI
        dropout is told its step by the program: let it be ``optimizer.steps``.

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
        grid, at = self._grid, _json("values", at)
        self._names = at.keys()
        grid.same("what is to be loaded", (step, at, self._settings))
        name = self._first("loading", self._find, step)
        if not name:
            self._loaded = True
            return at
        path = self._in(name)
        manifest = self._undamaged(path, lambda: "" if grid.rank else contents(os.path.join(path, MANIFEST)).decode("latin-1"))
        kept = self._undamaged(path, Checkpoint, path, grid.texts(manifest)[0].encode("latin-1"))
        grid.together(f"loading {path}", self._compare, kept, at)
        vectors = self._vectors()
        staged = {suffix: np.empty_like(vector) for suffix, vector in vectors.items()}
        targets = {name + suffix: view for suffix, vector in staged.items() for name, view in self.model.views(vector).items()}
        self._undamaged(path, kept.fill, targets)
        for suffix, vector in vectors.items():
            vector[...] = staged[suffix]
        self.model.gradient[...] = 0
        for module in self._modules():
            module.place = kept.content["seed"], module.place[1]
        self.optimizer.steps = kept.content["step"]
        if not isinstance(grid, _Alone):
            self.model.steps = kept.content["next_step"]
        self._loaded, self._begun, self._last = True, None, monotonic()
        return kept.content["at"]

    def _find(self, step):
        """The name of a folder with a checkpoint, or nothing if there is none."""
        steps, pointer = self._steps(), self._in("latest")
        if step is not None:
            name = f"step_{step}"
        elif os.path.lexists(pointer):
            name = contents(pointer).decode(errors="replace").removesuffix("\n")
        elif steps:
            name = f"step_{steps[-1]}"  # the job was killed before it could say so
        else:
            return ""
        if not re.fullmatch(r"step_\d+", name) or int(name[5:]) not in steps:
            who = "" if step is not None else f"{pointer} names {name[:100]!r}, but "
            there = f"only those of the steps {', '.join(map(str, steps))}: load(step={steps[-1]})" if steps else "none at all"
            raise ValueError(f"{who}{self.folder} holds no checkpoint {name[:100]!r}, {there}")
        return os.path.basename(self._existing(int(name[5:])))

    def _compare(self, kept, at):
        """Raise a ValueError if this is a checkpoint of something else."""
        content = kept.content
        kind = type(self.optimizer).__name__
        if content["optimizer"] != kind:
            raise ValueError(f"{kept.folder} was saved with {content['optimizer']} and cannot go on with {kind}: use the same "
                             f"optimizer, or take the weights alone: mpiml.save.load(model, {kept.folder!r})")
        old, new = content["settings"], self._settings
        changed = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in [*old, *(new.keys() - old)]
                   if key not in old or key not in new or old[key] != new[key]]
        if changed:
            raise ValueError(f"{kept.folder} was saved with other settings: {'; '.join(changed)}: go on with the same ones, or "
                             f"begin in another folder")
        if content["at"].keys() != at.keys():
            raise ValueError(f"{kept.folder} holds the values {', '.join(content['at']) or 'of no name'}, but load was asked "
                             f"for {', '.join(at) or 'none'}: give load the names that step and save are given")
        expected = self._expected()
        shapes = {name: shape for name, (shape, _) in expected.items()}
        problems = misfits(shapes, shapes, kept.shapes)
        problems += [f"{name} is of {kept.dtypes[name]} instead of {dtype}" for name, (_, dtype) in expected.items()
                     if name in kept.dtypes and kept.dtypes[name] != dtype]
        refuse(kept.folder, problems)

    def _undamaged(self, path, function, *args):
        """``function(*args)``; if that is a ValueError on any rank, all are told which older checkpoint is whole."""
        result, problem = None, ""
        try:
            result = function(*args)
        except ValueError as error:
            problem = str(error)
        if any(self._grid.texts(problem)):
            advice = self._first("loading", self._advise, path)
            self._grid.together(f"loading {path}", _raise_damage, problem, advice)
        return result

    def _advise(self, path):
        damaged = _number(os.path.basename(path))
        for steps in reversed([steps for steps in self._steps() if steps < damaged]):
            try:
                Checkpoint(self._existing(steps)).verify()
            except ValueError:
                continue
            return f"step_{steps} is whole: load(step={steps}) goes on from there"
        return "no older checkpoint is whole: begin anew in another folder"

    # --- The folder -----------------------------------------------------------------------------------------------

    def _in(self, name):
        return os.path.join(self.folder, name)

    def _path(self, steps):
        return self._in(f"step_{steps}")

    def _existing(self, steps):
        """The path of a checkpoint, which has another name if the job was killed while it was being replaced."""
        path = self._path(steps)
        return path if os.path.isdir(path) else f"{path}.old"

    def _steps(self):
        """The steps of all checkpoints, in their order."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted({_number(name) for name in names if re.fullmatch(r"step_\d+(\.old)?", name)})

    def _on_first(self, what, function, *args):
        """What ``function`` returns on rank 0, and nothing on the others, who raise its error too."""
        return self._grid.together(what, (lambda *_: "") if self._grid.rank else function, *args)

    def _first(self, what, function, *args):
        """The text that ``function`` returns on rank 0, on all ranks."""
        return self._grid.texts(self._on_first(what, function, *args))[0]


def _number(name):
    return int(re.match(r"step_(\d+)", name)[1])


def _raise_damage(problem, advice):
    if problem:
        raise ValueError(f"{problem}; {advice}")


def _json(what, values):
    """A copy of ``values`` as JSON carries them."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} of a checkpoint are text, finite numbers, lists and dicts of these: {error}") from error


def _put(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder):
    """Let the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
