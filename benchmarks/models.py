"""Whole training steps in float32 through the public interface, against PyTorch eager on one thread.

    python benchmarks/models.py [MODEL ...]

One definition builds both twins. They start from the same weights, their first losses are compared, and then they are
timed in turn; PyTorch in the faster of its layouts of images. Figures are medians over the rounds. "Of peak" is what the
matrix products and convolutions alone would take at the core's measured peak in multiply-adds, as a share of our time;
Winograd's algorithm multiplies less.

- lenet: LeNet-5 (LeCun et al. 1998), with max pooling and relu; 128 images of 28 x 28; Adam
- resnet: ResNet-20 for CIFAR (He et al. 2016), with batch norm; 32 images of 32 x 32; SGD with momentum
- gpt: 4 layers of width 128 with 4 heads, 65 letters; 8 texts of 128 letters; AdamW
"""

import argparse

# isort: off
from timing import against, alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch
import torch.nn.functional as F
from limits import flops, peak
from twins import OURS, THEIRS, gpt, lenet, resnet, weights

from mpiml import ops, optim

ROUNDS = 11
rng = np.random.default_rng(0)


def pictures(n, channels, size):
    return rng.standard_normal((n, channels, size, size), np.float32), rng.integers(0, 10, n)


MODELS = {
    "lenet": (lenet, lambda: pictures(128, 1, 28), lambda model: optim.Adam(model, lr=1e-3),
              lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)),
    "resnet": (resnet, lambda: pictures(32, 3, 32), lambda model: optim.SGD(model, lr=0.05, momentum=0.9),
               lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True)),
    "gpt": (gpt, lambda: tuple(rng.integers(0, 65, (2, 8, 128))), lambda model: optim.AdamW(model, lr=3e-4),
            lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True)),
}


def ours(build, x, y, optimizer):
    model = build(OURS).init(seed=0)
    optimizer = optimizer(model)
    start = weights(model)
    labels = y.reshape(-1)

    def step():
        logits = model(x, training=True)
        loss = ops.cross_entropy(ops.reshape(logits, (labels.size, logits.shape[-1])), labels) / labels.size
        loss.backward()
        optimizer.step()
        return float(loss)

    return step, start


def theirs(build, x, y, optimizer, start, layout):
    net = build(THEIRS)
    net.load_state_dict(start)
    net.to(memory_format=layout)
    x, labels = torch.tensor(x), torch.tensor(y).reshape(-1)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    optimizer = optimizer(net.parameters())

    def step():
        loss = F.cross_entropy(net(x).flatten(0, -2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    print(f"{versions()}; medians of {args.rounds} rounds\n{'':10}{'mpiml':>12}{'torch':>12}{'':>6}{'ratio':>7}{'of peak':>9}")
    for name in args.models or MODELS:
        build, data, make, torch_make = MODELS[name]
        x, y = data()
        mine, start = ours(build, x, y, make)
        layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last} if x.ndim == 4 else {
            "": torch.contiguous_format}
        others = [theirs(build, x, y, torch_make, start, layout) for layout in layouts.values()]
        losses = np.array([[step() for step in (mine, *others)] for _ in range(3)])
        assert np.allclose(losses, losses[:, :1], rtol=2e-3), f"the twins do not train alike: {losses}"
        share = flops(others[0]) / peak()
        us, torchs, layout, ratio = against(alternate([mine, *others], args.rounds, least=0.05))
        print(f"{name:10}{us * 1e3:>10.2f}ms{torchs * 1e3:>10.2f}ms{list(layouts)[layout]:>6}{ratio:>7.2f}"
              f"{share / us:>9.0%}", flush=True)


main()
