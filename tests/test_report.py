"""What a run's log becomes: words, text and a page."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from mpiml.__main__ import main
from mpiml.balance import imbalance
from mpiml.report import LogError, page, read, text
from mpiml.schedule import one_f_one_b, simulate

START = {"kind": "run", "version": "0.1.0", "ranks": 4, "data": 4, "pipe": 1, "lanes": None, "batch": 32, "samples": 1000,
         "parameters": 12345, "time": 1.7e9, "argv": ["train.py", "--note", "<i>&"]}


def step(number, loss=0.5, lr=0.1):
    return {"kind": "step", "step": number, "epoch": 1, "loss": loss, "lr": lr, "samples/s": 900.0, "seconds": 1.5}


def epoch(number, validation, ranks=4, per=10, slow=4.0):
    seconds = {"compute": [slow, *[4.0] * (ranks - 1)], "communicate": [0.5] * ranks, "wait": [0.25] * ranks,
               "other": [0.25] * ranks}
    return {"kind": "epoch", "epoch": number, "step": number * per, "loss": 0.75 / number, "validation loss": validation,
            "validation accuracy": 1 - validation, "lr": 0.1, "seconds": 5.0, "samples/s": 876.5, "ranks": seconds}


END = {"kind": "end", "reason": "all epochs are done"}


@pytest.fixture
def log(tmp_path):
    """A function that writes a log of these records, or of these bytes, and returns its folder."""
    def write(*records, name="run"):
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records]
        (tmp_path / name / "log.jsonl").write_bytes(b"".join(lines))
        return tmp_path / name
    return write


class Page(HTMLParser):
    """What a page says, what it refers to, and that its elements are closed."""

    EMPTY = ("meta", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], ""
        self.feed(html)
        self.close()
        assert not self.open and len(self.ids) == len(set(self.ids))
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links)  # it needs no other file

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attributes:
            self.ids += [value] * (name == "id")
            self.links += [value] * (name in ("href", "xlink:href", "src"))
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += f"{data} "


# --- Load imbalance in words ---------------------------------------------------------------------------------------------


def test_slow_ranks_are_named():
    assert imbalance([1, 1.4]).startswith("rank 1 computes 1.4 times as long as the median of all ranks (1.4 s, 1.0 s)")
    assert imbalance([1, 1, 2.5, 2]).startswith("ranks 2 and 3 compute up to 2.5 times")
    many = imbalance([*[1] * 60, 2, 2, 2, 1.5, 3])
    assert many.startswith("ranks 64, 60, 61 and 2 more compute up to 3.0 times") and many.endswith("wait for them")
    assert "rank 3 computes 3.0 s, and half of the ranks nothing" in imbalance([0, 0, 0, 3])


@pytest.mark.parametrize("compute", [[], [3], [4, 4, 4.1], [1, 2, 2, 2], [0.01, 0.9], [0, 0], [1, np.nan]], ids=str)
def test_balanced_or_meaningless_times_are_not_spoken_of(compute):
    assert imbalance(compute) is None


def test_what_counts_as_slow_and_as_long_can_be_chosen():
    assert imbalance([1, 1.4], threshold=1.5) is None
    assert imbalance([0.01, 0.02], least=0.01)


# --- Reading a log -------------------------------------------------------------------------------------------------------


def test_steps_that_were_taken_again_count_once(log):
    run = read(log(START, step(4, 0.9), step(9, 0.8), epoch(1, 0.3), step(12, 0.7), epoch(2, 0.2), step(25, 0.6),
                   START | {"ranks": 3}, step(13, 0.5), epoch(2, 0.1, ranks=3)))
    assert run.steps["step"].tolist() == [4, 9, 12, 13] and run.steps["loss"].tolist() == [0.9, 0.8, 0.7, 0.5]
    assert [(epoch["epoch"], epoch["validation loss"]) for epoch in run.epochs] == [(1, 0.3), (2, 0.1)]
    assert len(run.starts) == 2 and "4, then 3 ranks" in text([run])


def test_a_run_that_goes_on_has_not_ended(log):
    assert read(log(START, step(1), END)).end == "all epochs are done"
    assert read(log(START, step(1), END, START)).end is None
    assert "still running, or killed" in text([read(log(START, step(1)))])


@pytest.mark.parametrize("rest", [b'{"kind": "st', b'{"kind": "step", "step": 3}\0\0\0', b"\xff\xfe"], ids=str)
def test_what_a_killed_writer_left_is_left_out(log, rest):
    assert read(log(START, step(1), rest)).steps["step"].tolist() == [1]
    run = read(log(START, step(1), rest + b"\n", START, step(2), END))
    assert run.cut == 1 and run.steps["step"].tolist() == [1, 2] and "1 line of the log is cut off" in text([run])


@pytest.mark.parametrize("line, wrong", [
    (b'{"kind": "st\n', "not a line of JSON: {\"kind\": \"st"),
    (b"[1, 2]\n", 'an object with a "kind" was expected, not [1, 2]'),
    (step("4"), '"step" of a "step" line is a whole number, not "4"'),
    (step(4, "low"), '"loss" is a number, not "low"'),
    (epoch(1, 0.5) | {"ranks": {"compute": [1]}}, '"ranks" holds lists of seconds'),
])
def test_lines_damaged_otherwise_are_named(log, line, wrong):
    with pytest.raises(LogError, match=re.escape(wrong)) as raised:
        read(log(START, b"\n", line, step(5)))
    assert "log.jsonl, line 3: " in str(raised.value)


def test_a_folder_without_a_log_and_a_log_without_a_start(log, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl is not there: name a folder"):
        read(tmp_path)
    with pytest.raises(LogError, match='begins with one of the kind "run"'):
        read(log(step(1)))


def test_a_broken_timeline_is_named(log):
    folder = log(START, step(1))
    (folder / "timeline.json").write_text('{"spans": [[["X", 0, 0, 0, 1]]]}')
    with pytest.raises(LogError, match=r"timeline\.json: .*KeyError"):
        read(folder)


# --- Text and pages ------------------------------------------------------------------------------------------------------


def test_the_essentials_as_text(log):
    run = read(log(START, epoch(1, 0.25, slow=6.0), epoch(2, 0.125, slow=6.0), epoch(3, 0.5, slow=6.0), END))
    found = text([run])
    assert "4 ranks, batch 32, 1,000 samples, 12,345 parameters, 30 steps\n  ended: all epochs are done" in found
    assert "epoch 3: loss 0.25, validation loss 0.5, validation accuracy 0.5" in found
    assert "lowest validation loss: 0.125 in epoch 2" in found and "highest validation accuracy: 0.875 in epoch 2" in found
    assert "time of all ranks: compute 82%, communicate 9%, wait 5%, other 5%" in found
    assert "Rank 0 computes 1.5 times as long as the median of all ranks (18.0 s, 12.0 s)" in found


def test_a_page_of_a_run(log):
    epochs = epoch(1, 0.125, slow=6.0), epoch(2, 0.25, slow=6.0)
    folder = log(START, *(step(i, 1 / i) for i in range(1, 21)), *epochs, END)
    spans = [[[type(action).__name__, action.microbatch, action.chunk, start, end] for action, start, end in stage]
             for stage in simulate(one_f_one_b, 2, 3).spans]
    (folder / "timeline.json").write_text(json.dumps({"unit": "s", "spans": spans}))
    found = Page(page([read(folder)]))
    assert "script" not in found.tags and found.tags.count("svg") == 5  # loss, accuracy, samples/s, ranks, timeline
    for words in ("Ended: all epochs are done.", "lowest 0.125 in epoch 1", "0.8750", "0.1, constant", "12,345",
                  "Rank 0 computes 1.5 times", "rank 3", "stage 1", "measured: bubble", "train.py --note '<i>&'"):
        assert words in found.words, words


def test_names_are_escaped_and_runs_compared(log):
    names = ["_a<b>&$x_1$", "$\\frac", "c"]
    runs = [read(log(START, *(step(i, lr=0.1 / i) for i in range(1, 9)), epoch(1, 0.5) | {"validation $<u>": 2.0}, name=name))
            for name in names]
    found = Page(page(runs))
    assert "3 runs in comparison" in found.words and not {"b", "u"} & set(found.tags)
    assert all(name in found.words for name in names) and "validation $<u>" in found.words and "learning rate" in found.words


def test_empty_running_and_diverging_runs_have_pages_too(log):
    assert "Nothing has been logged yet." in Page(page([read(log())])).words
    assert "still running, or killed" in Page(page([read(log(START))])).words
    losses = [1.0, "nan", float("inf"), None, 2.0]
    run = read(log(START, *(step(i, loss) for i, loss in enumerate(losses))))
    found = Page(page([run]))
    assert "not finite in 3 of 5 noted steps, first in step 1." in found.words
    run = read(log(START, *(epoch(i, 0.5) | {"validation loss": "nan"} for i in (1, 2))))
    assert "nan" in Page(page([run])).words and "lowest validation loss" not in text([run])


def test_many_ranks_and_many_steps_stay_readable(log):
    steps = [step(i, 1 + i % 7) for i in range(20_000)]
    html = page([read(log(START, *steps, epoch(1, 0.5, ranks=300, slow=8.0, per=20_000)))])
    assert len(html) < 300_000 and "rank 150" not in Page(html).words
    assert "<td>0</td><td>8.00</td>" in html  # among those that compute longest


def test_the_command(log, tmp_path, monkeypatch, capsys):
    folder = str(log(START, epoch(1, 0.5), END))
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["mpiml", "report", folder, folder, "--out", str(out)])
    main()
    assert "2 runs in comparison" in Page(out.read_text(encoding="utf-8")).words and "page.html" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["mpiml", "report", folder, "--text"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main()
    assert "epoch 1: loss 0.75" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["mpiml", "report", folder])
    with pytest.raises(SystemExit, match=r"pip install 'mpiml\[draw\]' \(python -m mpiml report --text needs none\)"):
        main()
