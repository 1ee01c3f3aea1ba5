"""``python -m mpiml``: what mpiml can do without a program of yours."""

import argparse
import functools
import sys

from mpiml import check as findings
from mpiml import cores, patience, restart
from mpiml import report as reports
from mpiml.arguments import count, duration
from mpiml.kernels.warmup import warm_up
from mpiml.schedule import SCHEDULES, picture, simulate, text


def draw(args):
    """The timeline of a pipeline schedule, as text and, with --out, as a picture."""
    schedule = SCHEDULES[args.schedule]
    if args.chunks is not None:
        if args.schedule != "interleaved":
            raise ValueError(f"--chunks belongs to the interleaved schedule, not to {args.schedule}")
        schedule = functools.partial(schedule, chunks=args.chunks)
    timeline = simulate(schedule, args.stages, args.microbatches, args.forward, args.backward, args.weight, args.message)
    title = f"{args.schedule}, {args.stages} stages, {args.microbatches} micro-batches"
    print(text(timeline))
    held = [len({span.action.chunk for span in spans}) for spans in timeline.spans]
    alive = [f"{peak / chunks:g}" for peak, chunks in zip(timeline.peak, held, strict=True)]
    print(f"{title}: makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%}, "
          f"micro-batches alive at most {', '.join(alive)}")
    if args.out:
        picture({title: timeline}, args.out)


def warmup(args):
    """Compile all kernels for this CPU into the cache on disk, so that later runs start at once."""
    warm_up(args.dtype)


def check(args):
    """Find what is wrong with this machine or, under mpirun or srun, with this job, and say how to mend it."""
    speaks = not patience.launched_rank()
    found = findings.process() + (findings.machine() if cores.rank_on_node() == 0 else [])
    if speaks:
        print(findings.title())
        findings.show(found)  # before MPI starts, which may fail
    if not any(finding.topic == "MPI" and finding.mark != "ok" for finding in found):
        found = found + _job(found, speaks)
    if speaks:
        print(findings.verdict(found))
    sys.exit(speaks and any(finding.mark == "problem" for finding in found))


def _job(found, speaks):
    try:
        with findings.limited_start(speaks):
            from mpiml.parallel.check import job
    except ImportError as error:
        added = findings.problem("MPI", *str(error).split(": ", 1))
        findings.show(added if speaks else [])
        return added
    return job(found, speaks)


def run(args):
    """Run a job, such as mpirun -n 8 python train.py --run FOLDER --resume, and start it again if it fails."""
    sys.exit(restart.run(args.job, args.restarts, args.fewer))


def predict(args):
    """Predict, by a saved model, the class or the value of each row of a file: of a table (CSV), or of images (.npy).

    The probabilities of all classes come along. It runs alone, or under mpirun on any number of ranks.
    """
    from mpiml.predict import predict
    predict(args.model, args.source, args.out, args.only, args.force, args.pipe)


def report(args):
    """Show how a run of fit(..., run=FOLDER) goes or went, as a page for a browser or, with --text, here; or compare some."""
    runs = [reports.read(folder) for folder in args.folders]
    if args.text:
        print(reports.text(runs))
        return
    page = reports.page(runs)
    with open(args.out, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
        file.write(page)
    print(f"open {args.out} in a browser")


def main():
    parser = argparse.ArgumentParser(prog="python -m mpiml", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("draw", help=draw.__doc__, description=draw.__doc__)
    command.add_argument("schedule", choices=SCHEDULES, metavar="SCHEDULE", help=", ".join(SCHEDULES))
    command.add_argument("stages", type=count, metavar="STAGES")
    command.add_argument("microbatches", type=count, metavar="MICROBATCHES")
    command.add_argument("--chunks", type=count, help="chunks of the model on each stage (interleaved; default 2)")
    for name, what in ("forward", "a forward pass F"), ("backward", "the input's gradient B"), ("weight", "the weights' W"):
        command.add_argument(f"--{name}", type=duration, default=1.0, metavar="TIME", help=f"time of {what} (default 1)")
    command.add_argument("--message", type=duration, default=0.0, metavar="TIME", help="time of a message (default 0)")
    command.add_argument("--out", metavar="FILE", help="also write a picture: .svg, .png or .pdf")
    command.set_defaults(run=draw)
    command = commands.add_parser("warmup", help=warmup.__doc__, description=warmup.__doc__)
    command.add_argument("--dtype", nargs="+", choices=("float32", "float64"), default=("float32", "float64"),
                         help="float32, float64 or both (default)")
    command.set_defaults(run=warmup)
    command = commands.add_parser("check", help=check.__doc__, description=check.__doc__)
    command.set_defaults(run=check)
    command = commands.add_parser("run", help=run.__doc__, description=run.__doc__)
    command.add_argument("--restarts", type=count, default=3, metavar="N", help="how often (default %(default)s)")
    command.add_argument("--fewer", type=count, default=0, metavar="N", help="so many ranks less (-n) at each restart")
    command.add_argument("job", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the launcher's command")
    command.set_defaults(run=run)
    command = commands.add_parser("predict", help=predict.__doc__.splitlines()[0], description=predict.__doc__)
    command.add_argument("model", metavar="MODEL", help="a file of save(model, path, about)")
    command.add_argument("source", metavar="INPUT", help="what to predict of: a CSV file, or arrays (.npy)")
    command.add_argument("--out", metavar="OUTPUT", help="where to write (.csv, .npy); default: to the standard output, as CSV")
    command.add_argument("--only", action="store_true", help="leave out the input's own columns")
    command.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    command.add_argument("--pipe", type=count, default=1, metavar="P", help="stages to cut the model into (default 1)")
    command.set_defaults(run=predict)
    command = commands.add_parser("report", help=report.__doc__, description=report.__doc__)
    command.add_argument("folders", nargs="+", metavar="RUN", help="the folder of a run")
    command.add_argument("--out", default="report.html", metavar="FILE", help="where the page goes (default %(default)s)")
    command.add_argument("--text", action="store_true", help="the essentials, here, and no page")
    command.set_defaults(run=report)
    args = parser.parse_args()
    if args.run is run and not args.job:
        parser.error("run needs the command of a job")
    try:
        args.run(args)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"mpiml: {error}")


if __name__ == "__main__":
    main()
