"""Models that are built of mpiml's layers or of PyTorch's, under the same names and with the same weights."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from mpiml import nn, ops

# --- The layers of both sides, under the same names -----------------------------------------------------------

class TorchAttention(torch.nn.Module):
    def __init__(self, width, heads, is_causal=False):
        super().__init__()
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.heads, self.is_causal = heads, is_causal

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
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


class TorchBag(torch.nn.EmbeddingBag):
    def __init__(self, words, width, padding_idx=0, std=1.0):
        super().__init__(words, width, mode="mean", padding_idx=padding_idx)


SHARED = ("Sequential", "Linear", "Conv2d", "BatchNorm2d", "LayerNorm", "MaxPool2d", "AvgPool2d", "Flatten", "Embedding",
          "Dropout")
OURS = SimpleNamespace(**{name: getattr(nn, name) for name in SHARED}, Residual=nn.Residual, SelfAttention=nn.SelfAttention,
                       Positions=nn.Positions, EmbeddingBag=nn.EmbeddingBag, relu=ops.relu, gelu=ops.gelu)
THEIRS = SimpleNamespace(**{name: getattr(torch.nn, name) for name in SHARED}, Residual=TorchResidual,
                         SelfAttention=TorchAttention, Positions=TorchPositions, EmbeddingBag=TorchBag, relu=torch.nn.ReLU(),
                         gelu=torch.nn.GELU())


def weights(model):
    """The parameters and statistics of a model of ours, for ``load_state_dict`` of its twin."""
    return {name: torch.tensor(np.ascontiguousarray(p.value)) for name, p in model.named().items()}


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
        of.Residual(of.Sequential(of.LayerNorm(width), of.SelfAttention(width, heads, is_causal=True))),
        of.Residual(of.Sequential(of.LayerNorm(width), of.Linear(width, 4 * width), of.gelu, of.Linear(4 * width, width))))]
    return of.Sequential(of.Embedding(letters, width), of.Positions(length, width), *blocks, of.LayerNorm(width),
                         of.Linear(width, letters))
