"""Data-parallel training on MNIST: every rank holds the whole model and a share of each batch.

    mpirun -n 8 python examples/mnist_dp.py
    mpirun -n 8 python examples/mnist_dp.py --model cnn --data FOLDER
    mpirun -n 8 python examples/mnist_dp.py --run FOLDER --resume    # keeps a log and checkpoints; goes on where it was stopped
    mpirun -n 8 python examples/mnist_dp.py --save mnist.safetensors
    python -m mpiml predict mnist.safetensors images.npy
"""

from hashlib import sha256

from mpiml.arguments import count, new_file
from mpiml.data import Labels, mnist, pixels
from mpiml.fit import fit
from mpiml.metrics import correct
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam, cosine
from mpiml.parallel import ArgumentParser, Grid, Watch, place

parser = ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=count, default=5)
parser.add_argument("--batch", type=count, default=128, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=2e-3, help="first learning rate (default %(default)s)")
parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
parser.add_argument("--data", metavar="FOLDER", help="with the MNIST IDX files; default: $MPIML_DATA, cache, download")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
parser.add_argument("--lanes", type=count, help="pieces of each batch: with them, the same bits on any number of ranks")
parser.add_argument("--replay", action="store_true", help="repeat the step as a program: the same bits, a little faster")
parser.add_argument("--save", type=new_file, metavar="FILE", help="write the model to this safetensors file at the end")
parser.add_argument("--run", metavar="FOLDER", help="keep a log, and checkpoints to go on from, in this folder")
parser.add_argument("--every", type=count, metavar="STEPS", help="steps from one checkpoint to the next (default: 10 minutes)")
parser.add_argument("--resume", nargs="?", type=int, const=True, default=False, metavar="STEP",
                    help="go on from the newest checkpoint, if there is one, or from that of this step")
args = parser.parse_args()
if not args.run and (args.resume or args.every):
    parser.error("--resume and --every need --run FOLDER")


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


grid = Grid(lanes=args.lanes)
(x, y), test = mnist(args.data, grid)
model = place({"mlp": mlp, "cnn": cnn}[args.model](*x.shape[2:]), grid, args.seed, args.dtype)
steps = args.epochs * -(-len(x) // args.batch)
optimizer = Adam(model, lr=cosine(args.lr, steps))
say(f"{len(x)} digits, {args.model} of {len(model.vector)} parameters, {grid.size} ranks, batch {args.batch}")

watch = Watch()
history = fit(model, cross_entropy, (x, y), grid, optimizer, batch=args.batch, epochs=args.epochs, seed=args.seed,
              validation=test, metrics={"accuracy": correct}, transform=prepare, replay=args.replay, watch=watch,
              run=args.run, resume=args.resume, every=args.every, settings={"model": args.model})

if args.lanes:
    say(f"weights {sha256(model.vector).hexdigest()}")
if args.save and grid.rank == 0:
    from mpiml.save import save
    about = {"input": {"kind": "pixels", "shape": x.shape[1:]}, "target": Labels("digit", map(str, range(10))).settings()}
    save(model, args.save, about)
times = watch.report(grid)
rate = len(history) * len(x) / sum(epoch["seconds"] for epoch in history)
say(f"accuracy {history[-1]['validation accuracy']:.4f}, {rate:,.0f} samples/s\n{times}")
