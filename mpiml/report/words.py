"""What there is to say of a run, and saying it in the terminal."""

import math
import shlex
from datetime import datetime

import numpy as np

from mpiml.balance import imbalance

from .log import SHARES

_NO_METRICS = ("kind", "epoch", "step", "lr", "samples/s", "seconds", "ranks")
_LESS_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "rmse")


def metrics(run):
    """The names of what its epochs came to, such as "loss" and "validation accuracy", in the order of the log."""
    return list(dict.fromkeys(name for epoch in run.epochs for name in epoch if name not in _NO_METRICS))


def number(value):
    """A number as people write it: 12,345 or 0.01235."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def column(values):
    """The numbers of a column, with as many decimals each; four digits of the largest, if they are of one size.

    >>> column([0.5, 12.25, math.nan])
    ['0.50', '12.25', 'nan']
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    if not sizes or all(size == int(size) for size in sizes) or max(sizes) > 1000 * min(sizes):
        return [number(value) for value in values]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes))))
    return [f"{value:,.{decimals}f}" for value in values]


def duration(seconds):
    """A time as people say it: 0.35 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def moment(seconds):
    """A time since 1970 as a date and time of day, here."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def facts(run):
    """{what: text} about a run: what it trains on what, when, with which command, and how it ended."""
    if not run.starts:
        return {"state": state(run)}
    last, found = run.starts[-1], {}
    ranks = [number(start.get("ranks", "?")) for start in run.starts]
    found["ranks"] = ", then ".join(rank for i, rank in enumerate(ranks) if i == 0 or rank != ranks[i - 1])
    if _stages(run) > 1:
        found["grid"] = f"{last.get('data')} x {last['pipe']}: replicas x stages of the pipeline"
    if last.get("lanes"):
        found["lanes"] = number(last["lanes"])
    found |= {name: number(last[name]) for name in ("batch", "samples", "parameters") if last.get(name) is not None}
    if run.epochs or run.steps["step"].size:
        found["steps"] = number(max([*run.steps["step"][-1:].astype(int).tolist(), *(e["step"] for e in run.epochs[-1:])]))
    rates = {value for value in [*run.steps["lr"].tolist(), *(epoch.get("lr", math.nan) for epoch in run.epochs)]
             if math.isfinite(value)}
    if len(rates) == 1:
        found["learning rate"] = f"{number(rates.pop())}, constant"
    if math.isfinite(run.starts[0]["time"]):
        found["started"] = moment(run.starts[0]["time"])
    if len(run.starts) > 1:
        again = f", last {moment(last['time'])}" if math.isfinite(last["time"]) else ""
        found["went on"] = f"{len(run.starts) - 1} time{'s' * (len(run.starts) > 2)}{again}"
    if run.epochs:
        found["time in steps"] = duration(sum(epoch.get("seconds", 0.0) for epoch in run.epochs))
    found["state"] = state(run)
    if last.get("version"):
        found["mpiml"] = str(last["version"])
    if isinstance(last.get("argv"), list):
        found["command"] = shlex.join(map(str, last["argv"]))
    return found


def _stages(run):
    stages = run.starts[-1].get("pipe")
    return stages if isinstance(stages, int) else 1


def state(run):
    """How a run ended, or that it has not."""
    if not run.starts:
        return "nothing has been logged yet"
    if run.end is not None:
        return f"ended: {run.end}"
    return f"still running, or killed: its log was last written {moment(run.written)}"


def higher_is_better(name):
    """Whether higher values of a metric are better, as of an accuracy; judged by its name."""
    return not set(name.replace("_", " ").lower().split()) & set(_LESS_IS_BETTER)


def best(run, name):
    """The epoch with the best finite value of a metric, the first of equals; None if there is none."""
    found = [epoch for epoch in run.epochs if math.isfinite(epoch.get(name, math.nan))]
    return min(found, key=lambda epoch: epoch[name] * (-1 if higher_is_better(name) else 1), default=None)


def shares(run):
    """{"compute", "communicate", "wait", "other": (ranks,) seconds}: of the last epochs with as many ranks; or {}."""
    total = {}
    for epoch in reversed(run.epochs):
        ranks = epoch["ranks"]
        if not ranks or (total and ranks["compute"].size != total["compute"].size):
            break
        total = {name: total.get(name, 0.0) + np.maximum(ranks[name], 0.0) for name in SHARES}
    return total


def remarks(run):
    """Sentences about what to look at: ranks that are slow, losses that are not finite, lines that are missing."""
    found = []
    times = shares(run)
    if times:
        last = run.epochs[-1]["ranks"]
        slow, lately = imbalance(times["compute"]), imbalance(last["compute"])
        if slow or lately:
            advice = ("place(..., balance=profile(...)) cuts a pipeline by measured time" if _stages(run) > 1
                      else "look for another program on its node, slower cores, or more of the batch")
            found.append(f"{slow or f'in the last epoch {lately}'} ({advice}).")
    bad = ~np.isfinite(run.steps["loss"])
    if bad.any():
        found.append(f"The loss was not finite in {bad.sum()} of {bad.size} noted steps, first in step "
                     f"{run.steps['step'][bad.argmax()]:.0f}.")
    if run.cut:
        found.append(f"{run.cut} line{'s' * (run.cut > 1)} of the log {'are' if run.cut > 1 else 'is'} cut off: the writer was "
                     f"killed there{'' if run.end else ', or is just writing'}.")
    return [remark[0].upper() + remark[1:] for remark in found]


def spent(run):
    """What all ranks together spent their time on, in words; "" if that is not known."""
    times = {name: seconds.sum() for name, seconds in shares(run).items()}
    total = sum(times.values())
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in times.items()) if total else ""


def text(runs):
    """The essentials of some runs, as lines for a terminal.

    Parameters
    ----------
    runs : list of Run

    Returns
    -------
    str
    """
    return "\n\n".join("\n".join(_lines(run)) for run in runs)


def _lines(run):
    found = facts(run)
    sizes = ", ".join(f"{found[name]} {name}" if name != "batch" else f"batch {found[name]}"
                      for name in ("ranks", "batch", "samples", "parameters", "steps") if name in found)
    yield f"{run.name}: {sizes}" if sizes else run.name
    yield f"  {found['state']}"
    if run.epochs:
        epoch = run.epochs[-1]
        values = [f"{name} {number(epoch[name])}" for name in metrics(run) if name in epoch]
        yield f"  epoch {epoch['epoch']}: {', '.join(values)}"
    elif run.steps["step"].size:
        yield (f"  step {run.steps['step'][-1]:.0f}: loss {number(run.steps['loss'][-1].item())}, "
               f"{run.steps['samples/s'][-1]:,.0f} samples/s")
    for name in metrics(run):
        epoch = best(run, name)
        if epoch:
            extreme = "highest" if higher_is_better(name) else "lowest"
            yield f"  {extreme} {name}: {number(epoch[name])} in epoch {epoch['epoch']}"
    if spent(run):
        yield f"  time of all ranks: {spent(run)}"
    for remark in remarks(run):
        yield f"  {remark}"
