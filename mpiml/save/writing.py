"""A checkpoint on its way to the disk: each rank writes its file by itself, in a thread that knows nothing of MPI."""

import os
from concurrent.futures import ThreadPoolExecutor

from .checkpoint import seal
from .file import write


class Writing:
    """What one rank writes of a checkpoint.

    Parameters
    ----------
    part : str
        The folder to write to, which all ranks see.
    content : dict
        The manifest, but for the files and arrays, which are known when all ranks have written.
    rank, generation : int
        Of the grid, when the copies were made.
    arrays : {name: array}
        Copies, which the training does not change any more.
    rows : {name: (start, stop)}
        Which rows of the whole arrays these are.
    """

    def __init__(self, part, content, rank, generation, arrays, rows):
        self.part, self.content, self.generation = part, content, generation
        self.steps = content["step"]
        self._file, self._arrays, self._rows = os.path.join(part, _file(rank)), arrays, rows
        self._written = None

    def start(self):
        """Let a thread write."""
        pool = ThreadPoolExecutor(1)
        self._written = pool.submit(write, self._file, self._arrays)
        pool.shutdown(wait=False)
        self._arrays = None  # the thread holds the copies, and lets go of them

    def done(self):
        return self._written.done()

    def wait(self):
        """Return when the thread writes no more, whether it could or not."""
        self._written.exception()

    def report(self):
        """What rank 0 needs to know of this rank's file, when it is written: its size and SHA-256, and the rows in it.

        Raises
        ------
        OSError
            The thread could not write.
        """
        return [*self._written.result(), self._rows]

    def manifest(self, reports, expected):
        """The bytes of the manifest.

        Parameters
        ----------
        reports : list
            Of all ranks.
        expected : {name: (shape, dtype)}
            All arrays of the model and its optimizer.

        Raises
        ------
        FileNotFoundError
            What another rank has written is not seen here.
        """
        files = {_file(rank): {"bytes": size, "sha256": digest} for rank, (size, digest, _) in enumerate(reports)}
        arrays = {name: {"dtype": dtype.name, "shape": shape, "rows": []} for name, (shape, dtype) in expected.items()}
        for rank, (size, _, rows) in enumerate(reports):
            path = os.path.join(self.part, _file(rank))
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise FileNotFoundError(f"rank 0 does not see what rank {rank} wrote to {path}: the folder must be on a file "
                                        f"system that all nodes share")
            for name, (start, stop) in rows.items():
                arrays[name]["rows"].append([_file(rank), start, stop])
        return seal(self.content | {"files": files, "arrays": arrays})


def _file(rank):
    return f"{rank}.safetensors"
