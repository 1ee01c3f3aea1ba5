"""The folder of a training's checkpoints: which there are, and how a new one gets its name.

::

    run/step_200/    whole: a folder gets this name when all of it is on the disk
    run/step_300/
    run/latest       the name of the one to go on from
    run/step_400.tmp/    being written; what a killed job leaves of it is removed when the next one saves
    run/step_300.old/    was whole under its old name; is there if the job was killed while another took its place

One process changes it, rank 0, and may be killed between any two operations of the disk: :meth:`Folder.find` then finds the
checkpoint before or the new one, and nothing between them.
"""

import contextlib
import os
import re
import shutil

from .checkpoint import MANIFEST, Checkpoint, contents


class Folder:
    """The checkpoints in a folder, by the steps after which they were saved.

    Parameters
    ----------
    path : str
        It need not exist yet.
    """

    def __init__(self, path):
        self.path = path

    def of(self, steps):
        """The path of the checkpoint after so many steps, whether it exists or not."""
        return self._in(f"step_{steps}")

    def part(self, steps):
        """The path of the same while it is written."""
        return f"{self.of(steps)}.tmp"

    def steps(self):
        """The steps of all checkpoints, in their order."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted({_number(name) for name in names if re.fullmatch(r"step_\d+(\.old)?", name)})

    def refuse_to_mix(self):
        """Raise a ValueError if there are checkpoints."""
        steps = self.steps()
        if steps:
            raise ValueError(f"{self.path} holds checkpoints, up to step {steps[-1]}: call load() to go on from there "
                             f"(fit: resume=True), or save to another folder")

    # --- Finding --------------------------------------------------------------------------------------------------

    def find(self, step=None):
        """The path of a checkpoint, by default that of the newest; "" if there is none.

        Raises
        ------
        ValueError
            There are others but not this one.
        """
        steps, pointer = self.steps(), self._in("latest")
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
            raise ValueError(f"{who}{self.path} holds no checkpoint {name[:100]!r}, {there}")
        return self._existing(int(name[5:]))

    def advise(self, path):
        """What to do if this checkpoint is damaged, as text: all older ones are read until one is whole."""
        damaged = _number(os.path.basename(path))
        for steps in reversed([steps for steps in self.steps() if steps < damaged]):
            try:
                Checkpoint(self._existing(steps)).verify()
            except ValueError:
                continue
            return f"step_{steps} is whole: load(step={steps}) goes on from there"
        return "no older checkpoint is whole: begin anew in another folder"

    # --- Changing -------------------------------------------------------------------------------------------------

    def make(self, steps):
        """An empty folder to write a checkpoint to; what a killed job has left is swept away."""
        if not os.path.isdir(self.path):
            os.makedirs(self.path)
            _sync(os.path.dirname(os.path.abspath(self.path)))
        for entry in os.scandir(self.path):
            left = re.fullmatch(r"(step_\d+)\.(tmp|old)", entry.name)
            if left and entry.is_dir(follow_symlinks=False) and (left[2] == "tmp" or os.path.isdir(self._in(left[1]))):
                shutil.rmtree(entry.path)
        os.mkdir(self.part(steps))

    def drop(self, steps):
        """Remove what was written of a checkpoint that will not be complete."""
        shutil.rmtree(self.part(steps), ignore_errors=True)

    def name(self, steps, manifest, keep):
        """Complete a checkpoint, all files of which are there, by its manifest; give it its name; and delete old ones.

        Parameters
        ----------
        steps : int
        manifest : bytes
        keep : int
            So many checkpoints stay, of those up to this one.

        Raises
        ------
        OSError
            The disk failed; all other checkpoints are as they were.
        """
        part, path, pointer = self.part(steps), self.of(steps), self._in("latest")
        old = f"{path}.old"
        try:
            _put(os.path.join(part, MANIFEST), manifest)
            _sync(part)
            _put(f"{pointer}.tmp", f"{os.path.basename(path)}\n".encode())
            if os.path.isdir(path):
                os.replace(path, old)  # where load looks for it, should this be the end
            os.replace(part, path)
            _sync(self.path)
            os.replace(f"{pointer}.tmp", pointer)
        except OSError:
            if not os.path.isdir(part):
                os.replace(path, part)
            if os.path.isdir(old) and not os.path.isdir(path):
                os.replace(old, path)
            if os.path.exists(f"{pointer}.tmp"):
                os.remove(f"{pointer}.tmp")
            raise
        _sync(self.path)
        self._prune(steps, keep)

    def _prune(self, newest, keep):
        shutil.rmtree(f"{self.of(newest)}.old", ignore_errors=True)
        for steps in [steps for steps in self.steps() if steps <= newest][:-keep]:
            with contextlib.suppress(OSError):
                os.replace(self._existing(steps), self.part(steps))  # half of it is never taken for a checkpoint
                shutil.rmtree(self.part(steps))

    def _in(self, name):
        return os.path.join(self.path, name)

    def _existing(self, steps):
        """The path of a checkpoint, which has another name if the job was killed while it was being replaced."""
        path = self.of(steps)
        return path if os.path.isdir(path) else f"{path}.old"


def _number(name):
    return int(re.match(r"step_(\d+)", name)[1])


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
