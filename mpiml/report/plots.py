"""The plots of a report, as SVG to stand in a page, whose colours for text and paper they take."""

import contextlib
import io
import re

import numpy as np

from mpiml.schedule import ScheduleError, costs, figure, replay

from .log import SHARES
from .words import shares

COLOURS = ("#3d85c6", "#e0782f", "#2f9e6b", "#b067c4", "#c79a1b", "#d14b5f", "#35a3ad", "#8a8f98")
SHARE_COLOURS = dict(zip(SHARES, ("#3d85c6", "#e6a532", "#d14b5f", "#9aa0a8"), strict=True))
_INK = "#010203"  # stands for the colour of the page's text
_POINTS = 600  # of a curve: more than a screen shows
BARS = 32  # ranks with a bar of their own
_SPANS = 3000  # computations of a timeline


def _matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plots of a report are drawn by matplotlib: pip install 'mpiml[draw]' "
                          "(python -m mpiml report --text needs none)") from error
    return matplotlib


@contextlib.contextmanager
def style():
    """A context in which figures are made and drawn."""
    settings = {"svg.fonttype": "none", "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "auto",
                "text.parse_math": False, "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False,
                "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.18, "grid.color": _INK, "axes.axisbelow": True,
                "axes.unicode_minus": False}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                               "ytick.color"), _INK)
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the reader's does not concern the page
        matplotlib.rcParams.update(settings)
        yield


def svg(drawn, name):
    """A figure as an SVG element; ``name`` is unique in the page and says what is seen."""
    prefix = re.sub(r"\W+", "-", name)
    import matplotlib
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    found = buffer.getvalue()
    found = found[found.index("<svg"):]
    found = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", found, count=1, flags=re.DOTALL)  # the page has it
    found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", found)
    for colour, of_page in (_INK, "currentColor"), ("#eeeeee", "var(--idle)"), ("#ffffff", "var(--paper)"):
        found = found.replace(colour, of_page)
    return found


