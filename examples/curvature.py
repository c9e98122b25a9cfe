"""What second order in flat memory is for: the spectrum of a language model's Hessian.

`linear_cross_entropy` never holds the logits, nor does its second derivative, so that a product of
the Hessian with a vector fits where a gradient does. Products are all that Lanczos needs. Here they
come from a small language model of real text (`language_model.py`), for two functions:

    head     the loss as a function of the last layer's weight, the features given
    whole    the loss as a function of all parameters

and SciPy's `eigsh` makes the largest eigenvalues from them (and the whole's smallest: the head's
loss is convex, so that its Hessian has none below 0), stochastic Lanczos quadrature the density of
all. What to see:

- a table: for a model so tiny that its Hessian exists as a matrix, made by PyTorch from the plain
  expression in float64, the eigenvalues are the same in all printed digits; and likewise through
  `curvlinops` and `hessian_eigenthings`, which take our loss as they take any, where installed;
- a second one: the peak memory of one product, with the fused head and with all logits;
- a picture: the tiny model's density and the histogram of its eigenvalues, a larger one's beside
  it, where no matrix could be had.

    python examples/curvature.py
    python examples/curvature.py --probes 4 --seed 1
    python examples/curvature.py --size large --accelerator gpu

It needs `pip install ".[examples]"`, and takes under three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from language_model import (
    Transformer,
    add_accelerator,
    bar,
    blocks,
    device_of,
    positive,
    tokens,
)
from matplotlib.figure import Figure  # without pyplot, a PNG is drawn by Agg and needs no display
from matplotlib.ticker import MaxNLocator
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm  # which Lightning brings

from torch_nnmath.bench.measure import MIB, peak
from torch_nnmath.bench.works import Problem
from torch_nnmath.functional import linear_cross_entropy

LARGEST = 5  # eigenvalues that are printed
Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, its training, and the text of which the Hessian is."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    sequences: int  # of the loss whose Hessian it is, and of a step of training
    steps: int
    lr: float = 3e-3


TINY = Setting(272, 6, 1, 2, context=16, sequences=16, steps=400, lr=1e-2)
SIZES = {
    "quick": (replace(TINY, vocabulary=264, width=4, sequences=8, steps=20),
              Setting(1024, 32, 1, 2, context=32, sequences=8, steps=2)),
    "small": (TINY, Setting(4096, 128, 2, 4, context=64, sequences=8, steps=150)),
    "large": (TINY, Setting(32768, 512, 8, 8, context=256, sequences=16, steps=300, lr=1e-3)),
}  # fmt: skip


# The model and its loss


def plain(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """The loss as one writes it in PyTorch: with all logits in memory."""
    return F.cross_entropy(F.linear(x, W).flatten(0, -2), t.flatten())


class LossOf(nn.Module):
    """Token ids (B, T + 1) to the loss of each but the first, by its predecessors."""

    def __init__(self, model: Transformer, loss: Loss = linear_cross_entropy):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the attention that has a second derivative
            x = self.model.features(ids[:, :-1])
        return self.loss(x, self.model.head.weight, ids[:, 1:])


def made(setting: Setting, seed: int) -> Transformer:
    torch.manual_seed(seed)
    s = setting
    return Transformer(s.vocabulary, s.width, s.layers, s.heads, s.context)


def trained(setting: Setting, ids: Tensor, seed: int, device: str, title: str) -> Transformer:
    """By Adam, on sequences that are drawn anew for each step."""
    model = made(setting, seed).to(device)
    module, data = LossOf(model), blocks(ids, setting.context)
    adam = torch.optim.AdamW(model.parameters(), setting.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, setting.steps)
    order = torch.Generator().manual_seed(seed)
    with bar(f"{title}: training", setting.steps, "step") as progress:
        for _ in range(setting.steps):
            chosen = torch.randint(len(data), (setting.sequences,), generator=order)
            c = module(data[chosen].to(device))
            adam.zero_grad()
            c.backward()
            adam.step()
            decay.step()
            progress.update()
        progress.set_postfix_str(f"loss {c.item():.2f}", refresh=False)
    return model


@dataclass(frozen=True)
class Task:
    """A loss as a function of parameters: with the fused head, and with all logits."""

    params: Params
    ours: Callable[[Params], Tensor]
    plain: Callable[[Params], Tensor]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params.values())


def tasks(model: Transformer, ids: Tensor) -> dict[str, Task]:
    fused, unfused = LossOf(model), LossOf(model, plain)
    with torch.no_grad():
        x, t = model.features(ids[:, :-1]), ids[:, 1:]
    weight = model.head.weight.detach().clone().requires_grad_()
    return {
        "head": Task(
            {"weight": weight},
            lambda params: linear_cross_entropy(x, params["weight"], t),
            lambda params: plain(x, params["weight"], t),
        ),
        "whole": Task(
            dict(fused.named_parameters()),  # a tied weight is one of them
            lambda params: functional_call(fused, params, (ids,)),
            lambda params: functional_call(unfused, params, (ids,)),
        ),
    }


# Products, and what is made of them


def gradient(loss: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, ...]:
    """With its graph, so that it can be differentiated again."""
    return torch.autograd.grad(loss(params), list(params.values()), create_graph=True)


def times(g: Sequence[Tensor], params: Params, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The Hessian times v: the gradient of g·v. The graph of g stays for the next one."""
    return torch.autograd.grad(
        g, list(params.values()), v, retain_graph=True, materialize_grads=True
    )


