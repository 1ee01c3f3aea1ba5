"""Training on MNIST with the model cut into stages: a pipeline, or several of them side by side.

    mpirun -n 4 python examples/mnist_hybrid.py                       # 4 stages
    mpirun -n 8 python examples/mnist_hybrid.py --pipe 4              # 2 replicas of 4 stages
    mpirun -n 2 python examples/mnist_hybrid.py --model cnn --schedule zb_h1 --draw timeline.svg --trace trace.json
    mpirun -n 4 python examples/mnist_hybrid.py --checkpoint FOLDER --resume    # goes on where it was stopped
"""

import argparse
import math
from pathlib import Path
from time import perf_counter

from mpiml.data import Labels, batches, mnist, pixels
from mpiml.metrics import correct
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD, cosine
from mpiml.parallel import Grid, Watch, evaluate, gradient, place, profile, progress
from mpiml.schedule import SCHEDULES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pipe", type=int, help="stages (default: 4, 2 or 1, what the number of ranks is a multiple of)")
parser.add_argument("--microbatches", type=int, help="in each replica's share of a batch (default: 2 for each stage)")
parser.add_argument("--lanes", type=int, help="pieces of each batch, instead: with them, the same bits on any grid")
parser.add_argument("--schedule", choices=SCHEDULES, default="one_f_one_b")
parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch", type=int, default=128, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=0.02, help="first learning rate (default %(default)s)")
parser.add_argument("--data", metavar="FOLDER", help="with the MNIST IDX files; default: $MPIML_DATA, cache, download")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
parser.add_argument("--draw", metavar="FILE", help="write a picture of a step, simulated and measured (.svg, .png)")
parser.add_argument("--trace", metavar="FILE", help="write what all ranks did, for ui.perfetto.dev")
parser.add_argument("--save", metavar="FILE", help="write the model to this safetensors file at the end")
parser.add_argument("--checkpoint", metavar="FOLDER", help="keep checkpoints in this folder")
parser.add_argument("--every", type=int, metavar="STEPS", help="steps from one checkpoint to the next (default: 10 minutes)")
parser.add_argument("--resume", nargs="?", type=int, const=0, metavar="STEP",
                    help="go on from the newest checkpoint, if there is one, or from that of this step")
args = parser.parse_args()
if args.epochs < 1:
    parser.error(f"--epochs must be 1 at least, not {args.epochs}")
if args.lanes and args.microbatches:
    parser.error("--lanes are the micro-batches of the whole batch: leave out --microbatches")
if not args.checkpoint and (args.resume is not None or args.every):
    parser.error("--resume and --every need --checkpoint FOLDER")
for file in args.draw, args.trace, args.save:
    if file and not Path(file).absolute().parent.is_dir():
        parser.error(f"{file}: there is no such folder")
if args.draw and Path(args.draw).suffix not in (".svg", ".png", ".pdf"):
    parser.error(f"--draw {args.draw}: a picture ends in .svg, .png or .pdf")


def mlp(height, width):
    return Sequential(Flatten(), Linear(height * width, 128), relu, Linear(128, 64), relu, Linear(64, 10))


def cnn(height, width):
    return Sequential(
        Conv2d(1, 16, 3, padding=1), relu, MaxPool2d(2),
        Conv2d(16, 32, 3, padding=1), relu, MaxPool2d(2),
        Flatten(), Linear(32 * (height // 4) * (width // 4), 64), relu, Linear(64, 10))


def prepare(images):
    return pixels(images).astype(args.dtype, copy=False)


def say(text):
    if grid.rank == 0:
        print(text, flush=True)


grid = Grid(pipe=args.pipe or math.gcd(4, Grid().size), lanes=args.lanes)
(x, y), (x_test, y_test) = mnist(args.data, grid)
model = {"mlp": mlp, "cnn": cnn}[args.model](*x.shape[2:])
microbatches = args.microbatches
if microbatches is None and not args.lanes:
    microbatches = 2 * grid.pipe if grid.pipe > 1 else 1

sample = slice(max(1, args.batch // (args.lanes or grid.data * max(1, microbatches))))  # a micro-batch
costs = profile(model, prepare(x[sample]), grid, cross_entropy, y[sample], dtype=args.dtype)
model = place(model, grid, args.seed, args.dtype, SCHEDULES[args.schedule], balance=costs)
say(f"{len(x)} digits, {args.model}, batch {args.batch}, {grid.data} x {grid.pipe} ranks (data x pipe), "
    f"{f'{args.lanes} lanes' if args.lanes else f'{microbatches} micro-batches'}, {args.schedule}\n{model.report()}")

in_epoch = len(batches(x, y, args.batch, grid=grid))
steps = args.epochs * in_epoch
# Not Adam, which makes steps of full size out of gradients that are nothing but rounding errors: with SGD the weights of
# different grids can be compared even without lanes.
optimizer = SGD(model, lr=cosine(args.lr, steps), momentum=0.9)
watch = Watch()
step = gradient(model, cross_entropy, grid, microbatches, watch=watch)
# Loads or compiles the kernels, which is not training's time.
step(*next(iter(batches(x, y, args.batch, grid=grid, transform=prepare))))
total, training = 0.0, 0.0
if args.checkpoint:
    from mpiml.save import Checkpoints
    settings = {"model": args.model, "batch": args.batch, "seed": args.seed, "lanes": args.lanes}
    checkpoints = Checkpoints(args.checkpoint, optimizer, settings, every=args.every)
    if args.resume is not None:
        total = checkpoints.load(args.resume or None, total=total)["total"]
        say(f"{optimizer.steps} of {steps} steps are done")
first = optimizer.steps
watch.restart()
for epoch in range(first // in_epoch, args.epochs):
    start = perf_counter()
    share = batches(x, y, args.batch, epoch=epoch, seed=args.seed, grid=grid, transform=prepare,
                    start=optimizer.steps % in_epoch)
    for images, labels in progress(share, grid, f"epoch {epoch + 1}"):
        if optimizer.steps % in_epoch == 0:
            total = 0.0
        total += step(images, labels)
        optimizer.step()
        if args.checkpoint:
            checkpoints.step(total=total)
    seconds = perf_counter() - start
    training += seconds
    test = evaluate(model, x_test, y_test, {"loss": cross_entropy, "accuracy": correct}, grid, transform=prepare)
    say(f"epoch {epoch + 1}: loss {total / in_epoch:.6f}, test loss {test['loss']:.4f}, "
        f"test accuracy {test['accuracy']:.4f}, {len(x) * len(share) / in_epoch / seconds:,.0f} samples/s")
if first >= steps:
    raise SystemExit  # of a training that had come to its end there is nothing to tell
if args.checkpoint:
    checkpoints.save(total=total)

weights = model.collect()
if args.save and grid.rank == 0:
    from mpiml.save import save
    about = {"input": {"kind": "pixels", "shape": x.shape[1:]}, "target": Labels("digit", map(str, range(10))).settings()}
    save(model, args.save, about, weights)
times = watch.report(grid)
timelines = watch.draw(grid, args.draw)
if args.trace:
    watch.trace(grid, args.trace)
say(f"{timelines}\naccuracy {test['accuracy']:.4f}, {(steps - first) / in_epoch * len(x) / training:,.0f} samples/s\n{times}")
