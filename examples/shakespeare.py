"""A small GPT that writes like Shakespeare, letter by letter (the transformer of Radford et al. 2019, with 0.8 M parameters).

    mpirun -n 2 python examples/shakespeare.py --data FOLDER              # with tinyshakespeare.txt; or set MPIML_DATA
    mpirun -n 2 python examples/shakespeare.py --text FILE --pipe 2       # any text in UTF-8; as a pipeline of 2 stages
    mpirun -n 2 python examples/shakespeare.py --run run --resume         # keeps a log and checkpoints, and goes on from them
    mpirun -n 2 python examples/shakespeare.py --run run --resume --prompt "My lord" --sample 500     # when all is learnt
"""

from hashlib import sha256

import numpy as np

from mpiml.arguments import count
from mpiml.data import Vocabulary, batches, find, read_text, windows
from mpiml.fit import fit
from mpiml.nn import Dropout, Embedding, LayerNorm, Linear, Positions, Residual, SelfAttention, Sequential
from mpiml.ops import cross_entropy, gelu, softmax
from mpiml.optim import AdamW, cosine, warmup
from mpiml.parallel import ArgumentParser, Grid, place, predict
from mpiml.random import generator

parser = ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="FOLDER", help="with tinyshakespeare.txt; default: $MPIML_DATA")
parser.add_argument("--text", metavar="FILE", help="learn from this text instead")
parser.add_argument("--repair", action="store_true", help="take bytes of it that are not UTF-8 for unknown characters")
parser.add_argument("--epochs", type=count, default=4, help="of two passes through the text each (default %(default)s)")
parser.add_argument("--batch", type=count, default=16, help="windows of text per step, over all ranks (default %(default)s)")
parser.add_argument("--context", type=count, default=128, help="letters in a window (default %(default)s)")
parser.add_argument("--width", type=count, default=128)
parser.add_argument("--heads", type=count, default=4)
parser.add_argument("--layers", type=count, default=4)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default %(default)s)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--pipe", type=count, default=1, help="stages of the pipeline (default %(default)s: none)")
parser.add_argument("--lanes", type=count, help="pieces of each batch: with them, the same bits on any grid")
parser.add_argument("--run", metavar="FOLDER", help="keep a log and checkpoints in this folder")
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in it, if there is one")
parser.add_argument("--sample", type=int, default=300, metavar="N", help="letters to write at the end (default %(default)s)")
parser.add_argument("--prompt", default="\n", help="what they follow")
parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest letter (default %(default)s)")
args = parser.parse_args()
if args.resume and not args.run:
    parser.error("--resume needs --run FOLDER")
if args.temperature < 0 or not args.prompt:
    parser.error("--temperature is 0 or more, and --prompt has a letter at least")
try:
    text = read_text(args.text or find("tinyshakespeare.txt", args.data), "replace" if args.repair else "strict")
    letters = Vocabulary.of([text], "character", special=())
    ids, prompt = letters.ids(text), letters.ids(args.prompt)
    first = len(ids) * 9 // 10  # of the last tenth, for validation
    x, y = windows(ids[:first], args.context, step=-(-args.context // 2))
    validation = windows(ids[first:], args.context)
except (OSError, ValueError) as error:
    parser.error(str(error))


def block():
    """Attention to the letters before, and a perceptron for each letter, both added to what goes in."""
    width = args.width
    attention = SelfAttention(width, args.heads, is_causal=True)
    perceptron = Linear(width, 4 * width), gelu, Linear(4 * width, width)
    return (Residual(Sequential(LayerNorm(width), attention, Dropout(args.dropout))),
            Residual(Sequential(LayerNorm(width), *perceptron, Dropout(args.dropout))))


def loss(logits, letters):
    """The mean over the letters of a window, summed over the windows."""
    return cross_entropy(logits, letters) / args.context


def write(ids, count):
    """The text of ids and of ``count`` more, each drawn from what the model makes of those before; on all ranks together."""
    ids, rng = ids.tolist(), generator(args.seed, "sample")
    for _ in range(count):
        window = np.array([ids[-args.context:]])
        logits = predict(model, window, grid)[0, -1].astype(np.float64)
        if args.temperature:
            shares = np.cumsum(softmax(logits / args.temperature))
            ids.append(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")))
        else:
            ids.append(int(logits.argmax()))
    return letters.decode(ids)


def say(text):
    if grid.rank == 0:
        print(text, flush=True)


grid = Grid(pipe=args.pipe, lanes=args.lanes)
model = Sequential(Embedding(len(letters), args.width, std=0.02), Positions(args.context, args.width), Dropout(args.dropout),
                   *(layer for _ in range(args.layers) for layer in block()),
                   LayerNorm(args.width), Linear(args.width, len(letters)))
model = place(model, grid, args.seed)
say(f"{len(ids):,} letters, {len(letters)} different ones, {sum(p.size for p in model.whole().named().values()):,} parameters, "
    f"{grid.data} x {grid.pipe} ranks (data x pipe), batch {args.batch} x {args.context}")

steps = args.epochs * len(batches(x, y, args.batch, grid=grid))
rise = min(100, -(-steps // 10))
lr = warmup(cosine(args.lr, max(1, steps - rise), args.lr / 10), rise)
optimizer = AdamW(model, lr, betas=(0.9, 0.99), weight_decay=0.1)
history = fit(model, loss, (x, y), grid, optimizer, batch=args.batch, epochs=args.epochs, seed=args.seed,
              validation=validation, clip=1.0, run=args.run, resume=args.resume,
              settings={"letters": "".join(letters.tokens), "context": args.context})

last = history[-1]
say(f"validation loss {last['validation loss']:.4f} nats per letter, {last['samples/s'] * args.context:,.0f} letters/s")
if args.lanes:
    weights = model.collect()
    if grid.rank == 0:
        print(f"weights {sha256(b''.join(array.tobytes() for array in weights.values())).hexdigest()}")
if args.sample:
    say(write(prompt, args.sample))