class Hessian(LinearOperator):
    """As SciPy sees a symmetric matrix. The first derivative's graph serves all products."""

    def __init__(self, loss: Callable[[Params], Tensor], params: Params):
        self.params, self.g = params, gradient(loss, params)
        self.progress: tqdm | None = None
        n = sum(p.numel() for p in params.values())
        super().__init__(np.dtype(str(self.g[0].dtype).removeprefix("torch.")), (n, n))

    def of(self, v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in self.params.values()])
        shaped = [x.view_as(p) for x, p in zip(pieces, self.params.values(), strict=True)]
        if self.progress is not None:
            self.progress.update()
        return torch.cat([h.flatten() for h in times(self.g, self.params, shaped)])

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        g = self.g[0]
        return self.of(torch.from_numpy(v.reshape(-1)).to(g.device, g.dtype)).cpu().numpy()


def lanczos(product: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of v's spectral measure: nodes, and weights that sum to 1.

    All vectors are kept, and each new one is made orthogonal to them twice: rounding would let
    eigenvalues come again that were found already.
    """
    Q, q = v.new_empty(steps, len(v)), v / v.norm()
    α, β = [], []
    for j in range(steps):
        Q[j] = q
        w = product(q)
        α.append(q @ w)
        for _ in range(2):
            w = w - Q[: j + 1].T @ (Q[: j + 1] @ w)
        β.append(w.norm())
        if β[-1] <= 10 * torch.finfo(v.dtype).eps * max(map(abs, α)):
            break  # the space is exhausted
        q = w / β[-1]
    T = torch.diag(torch.stack(α).double())
    off = torch.stack(β[: len(α) - 1]).double() if len(α) > 1 else T.new_empty(0)
    T += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(T.cpu())
    return nodes, vectors[0] ** 2


@dataclass(frozen=True)
class Spectrum:
    """Of a Hessian. `nodes` and `weights`, which sum to 1, stand for all eigenvalues."""

    size: int
    largest: Tensor
    smallest: float
    nodes: Tensor
    weights: Tensor
    products: int = 0

    @property
    def trace(self) -> float:
        return self.size * (self.nodes @ self.weights).item()

    @property
    def reach(self) -> tuple[float, float]:
        """The first and the last eigenvalue, as far as is known."""
        low = min(self.smallest, self.nodes.min().item())
        return low, max(self.largest.max().item(), self.nodes.max().item())

    def density(self, grid: Tensor, width: float) -> Tensor:
        """Of the eigenvalues, each blurred to a Gaussian of this standard deviation."""
        at = (grid[:, None] - self.nodes) / width
        bells = torch.exp(-(at**2) / 2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights


def by_products(task: Task, probes: int, steps: int, seed: int, title: str) -> Spectrum:
    """Without the matrix."""
    H, n = Hessian(task.ours, task.params), task.size
    v = H.g[0]
    draw = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    with bar(f"{title}: density", probes * steps, "product") as H.progress:
        for _ in range(probes):
            probe = torch.randn(n, generator=draw, dtype=v.dtype).to(v.device)
            found, weight = lanczos(H.of, probe, min(steps, n))
            nodes.append(found)
            weights.append(weight / probes)
        products = H.progress.n
    # In float32 a product has six digits, and more are not asked for.
    tolerance = 0 if v.dtype == torch.float64 else 1e-4
    start = torch.randn(n, generator=draw, dtype=v.dtype).numpy()
    options = {"v0": start, "tol": tolerance, "maxiter": 100, "return_eigenvectors": False}
    with bar(f"{title}: eigenvalues", None, "product") as H.progress:
        largest = np.sort(eigsh(H, k=LARGEST, which="LA", ncv=6 * LARGEST, **options))[::-1]
        smallest = torch.cat(nodes).min().item()  # a bound from above
        if "whole" in title:
            smallest = eigsh(H, k=1, which="SA", ncv=20, **options | {"tol": tolerance * 10})[0]
        products += H.progress.n
    top = torch.tensor(largest.copy(), dtype=torch.float64)
    return Spectrum(n, top, float(smallest), torch.cat(nodes), torch.cat(weights), products)


def by_matrix(task: Task) -> Spectrum:
    """All of it, from PyTorch's Hessian of the plain expression."""
    shapes = {name: p.shape for name, p in task.params.items()}

    def of(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), pieces, strict=True)
        return task.plain({name: piece.view(shape) for (name, shape), piece in named})

    flat = torch.cat([p.detach().flatten() for p in task.params.values()])
    H = jacrev(grad(of), chunk_size=32)(flat)
    λ = torch.linalg.eigvalsh((H + H.T) / 2).cpu()
    return Spectrum(len(λ), λ.flip(0)[:LARGEST], λ[0].item(), λ, torch.full_like(λ, 1 / len(λ)))


