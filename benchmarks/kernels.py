"""Every kernel in float32 against PyTorch eager on one thread, and against what the core can do.

    python benchmarks/kernels.py [FAMILY ...]

A row is a kernel at a shape: medians of alternating rounds, the faster of PyTorch's layouts, and the fraction of the
limit that counts: of the peak in fused multiply-adds for matrix products, convolutions and attention, else of the
bandwidth of the triad ``a = a + s * b`` over as many bytes as must move at least. Both limits are measured here; more
than 100 % is an algorithm that multiplies less (Winograd's) or memory that is faster than the triad finds it. The results
of both sides are compared first.
"""

import argparse
import functools
from dataclasses import dataclass, field

# isort: off
from timing import against, alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np
import torch
import torch.nn.functional as F
from limits import bandwidth, peak

from mpiml import Tensor, ops
from mpiml import kernels as k
from mpiml.kernels import aligned

ROUNDS = 11
aten = torch.ops.aten
rng = np.random.default_rng(0)


@dataclass
class Case:
    kernel: str
    shape: str
    ours: object
    theirs: dict  # layout: function
    flops: float = 0
    bytes: float = field(default=0)


# --- Arrays ---------------------------------------------------------------------------------------------------

def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def weight(*shape):
    """As the layers keep it: the outputs side by side."""
    return np.asfortranarray(normal(*shape))


def picture(n, c, h, w):
    """As the convolutions return it: the samples side by side."""
    return normal(h, w, c, n).transpose(3, 2, 0, 1)


def layouts(call, *pictures, **options):
    """PyTorch with its pictures in either layout."""
    def run(layout):
        given = [torch.tensor(np.ascontiguousarray(x)).contiguous(memory_format=layout) for x in pictures]
        return lambda: call(*given, **options)

    return {"nchw": run(torch.contiguous_format), "nhwc": run(torch.channels_last)}


def torches(*arrays):
    return [torch.tensor(np.ascontiguousarray(a)) for a in arrays]


def with_gradient(call, leaves, g):
    """``call(*leaves)`` and its gradients; PyTorch."""
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        y = call(*leaves)
        return y, *torch.autograd.grad(y, leaves, g)

    return run


# --- Families -------------------------------------------------------------------------------------------------

def products():
    for n, inner, out in (32, 784, 128), (128, 784, 128), (128, 128, 64), (128, 64, 10), (1024, 128, 512), (1024, 1024, 1024):
        x, w, b, g = normal(n, inner), weight(out, inner), normal(out), normal(n, out)
        tx, tw, tb, tg = torches(x, w, b, g)
        shape, flops = f"{n} x {inner} x {out}", 2 * n * inner * out
        yield Case("linear", shape, lambda x=x, w=w, b=b: k.linear(x, w, b),
                   {"": lambda x=tx, w=tw, b=tb: F.linear(x, w, b)}, flops)
        yield Case("linear dx", shape, lambda g=g, w=w: k.linear_vjp_x(g, w), {"": lambda g=tg, w=tw: g @ w}, flops)
        yield Case("linear dw", shape, lambda g=g, x=x: k.linear_vjp_weight(g, x), {"": lambda g=tg, x=tx: g.T @ x}, flops)


