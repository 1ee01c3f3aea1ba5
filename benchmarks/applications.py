"""The applications of examples/, trained by mpiml and by PyTorch eager: what they learn, and how fast.

    python benchmarks/applications.py [NAME ...] [--epochs N]

Twin models (twins.py) start from the same weights, see the same batches and take steps of the same optimizer (PyTorch's fused
one, where there is one). They train an epoch each in turn, on one thread, through what a program would use: `batches` for
both, and on our side `gradient` on a grid of one rank. So times include loading, augmentation and optimizer. Figures are
medians over the epochs, the ratio that of each pair of epochs. The data are in the folder that MPIML_DATA names.

- adult: 128-64-2 on tables, Adam              - penguins: 16-3, Adam
- line: linear regression, SGD                 - cnn: MNIST, two convolutions, Adam
- resnet: ResNet-20 on a part of CIFAR-10, SGD with momentum, crops and mirrors
- news: bag of embeddings on AG News, Adam     - gpt: letters of Shakespeare, AdamW
"""

import argparse
import itertools
import os
from functools import partial
from time import perf_counter
from typing import NamedTuple

# isort: off
from timing import versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch
import torch.nn.functional as F
from twins import OURS, THEIRS, gpt, resnet, weights

from mpiml import data, optim
from mpiml.data import Features, Labels, Number, Vocabulary, batches
from mpiml.data.find import find
from mpiml.ops import cross_entropy, mse_loss, reshape
from mpiml.parallel import Grid, gradient, place

GRID = Grid()
ADAM = optim.Adam, partial(torch.optim.Adam, fused=True)
SGD = partial(optim.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9, fused=True)
ADAMW = optim.AdamW, partial(torch.optim.AdamW, fused=True)


class Work(NamedTuple):
    build: object  # function of the layers' namespace
    train: tuple
    test: tuple
    batch: int
    epochs: int
    optimizers: tuple  # ours and PyTorch's, functions of (model or parameters, lr)
    lr: object  # a number, or a function of (number of steps), which returns a schedule
    layout: object = torch.contiguous_format  # the faster one for PyTorch
    transform: object = None
    augment: object = None


def dense(*sizes):
    def build(of):
        layers = [layer for given, made in itertools.pairwise(sizes) for layer in (of.Linear(given, made), of.relu)]
        return of.Sequential(*layers[:-1])

    return build


def encoded(features, target, *tables):
    return [(features.encode(table), target.encode(table)) for table in tables]


def adult():
    names = ["age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
             "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"]
    train, test = (data.clean(data.read_csv(find(f"adult-{part}.csv"), names).map("income", lambda text: text.rstrip(".")),
                              "income")[0] for part in ("train", "test"))
    features = Features.fit(train, without=["income"], unknown="ignore")
    train, test = encoded(features, Labels("income", ["<=50K", ">50K"]), train, test)
    return Work(dense(len(features.names), 128, 64, 2), train, test, 256, 10, ADAM, 1e-3)


def penguins():
    table, _ = data.clean(data.read_csv(find("penguins.csv")), "species")
    train, test = (table[rows] for rows in data.split(table["species"], (0.8, 0.2), 0))
    features = Features.fit(train, without=["species"])
    train, test = encoded(features, Labels.fit(train, "species"), train, test)
    return Work(dense(len(features.names), 16, 3), train, test, 32, 40, ADAM, 1e-2)


def line():
    table, _ = data.clean(data.read_csv(find("penguins.csv")), "body_mass_g")
    features = Features.fit(table, ["bill_length_mm", "bill_depth_mm", "flipper_length_mm"])
    pairs, = encoded(features, Number.fit(table, "body_mass_g"), table)
    return Work(dense(3, 1), pairs, pairs, len(table), 500,
                (optim.SGD, partial(torch.optim.SGD, fused=True)), 0.2)


def cnn():
    def build(of):
        return of.Sequential(of.Conv2d(1, 16, 3, padding=1), of.relu, of.MaxPool2d(2),
                             of.Conv2d(16, 32, 3, padding=1), of.relu, of.MaxPool2d(2),
                             of.Flatten(), of.Linear(1568, 64), of.relu, of.Linear(64, 10))

    return Work(build, *data.mnist(), 128, 3, ADAM, lambda steps: optim.cosine(2e-3, steps), transform=data.pixels)


