"""Which species is a penguin of? A small dense network on the measurements of 344 of them (Horst, Hill and Gorman 2020).

    mpirun -n 2 python examples/penguins.py --data FOLDER      # with penguins.csv; or set MPIML_DATA
"""


from mpiml.arguments import count, new_file
from mpiml.data import Features, Labels, clean, find, read_csv, split
from mpiml.fit import Best, EarlyStopping, fit
from mpiml.metrics import correct
from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam
from mpiml.parallel import ArgumentParser, Grid, evaluate, place

parser = ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="FOLDER", help="with penguins.csv; default: $MPIML_DATA")
parser.add_argument("--epochs", type=count, default=60, help="at most (default %(default)s)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lanes", type=count, default=8,
                    help="pieces of each batch: the same bits on up to so many ranks (default %(default)s)")
parser.add_argument("--save", type=new_file, metavar="FILE",
                    help="write the model to this safetensors file, for python -m mpiml predict")
args = parser.parse_args()
try:
    file = find("penguins.csv", args.data)
except FileNotFoundError as error:
    parser.error(str(error))

grid = Grid(lanes=args.lanes)


def say(*lines):
    if grid.rank == 0:
        print(*lines, sep="\n", flush=True)


table, report = clean(read_csv(file, grid=grid), "species", grid=grid)
say(*report)
# Each rank has a share of the rows, and of each part the rows that are in its share.
parts = split(table["species"], (0.6, 0.2, 0.2), args.seed, grid)
train, validation, test = (table[rows] for rows in parts)
features = Features.fit(train, without=["species"], grid=grid)
labels = Labels.fit(train, "species", grid=grid)


def arrays(table):
    """Features and labels of all ranks' rows."""
    return grid.rows(features.encode(table)), grid.rows(labels.encode(table))


model = place(Sequential(Linear(len(features.names), 16), relu, Linear(16, len(labels.classes))), grid, args.seed)
say(f"{', '.join(features.names)} -> {', '.join(labels.classes)}")
fit(model, cross_entropy, arrays(train), grid, Adam(model, lr=3e-3), batch=32, epochs=args.epochs, seed=args.seed,
    validation=arrays(validation), metrics={"accuracy": correct},
    callbacks=[Best("validation loss"), EarlyStopping("validation loss", patience=10)])
found = evaluate(model, *arrays(test), {"loss": cross_entropy, "accuracy": correct}, grid)
say(f"test loss {found['loss']:.4f}, accuracy {found['accuracy']:.4f}")
if args.save and grid.rank == 0:
    from mpiml.save import save
    save(model, args.save, about={"input": features.settings(), "target": labels.settings()})