def convolutions():
    for name, n, c, size, out, kernel_size, stride, padding in (
            ("LeNet 1", 128, 1, 28, 6, 5, 1, 2), ("LeNet 2", 128, 6, 14, 16, 5, 1, 0), ("stem", 32, 3, 32, 16, 3, 1, 1),
            ("16", 32, 16, 32, 16, 3, 1, 1), ("32", 32, 32, 16, 32, 3, 1, 1), ("64", 32, 64, 8, 64, 3, 1, 1),
            ("16/2", 32, 16, 32, 32, 3, 2, 1), ("32/2", 32, 32, 16, 64, 3, 2, 1), ("1x1/2", 32, 16, 32, 32, 1, 2, 0)):
        x, w = picture(n, c, size, size), weight(out, c, kernel_size, kernel_size)
        s, p = (stride, stride), (padding, padding)
        g = picture(n, out, *[k.out_size(size, kernel_size, stride, padding)] * 2)
        shape, flops = f"{name}: {n}x{c}x{size}x{size} {kernel_size}x{kernel_size}", 2 * g.size * w[0].size

        def back(g, x, w, mask, s=s, p=p):
            return aten.convolution_backward(g, x, w, None, s, p, (1, 1), False, (0, 0), 1, mask)

        yield Case("conv2d", shape, lambda x=x, w=w, s=s, p=p: k.conv2d(x, w, s, p),
                   layouts(F.conv2d, x, w, stride=s, padding=p), flops)
        yield Case("conv2d dx", shape, lambda x=x, w=w, g=g, s=s, p=p: k.conv2d_vjp_x(g, w, x.shape, s, p),
                   layouts(lambda *a, back=back: back(*a, (True, False, False))[0], g, x, w), flops)
        yield Case("conv2d dw", shape, lambda x=x, w=w, g=g, s=s, p=p: k.conv2d_vjp_weight(g, x, w.shape, s, p),
                   layouts(lambda *a, back=back: back(*a, (False, True, False))[1], g, x, w), flops)


def pooling():
    two = 2, 2
    for n, c, size in (128, 6, 28), (128, 16, 10), (32, 64, 8):
        x, g = picture(n, c, size, size), picture(n, c, size // 2, size // 2)
        shape = f"{n}x{c}x{size}x{size}, 2x2"
        _, index = k.max_pool2d(x, two, two)
        (tx,) = torches(x)
        places = F.max_pool2d(tx, 2, return_indices=True)[1].numpy()
        yield Case("max_pool2d", shape, lambda x=x: k.max_pool2d(x, two, two),
                   layouts(lambda x: F.max_pool2d(x, 2, return_indices=True), x), bytes=5 * x.nbytes / 4)
        yield Case("max_pool2d vjp", shape, lambda g=g, index=index, x=x: k.max_pool2d_vjp(g, index, x.shape, two, two),
                   layouts(lambda g, x, i: aten.max_pool2d_with_indices_backward(g, x, two, two, (0, 0), (1, 1), False, i),
                           g, x, places), bytes=5 * x.nbytes / 4)
        yield Case("avg_pool2d", shape, lambda x=x: k.avg_pool2d(x, two, two), layouts(lambda x: F.avg_pool2d(x, 2), x),
                   bytes=5 * x.nbytes / 4)


def trained(function, *values, g):
    """Our op on Tensors and its gradients."""
    def run():
        leaves = [Tensor(value) for value in values]
        y = function(*leaves)
        y.backward(g)
        return y.value, *(leaf.grad for leaf in leaves)

    return run


def norms():
    for shape in (32, 16, 32, 32), (32, 64, 8, 8):
        x, g, w, b = picture(*shape), picture(*shape), normal(shape[1]), normal(shape[1])
        tw, tb = torches(w, b)
        running = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32), np.zeros((), np.float32)
        yield Case("batch_norm", "x".join(map(str, shape)),
                   lambda x=x, w=w, b=b, running=running: ops.batch_norm(x, *running, w, b, training=True),
                   layouts(lambda x, w=tw, b=tb: F.batch_norm(x, None, None, w, b, True), x), bytes=3 * x.nbytes)
        call = lambda x, w, b, running=running: ops.batch_norm(x, *map(Tensor, running), w, b, training=True)
        theirs = {}
        for layout in torch.contiguous_format, torch.channels_last:
            tx, tg = (a.contiguous(memory_format=layout) for a in torches(x, g))
            theirs["nchw" if layout == torch.contiguous_format else "nhwc"] = with_gradient(
                lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [tx, tw.clone(), tb.clone()], tg)
        yield Case("batch_norm + vjp", "x".join(map(str, shape)), trained(call, x, w, b, g=g), theirs, bytes=7 * x.nbytes)
    for rows, features in (1024, 128), (1024, 768):
        x, g, w, b = normal(rows, features), normal(rows, features), normal(features), normal(features)
        tx, tg, tw, tb = torches(x, g, w, b)
        call = functools.partial(F.layer_norm, normalized_shape=(features,))
        yield Case("layer_norm", f"{rows}x{features}", lambda x=x, w=w, b=b: ops.layer_norm(x, w, b),
                   {"": lambda x=tx, w=tw, b=tb, f=features: F.layer_norm(x, (f,), w, b)}, bytes=2 * x.nbytes)
        yield Case("layer_norm + vjp", f"{rows}x{features}", trained(ops.layer_norm, x, w, b, g=g),
                   {"": with_gradient(lambda x, w, b, call=call: call(x, weight=w, bias=b),
                                      [a.clone() for a in (tx, tw, tb)], tg)}, bytes=5 * x.nbytes)


