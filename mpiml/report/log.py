"""Reading what :class:`mpiml.fit.log.Log` wrote, whoever stopped it in the middle of a line."""

import json
import math
import os
from typing import NamedTuple

import numpy as np

from mpiml.schedule import B, F, Span, Timeline, W, alive

SHARES = ("compute", "communicate", "wait", "other")
_STEP = ("loss", "lr", "samples/s", "seconds")
_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers


class LogError(ValueError):
    """A log that is damaged elsewhere than where its writer was stopped."""


class Run(NamedTuple):
    """One run, with what was done again counted once.

    Attributes
    ----------
    name : str
        Its folder.
    starts : list of dict
        The "run" lines: one for the start, one for each resumption.
    steps : dict of (n,) arrays
        "step", "loss", "lr", "samples/s" and "seconds" of the steps that were noted; NaN where a note lacks one.
    epochs : list of dict
    end : str or None
        The reason; None if it still runs, or was killed.
    cut : int
        Lines that were cut off, as their writer was killed.
    written : float
        When the log was last written, in seconds since 1970.
    timeline : mpiml.schedule.Timeline or None
        A measured step.
    """

    name: str
    starts: list
    steps: dict
    epochs: list
    end: str
    cut: int
    written: float
    timeline: Timeline


def read(folder):
    """The run whose log is in a folder.

    A run that went on from a checkpoint took some steps twice: of those, the later ones count. A line that was cut off when
    its writer was killed, which is the last one or one before a "run" line, is left out.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    Run

    Raises
    ------
    FileNotFoundError
        There is no log.
    LogError
        A line is damaged: its file, its number and what is wrong with it.
    """
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there: name a folder that was given to fit(..., run=FOLDER)")
    starts, steps, epochs, end, cut = [], [], [], None, 0
    for record in _records(path):
        kind = record and record["kind"]
        if kind not in (None, "run") and not starts:
            raise LogError(f'{path}: its first line is of the kind "{kind}", but a log begins with one of the kind "run"')
        if kind is None:
            cut += 1
        elif kind == "run":
            starts.append(record)
            end = None
        elif kind == "step":
            # Steps that are taken again: what came of them before counts no more.
            _forget(steps, record["step"])
            _forget(epochs, record["step"])
            steps.append(record)
        elif kind == "epoch":
            _forget(epochs, record["step"])
            _forget(steps, record["step"] + 1)
            epochs.append(record)
        elif kind == "end":
            end = str(record.get("reason", "it ended"))
    columns = {name: np.array([record.get(name, math.nan) for record in steps], float) for name in ("step", *_STEP)}
    return Run(os.path.normpath(folder), starts, columns, epochs, end, cut, os.path.getmtime(path), _timeline(folder))


def _forget(records, step):
    while records and records[-1]["step"] >= step:
        records.pop()


def _records(path):
    """The records of a log, checked; None for a line that was cut off."""
    held = None  # the error of a damaged line, until it is known what follows
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip(b"\0 \r\n\t"):
                continue
            try:
                record = _record(line)
            except ValueError as error:
                if held:
                    raise held from None
                held = LogError(f"{path}, line {number}: {error}")
                continue
            if held:
                if record["kind"] != "run":
                    raise held
                held = None
                yield None
            yield record
    if held:
        if line.endswith(b"\n"):
            raise held
        yield None


def _record(line):
    try:
        record = json.loads(line)
    except ValueError:  # of JSON, or of UTF-8
        raise ValueError(f"not a line of JSON: {_short(line.decode(errors='replace').strip())}") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f'an object with a "kind" was expected, not {_short(line.decode().strip())}')
    if record["kind"] in ("step", "epoch"):
        _check_count(record, "step")
    if record["kind"] == "step":
        record |= {name: _number(name, record[name]) for name in _STEP if name in record}
    if record["kind"] == "epoch":
        _check_count(record, "epoch")
        record |= {name: _number(name, value) for name, value in record.items()
                   if name not in ("kind", "step", "epoch", "ranks")}
        record["ranks"] = _ranks(record.get("ranks") or {})
    if record["kind"] == "run":
        record["time"] = _number("time", record.get("time"))
    return record


def _check_count(record, name):
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f'"{name}" of a "{record["kind"]}" line is a whole number, not {_short(json.dumps(value))}')


def _number(name, value):
    if value is None:
        return math.nan
    if isinstance(value, str) and value in _NAMES:
        return _NAMES[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'"{name}" is a number, not {_short(json.dumps(value))}')
    return float(value)


def _ranks(shares):
    """{"compute", ...: (ranks,) array of seconds}, or {}."""
    try:
        arrays = {name: np.array([float(value) for value in shares[name]]) for name in SHARES} if shares else {}
    except (KeyError, TypeError, ValueError):
        arrays = None
    if arrays is None or len({array.size for array in arrays.values()}) > 1:
        raise ValueError(f'"ranks" holds lists of seconds, one number for each rank, under {", ".join(SHARES)}, '
                         f'not {_short(json.dumps(shares))}')
    return arrays


def _timeline(folder):
    path = os.path.join(folder, "timeline.json")
    if not os.path.isfile(path):
        return None
    kinds = {"F": F, "B": B, "W": W}
    try:
        with open(path, encoding="utf-8") as file:
            stages = json.load(file)["spans"]
        spans = [[Span(kinds[kind](int(m), int(chunk)), float(start), float(end)) for kind, m, chunk, start, end in stage]
                 for stage in stages]
    except (ValueError, TypeError, KeyError) as error:
        raise LogError(f'{path}: {{"spans": [[["F", micro-batch, chunk, start, end], ...] for each stage]}} was expected '
                       f"({type(error).__name__}: {error}); the report is made without it when it is deleted") from None
    return Timeline(spans, [alive([span.action for span in stage]) for stage in spans])


def _short(text, most=60):
    return text if len(text) <= most else text[:most - 3] + "..."
