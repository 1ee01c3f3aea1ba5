"""The log of a run: a line of JSON for every event, in its folder."""

import json
import math
import os
import sys
from pathlib import Path
from time import monotonic, time

import numpy as np

from mpiml import __version__

NAME, TIMELINE = "log.jsonl", "timeline.json"
_SECONDS = 0.1  # from one note of a step to the next


class Log:
    """Writes ``log.jsonl`` in a folder; on ranks other than 0, and without a folder, it writes nothing.

    Every line is an object with a "kind":

    run
        At the start, and again when a run goes on: "version", "ranks", "data", "pipe", "lanes", "batch", "samples" (of the
        training set), "parameters", "time" (seconds since 1970), "argv".
    step
        About ten a second: "step", "epoch", "loss", "lr", "samples/s", "seconds" (since the start of this part of the run).
    epoch
        What the history has of it, and "ranks": {"compute", "communicate", "wait", "other"}, each a list of seconds with an
        element for each rank.
    end
        "reason".

    Numbers that are not finite are the strings "nan", "inf" and "-inf", as JSON has none.
    """

    def __init__(self, folder, grid, resume):
        self._file = None
        self._begun = self._noted = monotonic()
        if folder and grid.rank == 0:
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, NAME)
            if not resume and os.path.exists(path) and '{"kind": "epoch"' in Path(path).read_text(encoding="utf-8"):
                raise ValueError(f"{path} is the log of another run: go on with that one (fit: resume=True), or begin in "
                                 f"another folder")
            self._file = open(path, "a", encoding="utf-8")
            if self._file.tell() and not _ends_a_line(self._file.name):
                self._file.write("\n")  # whoever wrote it was killed

    def run(self, grid, batch, samples, parameters):
        """Note what is about to run."""
        self._write("run", version=__version__, ranks=grid.size, data=grid.data, pipe=grid.pipe, lanes=grid.lanes,
                    batch=batch, samples=samples, parameters=parameters, time=time(), argv=sys.argv)

    def step(self, step, epoch, loss, lr, samples):
        """Note a step, if the last note is long enough ago; ``samples`` is the size of its batch."""
        now = monotonic()
        if self._file and now - self._noted >= _SECONDS:
            rate = (self._samples + samples) / (now - self._noted)
            self._write("step", step=step, epoch=epoch, loss=loss, lr=lr, seconds=now - self._begun, **{"samples/s": rate})
            self._noted, self._samples = now, 0
        else:
            self._samples += samples

    def pause(self):
        """The time until the next step is not that step's."""
        self._noted, self._samples = monotonic(), 0

    def epoch(self, epoch, times):
        """Note the end of an epoch, and what the ranks did in it."""
        self._write("epoch", **epoch, ranks={name: np.round(seconds, 6).tolist() for name, seconds in times.items()})

    def end(self, reason):
        """Note the end of the run."""
        self._write("end", reason=reason)
        if self._file:
            self._file.close()
            self._file = None

    def timeline(self, timeline):
        """Keep a measured step, for the report."""
        if self._file:
            spans = [[[type(action).__name__, action.microbatch, action.chunk, start, end] for action, start, end in stage]
                     for stage in timeline.spans]
            with open(os.path.join(os.path.dirname(self._file.name), TIMELINE), "w", encoding="utf-8") as file:
                json.dump({"unit": "s", "spans": spans}, file)

    def _write(self, kind, **values):
        if self._file:
            self._file.write(json.dumps({"kind": kind} | finite(values)) + "\n")
            self._file.flush()


def finite(values):
    """{name: value} with "nan", "inf" and "-inf" for such numbers, which ``float`` reads."""
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}


def _ends_a_line(path):
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