def smooth(values, width):
    """Means over ``width`` neighbours, fewer where there are fewer; those that are not finite are left out.

    At the beginning, where a loss falls steeply, it takes hardly more behind than there are before.

    >>> smooth(np.array([4.0, 1.0, np.nan, 5.0]), 3)
    array([4. , 2.5, 3. , 5. ])
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    first = np.maximum(at - width // 2, 0)
    last = np.minimum(at + np.clip(at, width // 16, width // 2) + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def thin(x, y, most=_POINTS):
    """At most about ``most`` of the points of a curve: of each run of neighbours the lowest and the highest.

    >>> thin(np.arange(6), np.array([0, 9, 1, 2, -3, 3]), 4)
    (array([0, 1, 4, 5]), array([ 0,  9, -3,  3]))
    """
    if len(x) <= most:
        return x, y
    keep = []
    for part in np.array_split(np.arange(len(x)), most // 2):
        values = y[part]
        keep += sorted({part[np.argmin(np.where(np.isnan(values), np.inf, values))],
                        part[np.argmax(np.where(np.isnan(values), -np.inf, values))]})
    return x[keep], y[keep]


def _axes(title, xlabel, width=4.8, height=2.9):
    _matplotlib()
    from matplotlib.figure import Figure
    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.margins(x=0.02)
    axes.yaxis.set_major_formatter("{x:g}")
    if xlabel in ("step", "epoch"):
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return axes


def _marker(points):
    return {"marker": "o", "markersize": 4} if len(points) <= 60 else {}


def _per_epoch(run, name):
    """The values of those epochs that have one, and their epochs and steps."""
    found = [(epoch["epoch"], epoch["step"], epoch[name]) for epoch in run.epochs if name in epoch]
    return np.array(found, float).reshape(-1, 3).T


def has_steps(run):
    """Whether single steps tell more than the epochs; short ones are hardly noted."""
    return run.steps["step"].size > len(run.epochs)


def _of_steps(axes, x, y, colour, faint):
    """A curve with a value for each step: smooth and, if wanted, faint as it is; returns the smooth values."""
    means = smooth(y, max(1, min(len(y) // 3, max(15, len(y) // 40))))
    if faint:
        axes.plot(*thin(x, y), color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(*thin(x, means), color=colour, linewidth=1.8)
    return means


def loss(runs):
    """Training loss of each step and validation loss of each epoch."""
    axes = _axes("loss", "step", 13.0, 4.0)
    lowest, highest = np.inf, 0.0
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        if has_steps(run):
            x, y = run.steps["step"], run.steps["loss"]
            y = _of_steps(axes, x, np.where(np.isfinite(y), y, np.nan), colour, len(runs) == 1)
        else:
            _, x, y = _per_epoch(run, "loss")
            axes.plot(x, y, color=colour, linewidth=1.8, **_marker(x))
        _, steps, validation = _per_epoch(run, "validation loss")
        axes.plot(steps, validation, color=COLOURS[1] if len(runs) == 1 else colour, linestyle="--", linewidth=1.6,
                  **_marker(steps))
        seen = np.concatenate([y, validation])
        seen = seen[np.isfinite(seen)]
        lowest, highest = min([lowest, *seen]), max([highest, *seen])
        for step in run.steps["step"][~np.isfinite(run.steps["loss"])][:20]:
            axes.axvline(step, color="#d14b5f", linewidth=1, linestyle=":")
    if 0 < lowest < highest / 30:
        from matplotlib.ticker import LogLocator, NullFormatter
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if highest > 300 * lowest else (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes TeX
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif lowest >= 0:
        axes.set_ylim(bottom=0)
    return axes.figure


def of_epochs(runs, name):
    """A metric of the validation, and of the training if it has one of that name."""
    axes = _axes(name, "epoch")
    for i, run in enumerate(runs):
        epochs, _, values = _per_epoch(run, name)
        colour = COLOURS[1] if len(runs) == 1 else COLOURS[i % len(COLOURS)]
        axes.plot(epochs, values, color=colour, linestyle="--", linewidth=1.6, **_marker(epochs))
    return axes.figure


def of_steps(runs, name):
    """The learning rate or the speed, of each noted step, or of each epoch where there are fewer steps than those."""
    axes = _axes({"lr": "learning rate"}.get(name, name), "step")
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        x, y = run.steps["step"], run.steps[name]
        if not has_steps(run):
            _, x, y = _per_epoch(run, name)
        if name == "lr":
            axes.plot(*thin(x, y), color=colour, linewidth=1.8)
        else:
            _of_steps(axes, x, y, colour, len(runs) == 1)
    axes.set_ylim(bottom=0)
    return axes.figure


def ranks(run):
    """How each rank spent its time: a bar for each, or an area where they are many."""
    times = shares(run)
    count = times["compute"].size
    total = sum(times.values())
    scale = 100 / np.maximum(total, np.finfo(float).tiny)
    left = np.zeros(count)
    if count <= BARS:
        axes = _axes("", "share of the time in %", 13.0, 0.9 + 0.3 * count)
        for name, seconds in times.items():
            part = seconds * scale
            axes.barh(range(count), part, 0.8, left, color=SHARE_COLOURS[name])
            for rank in np.flatnonzero(part >= 4):
                axes.text(left[rank] + part[rank] / 2, rank, f"{part[rank]:.0f}", ha="center", va="center", fontsize=9,
                          color="black")
            left += part
        axes.set_yticks(range(count), [f"rank {rank}" for rank in range(count)])
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
    else:
        axes = _axes("", "rank", 13.0, 3.6)
        edges = np.arange(count + 1) - 0.5
        for name, seconds in times.items():
            part = seconds * scale
            axes.stairs(left + part, edges, baseline=left, fill=True, color=SHARE_COLOURS[name], linewidth=0)
            left = left + part
        axes.set_ylabel("share of the time in %")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 100)
    return axes.figure


def timeline(run):
    """A measured step, of a pipeline below the simulated one; None if it has too many computations to be drawn."""
    measured = run.timeline
    if sum(map(len, measured.spans)) > _SPANS:
        return None
    both = {"measured": measured}
    if len(measured.spans) > 1:
        with contextlib.suppress(ScheduleError):
            lists = [[span.action for span in spans] for spans in measured.spans]
            both = {"simulated, with the mean times of the measured": replay(lists, **costs(measured))} | both
    return figure(both, "s")
