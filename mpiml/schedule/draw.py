"""A timeline as text and as a picture."""

from .orders import B, F, W

_COLOURS = {F: "#7db8e8", B: "#f0a860", W: "#9fce8f"}


def _label(action, held):
    """The name of a computation; with several chunks on the stage, a letter tells them apart."""
    letter = chr(ord("a") + held.index(action.chunk) % 26) if len(held) > 1 else ""
    return f"{type(action).__name__}{action.microbatch}{letter}"


def _held(spans):
    return sorted({span.action.chunk for span in spans})


def text(timeline, width=240):
    """The timeline as lines of text, one for each stage, time from left to right; dots are idle.

    Parameters
    ----------
    timeline : Timeline
    width : int
        Columns at most, for the time; a computation too short for its name shows its kind alone, and one much shorter
        than a column nothing.

    Examples
    --------
    >>> from mpiml.schedule import one_f_one_b, simulate
    >>> print(text(simulate(one_f_one_b, stages=2, microbatches=3)))
    stage 0 |F0 F1 ......B0    F2 B1    ...B2    |
    stage 1 |...F0 B0    F1 B1    F2 B2    ......|
    """
    first = min((span.start for spans in timeline.spans for span in spans), default=0.0)
    named = [[(_label(span.action, _held(spans)), span.start - first, span.end - first) for span in spans]
             for spans in timeline.spans]
    widest = max((len(label) for spans in named for label, _, _ in spans), default=1)
    shortest = min((end - start for spans in named for _, start, end in spans if end > start), default=1.0)
    cell = min(widest + 1, width * shortest / timeline.makespan) if timeline.makespan else 1
    scale = (int(cell) if cell >= 1 else cell) / shortest  # whole columns keep equal lengths equal
    lines = []
    for stage, spans in enumerate(named):
        line = ["."] * round(timeline.makespan * scale)
        for label, start, end in spans:
            start, end = round(start * scale), round(end * scale)
            line[start:end] = (label if len(label) <= end - start else label[0]).ljust(end - start)[:end - start]
        lines.append(f"stage {stage:<{len(str(len(named) - 1))}} |{''.join(line)}|")
    return "\n".join(lines)


def picture(timelines, path, unit=""):
    """Write timelines as a picture, see :func:`figure`.

    Parameters
    ----------
    timelines : {str: Timeline}
        With their titles.
    path : str
        Its ending chooses the format: .svg, .png, .pdf.
    unit : str
        Of the times, such as "s".

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    figure(timelines, unit).savefig(path, dpi=150)


def figure(timelines, unit=""):
    """Timelines, one below the other on one scale of time, as a figure of matplotlib.

    Parameters
    ----------
    timelines : {str: Timeline}
        With their titles.
    unit : str
        Of the times, such as "s".

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no state shared with the caller's plots
        from matplotlib.patches import Patch
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ImportError("pictures of timelines are drawn by matplotlib: pip install 'mpiml[draw]'") from error
    stages = sum(len(timeline.spans) for timeline in timelines.values())
    whole = Figure(figsize=(12, 0.9 + 0.42 * stages + 0.7 * len(timelines)), layout="constrained")
    heights = [len(timeline.spans) for timeline in timelines.values()]
    rows = whole.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(timeline.makespan for timeline in timelines.values())
    kinds = set()
    for axes, (title, timeline) in zip(rows, timelines.items(), strict=True):
        first = min((span.start for spans in timeline.spans for span in spans), default=0.0)
        for stage, spans in enumerate(timeline.spans):
            held = _held(spans)
            for span in spans:
                kind, length = type(span.action), span.end - span.start
                kinds.add(kind)
                axes.barh(stage, length, 0.86, span.start - first, color=_COLOURS[kind], edgecolor="white",
                          linewidth=0.5 if length > longest * 0.002 else 0,  # an edge would hide what is shorter
                          alpha=1 - 0.7 * held.index(span.action.chunk) / len(held))
                label = str(span.action.microbatch)
                if length > longest * 0.008 * len(label):
                    axes.text(span.start - first + length / 2, stage, label, ha="center", va="center", fontsize=8,
                              color="black")
        axes.set_title(f"{title}: bubble {timeline.bubble:.1%}", loc="left", fontsize=10)
        axes.set_yticks(range(len(timeline.spans)), [f"stage {stage}" for stage in range(len(timeline.spans))])
        axes.invert_yaxis()
        axes.set_xlim(0, longest)
        axes.set_facecolor("#eeeeee")
        for side in axes.spines.values():
            side.set_visible(False)
    rows[-1].set_xlabel("time")
    if unit:
        rows[-1].xaxis.set_major_formatter(EngFormatter(unit))
    names = {F: "forward", B: "backward", W: "weight gradients"}
    patches = [Patch(color=_COLOURS[kind], label=names[kind]) for kind in names if kind in kinds]
    if any(len(_held(spans)) > 1 for timeline in timelines.values() for spans in timeline.spans):
        patches.append(Patch(color="#bbbbbb", alpha=0.5, label="lighter: a stage's later chunks"))
    whole.legend(handles=patches, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return whole
