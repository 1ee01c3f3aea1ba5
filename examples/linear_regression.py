"""How heavy is a penguin? Linear regression by gradient descent, in float64 until it stands still, beside the closed form.

    mpirun -n 2 python examples/linear_regression.py --data FOLDER    # with penguins.csv; or set MPIML_DATA

Without data, it takes penguins that are made up.
"""


import numpy as np

from mpiml.arguments import count, new_file
from mpiml.data import Features, Number, Table, clean, find, read_csv
from mpiml.fit import EarlyStopping, fit
from mpiml.nn import Linear, Sequential
from mpiml.ops import mse_loss
from mpiml.optim import SGD
from mpiml.parallel import ArgumentParser, Grid, place, predict
from mpiml.random import generator

parser = ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="FOLDER", help="with penguins.csv; default: $MPIML_DATA, or made-up numbers")
parser.add_argument("--epochs", type=count, default=2000, help="at most (default %(default)s)")
parser.add_argument("--lr", type=float, default=0.2, help="learning rate (default %(default)s)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--save", type=new_file, metavar="FILE",
                    help="write the model to this safetensors file, for python -m mpiml predict")
args = parser.parse_args()

MEASURES, MASS = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm"], "body_mass_g"


def made_up(n=300):
    """A table of random penguins, the heavier the longer and deeper they are."""
    size, *noise = generator(args.seed, "penguins").normal(size=(5, n))
    typical = {"bill_length_mm": (44, 5), "bill_depth_mm": (17, 2), "flipper_length_mm": (201, 14), MASS: (4200, 800)}
    return Table({name: (mean + deviation * (0.8 * size + 0.6 * own)).round(1).tolist()
                  for (name, (mean, deviation)), own in zip(typical.items(), noise, strict=True)})


grid = Grid()


def say(*lines):
    if grid.rank == 0:
        print(*lines, sep="\n", flush=True)


try:
    table = read_csv(find("penguins.csv", args.data))  # so small a table each rank reads as a whole
except FileNotFoundError as error:
    if args.data:
        parser.error(str(error))
    table = made_up()
    say("no penguins.csv was named (--data FOLDER): these penguins are made up")
table, report = clean(table, MASS)
say(*report)
features = Features.fit(table, MEASURES, dtype="float64")
mass = Number.fit(table, MASS)
x, y = features.encode(table), mass.encode(table, dtype="float64")

model = place(Sequential(Linear(len(MEASURES), 1)), grid, args.seed, "float64")
history = fit(model, mse_loss, (x, y), grid, SGD(model, lr=args.lr), batch=len(x), epochs=args.epochs, say=None,
              callbacks=[EarlyStopping("loss", patience=10)])
for epoch in history[::20]:
    say(f"step {epoch['step']}: loss {epoch['loss']:.12f}")
say(f"step {history[-1]['step']}: loss {history[-1]['loss']:.12f}")

exact, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y)  # what makes the sum of squares the smallest
learnt = np.append(*(parameter.value for parameter in model.named().values()))
for name, by_descent, by_algebra in zip([*MEASURES, "bias"], learnt, exact[:, 0], strict=True):
    say(f"{name}: {by_descent:+.9f}, closed form {by_algebra:+.9f}")
error = mass.decode(predict(model, x, grid)) - table.numbers(MASS)
say(f"largest difference {np.abs(learnt - exact[:, 0]).max():.1e}; off by {np.sqrt(np.mean(error**2)):.1f} g (root of the mean "
    f"square), R2 {1 - np.mean(error**2) / mass.deviation**2:.4f}")
if args.save and grid.rank == 0:
    from mpiml.save import save
    save(model, args.save, about={"input": features.settings(), "target": mass.settings()})
