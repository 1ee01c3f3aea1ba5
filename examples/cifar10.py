"""Photographs of ten kinds of things (CIFAR-10), told apart by a ResNet-20 or a small DenseNet.

    mpirun -n 2 python examples/cifar10.py --data FOLDER
    mpirun -n 2 python examples/cifar10.py --model densenet --run run    # keeps a log and checkpoints in the folder "run"
"""

from functools import partial
from hashlib import sha256

from mpiml.arguments import count, new_file
from mpiml.data import Labels, cifar10, colors, crop_and_flip
from mpiml.fit import fit
from mpiml.metrics import correct
from mpiml.nn import AvgPool2d, BatchNorm2d, Concatenate, Conv2d, Flatten, Linear, Residual, Sequential
from mpiml.ops import cross_entropy, identity, relu
from mpiml.optim import SGD, cosine, warmup
from mpiml.parallel import ArgumentParser, Grid, place

parser = ArgumentParser(description=__doc__)
parser.add_argument("--model", choices=["resnet20", "densenet"], default="resnet20")
parser.add_argument("--epochs", type=count, default=15)
parser.add_argument("--batch", type=count, default=64, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate (default %(default)s)")
parser.add_argument("--data", metavar="FOLDER", help="with the binary files; default: $MPIML_DATA, cache, download")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lanes", type=count, help="pieces of each batch: with them, the same bits on any number of ranks")
parser.add_argument("--save", type=new_file, metavar="FILE", help="write the model to this file, for python -m mpiml predict")
parser.add_argument("--run", metavar="FOLDER", help="keep a log and checkpoints in this folder")
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in it, if there is one")
args = parser.parse_args()
if args.resume and not args.run:
    parser.error("--resume needs --run FOLDER")


KINDS = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"


def norm(channels):
    # Statistics of 16 samples, whatever the batch and the number of ranks that share it.
    return BatchNorm2d(channels, samples=16)


def conv(given, made, size=3, stride=1):
    return Conv2d(given, made, size, stride, padding=size // 2, bias=False)


def resnet20(classes=10):
    """He et al. 2016, "Deep residual learning for image recognition", section 4.2."""
    layers, given = [conv(3, 16), norm(16), relu], 16
    for made in 16, 32, 64:
        for _ in range(3):
            stride = made // given
            body = Sequential(conv(given, made, 3, stride), norm(made), relu, conv(made, made), norm(made))
            shortcut = Sequential(conv(given, made, 1, stride), norm(made)) if stride > 1 else identity
            layers += [Residual(body, shortcut), relu]
            given = made
    return Sequential(*layers, AvgPool2d(8), Flatten(), Linear(given, classes))


def densenet(classes=10, growth=12, depth=4):
    """Huang et al. 2017, "Densely connected convolutional networks": three blocks, half of the channels go on between them."""
    channels = 2 * growth
    layers = [conv(3, channels)]
    for block in range(3):
        if block:
            layers += [norm(channels), relu, conv(channels, channels // 2, 1), AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers += [Concatenate(identity, Sequential(norm(channels), relu, conv(channels, growth)))]
            channels += growth
    return Sequential(*layers, norm(channels), relu, AvgPool2d(8), Flatten(), Linear(channels, classes))


grid = Grid(lanes=args.lanes)
(x, y), test = cifar10(args.data, grid)
steps = -(-len(x) // args.batch)  # in an epoch
rise = 2 * steps if args.epochs > 2 else 1
model = place({"resnet20": resnet20, "densenet": densenet}[args.model](), grid, args.seed)
rate = warmup(cosine(args.lr, args.epochs * steps - rise), rise)
optimizer = SGD(model, rate, momentum=0.9, weight_decay=5e-4)
if grid.rank == 0:
    print(f"{len(x)} photographs, {args.model} of {len(model.vector)} parameters, {grid.size} ranks, batch {args.batch}",
          flush=True)
history = fit(model, cross_entropy, (x, y), grid, optimizer, batch=args.batch, epochs=args.epochs, seed=args.seed,
              validation=test, metrics={"accuracy": correct}, transform=colors,
              augment=partial(crop_and_flip, seed=args.seed), run=args.run, resume=args.resume,
              settings={"model": args.model, "epochs": args.epochs})
if args.save and grid.rank == 0:
    from mpiml.save import save
    save(model, args.save, {"input": {"kind": "colors", "shape": x.shape[1:]}, "target": Labels("kind", KINDS).settings()})
if grid.rank == 0:
    if args.lanes:
        print(f"weights {sha256(model.vector).hexdigest()}")
    print(f"accuracy {history[-1]['validation accuracy']:.4f}")
