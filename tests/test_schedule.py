"""Schedules, their simulation and their drawing: no model, no MPI."""

import functools
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from mpiml.schedule import (
    SCHEDULES,
    B,
    F,
    ScheduleError,
    Span,
    Timeline,
    W,
    alive,
    check,
    costs,
    gpipe,
    interleaved,
    one_f_one_b,
    orders,
    picture,
    sequential,
    simulate,
    text,
    zb_h1,
    zb_v,
)

STAGES = range(2, 9)


def microbatches(stages):
    return range(stages, 33)


@pytest.mark.parametrize("stages", STAGES)
def test_bubbles_are_those_of_the_papers(stages):
    p = stages
    for m in microbatches(stages):
        expected = {sequential: 1 - 1 / p, gpipe: (p - 1) / (m + p - 1), one_f_one_b: (p - 1) / (m + p - 1),
                    zb_h1: (p - 1) / (3 * m + p - 1)}
        for chunks in 2, 3:
            expected[functools.partial(interleaved, chunks=chunks)] = (p - 1) / (chunks * m + p - 1)
        if m >= 2 * p - 1:
            expected[zb_v] = (p - 1) / (6 * m + p - 1)
        for schedule, bubble in expected.items():
            assert simulate(schedule, stages, m).bubble == pytest.approx(bubble, abs=1e-12), (schedule, m)


@pytest.mark.parametrize("stages", STAGES)
def test_micro_batches_alive(stages):
    for m in microbatches(stages):
        assert simulate(sequential, stages, m).peak == [1] * stages
        assert simulate(gpipe, stages, m).peak == [m] * stages
        assert simulate(one_f_one_b, stages, m).peak == [min(stages - s, m) for s in range(stages)]
        assert max(simulate(zb_h1, stages, m).peak) == stages
        assert max(simulate(zb_v, stages, m).peak) == 2 * stages  # of half the size


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_ends_with_any_number_of_micro_batches(schedule):
    for stages in range(1, 9):
        for m in range(1, 12):
            timeline = simulate(schedule, stages, m)
            assert sum(isinstance(s.action, F) for spans in timeline.spans for s in spans) % m == 0
            assert 0 <= timeline.bubble < 1


def test_bubbles_do_not_depend_on_the_ratio_of_forward_and_backward():
    for schedule in gpipe, one_f_one_b, interleaved:
        assert simulate(schedule, 4, 8, 1, 0.7, 0.3).bubble == pytest.approx(simulate(schedule, 4, 8, 1, 2, 5).bubble)


def test_unequal_stages_and_messages():
    # Two stages, one micro-batch: everything is in one line.
    one = simulate(gpipe, 2, 1, forward=[1, 2], backward=[3, 4], weight=[5, 6], message=0.5)
    assert [[tuple(span) for span in spans] for spans in one.spans] == [
        [(F(0, 0), 0, 1), (B(0, 0), 14, 22)], [(F(0, 1), 1.5, 3.5), (B(0, 1), 3.5, 13.5)]]
    assert one.makespan == 22
    assert one.bubble == pytest.approx(1 - 21 / 44)
    # The slower stage sets the pace.
    assert simulate(one_f_one_b, 2, 10, forward=[1, 2], backward=[1, 2], weight=0).makespan == 10 * 4 + 2
    # W waits for nobody, so the zero-bubble schedule hides some of the messages.
    assert simulate(zb_h1, 4, 8, message=0.5).makespan < simulate(one_f_one_b, 4, 8, message=0.5).makespan
    # Chunks of one stage hand over without a message.
    assert simulate(zb_v, 1, 3, message=100).bubble == 0


def test_a_cost_for_each_chunk_is_asked_for():
    with pytest.raises(ValueError, match="a pipeline has 1 stage and 1 micro-batch at least, not 2 and 0"):
        simulate(gpipe, 2, 0)
    with pytest.raises(ValueError, match=r"the cost is a number >= 0 or one for each of 2, not \[1, 2, 3\]"):
        simulate(gpipe, 2, 3, forward=[1, 2, 3])
    with pytest.raises(ValueError, match="the time of a message is a number >= 0 or one for each of 1, not -1"):
        simulate(gpipe, 2, 3, message=-1)


def test_a_schedule_that_would_hang_names_the_stages_that_are_stuck():
    def crossed(stage, stages, microbatches):
        """Stage 1 wants the gradients in the other order than stage 2 makes them."""
        actions = gpipe(stage, stages, microbatches)
        return actions if stage != 1 else [B(0, 1), *(a for a in actions if a != B(0, 1))]

    with pytest.raises(ScheduleError, match=(
            r"crossed with 3 stages and 2 micro-batches never ends: "
            r"stage 0 with B\(0, 0\), entry 2 of its list, waits for B\(0, 1\) of stage 1; "
            r"stage 1 with B\(0, 1\), entry 0 of its list, waits for F\(0, 1\) of stage 1; "
            r"stage 2 with F\(0, 2\), entry 0 of its list, waits for F\(0, 1\) of stage 1")):
        simulate(crossed, 3, 2)