def classes():
    for shape in (4096, 128), (1024, 65):
        x, g = normal(*shape), normal(*shape)
        tx, tg = torches(x, g)
        y = k.softmax(x)
        (ty,) = torches(y)
        yield Case("softmax", "x".join(map(str, shape)), lambda x=x: k.softmax(x), {"": lambda x=tx: F.softmax(x, 1)},
                   bytes=2 * x.nbytes)
        yield Case("softmax vjp", "x".join(map(str, shape)), lambda g=g, y=y: k.softmax_vjp(g, y),
                   {"": lambda g=tg, y=ty: aten._softmax_backward_data(g, y, 1, torch.float32)},
                   bytes=3 * x.nbytes)
    for n, size in (128, 10), (1024, 65), (1024, 5000):
        x, labels = normal(n, size), rng.integers(0, size, n)
        tx, tl = torches(x, labels)
        call = lambda x, tl=tl: F.cross_entropy(x, tl, reduction="sum")

        def both(x=x, labels=labels):
            loss, probabilities = k.label_loss(x, labels)
            return np.float64(loss), k.label_loss_vjp(1.0, probabilities, labels, out=probabilities)  # as in training

        yield Case("cross-entropy + vjp", f"{n}x{size}", both, {"": with_gradient(call, [tx], torch.tensor(1.0))},
                   bytes=2 * x.nbytes)


def attention():
    call = getattr(ops, "scaled_dot_product_attention", None)
    if call is None:
        return
    theirs = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    ours = functools.partial(call, is_causal=True)
    for n, heads, length, size in (8, 4, 128, 32), (4, 4, 256, 32), (1, 12, 512, 64), (1, 12, 1024, 64):
        q, key, v, g = (normal(n, heads, length, size) for _ in range(4))
        tq, tk, tv, tg = torches(q, key, v, g)
        flops = 4 * n * heads * size * length * (length + 1) / 2  # the causal half of two products
        shape = f"{n}x{heads}x{length}x{size} causal"
        yield Case("attention", shape, lambda q=q, key=key, v=v: ours(q, key, v),
                   {"": lambda q=tq, key=tk, v=tv: theirs(q, key, v)}, flops)
        yield Case("attention + vjp", shape, trained(ours, q, key, v, g=g),
                   {"": with_gradient(theirs, [a.clone() for a in (tq, tk, tv)], tg)}, 3.5 * flops)


def elementwise():
    x, g = normal(1024, 512), normal(1024, 512)
    tx, tg = torches(x, g)
    for tanh, name in (True, "tanh"), (False, "none"):
        label = "gelu tanh" if tanh else "gelu"
        yield Case(label, "1024x512", lambda tanh=tanh: k.gelu(x, tanh), {"": lambda name=name: F.gelu(tx, approximate=name)},
                   bytes=2 * x.nbytes)
        yield Case(f"{label} vjp", "1024x512", lambda tanh=tanh: k.gelu_vjp(g, x, tanh),
                   {"": lambda name=name: aten.gelu_backward(tg, tx, approximate=name)}, bytes=3 * x.nbytes)
    for name in "exp", "tanh", "sigmoid", "relu":
        ours, theirs = functools.partial(getattr(ops, name), x), functools.partial(getattr(torch, name), tx)
        yield Case(name, "1024x512", ours, {"": theirs}, bytes=2 * x.nbytes)
    for rows in 65, 5000:
        ids, g = rng.integers(0, rows, 1024), normal(1024, 128)
        ti, tg = torches(ids, g)
        yield Case("embedding vjp", f"{rows}x128, 1024 ids", lambda ids=ids, g=g, rows=rows: k.embedding_vjp(g, ids, rows),
                   {"": lambda ti=ti, tg=tg, rows=rows: aten.embedding_dense_backward(tg, ti, rows, -1, False)},
                   bytes=3 * g.nbytes + 4 * rows * 128)


