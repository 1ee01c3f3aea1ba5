"""Training on MNIST with the model cut into stages: a pipeline, or several of them side by side.

    mpirun -n 4 python examples/mnist_hybrid.py                       # 4 stages
    mpirun -n 8 python examples/mnist_hybrid.py --pipe 4              # 2 replicas of 4 stages
    mpirun -n 2 python examples/mnist_hybrid.py --model cnn --schedule zb_h1 --draw timeline.svg --trace trace.json
    mpirun -n 4 python examples/mnist_hybrid.py --run FOLDER --resume    # goes on where it was stopped
"""

import math
from pathlib import Path

from mpiml.arguments import count, new_file
from mpiml.data import Labels, mnist, pixels
from mpiml.fit import fit
from mpiml.metrics import correct
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD, cosine
from mpiml.parallel import ArgumentParser, Grid, Watch, place, profile
from mpiml.schedule import SCHEDULES

parser = ArgumentParser(description=__doc__)
parser.add_argument("--pipe", type=count, help="stages (default: 4, 2 or 1, what the number of ranks is a multiple of)")
parser.add_argument("--microbatches", type=count, help="in each replica's share of a batch (default: 2 for each stage)")
parser.add_argument("--lanes", type=count, help="pieces of each batch, instead: with them, the same bits on any grid")
parser.add_argument("--schedule", choices=SCHEDULES, default="one_f_one_b")
parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
parser.add_argument("--epochs", type=count, default=5)
parser.add_argument("--batch", type=count, default=128, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=0.02, help="first learning rate (default %(default)s)")
parser.add_argument("--data", metavar="FOLDER", help="with the MNIST IDX files; default: $MPIML_DATA, cache, download")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
parser.add_argument("--draw", type=new_file, metavar="FILE",
                    help="write a picture of a step, simulated and measured (.svg, .png)")
parser.add_argument("--trace", type=new_file, metavar="FILE", help="write what all ranks did, for ui.perfetto.dev")
parser.add_argument("--save", type=new_file, metavar="FILE", help="write the model to this safetensors file at the end")
parser.add_argument("--run", metavar="FOLDER", help="keep a log, and checkpoints to go on from, in this folder")
parser.add_argument("--every", type=count, metavar="STEPS", help="steps from one checkpoint to the next (default: 10 minutes)")
parser.add_argument("--resume", nargs="?", type=int, const=True, default=False, metavar="STEP",
                    help="go on from the newest checkpoint, if there is one, or from that of this step")
args = parser.parse_args()
if args.lanes and args.microbatches:
    parser.error("--lanes are the micro-batches of the whole batch: leave out --microbatches")
if not args.run and (args.resume or args.every):
    parser.error("--resume and --every need --run FOLDER")
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
(x, y), test = mnist(args.data, grid)
model = {"mlp": mlp, "cnn": cnn}[args.model](*x.shape[2:])
microbatches = args.microbatches
if microbatches is None and not args.lanes:
    microbatches = 2 * grid.pipe if grid.pipe > 1 else 1

sample = slice(max(1, args.batch // (args.lanes or grid.data * max(1, microbatches))))  # a micro-batch
costs = profile(model, prepare(x[sample]), grid, cross_entropy, y[sample], dtype=args.dtype)
model = place(model, grid, args.seed, args.dtype, SCHEDULES[args.schedule], balance=costs)
say(f"{len(x)} digits, {args.model}, batch {args.batch}, {grid.data} x {grid.pipe} ranks (data x pipe), "
    f"{f'{args.lanes} lanes' if args.lanes else f'{microbatches} micro-batches'}, {args.schedule}\n{model.report()}")

# Not Adam, which makes steps of full size out of gradients that are nothing but rounding errors: with SGD the weights of
# different grids can be compared even without lanes.
optimizer = SGD(model, lr=cosine(args.lr, args.epochs * -(-len(x) // args.batch)), momentum=0.9)
watch = Watch()
history = fit(model, cross_entropy, (x, y), grid, optimizer, batch=args.batch, epochs=args.epochs, seed=args.seed,
              validation=test, metrics={"accuracy": correct}, transform=prepare, microbatches=microbatches, watch=watch,
              run=args.run, resume=args.resume, every=args.every, settings={"model": args.model})

weights = model.collect()
if args.save and grid.rank == 0:
    from mpiml.save import save
    about = {"input": {"kind": "pixels", "shape": x.shape[1:]}, "target": Labels("digit", map(str, range(10))).settings()}
    save(model, args.save, about, weights)
times = watch.report(grid)
if not watch.steps:
    say("the training had come to its end before: there is nothing to draw")
    raise SystemExit
timelines = watch.draw(grid, args.draw)
if args.trace:
    watch.trace(grid, args.trace)
rate = len(history) * len(x) / sum(epoch["seconds"] for epoch in history)
say(f"{timelines}\naccuracy {history[-1]['validation accuracy']:.4f}, {rate:,.0f} samples/s\n{times}")
