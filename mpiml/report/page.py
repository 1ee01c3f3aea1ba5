"""The page: one HTML file that needs no other, no network and no script."""

import math
from html import escape
from time import time

from . import plots
from .words import best, column, facts, higher_is_better, metrics, moment, number, remarks, shares, spent

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1d2228; --soft: #5c6670; --line: #d9dde2;
        --idle: #e9ebee; --alert: #fdf1dc; --alert-line: #e0a03a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --card: #1e2228; --ink: #e4e7ea; --soft: #9aa4ae; --line: #363c44; --idle: #98a1ac;
          --alert: #33291a; --alert-line: #c58a2b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 3rem; max-width: 84rem; background: var(--paper);
       color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 0.5rem; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 0.6rem; font-size: 1.15rem; break-after: avoid; }
h3 { margin: 1.4rem 0 0.3rem; font-size: 1rem; overflow-wrap: anywhere; break-after: avoid; }
p { margin: 0.4rem 0; max-width: 60rem; }
.soft, footer { color: var(--soft); }
footer { margin-top: 3rem; font-size: 0.85rem; }
.remark { background: var(--alert); border-left: 4px solid var(--alert-line); padding: 0.5rem 0.9rem; border-radius: 4px; }
dl.numbers { display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 1.1rem 0; }
dl.numbers > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.5rem 1rem; }
dl.numbers dt { font-size: 0.85rem; color: var(--soft); }
dl.numbers dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dl.numbers dd small { font-size: 0.8rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; font-size: 0.9rem; margin: 0.3rem 0; }
.legend span { overflow-wrap: anywhere; }
i { display: inline-block; width: 1.1em; height: 0.75em; margin-right: 0.4em; border-radius: 2px;
            print-color-adjust: exact; -webkit-print-color-adjust: exact; }
