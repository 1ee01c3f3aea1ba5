"""The programs in the README and in docs/ run as they stand there."""

import os
import re
import subprocess
import sys

import pytest
from launch import ROOT, environment, mpirun

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9"}

FAULTS = {  # the first words of each row of the table "If something goes wrong": the tests of what it says
    "a wrong option": "test_launch.test_wrong_options_are_explained_once",
    "an exception on one rank": "test_launch.test_a_failing_rank_ends_the_job test_killed.test_a_job_that_is_disturbed",
    "`sys.exit(n)`": "test_launch.test_sys_exit_on_one_rank_ends_the_job_with_its_status",
    "a rank leaves the program": "test_launch.test_ranks_that_part_company_do_not_hang",
    "ranks do different things": "test_launch.test_ranks_that_part_company_do_not_hang "
                                 "test_killed.test_a_job_that_is_disturbed",
    "a rank is killed or crashes": "test_launch.test_ranks_that_part_company_do_not_hang test_restart.test_a_killed_job "
                                   "test_launch.test_training_outlives_ranks",
    "a rank is late": "test_launch.test_the_watchdog_tells_who_is_late test_killed.test_a_job_that_is_disturbed",
    "a rank fails before": "test_launch.test_a_rank_that_fails_before_it_starts_mpi",
    "a checkpoint cannot be written": "test_checkpoint.test_a_full_disk test_killed.test_a_job_that_is_disturbed",
    "all is killed": "test_killed.test_a_job_that_is_disturbed test_restart.test_training_that_is_killed",
    "a batch makes the loss": "test_launch.test_a_failing_rank_ends_the_job test_parallel.test_a_nan_is_reported_by_all",
    "ranks were given different": "test_parallel.test_ranks_that_differ_are_told_so "
                                  "test_parallel.test_weights_and_data_that_differ_are_refused",
}

pytestmark = pytest.mark.launch


def programs(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


README = programs("README.md")


def blocked(module):
    return f"import sys; sys.modules[{module!r}] = None\n"


def test_the_serial_program_runs_without_mpi4py(tmp_path):
    run = subprocess.run([sys.executable, "-c", blocked("mpi4py") + README[0]], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120, env=environment(XDG_CACHE_HOME=str(tmp_path), **OFFLINE))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.removeprefix("accuracy")) > 0.88


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_parallel_program(ranks, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(README[1])
    run = mpirun(ranks, str(path), env=environment(XDG_CACHE_HOME=str(tmp_path), **OFFLINE))
    assert run.code == 0, run.err
    assert float(re.fullmatch(r"\{'accuracy': (\S+)\}\n", run.out)[1]) > 0.88


def test_the_program_with_fit(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(README[2].replace('"run"', repr(str(tmp_path / "run"))))
    run = mpirun(2, str(path), env=environment(XDG_CACHE_HOME=str(tmp_path), **OFFLINE))
    assert run.code == 0, run.err
    first, *_, last = run.out.splitlines()
    assert first.startswith("epoch 1: loss ") and float(last) > 0.85
    assert {"best.safetensors", "latest", "log.jsonl", "timeline.json"} <= set(os.listdir(tmp_path / "run"))


def test_the_hybrid_program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(programs("docs/pipelines.md")[0])
    run = mpirun(4, str(path), env=environment(XDG_CACHE_HOME=str(tmp_path), **OFFLINE))
    assert run.code == 0, run.err
    assert float(re.match(r"\{'accuracy': (\S+)\}\n", run.out)[1]) > 0.85
    assert run.out.count("stage 0") == 3


def test_the_schedule_of_ones_own():
    program = programs("docs/pipelines.md")[1]
    run = subprocess.run([sys.executable, "-c", blocked("mpi4py") + program], capture_output=True, text=True, timeout=60)
    *drawn, numbers = run.stdout.splitlines()
    assert len(drawn) == 4 and drawn[0].startswith("stage 0 |F0 F1")
    assert float(numbers.split()[0]) == pytest.approx(3 / 11) and "[8, 8, 8, 8]" in numbers, run.stderr


def test_the_drawn_timelines():
    drawing = re.compile(r"^\$ python (-m mpiml draw .*)\n((?:[^`\n]+\n)+)", re.M)
    drawings = {match for page in PAGES for match in drawing.findall(page.read_text())}
    assert len(drawings) == 2
    for command, drawn in drawings:
        words = command.split(" --out")[0].split()
        run = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
        assert run.stdout == drawn


def test_the_program_with_checkpoints(tmp_path):
    path, folder = tmp_path / "program.py", tmp_path / "run"
    program = programs("docs/checkpoints.md")[0].replace('"run"', repr(str(folder)))
    for ranks, text in (2, program.replace("length, 5)", "length, 1)")), (3, program):
        path.write_text(text)
        run = mpirun(ranks, str(path), env=environment(XDG_CACHE_HOME=str(tmp_path), **OFFLINE))
        assert run.code == 0, run.err
    steps = sorted(int(name.removeprefix("step_")) for name in os.listdir(folder) if name != "latest")
    assert len(steps) == 2 and steps[1] == 5 * steps[0] and f"step_{steps[1]}\n" == (folder / "latest").read_text()


@pytest.mark.parametrize("block, printed", [(-3, "[1.         0.54030231]\n"), (-2, "[2. 2. 2.]\n"), (-1, "[[1. 0.]]\n")])
def test_the_new_op_the_new_layer_and_the_compiled_loop(block, printed):
    run = subprocess.run([sys.executable, "-c", README[block]], capture_output=True, text=True, timeout=120,
                         env=environment())
    assert run.stdout == printed, run.stderr


@pytest.mark.parametrize("page, block, printed", [
    ("applications.md", 0, "[1 0 0]\n"), ("runs.md", 0, "(2, 2)\n")])
def test_tables_and_saved_models(page, block, printed, tmp_path):
    run = subprocess.run([sys.executable, "-c", programs(f"docs/{page}")[block]], capture_output=True, text=True, timeout=120,
                         env=environment(), cwd=tmp_path)
    assert run.stdout.endswith(printed), run.stdout + run.stderr


def test_the_printed_program():
    page = (ROOT / "docs/replay.md").read_text()
    printed = re.search(r"\n```\n(def forward.*?)```\n", page, re.DOTALL)[1]
    run = subprocess.run([sys.executable, "-c", programs("docs/replay.md")[0]], capture_output=True, text=True, timeout=120,
                         env=environment())
    assert run.stdout == printed, run.stdout + run.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if not target.startswith("http"):
                path, _, heading = target.partition("#")
                assert not path or (page.parent / path).exists(), f"{page.name}: {target}"
                headings = re.findall(r"^#+ (.*)", (page.parent / path if path else page).read_text(), re.M)
                assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


def test_each_fault_that_is_promised_an_end_has_a_test():
    table = re.search(r"\| what happens .*\n.*\n((?:\|.*\n)+)", (ROOT / "docs/faults.md").read_text())[1]
    for row in table.splitlines():
        tests = [tests for words, tests in FAULTS.items() if row.startswith(f"| {words}")]
        assert len(tests) == 1, row
        for test in tests[0].split():
            file, name = test.split(".")
            assert f"def {name}" in (ROOT / "tests" / f"{file}.py").read_text(), test