def photographs():
    def rate(steps):
        return optim.warmup(optim.cosine(0.1, steps - steps // 8), steps // 8)

    return Work(resnet, *data.cifar10(), 64, 15, SGD, rate, torch.channels_last, data.colors, data.crop_and_flip)


def news():
    table = data.read_csv(find("ag_news_test.csv"), ["class", "title", "description"])
    train, test = (table[rows] for rows in data.split(table["class"], (0.8, 0.2), 0))

    def texts(part):
        return [f"{title} {description}" for title, description in zip(part["title"], part["description"], strict=True)]

    vocabulary, labels = Vocabulary.of(texts(train), min_count=2), Labels.fit(train, "class")
    train, test = ((vocabulary.encode(texts(part), 80), labels.encode(part)) for part in (train, test))

    def build(of):
        return of.Sequential(of.EmbeddingBag(len(vocabulary), 64, padding_idx=0), of.Linear(64, 4))

    return Work(build, train, test, 64, 10, ADAM, 5e-3)


def letters():
    text = data.read_text(find("tinyshakespeare.txt"))
    vocabulary = Vocabulary.of([text], "character", special=())
    ids = vocabulary.ids(text)
    cut = len(ids) * 9 // 10
    return Work(partial(gpt, letters=len(vocabulary)), data.windows(ids[:cut], 128), data.windows(ids[cut:], 128), 32, 2, ADAMW,
                lambda steps: optim.warmup(optim.cosine(2e-3, steps - 50), 50))


WORKS = {"adult": adult, "penguins": penguins, "line": line, "cnn": cnn, "resnet": photographs, "news": news, "gpt": letters}


# --- The twins ------------------------------------------------------------------------------------------------

def summed(output, target):
    """The loss that we differentiate, a sum over the samples."""
    if target.dtype.kind == "f":
        return mse_loss(output, target)
    return cross_entropy(reshape(output, (target.size, output.shape[-1])), target.reshape(-1)) * (len(target) / target.size)


class Ours:
    def __init__(self, work, steps):
        self.model = place(work.build(OURS), GRID, seed=0)
        self.start = weights(self.model.whole() if hasattr(self.model, "whole") else self.model)
        self.step_of = gradient(self.model, summed, GRID)
        self.optimizer = work.optimizers[0](self.model, lr=schedule(work, steps))

    def step(self, x, y):
        loss = self.step_of(x, y)
        self.optimizer.step()
        return loss

    def outputs(self, x):
        return self.model(x)


class Theirs:
    def __init__(self, work, steps, start):
        self.net, self.layout = work.build(THEIRS), work.layout
        self.net.load_state_dict(start)
        self.net.to(memory_format=work.layout)
        self.lr, self.steps = schedule(work, steps), 0
        self.optimizer = work.optimizers[1](self.net.parameters(), lr=self.lr(0))

    def _tensor(self, x):
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
        return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x

    def step(self, x, y):
        self.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.steps)
        self.steps += 1
        output, y = self.net(self._tensor(x)), torch.from_numpy(np.ascontiguousarray(y))
        loss = F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output.flatten(0, -2), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def outputs(self, x):
        self.net.eval()
        with torch.no_grad():
            return self.net(self._tensor(x)).numpy()


def schedule(work, steps):
    return work.lr(steps) if callable(work.lr) else optim.constant(work.lr)


def score(twin, work):
    """The accuracy on the test set; of a regression the mean squared error, of letters the mean loss."""
    total = 0.0
    x, y = work.test
    for start in range(0, len(x), 256):
        part, target = x[start:start + 256], y[start:start + 256]
        output = twin.outputs(work.transform(part) if work.transform else part)
        if target.ndim == 1 and target.dtype.kind == "i":
            total += (output.argmax(-1) == target).sum()
        else:
            total += float(summed(output, target))
    return total / len(x)


def run(name, epochs):
    work = WORKS[name]()
    epochs = epochs or work.epochs
    x, y = work.train
    steps = epochs * -(-len(x) // work.batch)
    ours = Ours(work, steps)
    twins = ours, Theirs(work, steps, ours.start)
    seconds, losses = np.empty((epochs, 2)), np.zeros((epochs, 2))
    for epoch in range(epochs):
        for i in (0, 1) if epoch % 2 == 0 else (1, 0):
            begin = perf_counter()
            for share in batches(x, y, work.batch, epoch=epoch, transform=work.transform, augment=work.augment):
                losses[epoch, i] += twins[i].step(*share)
            seconds[epoch, i] = perf_counter() - begin
    assert np.allclose(losses[0, 0], losses[0, 1], rtol=0.1), f"the twins do not train alike: {losses[0]}"
    rates = len(x) / np.median(seconds[epochs > 1:], axis=0)  # the first epoch loads the kernels
    ratio = np.median(seconds[epochs > 1:, 1] / seconds[epochs > 1:, 0])
    scores = [score(twin, work) for twin in twins]
    print(f"{name:10}{work.batch:>6}{epochs:>8}{scores[0]:>10.4f}{scores[1]:>10.4f}{rates[0]:>12,.0f}{rates[1]:>12,.0f}"
          f"{ratio:>8.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--epochs", type=int, help="fewer, for a quick look at the speed")
    args = parser.parse_args()
    if not os.environ.get("MPIML_DATA"):
        print("the applications' data are missing: name their folder by MPIML_DATA (docs/applications.md tells where they are)")
        return
    print(f"{versions()}\n{'':10}{'batch':>6}{'epochs':>8}{'accuracy or loss':>20}{'samples/s':>24}{'':>8}\n"
          f"{'':24}{'mpiml':>10}{'torch':>10}{'mpiml':>12}{'torch':>12}{'ratio':>8}")
    for name in args.names or WORKS:
        run(name, args.epochs)


main()