i.line { width: 1.9em; height: 0; border-top: 3px solid; border-radius: 0; vertical-align: middle; }
i.dashed { border-top-style: dashed; }
figure { margin: 0.6rem 0; overflow-x: auto; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure.wide svg { min-width: 44rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 0.8rem; }
.grid figure { min-width: 0; }
.table { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
table.results th:first-child { position: static; min-width: 8rem; text-align: left; white-space: normal;
                             overflow-wrap: anywhere; }
td { vertical-align: top; }
small { color: var(--soft); }
table.facts tbody th { width: 10rem; }
table.facts th { position: static; text-align: left; vertical-align: top; }
table.facts thead th { min-width: 9rem; overflow-wrap: anywhere; white-space: normal; }
table.facts td { min-width: 9rem; text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td.command { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.82rem; }
td.best { font-weight: 700; }
@page { margin: 12mm; }
@media print { html { font-size: 11px; } body { padding: 0; }
              .grid { grid-template-columns: repeat(3, 1fr); } .table { max-height: none; border: 0; overflow: visible; }
               th { position: static; } figure.wide svg { min-width: 0; } tr { break-inside: avoid; } }
"""


def page(runs):
    """One run, or some runs in comparison, as a page of HTML.

    Parameters
    ----------
    runs : list of mpiml.report.Run

    Returns
    -------
    str

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs in comparison"
    with plots.style():
        body = "\n".join([
            f"<h1>{escape(title)}</h1>",
            *([_state(runs[0]), _numbers(runs[0])] if len(runs) == 1 else [_results(runs)]),
            *(f'<p class="remark">{escape(_named(runs, run, remark))}</p>' for run in runs for remark in remarks(run)),
            *_curves(runs),
            *_ranks(runs),
            *_timelines(runs),
            *_epochs(runs),
            "<h2>Facts</h2>",
            _facts(runs),
            f"<footer>Made by mpiml on {moment(time())}.</footer>"])
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def _named(runs, run, sentence):
    return sentence if len(runs) == 1 else f"{run.name}: {sentence}"


def _sentence(words):
    return words[:1].upper() + words[1:] + "."


def _state(run):
    found = facts(run)
    parts = [f"{found[name]} {name}" for name in ("ranks", "samples", "parameters") if name in found]
    if "batch" in found:
        parts.append(f"batches of {found['batch']}")
    return f'<p>{escape(", ".join(parts))}</p><p>{escape(_sentence(found["state"]))}</p>'


def _numbers(run):
    """The last values, large."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(where)}</small></dd></div>"
                    for name, (value, where) in _last(run).items())
    return f'<dl class="numbers">{items}</dl>' if items else ""


def _last(run):
    """{name: (last value, the best one if that is another)}."""
    found = {}
    if run.epochs:
        last = run.epochs[-1]
        found["epoch"] = number(last["epoch"]), ""
        for name in metrics(run):
            top = best(run, name)
            extreme = "highest" if higher_is_better(name) else "lowest"
            where = "" if top is None or top is last else f"{extreme} {number(top[name])} in epoch {top['epoch']}"
            found[name] = number(last.get(name, math.nan)), where
    elif run.steps["step"].size:
        found["step"] = number(run.steps["step"][-1].item()), ""
        found["loss"] = number(run.steps["loss"][-1].item()), ""
    speeds = [epoch["samples/s"] for epoch in run.epochs if "samples/s" in epoch] or run.steps["samples/s"].tolist()
    if speeds:
        found["samples/s"] = f"{speeds[-1]:,.{0 if speeds[-1] >= 100 else 1}f}", ""
    return found


def _results(runs):
    """The last values of several runs, as a table."""
    found = [_last(run) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = ""
    for i, (run, one) in enumerate(zip(runs, found, strict=True)):
        cells = (f"<td>{escape(value)}<br><small>{escape(where)}</small></td>" for value, where in
                 (one.get(name, ("", "")) for name in names))
        rows += f"<tr><th>{_key(plots.COLOURS[i % len(plots.COLOURS)], run.name)}</th>{''.join(cells)}</tr>"
    return (f'<div class="table"><table class="results"><thead><tr><th>run</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")


def _figure(drawn, name, wide=False):
    svg = plots.svg(drawn, name).replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    return f'<figure{" class=wide" if wide else ""}>{svg}</figure>'


def _key(colour, words, line=""):
    mark = f'class="line {line}" style="color:{colour}"' if line else f'style="background:{colour}"'
    return f"<span><i {mark}></i>{escape(words)}</span>"


def _legend(keys):
    return f'<div class="legend">{"".join(keys)}</div>'


def _curves(runs):
    if not any(run.epochs or run.steps["step"].size for run in runs):
        return
    names = list(dict.fromkeys(name for run in runs for name in metrics(run)))
    yield "<h2>Training</h2>"
    if len(runs) == 1:
        steps = plots.has_steps(runs[0])
        keys = [_key(plots.COLOURS[0], "training" + ": moving mean, and faint each noted step" * steps, "solid")]
        if any(name.startswith("validation ") for name in names):
            keys.append(_key(plots.COLOURS[1], "validation, after each epoch", "dashed"))
    else:
        keys = [_key(plots.COLOURS[i % len(plots.COLOURS)], run.name) for i, run in enumerate(runs)]
        keys += [_key("currentColor", "training", "solid"), _key("currentColor", "validation", "dashed")]
    yield _legend(keys)
    yield _figure(plots.loss(runs), "loss", wide=True)
    yield '<div class="grid">'
    for name in names:
        if name not in ("loss", "validation loss"):
            yield _figure(plots.of_epochs(runs, name), name)
    if any("constant" not in facts(run).get("learning rate", "") for run in runs):
        yield _figure(plots.of_steps(runs, "lr"), "learning rate")
    yield _figure(plots.of_steps(runs, "samples/s"), "samples per second")
    yield "</div>"


def _ranks(runs):
    measured = {i: run for i, run in enumerate(runs, 1) if shares(run)}
    if not measured:
        return
    yield "<h2>What the ranks spent their time on</h2>"
    yield ('<p class="soft">Communicate: the sum of the gradients itself. Wait: for ranks that come to it later, or, in a '
           "pipeline, for other stages. Other: reading data and the optimizer.</p>")
    yield _legend([_key(colour, name) for name, colour in plots.SHARE_COLOURS.items()])
    for i, run in measured.items():
        if len(runs) > 1:
            yield f"<h3>{escape(run.name)}</h3>"
        yield f"<p>All ranks together: {escape(spent(run))}.</p>"
        yield _figure(plots.ranks(run), f"shares of the ranks of run {i}", wide=True)
        yield _extremes(run)


def _extremes(run, most=3):
    """The ranks that compute longest and shortest, where there are too many to find them in the plot."""
    times = shares(run)
    order = times["compute"].argsort(kind="stable")[::-1].tolist()
    if len(order) <= plots.BARS:
        return ""
    middle = order[len(order) // 2]
    rows = [*order[:most], middle, *order[-most:]]
    head = "".join(f"<th>{name}, s</th>" for name in times)
    body = "".join(f"<tr><td>{rank}{' (median)' if rank == middle else ''}</td>"
                   f"{''.join(f'<td>{seconds[rank]:.2f}</td>' for seconds in times.values())}</tr>" for rank in rows)
    return (f'<p class="soft">Those that compute longest, the median, and those that compute shortest:</p>'
            f'<div class="table"><table><thead><tr><th>rank</th>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _timelines(runs):
    measured = {i: run for i, run in enumerate(runs, 1) if run.timeline and any(run.timeline.spans)}
    if not measured:
        return
    yield "<h2>A step, as the stages computed it</h2>"
    yield ('<p class="soft">The numbers are those of the micro-batches, of replica 0, in a step of median length. '
           "The bubble is the share of the time in which the stages compute nothing.</p>")
    for i, run in measured.items():
        if len(runs) > 1:
            yield f"<h3>{escape(run.name)}</h3>"
        drawn = plots.timeline(run)
        yield (_figure(drawn, f"timeline of run {i}", wide=True) if drawn else
               f"<p>Its {sum(map(len, run.timeline.spans)):,} computations are too many to draw here: Watch.trace writes "
               f"them for ui.perfetto.dev.</p>")


def _epochs(runs):
    for run in runs:
        if run.epochs:
            yield f"<h2>{escape('Epochs' if len(runs) == 1 else f'Epochs of {run.name}')}</h2>"
            yield _table(run)


def _table(run):
    names = [name for name in ("epoch", "step", *metrics(run), "lr", "seconds", "samples/s")
             if any(name in epoch for epoch in run.epochs)]
    top = {name: best(run, name) for name in metrics(run)}
    columns = [column([epoch.get(name, math.nan) for epoch in run.epochs]) for name in names]
    rows = "".join("<tr>" + "".join(f'<td{" class=best" if top.get(name) is epoch else ""}>{escape(value)}</td>'
                                    for name, value in zip(names, values, strict=True)) + "</tr>"
                   for epoch, *values in zip(run.epochs, *columns, strict=True))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _facts(runs):
    found = [facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td{" class=command" if name == "command" else ""}>{escape(one.get(name, ""))}</td>' for one in found)
        + "</tr>" for name in names)
    return f'<div class="table"><table class="facts">{head}<tbody>{rows}</tbody></table></div>'
