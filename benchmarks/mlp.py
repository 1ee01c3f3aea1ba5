"""Training step of the MLP 784-128-64-10 in float32, against PyTorch eager on one thread.

    python benchmarks/mlp.py

Both take the same steps from the same weights on the same data, through their public interfaces, and are timed in
turn: one round of each, again and again; the figures are medians over the rounds, and the ratio is that of each
pair of rounds. Last comes what a layer costs beyond its arithmetic: the time that one more Linear(4, 4) with its relu
takes, forward and backward, on one sample.
"""

# isort: off
from timing import against, alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch

from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD, Adam

ROUNDS, STEPS = 21, 50


def ours(optimizer, x, y):
    model = Sequential(Linear(784, 128), relu, Linear(128, 64), relu, Linear(64, 10)).init(seed=0)
    optimizer = {"SGD": lambda: SGD(model, lr=0.1), "Adam": lambda: Adam(model, lr=1e-3)}[optimizer]()

    def step():
        loss = cross_entropy(model(x, training=True), y) / len(y)
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


def tiny(layers):
    """Forward and backward through so many layers with next to nothing to compute, ours and theirs."""
    model = Sequential(*[layer for _ in range(layers) for layer in (Linear(4, 4), relu)]).init(seed=0)
    nn = torch.nn
    net = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.ReLU())])
    x, g = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
    torch_x, torch_g = torch.from_numpy(x), torch.from_numpy(g)
    return lambda: model(x, training=True).backward(g), lambda: net(torch_x).backward(torch_g)


def main():
    print(f"{versions()}; medians of {ROUNDS} rounds of {STEPS} steps")
    print(f"{'':14}{'mpiml':>10}{'torch':>10}{'ratio':>8}")
    for optimizer in "SGD", "Adam":
        for batch in 32, 128:
            rng = np.random.default_rng(0)
            x = rng.standard_normal((batch, 784), np.float32)
            y = rng.integers(0, 10, batch)
            model, mine = ours(optimizer, x, y)
            other = theirs(optimizer, x, y, model)
            first = [(mine(), other()) for _ in range(5)]
            assert np.allclose(*zip(*first, strict=True), rtol=1e-3), "the two do not train alike"
            us, torchs, _, ratio = against(alternate([mine, other], ROUNDS, STEPS))
            print(f"{optimizer:5} batch {batch:<3}{us * 1e6:>8.0f}us{torchs * 1e6:>8.0f}us{ratio:>8.2f}")
    times = alternate([*tiny(2), *tiny(12)], ROUNDS)
    us, torchs = np.median((times[:, 2:] - times[:, :2]) / 10, axis=0)
    print(f"{'a layer':14}{us * 1e6:>8.1f}us{torchs * 1e6:>8.1f}us{torchs / us:>8.2f}")


main()
