"""Training step of the MLP 784-128-64-10 in float32, against PyTorch eager on one thread.

    python benchmarks/mlp.py

Both take the same steps from the same weights on the same data, through their public interfaces, and are timed in
turn: one round of each, again and again; the figures are medians over the rounds, and the ratio is that of each
pair of rounds. "Of peak" is what the matrix products alone would take at the measured peak of the core, as a share
of our time; "replay" our time with mpiml.Replay. Last comes what a layer costs beyond its arithmetic: the time that
one more Linear(4, 4) with its relu takes, forward and backward, on one sample.
"""

# isort: off
from timing import against, alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch
from limits import flops, peak

from mpiml import Replay
from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD, Adam

ROUNDS, STEPS = 21, 50


def ours(optimizer, x, y, replay):
    model = Sequential(Linear(784, 128), relu, Linear(128, 64), relu, Linear(64, 10)).init(seed=0)
    optimizer = {"SGD": lambda: SGD(model, lr=0.1), "Adam": lambda: Adam(model, lr=1e-3)}[optimizer]()

    def mean_loss(x, y):
        return cross_entropy(model(x, training=True), y) / len(y)

    compute = Replay(mean_loss) if replay else mean_loss

    def step():
        loss = compute(x, y)
        loss.backward()
        optimizer.step()
        return float(loss)

    return model, step


def theirs(optimizer, x, y, model):
    nn = torch.nn
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    net.load_state_dict({name: torch.from_numpy(p.value.copy()) for name, p in model.named().items()})
    optimizer = {"SGD": lambda: torch.optim.SGD(net.parameters(), lr=0.1, fused=True),
                 "Adam": lambda: torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)}[optimizer]()
    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def step():
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def tiny(layers, replay=False):
    """Forward and backward through so many layers with next to nothing to compute, ours and theirs."""
    model = Sequential(*[layer for _ in range(layers) for layer in (Linear(4, 4), relu)]).init(seed=0)
    nn = torch.nn
    net = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.ReLU())])
    x, g = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
    torch_x, torch_g = torch.from_numpy(x), torch.from_numpy(g)
    run = Replay(model) if replay else model
    for _ in range(3):  # of which two are recorded, which is no time to measure
        run(x, True)
    return lambda: run(x, True).backward(g), lambda: net(torch_x).backward(torch_g)


def main():
    print(f"{versions()}; medians of {ROUNDS} rounds of {STEPS} steps")
    print(f"{'':14}{'mpiml':>10}{'torch':>10}{'ratio':>8}{'of peak':>9}{'replay':>10}{'ratio':>8}")
    for optimizer in "SGD", "Adam":
        for batch in 32, 128:
            rng = np.random.default_rng(0)
            x = rng.standard_normal((batch, 784), np.float32)
            y = rng.integers(0, 10, batch)
            model, mine = ours(optimizer, x, y, replay=False)
            other = theirs(optimizer, x, y, model)
            share = flops(other) / peak()
            other = theirs(optimizer, x, y, model)
            _, replayed = ours(optimizer, x, y, replay=True)
            first = np.array([(mine(), other(), replayed()) for _ in range(5)])
            assert np.allclose(first, first[:, :1], rtol=1e-3), "they do not train alike"
            times = alternate([mine, other, replayed], ROUNDS, STEPS)
            us, torchs, _, ratio = against(times[:, :2])
            again, _, _, better = against(times[:, [2, 1]])
            print(f"{optimizer:5} batch {batch:<3}{us * 1e6:>8.0f}us{torchs * 1e6:>8.0f}us{ratio:>8.2f}{share / us:>9.0%}"
                  f"{again * 1e6:>8.0f}us{better:>8.2f}", flush=True)
    times = alternate([*tiny(2), tiny(2, True)[0], *tiny(12), tiny(12, True)[0]], ROUNDS)
    us, torchs, again = np.median((times[:, 3:] - times[:, :3]) / 10, axis=0)
    print(f"{'a layer':14}{us * 1e6:>8.1f}us{torchs * 1e6:>8.1f}us{torchs / us:>8.2f}{'':>9}{again * 1e6:>8.1f}us"
          f"{torchs / again:>8.2f}")


main()
