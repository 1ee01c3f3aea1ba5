"""Whole training steps in float32 through the public interface, against PyTorch eager on one thread.

    python benchmarks/models.py [MODEL ...]

One definition builds both twins. They start from the same weights, their first losses are compared, and then they are
timed in turn; PyTorch in the faster of its layouts of images. Figures are medians over the rounds.

- lenet: LeNet-5 (LeCun et al. 1998), with max pooling and relu; 128 images of 28 x 28; Adam
- resnet: ResNet-20 for CIFAR (He et al. 2016), with batch norm; 32 images of 32 x 32; SGD with momentum
- gpt: 4 layers of width 128 with 4 heads, 65 letters; 8 texts of 128 letters; AdamW
"""

import argparse
from types import SimpleNamespace

# isort: off
from timing import against, alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch
import torch.nn.functional as F

from mpiml import nn, ops, optim

ROUNDS = 11
rng = np.random.default_rng(0)


# --- The layers of both sides, under the same names -----------------------------------------------------------

class Attention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, width, heads):
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def __call__(self, x, training=False):
        n, length, width = x.shape

        def heads(layer):
            return ops.transpose(ops.reshape(layer(x, training), (n, length, self.heads, width // self.heads)), (0, 2, 1, 3))

        y = ops.scaled_dot_product_attention(heads(self.query), heads(self.key), heads(self.value), is_causal=True)
        return self.out(ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (n, length, width)), training)


class Positions(nn.Module):
    """Adds a vector for each position."""

    def __init__(self, length, width):
        self.weight = nn.Parameter((length, width), nn.normal(0.02))

    def __call__(self, x, training=False):
        (weight,) = nn.given(training, self.weight)
        return x + weight


class TorchAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class TorchPositions(torch.nn.Module):
    def __init__(self, length, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(length, width))

    def forward(self, x):
        return x + self.weight


class TorchResidual(torch.nn.Module):
    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body = body
        self.shortcut = torch.nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


SHARED = "Sequential", "Linear", "Conv2d", "BatchNorm2d", "LayerNorm", "MaxPool2d", "AvgPool2d", "Flatten", "Embedding"
OURS = SimpleNamespace(**{name: getattr(nn, name) for name in SHARED}, Residual=nn.Residual, Attention=Attention,
                       Positions=Positions, relu=ops.relu, gelu=ops.gelu)
THEIRS = SimpleNamespace(**{name: getattr(torch.nn, name) for name in SHARED}, Residual=TorchResidual,
                         Attention=TorchAttention, Positions=TorchPositions, relu=torch.nn.ReLU(), gelu=torch.nn.GELU())


# --- The models -----------------------------------------------------------------------------------------------

def lenet(of):
    return of.Sequential(of.Conv2d(1, 6, 5, padding=2), of.relu, of.MaxPool2d(2), of.Conv2d(6, 16, 5), of.relu, of.MaxPool2d(2),
                         of.Flatten(), of.Linear(400, 120), of.relu, of.Linear(120, 84), of.relu, of.Linear(84, 10))


def resnet(of):
    def convolution(given, made, size, stride):
        return of.Conv2d(given, made, size, stride=stride, padding=size // 2, bias=False), of.BatchNorm2d(made)

    layers = [*convolution(3, 16, 3, 1), of.relu]
    given = 16
    for made in 16, 32, 64:
        for _ in range(3):
            stride = made // given
            body = of.Sequential(*convolution(given, made, 3, stride), of.relu, *convolution(made, made, 3, 1))
            shortcut = [of.Sequential(*convolution(given, made, 1, stride))] if stride > 1 else []
            layers += [of.Residual(body, *shortcut), of.relu]
            given = made
    return of.Sequential(*layers, of.AvgPool2d(8), of.Flatten(), of.Linear(64, 10))


def gpt(of, letters=65, length=128, width=128, heads=4, depth=4):
    blocks = [block for _ in range(depth) for block in (
        of.Residual(of.Sequential(of.LayerNorm(width), of.Attention(width, heads))),
        of.Residual(of.Sequential(of.LayerNorm(width), of.Linear(width, 4 * width), of.gelu, of.Linear(4 * width, width))))]
    return of.Sequential(of.Embedding(letters, width), of.Positions(length, width), *blocks, of.LayerNorm(width),
                         of.Linear(width, letters))


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
    weights = {name: torch.tensor(np.ascontiguousarray(p.value)) for name, p in model.named().items()}
    labels = y.reshape(-1)

    def step():
        logits = model(x, training=True)
        loss = ops.cross_entropy(ops.reshape(logits, (labels.size, logits.shape[-1])), labels) / labels.size
        loss.backward()
        optimizer.step()
        return float(loss)

    return step, weights


def theirs(build, x, y, optimizer, weights, layout):
    net = build(THEIRS)
    net.load_state_dict(weights)
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
    print(f"{versions()}; medians of {args.rounds} rounds\n{'':10}{'mpiml':>12}{'torch':>12}{'':>6}{'ratio':>7}")
    for name in args.models or MODELS:
        if name == "gpt" and not hasattr(ops, "scaled_dot_product_attention"):
            print(f"{name:10}needs an attention kernel")
            continue
        build, data, make, torch_make = MODELS[name]
        x, y = data()
        mine, weights = ours(build, x, y, make)
        layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last} if x.ndim == 4 else {
            "": torch.contiguous_format}
        others = [theirs(build, x, y, torch_make, weights, layout) for layout in layouts.values()]
        losses = np.array([[step() for step in (mine, *others)] for _ in range(3)])
        assert np.allclose(losses, losses[:, :1], rtol=2e-3), f"the twins do not train alike: {losses}"
        us, torchs, layout, ratio = against(alternate([mine, *others], args.rounds, least=0.05))
        print(f"{name:10}{us * 1e3:>10.2f}ms{torchs * 1e3:>10.2f}ms{list(layouts)[layout]:>6}{ratio:>7.2f}", flush=True)


main()
