"""Which kind of news is it: world, sports, business or science? A classifier of short texts (AG News, Zhang et al. 2015).

    mpirun -n 2 python examples/ag_news.py --data FOLDER                   # with ag_news_test.csv; or set MPIML_DATA
    mpirun -n 2 python examples/ag_news.py --model conv --save news.safetensors
"""

from functools import partial

from mpiml.arguments import count, new_file
from mpiml.data import Labels, TextFeatures, find, read_csv, split
from mpiml.fit import fit
from mpiml.metrics import correct
from mpiml.nn import Conv1d, Dropout, Embedding, EmbeddingBag, LayerNorm, Linear, Module, Positions, SelfAttention, Sequential
from mpiml.ops import cross_entropy, masked_mean, max, relu, transpose
from mpiml.optim import Adam, cosine
from mpiml.parallel import ArgumentParser, Grid, place

NAMES = ["class", "title", "description"]  # of the columns; the file has no header
KINDS = {"1": "world", "2": "sports", "3": "business", "4": "science"}

parser = ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="FOLDER", help="with ag_news_test.csv; default: $MPIML_DATA")
parser.add_argument("--model", choices=["bag", "conv", "attention"], default="bag")
parser.add_argument("--epochs", type=count, default=5)
parser.add_argument("--batch", type=count, default=64, help="samples per step, over all ranks (default %(default)s)")
parser.add_argument("--lr", type=float, help="first learning rate (default: 0.005, attention 0.002)")
parser.add_argument("--length", type=count, default=64, help="words of each text, the rest is cut off (default %(default)s)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lanes", type=count, help="pieces of each batch: with them, the same bits on any number of ranks")
parser.add_argument("--run", metavar="FOLDER", help="keep a log and checkpoints in this folder")
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in it, if there is one")
parser.add_argument("--save", type=new_file, metavar="FILE",
                    help="write the model to this file, for python -m mpiml predict (not: attention)")
args = parser.parse_args()
if args.resume and not args.run:
    parser.error("--resume needs --run FOLDER")
if args.save and args.model == "attention":
    parser.error("--save: the layer Attention is this example's own, which python -m mpiml predict does not know")
try:
    path = find("ag_news_test.csv", args.data)
except FileNotFoundError as error:
    parser.error(str(error))


def bag(words):
    """The mean of vectors of the words, and a linear map (as in fastText, Joulin et al. 2017)."""
    return Sequential(EmbeddingBag(words, 64, std=0.1), Linear(64, len(KINDS)))


def conv(words):
    """The strongest answer of each of 64 filters that see three words at a time (Kim 2014)."""
    return Sequential(Embedding(words, 64, std=0.1), Dropout(0.5), partial(transpose, axes=(0, 2, 1)),
                      Conv1d(64, 64, 3, padding=1), relu, partial(max, axis=2), Dropout(0.5), Linear(64, len(KINDS)))


def attention(words):
    """The mean of vectors of the words, after each has looked at the others."""
    return Sequential(Attention(words, 64, 4), Dropout(0.5), Linear(64, len(KINDS)))


class Attention(Module):
    """Words (n, length), told apart by where they stand, look at each other; the mean of what comes of it, (n, width)."""

    def __init__(self, words, width, heads):
        self.embedding, self.positions = Embedding(words, width, std=0.1), Positions(args.length, width)
        self.norm, self.attention = LayerNorm(width), SelfAttention(width, heads)

    def __call__(self, words, training=False):
        there = words != 0  # the others are padding
        x = self.positions(self.embedding(words, training), training)
        return masked_mean(x + self.attention(self.norm(x, training), training, there), there)


def say(text):
    if grid.rank == 0:
        print(text, flush=True)


grid = Grid(lanes=args.lanes)
table = read_csv(path, NAMES, grid=grid)  # this rank's share of the rows
labels = Labels("class", list(KINDS))
grid.together("reading the classes", labels.encode, table)  # refuses a class that is none of them
train, test = (table[rows] for rows in split(table["class"], (0.8, 0.2), args.seed, grid))
features = TextFeatures.fit(train, ["title", "description"], args.length, grid)


def arrays(table):
    """Words and classes of all ranks' rows."""
    return grid.rows(features.encode(table)), grid.rows(labels.encode(table))


x, y = arrays(train)
words = len(features.vocabulary)
model = place({"bag": bag, "conv": conv, "attention": attention}[args.model](words), grid, args.seed)
say(f"{len(x)} texts, {words:,} words, {args.model} of {len(model.vector):,} parameters, {grid.size} ranks, batch {args.batch}")
lr = args.lr or {"bag": 5e-3, "conv": 5e-3, "attention": 2e-3}[args.model]
optimizer = Adam(model, lr=cosine(lr, args.epochs * -(-len(x) // args.batch)))
history = fit(model, cross_entropy, (x, y), grid, optimizer, batch=args.batch, epochs=args.epochs, seed=args.seed,
              validation=arrays(test), metrics={"accuracy": correct}, run=args.run, resume=args.resume,
              settings={"model": args.model, "length": args.length})
say(f"test accuracy {history[-1]['validation accuracy']:.4f}")
if args.save and grid.rank == 0:
    from mpiml.save import save
    named = Labels("class", list(KINDS.values()))
    save(model, args.save, about={"input": features.settings(), "target": named.settings(), "csv": {"names": NAMES}})
