"""Data-parallel training on MNIST: every rank holds the whole model and a share of each batch.

    mpirun -n 8 python examples/mnist_dp.py
    mpirun -n 8 python examples/mnist_dp.py --model cnn --data FOLDER
    mpirun -n 8 python examples/mnist_dp.py --checkpoint FOLDER --resume    # goes on where it was stopped
"""

import argparse
from hashlib import sha256
from pathlib import Path
from time import perf_counter

from mpiml.data import batches, mnist, pixels
from mpiml.metrics import correct
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam, cosine
from mpiml.parallel import Grid, Watch, evaluate, gradient, place, progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch", type=int, default=128, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=2e-3, help="first learning rate (default %(default)s)")
parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
parser.add_argument("--data", metavar="FOLDER", help="with the MNIST IDX files; default: $MPIML_DATA, cache, download")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
parser.add_argument("--lanes", type=int, help="pieces of each batch: with them, the same bits on any number of ranks")
parser.add_argument("--save", metavar="FILE", help="write the weights to this safetensors file at the end")
parser.add_argument("--checkpoint", metavar="FOLDER", help="keep checkpoints in this folder")
parser.add_argument("--every", type=int, metavar="STEPS", help="steps from one checkpoint to the next (default: 10 minutes)")
parser.add_argument("--resume", nargs="?", type=int, const=0, metavar="STEP",
                    help="go on from the newest checkpoint, if there is one, or from that of this step")
args = parser.parse_args()
if args.epochs < 1:
    parser.error(f"--epochs must be 1 at least, not {args.epochs}")
if not args.checkpoint and (args.resume is not None or args.every):
    parser.error("--resume and --every need --checkpoint FOLDER")
if args.save and not Path(args.save).absolute().parent.is_dir():
    parser.error(f"--save {args.save}: there is no such folder")


def mlp(height, width):
    return Sequential(Flatten(), Linear(height * width, 128), relu, Linear(128, 64), relu, Linear(64, 10))


def cnn(height, width):
    return Sequential(
        Conv2d(1, 16, 3, padding=1), relu, MaxPool2d(2),
        Conv2d(16, 32, 3, padding=1), relu, MaxPool2d(2),
        Flatten(), Linear(32 * (height // 4) * (width // 4), 64), relu, Linear(64, 10))


grid = Grid(lanes=args.lanes)
(x, y), (x_test, y_test) = mnist(args.data, grid)
in_epoch = len(batches(x, y, args.batch, grid=grid))
steps = args.epochs * in_epoch

model = place({"mlp": mlp, "cnn": cnn}[args.model](*x.shape[2:]), grid, args.seed, args.dtype)
optimizer = Adam(model, lr=cosine(args.lr, steps))
watch = Watch()
step = gradient(model, cross_entropy, grid, watch=watch)


def prepare(images):
    return pixels(images).astype(args.dtype, copy=False)


def say(text):
    if grid.rank == 0:
        print(text, flush=True)


say(f"{len(x)} digits, {args.model} of {len(model.vector)} parameters, {grid.size} ranks, batch {args.batch}")
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

if args.lanes:
    say(f"weights {sha256(model.vector).hexdigest()}")
times = watch.report(grid)
if args.save and grid.rank == 0:
    from mpiml.save import save
    save(model, args.save)
say(f"accuracy {test['accuracy']:.4f}, {(steps - first) / in_epoch * len(x) / training:,.0f} samples/s\n{times}")