def optimizers():
    one = np.float32
    for size in 109_386, 1_000_000, 10_000_000:
        w, g = normal(size), normal(size)

        def fused(make, w=w, g=g):
            p = torch.tensor(w).requires_grad_()
            p.grad = torch.tensor(g)
            optimizer = make([p], lr=1e-3, weight_decay=1e-2, fused=True)
            return lambda: (optimizer.step(), p.detach())[1]

        def vectors(*values, size=size):
            """As a model and its optimizer keep them."""
            result = [aligned.empty(size, np.float32) for _ in values]
            for vector, value in zip(result, values, strict=True):
                vector[:] = value
            return result

        momentum = vectors(w, g, 0)
        yield Case("sgd, momentum", f"{size}", lambda a=momentum: (
            k.sgd(*a, one(1e-3), one(0.9), False, one(1e-2)), a[0])[1],
            {"fused": fused(functools.partial(torch.optim.SGD, momentum=0.9))}, bytes=6 * w.nbytes)
        # The gradient is 0 after a step; the weights' decay keeps the moments away from denormal numbers.
        adam = vectors(w, g, 0, 0)
        yield Case("adam", f"{size}", lambda a=adam: (
            k.adam(*a, *map(one, (1e-3, 0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8, 1e-2, 0.0))), a[0])[1],
            {"fused": fused(torch.optim.Adam)}, bytes=8 * w.nbytes)


FAMILIES = {f.__name__: f for f in (products, convolutions, pooling, norms, classes, attention, elementwise, optimizers)}


def agree(ours, theirs):
    """Whether the first results, and the gradients behind them, are equal but for rounding."""
    ours, theirs = (a if isinstance(a, tuple) else (a,) for a in (ours, theirs))
    pairs = [(np.asarray(a), b.detach().numpy()) for a, b in zip(ours, theirs, strict=False) if b.is_floating_point()]
    return all(abs(a - b).max() <= 1e-3 * max(1, abs(b).max()) for a, b in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if unknown := {*args.families} - {*FAMILIES}:
        parser.error(f"there is no family {', '.join(sorted(unknown))}, but {', '.join(FAMILIES)}")
    top = peak()
    print(f"{versions()}; medians of {args.rounds} rounds\n"
          f"peak {top / 1e9:.0f} GF/s; triad {bandwidth(1 << 18) / 1e9:.0f} GB/s in cache, "
          f"{bandwidth(1 << 27) / 1e9:.0f} GB/s in memory\n")
    print(f"{'':22}{'':34}{'mpiml':>10}{'torch':>10}{'':>6}{'ratio':>7}{'limit':>7}")
    for family in args.families or FAMILIES:
        for case in FAMILIES[family]():
            ours, *theirs = [case.ours(), *(f() for f in case.theirs.values())]
            same = all(agree(ours, other) for other in theirs)
            us, torchs, layout, ratio = against(alternate([case.ours, *case.theirs.values()], args.rounds))
            share = case.flops / us / top if case.flops else case.bytes / us / bandwidth(1 << int(np.log2(case.bytes)))
            print(f"{case.kernel:22}{case.shape:34}{us * 1e6:>8.1f}us{torchs * 1e6:>8.1f}us"
                  f"{list(case.theirs)[layout]:>6}{ratio:>7.2f}{share:>7.0%}{'' if same else '  DIFFERENT'}", flush=True)


main()
