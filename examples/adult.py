"""Who earns more than 50,000 dollars a year? A dense network on a table of people (the Adult data set, Kohavi 1996).

    mpirun -n 2 python examples/adult.py --data FOLDER      # with adult-train.csv and adult-test.csv; or set MPIML_DATA
"""


from mpiml.arguments import count, new_file
from mpiml.data import Features, Labels, clean, find, read_csv, split
from mpiml.fit import Best, EarlyStopping, fit
from mpiml.metrics import correct
from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam
from mpiml.parallel import ArgumentParser, Grid, evaluate, place

NAMES = ["age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
         "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"]

parser = ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="FOLDER", help="with adult-train.csv and adult-test.csv; default: $MPIML_DATA")
parser.add_argument("--epochs", type=count, default=30, help="at most (default %(default)s)")
parser.add_argument("--batch", type=count, default=256, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default %(default)s)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lanes", type=count, default=8,
                    help="pieces of each batch: the same bits on up to so many ranks (default %(default)s)")
parser.add_argument("--save", type=new_file, metavar="FILE",
                    help="write the model to this safetensors file, for python -m mpiml predict")
args = parser.parse_args()
try:
    files = [find(name, args.data) for name in ("adult-train.csv", "adult-test.csv")]
except FileNotFoundError as error:
    parser.error(str(error))

grid = Grid(lanes=args.lanes)
labels = Labels("income", ["<=50K", ">50K"])


def say(*lines):
    if grid.rank == 0:
        print(*lines, sep="\n", flush=True)


def load(path):
    """This rank's share of a table."""
    table = read_csv(path, NAMES, grid=grid)
    table = table.map("income", lambda text: text.rstrip("."))  # in the test file, a full stop follows
    table, report = clean(table, "income", labels.classes, grid=grid)
    say(*report)
    return table


def arrays(table):
    """Features and labels of all ranks' rows."""
    return grid.rows(features.encode(table)), grid.rows(labels.encode(table))


known, test = map(load, files)
train, validation = (known[rows] for rows in split(known["income"], (0.9, 0.1), args.seed, grid))
# A country that nobody in the training rows comes from is none of their countries.
features = Features.fit(train, without=["income"], unknown="ignore", grid=grid)

model = place(Sequential(Linear(len(features.names), 128), relu, Linear(128, 64), relu, Linear(64, 2)), grid, args.seed)
say(f"{len(features.names)} features, {len(model.vector)} parameters, {grid.size} ranks, batch {args.batch}")
fit(model, cross_entropy, arrays(train), grid, Adam(model, lr=args.lr), batch=args.batch, epochs=args.epochs, seed=args.seed,
    validation=arrays(validation), metrics={"accuracy": correct},
    callbacks=[Best("validation loss"), EarlyStopping("validation loss", patience=4)])
found = evaluate(model, *arrays(test), {"loss": cross_entropy, "accuracy": correct}, grid)
say(f"test loss {found['loss']:.4f}, accuracy {found['accuracy']:.4f}")
if args.save and grid.rank == 0:
    from mpiml.save import save
    save(model, args.save, about={"input": features.settings(), "target": labels.settings(), "csv": {"names": NAMES}})
