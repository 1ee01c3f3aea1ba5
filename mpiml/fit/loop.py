"""The training loop."""

import contextlib
from time import perf_counter

import numpy as np

from mpiml.balance import imbalance
from mpiml.data.batches import batches
from mpiml.lanes import samples_together
from mpiml.optim import clip_norm
from mpiml.parallel import RanksLost, Watch, evaluate, gradient, progress

from .log import Log, finite
from .training import Training


def fit(model, loss, data, grid, optimizer, *, batch, epochs, seed=0, validation=None, metrics=None, transform=None,
        augment=None, ahead=0, microbatches=None, replay=False, clip=None, callbacks=(), watch=None, run=None, resume=False,
        settings=None, minutes=10.0, every=None, say=print):
    """Train a model, on any grid; to be called on all ranks together.

    Parameters
    ----------
    model : mpiml.parallel.Part
        What :func:`mpiml.parallel.place` returned.
    loss : function of (output, target)
        Returns the *sum* over the samples, such as :func:`mpiml.ops.cross_entropy`.
    data : (x, y)
        See :class:`mpiml.data.batches`.
    grid : mpiml.parallel.Grid
    optimizer : mpiml.optim.Optimizer
        Of the model; its learning rate may be a schedule.
    batch : int
        Samples in a step, over all ranks together.
    epochs : int
        Passes over the data, those before a resumption included.
    seed : int
        Of the shuffles.
    validation : (x, y), optional
        Evaluated after each epoch.
    metrics : {name: function of (output, target)}, optional
        Evaluated on the validation data beside the loss; each a sum over the samples, such as
        :func:`mpiml.metrics.correct`.
    transform : function of an array, optional
        Applied to each share of x, in training and validation.
    augment : function of (array, samples, epoch), optional
        Applied in training alone, before ``transform``; see :class:`mpiml.data.batches`.
    ahead : int
        So many batches are read ahead in a thread; see :class:`mpiml.data.batches`.
    microbatches : int, optional
        See :func:`mpiml.parallel.gradient`.
    replay : bool
        See :func:`mpiml.parallel.gradient`.
    clip : float, optional
        Clip the norm of the gradient to this, see :func:`mpiml.optim.clip_norm`.
    callbacks : list of functions of a Training
        Called after each epoch, in order; see :class:`mpiml.fit.Training`.
    watch : mpiml.parallel.Watch, optional
        Is started anew at each epoch; give one to ask it for more at the end.
    run : str or path, optional
        A folder for the log, the timeline of a step and the checkpoints of this run; ``python -m mpiml report`` draws it.
    resume : bool or int
        True: go on from the newest checkpoint in the folder, if there is one; a number: from that after so many steps. Without
        it, a folder with checkpoints is refused.
    settings : dict, optional
        What else must not change from a checkpoint to its resumption, beside batch, seed and lanes.
    minutes, every : float or None, int or None
        See :class:`mpiml.save.Checkpoints`. There is always one at the end.
    say : function of a text, or None
        Is told, on rank 0, what each epoch came to.

    Returns
    -------
    list of dict
        The history, see :class:`mpiml.fit.Training`; the same on all ranks.

    Raises
    ------
    ValueError, RankError
        As from :class:`mpiml.data.batches`, :func:`mpiml.parallel.gradient`, :func:`mpiml.parallel.evaluate` and
        :class:`mpiml.save.Checkpoints`.
    """
    if not isinstance(epochs, (int, np.integer)) or epochs < 1:
        raise ValueError(f"epochs is a whole number above 0, not {epochs!r}")
    if run is None and (resume or every):
        raise ValueError("resume and every are about checkpoints, which need a folder: give run=FOLDER")
    for name, pair in ("data", data), ("validation", (0, 0) if validation is None else validation):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{name} is a pair, (x, y), not {type(pair).__name__} of length {len(pair)}")
    if optimizer.model is not model:
        raise ValueError("the optimizer is one of another model: make it of what place(model, grid) returned, which is what "
                         "fit trains")
    _check_monitors(callbacks, validation, metrics)
    training = Training(model, grid, optimizer, run and str(run))
    history, kept = training.history, []  # kept: the history as JSON can carry it
    watch = watch or Watch()
    step = gradient(model, loss, grid, microbatches, watch=watch, replay=replay)
    multiple = samples_together(model.whole(), grid.lanes or grid.data * model.microbatches)

    def shares(epoch, start=0):
        return batches(*data, batch, epoch=epoch, seed=seed, grid=grid, multiple=multiple, transform=transform,
                       augment=augment, start=start, ahead=ahead)

    _load_kernels(model, step, shares(0))
    if validation:
        first_of_validation = [part[:batch] for part in validation]  # what does not fit is seen now, not after an epoch
        evaluate(model, *first_of_validation, {"loss": loss} | (metrics or {}), grid, transform=transform)
    length, total = len(shares(0)), 0.0
    checkpoints = None
    if run is not None:
        from mpiml.save import Checkpoints
        checkpoints = Checkpoints(run, optimizer, {"batch": batch, "seed": seed, "lanes": grid.lanes} | (settings or {}),
                                  minutes=minutes, every=every)
        if not resume:
            checkpoints.claim(total=total, history=kept)
        else:
            at = checkpoints.load(None if resume is True else resume, total=total, history=kept)
            total, kept = at["total"], at["history"]
            history[:] = [{name: float(value) if isinstance(value, str) else value for name, value in epoch.items()}
                          for epoch in kept]
            if optimizer.steps and say and grid.rank == 0:
                say(f"{optimizer.steps} of {epochs * length} steps are done" if optimizer.steps < epochs * length else
                    f"{optimizer.steps} steps are done: nothing is left of {epochs} epochs")
    uneven = None  # which ranks keep the others waiting
    log = grid.together(f"opening the log in {run}", Log, run, grid, resume)
    try:
        log.run(grid, batch, len(data[0]), sum(p.size for p in model.whole().named().values()))
        stop = _stop(training, callbacks) if history and optimizer.steps % length == 0 else None
        for epoch in range(optimizer.steps // length, epochs):
            if stop:
                break
            done = optimizer.steps % length
            watch.restart()
            log.pause()
            begin = perf_counter()
            share = shares(epoch, done)
            for x, y in progress(share, grid, f"epoch {epoch + 1}"):
                try:
                    mean = step(x, y)
                except RanksLost:  # the same batch comes again
                    watch.restart()
                    continue
                if clip:
                    clip_norm(model, clip)
                optimizer.step()
                total += mean
                log.step(optimizer.steps, epoch + 1, mean, optimizer.lr(optimizer.steps - 1), batch)
                if checkpoints and optimizer.steps % length:
                    checkpoints.step(total=total, history=kept)
            microseconds, = grid.maximum(int(1e6 * (perf_counter() - begin)))
            times = grid.again(watch.times, grid)
            history.append({"epoch": epoch + 1, "step": optimizer.steps, "loss": total / length})
            if validation:
                found = evaluate(model, *validation, {"loss": loss} | (metrics or {}), grid, transform=transform)
                history[-1] |= {f"validation {name}": value for name, value in found.items()}
            history[-1] |= {"lr": float(optimizer.lr(optimizer.steps - 1)), "seconds": microseconds / 1e6,
                            "samples/s": len(data[0]) * len(share) / length / (microseconds / 1e6)}
            kept.append(finite(history[-1]))
            total = 0.0
            log.epoch(history[-1], times)
            if say and grid.rank == 0:
                say(line(history[-1]))
                if not uneven and (uneven := imbalance(times["compute"])):
                    say(f"uneven load: {uneven}")
            stop = _stop(training, callbacks)
            if checkpoints:
                checkpoints.step(total=total, history=kept)
        if stop and say and grid.rank == 0:
            say(f"stopped: {stop}")
        if checkpoints:
            checkpoints.save(total=total, history=kept)
        with contextlib.suppress(ValueError):  # replica 0 has had no samples, or nothing was left to train
            log.timeline(grid.again(watch.timeline, grid))
        for callback in callbacks:
            if hasattr(callback, "end"):
                callback.end(training)
        log.end(stop or "all epochs are done")
    except SystemExit:
        log.end("stopped by a signal")
        raise
    except BaseException as error:
        log.end(f"{type(error).__name__}: {error}")
        raise
    return history


def _load_kernels(model, step, share):
    """Take a step and forget it: kernels are loaded or compiled at their first use, which is not training's time."""
    number = model.steps
    for x, y in share:
        try:
            step(x, y)
            break
        except RanksLost:
            continue
    model.steps, model.gradient[...] = number, 0


def _check_monitors(callbacks, validation, metrics):
    """Refuse at once what would be refused after the first epoch, perhaps hours later."""
    known = ["loss", "lr", "samples/s", "seconds"]
    if validation:
        known += [f"validation {name}" for name in ("loss", *(metrics or {}))]
    for callback in callbacks:
        if isinstance(callback, type):
            raise ValueError(f"a callback is a function or an object: {callback.__name__}(), not {callback.__name__}")
        monitor = getattr(callback, "monitor", known[0])
        if monitor not in known:
            raise ValueError(f"{type(callback).__name__} looks at {monitor!r}, but the history will have "
                             f"{', '.join(map(repr, known))}: for a validation loss or metric call fit(..., validation=(x, y), "
                             f"metrics=...)")


def _stop(training, callbacks):
    """Why the callbacks want to stop, or None."""
    reasons = [reason for callback in callbacks if (reason := callback(training))]
    training.grid.same("what the callbacks return", reasons)
    return reasons[0] if reasons else None


def line(epoch):
    """What an epoch came to, in a line of text.

    >>> line({"epoch": 2, "step": 20, "loss": 0.5, "validation accuracy": 0.75, "lr": 1e-3, "samples/s": 12345.6})
    'epoch 2: loss 0.500000, validation accuracy 0.7500, 12,346 samples/s'
    """
    values = [f"{name} {epoch[name]:.{6 if name == 'loss' else 4}f}" for name in epoch
              if name == "loss" or name.startswith("validation ")]
    return f"epoch {epoch['epoch']}: {', '.join(values)}, {epoch['samples/s']:,.0f} samples/s"
