"""What a checkpoint holds of a training: the model's and the optimizer's arrays and numbers, taken out and put back."""

import numpy as np

from mpiml.nn import Module, Statistic

from .checkpoint import FORMAT, split
from .weights import misfits, refuse


class State:
    """The state of an optimizer and its model; of what this rank holds of it, on a grid.

    Parameters
    ----------
    optimizer : mpiml.optim.Optimizer
    """

    def __init__(self, optimizer):
        self.optimizer, self.model = optimizer, optimizer.model
        self.alone = self.model.whole() is self.model  # without MPI

    @property
    def next_step(self):
        """The number that dropout depends on next."""
        return self.optimizer.steps if self.alone else self.model.steps

    def content(self):
        """What of it goes into the manifest."""
        return {"format": FORMAT, "step": self.optimizer.steps, "next_step": self.next_step,
                "seed": int(self._modules()[0].place[0]), "optimizer": type(self.optimizer).__name__}

    def _modules(self):
        """The layers of this rank, which know the model's seed."""
        return list(self.model.named(Module).values())

    def vectors(self):
        """{suffix of the names: flat vector} of all that is kept."""
        return {"": self.model.vector} | {f"/{name}": getattr(self.optimizer, name) for name in self.optimizer.moments}

    def expected(self):
        """{name: (shape, dtype)} of all arrays in a checkpoint of the whole model."""
        parameters = self.model.whole().named().items()
        return {name + suffix: (p.shape, vector.dtype) for suffix, vector in self.vectors().items()
                for name, p in parameters if not (suffix and isinstance(p, Statistic))}

    def copies(self, writer, writers):
        """One writer's share of the arrays of its stage, and which rows these are."""
        shapes = {name: p.shape for name, p in self.model.named().items()}
        mine = split(shapes, writer, writers)
        arrays, rows = {}, {}
        for suffix, vector in self.vectors().items():
            for name, view in self.model.views(vector).items():
                start, stop = mine[name]
                if start < stop:
                    arrays[name + suffix] = np.array(np.atleast_1d(view)[start:stop], order="K")
                    rows[name + suffix] = start, stop
        return arrays, rows

    def compare(self, kept, settings, at):
        """Raise a ValueError if ``kept``, a Checkpoint, is one of something else."""
        content = kept.content
        kind = type(self.optimizer).__name__
        if content["optimizer"] != kind:
            raise ValueError(f"{kept.folder} was saved with {content['optimizer']} and cannot go on with {kind}: use the same "
                             f"optimizer, or take the weights alone: mpiml.save.load(model, {kept.folder!r})")
        old = content["settings"]
        changed = [f"{key} was {old.get(key)!r} and is {settings.get(key)!r}" for key in [*old, *(settings.keys() - old)]
                   if key not in old or key not in settings or old[key] != settings[key]]
        if changed:
            raise ValueError(f"{kept.folder} was saved with other settings: {'; '.join(changed)}: go on with the same ones, or "
                             f"begin in another folder")
        if content["at"].keys() != at.keys():
            raise ValueError(f"{kept.folder} holds the values {', '.join(content['at']) or 'of no name'}, but load was asked "
                             f"for {', '.join(at) or 'none'}: give load the names that step and save are given")
        expected = self.expected()
        shapes = {name: shape for name, (shape, _) in expected.items()}
        problems = misfits(shapes, shapes, kept.shapes)
        problems += [f"{name} is of {kept.dtypes[name]} instead of {dtype}" for name, (_, dtype) in expected.items()
                     if name in kept.dtypes and kept.dtypes[name] != dtype]
        refuse(kept.folder, problems)

    def read(self, kept):
        """The vectors out of a Checkpoint, {suffix: flat vector}, which :meth:`put` puts in their place."""
        staged = {suffix: np.empty_like(vector) for suffix, vector in self.vectors().items()}
        kept.fill({name + suffix: view for suffix, vector in staged.items() for name, view in self.model.views(vector).items()})
        return staged

    def put(self, kept, staged):
        """Go on from a Checkpoint and the vectors read out of it; nothing can fail here."""
        for suffix, vector in self.vectors().items():
            vector[...] = staged[suffix]
        self.model.gradient[...] = 0
        for module in self._modules():
            module.place = kept.content["seed"], module.place[1]
        self.optimizer.steps = kept.content["step"]
        if not self.alone:
            self.model.steps = kept.content["next_step"]