@pytest.mark.parametrize("lists, message", [
    ([[F(0, 0), B(0, 0)], [F(0, 1)]], r"stage 1 never computes B\(0, 1\)"),
    ([[F(0, 0), B(0, 0), F(0, 0)]], r"stage 0 computes F\(0, 0\) twice"),
    ([[F(0, 0), B(0, 0), F(1, 0)]], r"stage 0 computes F\(1, 0\), which is not one of 1 micro-batches"),
    ([[F(0, 0), B(0, 0), W(1, 0)]], r"stage 0 computes W\(1, 0\), which is not one of 1 micro-batches"),
    ([[F(0, 0), B(0, 0)], []], "stage 1 of 2 has nothing to do"),
    ([[F(0, 0), B(0, 0)], [F(0, 2), B(0, 2)]], r"are numbered 0, 1, 2, ...: these are \[0, 2\]"),
    ([[F(0, 0), B(0, 0)], [F(0, 1), B(0, 0)]], r"chunk 0 is held by stage 0, but stage 1 computes B\(0, 0\)"),
])
def test_lists_that_are_no_schedule(lists, message):
    with pytest.raises(ScheduleError, match=message):
        check(lists, 1)


def test_lists_of_something_else():
    with pytest.raises(ScheduleError, match=r"stage 0 is to compute \('F', 0\): a schedule lists F\(microbatch, chunk\), B"):
        simulate(lambda stage, stages, microbatches: [("F", 0)], 2, 2)


def test_actions_of_different_kinds_are_different():
    assert F(0, 0) == F(0, 0) != B(0, 0)
    assert len({F(0, 0), B(0, 0), W(0, 0)}) == 3


def test_alive_counts_until_the_weights_gradients():
    assert alive([F(0, 0), B(0, 0), F(1, 0), B(1, 0), W(0, 0), W(1, 0)]) == 2
    assert alive([]) == 0


def test_costs_of_a_timeline_simulate_it_again():
    for schedule in SCHEDULES.values():
        one = simulate(schedule, 2, 4, forward=2, backward=3, weight=1 if "zb" in schedule.__name__ else 3)
        again = simulate(schedule, 2, 4, **costs(one))
        assert again.makespan == pytest.approx(one.makespan)
        assert again.spans == one.spans


def test_text_shows_every_computation_at_its_time():
    drawn = text(simulate(zb_h1, 2, 3))
    assert drawn == ("stage 0 |F0 F1 ...B0 W0 F2 B1 W1 B2 W2 |\n"
                     "stage 1 |...F0 B0 F1 B1 W0 F2 B2 W1 W2 |")
    two = text(simulate(interleaved, 2, 2)).splitlines()
    assert two[0].startswith("stage 0 |F0a F1a F0b F1b ")  # letters for the chunks
    assert len({len(line) for line in two}) == 1
    narrow = text(simulate(gpipe, 4, 64), width=150).splitlines()
    assert all(len(line) <= 160 for line in narrow)
    assert text(Timeline([[], []], [0, 0])) == "stage 0 ||\nstage 1 ||"


def test_text_of_measured_times():
    measured = Timeline([[Span(F(0, 0), 5.0, 5.1), Span(B(0, 0), 5.35, 5.5)],
                         [Span(F(0, 1), 5.1, 5.2), Span(B(0, 1), 5.2, 5.3)]], [1, 1])
    assert measured.makespan == pytest.approx(0.5)
    assert text(measured, 20).splitlines() == ["stage 0 |F0 ........B0  |", "stage 1 |...F0 B0 ......|"]
    assert measured.bubble == pytest.approx(1 - 0.45 / 1)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    both = {"simulated": simulate(zb_v, 2, 4), "measured": simulate(one_f_one_b, 2, 4, forward=1.3)}
    for name in "timeline.svg", "timeline.png":
        picture(both, tmp_path / name)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(tmp_path / "timeline.svg").getroot().tag.endswith("svg")  # noqa: S314


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mpiml\[draw\]'"):
        picture({"one": simulate(gpipe, 2, 2)}, tmp_path / "timeline.png")


def command(*words):
    return subprocess.run([sys.executable, "-m", "mpiml", *words], capture_output=True, text=True, timeout=60)


def test_the_command_draws(tmp_path):
    pytest.importorskip("matplotlib")
    run = command("draw", "interleaved", "4", "8", "--chunks", "3", "--out", str(tmp_path / "timeline.svg"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("stage ") == 4
    assert "bubble 11.1%" in run.stdout
    assert "alive at most 5, 4.33333, 3.66667, 3\n" in run.stdout
    assert (tmp_path / "timeline.svg").exists()
    plain = command("draw", "one_f_one_b", "2", "3", "--backward", "0.5", "--weight", "0.5")
    assert plain.stdout.startswith("stage 0 |F0")
    assert "mpi4py" not in plain.stderr


@pytest.mark.parametrize("words, message", [
    (["gpipe", "0", "3"], "a whole number above 0, not 0"),
    (["pipedream", "2", "3"], "invalid choice: 'pipedream'"),
    (["gpipe", "2", "3", "--chunks", "2"], "--chunks belongs to the interleaved schedule, not to gpipe"),
    (["gpipe", "2", "3", "--out", "no/such/folder/a.svg"], "No such file or directory"),
    (["gpipe", "2", "3", "--forward", "-1"], "argument --forward: a time is 0 or more, not -1"),
])
def test_the_command_explains_what_is_wrong(words, message):
    run = command("draw", *words)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_drawing_needs_no_mpi():
    code = ("import sys; sys.modules['mpi4py'] = None; import mpiml.schedule as s; "
            "print(s.text(s.simulate(s.gpipe, 2, 2)))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("stage 0"), run.stderr


def test_the_lists_of_all_stages():
    assert orders(gpipe, 2, 1) == [[F(0, 0), B(0, 0)], [F(0, 1), B(0, 1)]]