# Packages for curvature, where they are installed


class Weight(nn.Module):
    """Gives the loss what it needs: features, and the weight, of which the head's loss is."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.weight


class Fused(nn.Module):
    reduction = "mean"  # which curvlinops asks for

    def forward(self, seen: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return linear_cross_entropy(*seen, t)


def by_curvlinops(model: Transformer, ids: Tensor) -> Tensor:
    """Of the head. Its products are jvp(jacrev(loss)), which PyTorch 2.13 gets wrong for the weight
    and bias of a LayerNorm, whatever the loss: the whole model is not for it."""
    from curvlinops import HessianLinearOperator

    with torch.no_grad():
        data = [(model.features(ids[:, :-1]), ids[:, 1:])]
    module = Weight(model.head.weight)
    H = HessianLinearOperator(module, Fused(), list(module.parameters()), data)
    start = np.random.default_rng(0).standard_normal(H.shape[0])
    options = {"v0": start, "ncv": 6 * LARGEST, "return_eigenvectors": False}
    return torch.tensor(eigsh(H.to_scipy(np.float64), k=LARGEST, which="LA", **options))


def by_hessian_eigenthings(model: Transformer, ids: Tensor) -> Tensor:
    from hessian_eigenthings import HessianOperator, lanczos

    H = HessianOperator(LossOf(model), [ids], lambda module, batch: module(batch))
    # Without making each vector orthogonal to all, eigenvalues would be found again.
    options = {"max_iter": 150, "reorthogonalize": True, "seed": 0}
    return lanczos(H, k=LARGEST, which="LA", **options).eigenvalues


PACKAGES = {
    ("head", "curvlinops"): by_curvlinops,
    ("whole", "hessian_eigenthings"): by_hessian_eigenthings,
}


# Memory


def peak_of(name: str, setting: Setting, fused: bool, device: str) -> int:
    """Bytes at the peak of one product, from the loss on, beyond arguments and result."""

    def run_of(setting: Setting) -> tuple[Callable[[], tuple[Tensor, ...]], Problem]:
        model = made(setting, 0).to(device)
        shape = setting.sequences, setting.context + 1
        task = tasks(model, torch.randint(setting.vocabulary, shape).to(device))[name]
        params = tuple(task.params.values())
        v = tuple(torch.randn_like(p) for p in params)

        def run() -> tuple[Tensor, ...]:
            return times(gradient(task.ours if fused else task.plain, task.params), task.params, v)

        return run, Problem(params, v)

    tiny, _ = run_of(replace(TINY, sequences=1))
    tiny()  # what a first call loads is not counted
    return peak(*run_of(setting))


Case = tuple[str, Setting, bool]


def peaks(setting: Setting, device: str) -> dict[tuple[str, int, bool], int]:
    """By task, tokens and whether fused; on the CPU each in a process that has run nothing else."""
    cases: list[Case] = [
        (name, replace(setting, sequences=setting.sequences * more), fused)
        for name in ("head", "whole")
        for more in (1, 4)
        for fused in (True, False)
    ]
    found = {}
    with bar("memory of one product", len(cases), "case") as progress:
        measured = alone(cases) if device == "cpu" else (peak_of(*c, device) for c in cases)
        for (name, larger, fused), value in zip(cases, measured, strict=True):
            found[name, larger.sequences * larger.context, fused] = value
            progress.update()
    return found


def alone(cases: Sequence[Case]) -> Iterator[int]:
    """A fresh process imports what is needed and forks for each case."""
    code = "import curvature, sys; curvature.child(sys.argv[1])"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    asked = json.dumps([(name, asdict(setting), fused) for name, setting, fused in cases])
    with subprocess.Popen(
        [sys.executable, "-c", code, asked],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield from map(int, process.stdout)


def child(asked: str) -> None:
    torch.set_num_threads(1)  # each thread would have a block of its own
    cases = [(name, Setting(**setting), fused, "cpu") for name, setting, fused in json.loads(asked)]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for value in pool.imap(peak_of_case, cases):
            print(value, flush=True)


def peak_of_case(case: tuple[str, Setting, bool, str]) -> int:
    return peak_of(*case)


# What is shown


@dataclass(frozen=True)
class Results:
    dense: dict[str, Spectrum]  # of the tiny model, by the name of the task
    tiny: dict[str, Spectrum]
    larger: dict[str, Spectrum]
    packages: dict[tuple[str, str], Tensor]  # largest eigenvalues, by task and package
    peaks: dict[tuple[str, int, bool], int]
    picture: Path


def width_of(spectrum: Spectrum) -> float:
    """What Lanczos can tell apart: less of a large Hessian, by fewer steps."""
    low, high = spectrum.reach
    return (high - low) / (120 if spectrum.size < 10_000 else 50)


def grid_of(spectrum: Spectrum, width: float) -> Tensor:
    low, high = spectrum.reach
    return torch.linspace(low - 6 * width, high + 6 * width, 4001, dtype=torch.float64)


def distance(a: Spectrum, b: Spectrum) -> float:
    """Half of the area between the two densities: 0 if they are one, 1 if nowhere together."""
    width = width_of(b)
    grid = grid_of(b, width)
    difference = (a.density(grid, width) - b.density(grid, width)).abs()
    return torch.trapezoid(difference, grid).item() / 2


def row(name: str, how: str, size: object, λ: Tensor, *rest: str) -> str:
    values = "".join(f"{x:11.6f}" for x in λ.tolist())
    return f"{name:7}{how:22}{size!s:>9}  {values}" + "".join(f"{x:>12}" for x in rest)


def table(results: Results) -> str:
    head = (
        f"{'of':7}{'by':22}{'size':>9}  {f'the {LARGEST} largest eigenvalues':^{11 * LARGEST}}"
        f"{'smallest':>12}{'trace':>12}{'products':>12}"
    )
    lines = [head, "-" * len(head)]

    def add(name: str, how: str, s: Spectrum) -> None:
        trace = f"≈ {s.trace:.0f}" if s.products else f"{s.trace:.3f}"  # of a few probes, or exact
        rest = f"{s.smallest:z.6f}", trace, f"{s.products or ''}"
        lines.append(row(name, how, s.size, s.largest, *rest))

    for name, dense in results.dense.items():
        add(name, "tiny model's matrix", dense)
        add(name, "products, fused head", results.tiny[name])
    for (name, package), λ in results.packages.items():
        lines.append(row(name, package, results.dense[name].size, λ))
    for name, larger in results.larger.items():
        add(name, "larger model, products", larger)
    for name, dense in results.dense.items():
        tiny = results.tiny[name]
        off = ((tiny.largest - dense.largest).abs() / dense.largest.abs()).max().item()
        lines.append(
            f"tiny {name}: eigenvalues differ by {off:.0e} of themselves, the density misplaces "
            f"{distance(tiny, dense):.1%} of them"
        )
    lines += ["", f"{'peak memory of one product':30}{'tokens':>8}{'fused':>14}{'all logits':>14}"]
    lines.append("-" * 66)
    for name, rows in dict.fromkeys((name, rows) for name, rows, _ in results.peaks):
        ours, theirs = (results.peaks[name, rows, fused] / MIB for fused in (True, False))
        label = {"head": "larger model's head", "whole": "larger model, whole"}[name]
        lines.append(f"{label:30}{rows:8}{ours:10.1f} MiB{theirs:10.1f} MiB")
    return "\n".join(lines)


BLUE, ORANGE, RED = "#14365d", "#f5a65b", "#c0143c"


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, hspace=0.05, wspace=0.03)
    figure.suptitle("The spectrum of a language model's Hessian, from products alone", fontsize=15)
    panels = figure.subplots(3, 2, height_ratios=(1, 1, 0.55))
    titles = {"head": "the head's weight", "whole": "all parameters"}
    for above, name in zip(panels, titles, strict=False):
        dense, tiny, larger = (s[name] for s in (results.dense, results.tiny, results.larger))
        for axes, s, what in zip(
            above, (tiny, larger), ("tiny model", "larger model"), strict=True
        ):
            width = width_of(s)
            grid = grid_of(s, width)
            if s is tiny:
                low, high = dense.reach
                bins = np.arange(low - 1.25 * width, high + 2.5 * width, 2.5 * width)
                λ = dense.nodes.numpy()
                axes.hist(
                    λ,
                    bins,
                    density=True,
                    color=ORANGE,
                    alpha=0.75,
                    label="eigenvalues of the matrix",
                )
            axes.semilogy(
                grid, s.density(grid, width), color=BLUE, lw=1.6, label="Lanczos quadrature"
            )
            one = 1 / (s.size * width * math.sqrt(2 * math.pi))  # the top of a single eigenvalue
            highest = s.density(grid, width).max().item()
            axes.set_ylim(one / 8, highest * 6)
            axes.axhline(one, color="grey", lw=0.9, ls=":", label="height of a single eigenvalue")
            marked, label = s.largest.tolist(), f"eigsh: the {LARGEST} largest"
            if name == "whole":
                marked, label = [*marked, s.smallest], f"{label}, the smallest"
            at = [one / 5] * len(marked)
            axes.plot(marked, at, "v", color=RED, ms=7, ls="none", label=label)
            axes.set_title(f"{what}, {titles[name]}: {s.size:,} × {s.size:,}")
            axes.set_xlabel("eigenvalue (nats per squared unit of a parameter)")
            axes.set_ylabel("density (share per unit of eigenvalue)")
            axes.xaxis.set_major_locator(MaxNLocator(8))
            axes.grid(alpha=0.25)
            axes.legend(fontsize=9)
    for axes, name in zip(panels[2], titles, strict=True):
        rows = sorted({rows for other, rows, _ in results.peaks if other == name})
        for fused, color, label, shift in (
            (True, BLUE, "fused head", -0.2),
            (False, ORANGE, "all logits", 0.2),
        ):
            values = [results.peaks[name, n, fused] / MIB for n in rows]
            bars = axes.barh(np.arange(len(rows)) + shift, values, 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_yticks(range(len(rows)), [f"{n:,} tokens" for n in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("peak memory of one product (MiB)")
        axes.set_title(f"larger model, {titles[name]}")
        axes.grid(axis="x", alpha=0.25)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=100)


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Eigenvalues and spectral density of a language model's Hessian by Lanczos on "
        "products with it, held to the matrix where there is one, and the memory of a product.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_accelerator(parser)
    parser.add_argument("--size", choices=SIZES, default="small", help="large is for a GPU")
    parser.add_argument("--probes", type=positive, default=1, help="random vectors of the density")
    parser.add_argument(
        "--lanczos", type=positive, default=60, help="steps from each, all kept in memory"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and probes")
    parser.add_argument("--out", type=Path, default=Path("curvature_out"), help="picture's folder")
    return parser.parse_args(argv)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Spectra = dict[str, Spectrum]


def of_tiny_model(
    args: argparse.Namespace, device: str
) -> tuple[Spectra, Spectra, dict[tuple[str, str], Tensor]]:
    """By the matrix, by products, and by packages."""
    setting, _ = SIZES[args.size]
    _, training, held_out = tokens("small", setting.vocabulary)
    model = trained(setting, training, args.seed, device, "tiny").double()
    ids = blocks(held_out, setting.context)[: setting.sequences].to(device)
    its = tasks(model, ids)
    # Products cost little here, so that there are more of them.
    probes, steps = 5 * args.probes, 2 * args.lanczos
    tiny = {
        name: by_products(task, probes, steps, args.seed, f"tiny {name}")
        for name, task in its.items()
    }
    dense = {}
    with bar("tiny: matrices, for comparison", len(its), "matrix") as progress:
        for name, task in its.items():
            dense[name] = by_matrix(task)
            progress.update()
    packages = {}
    for (name, package), by in PACKAGES.items():
        if find_spec(package):
            packages[name, package] = by(model, ids).double().cpu().sort(descending=True).values
    return dense, tiny, packages


def of_larger_model(args: argparse.Namespace, device: str) -> Spectra:
    _, setting = SIZES[args.size]
    _, training, held_out = tokens("large" if args.size == "large" else "small", setting.vocabulary)
    model = trained(setting, training, args.seed, device, "larger")
    ids = blocks(held_out, setting.context)[: setting.sequences].to(device)
    return {
        name: by_products(task, args.probes, args.lanczos, args.seed, f"larger {name}")
        for name, task in tasks(model, ids).items()
    }


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    device = device_of(args.accelerator).type
    with one_thread():  # matrices as small as these only lose by sharing the work
        dense, tiny, packages = of_tiny_model(args, device)
    larger = of_larger_model(args, device)
    memory = peaks(SIZES[args.size][1], device)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(dense, tiny, larger, packages, memory, args.out / "curvature.png")
    draw(results, results.picture)
    print(f"\n{table(results)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
