"""Computes the spectrum of a language model's Hessian from Hessian-vector products.

`linear_cross_entropy` materialises the logits neither in its first nor in its second derivative, so
a Hessian-vector product fits in memory wherever a gradient does, and Lanczos methods need nothing
else. The products come from a small transformer (`text_model.py`), for two functions:

    head     the loss as a function of the last layer's weight, with fixed features
    whole    the loss as a function of all parameters

SciPy's `eigsh` computes the largest eigenvalues, and for `whole` the smallest, too: the loss of
`head` is convex, so its Hessian has no negative ones. Stochastic Lanczos quadrature computes the
density.
Results:

- a table: for a tiny model, whose Hessian PyTorch computes as a matrix from the plain expression
  in float64, all printed digits of the eigenvalues agree; also with `curvlinops` and
  `hessian_eigenthings`, if they are installed;
- a table of the peak memory of one product, with the fused head and with all logits;
- a picture: the tiny model's density over the histogram of its eigenvalues, and the density of a
  larger model, whose Hessian would not fit in memory.

    python examples/curvature.py
    python examples/curvature.py --probes 4 --seed 1
    python examples/curvature.py --size large --accelerator gpu

It needs `pip install ".[examples]"`, and takes under three minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot, which may need a display
from matplotlib.ticker import MaxNLocator
from scipy.sparse.linalg import LinearOperator, eigsh
from shared import (
    BLUE,
    ORANGE,
    RED,
    add_accelerator,
    make_bar,
    one_thread,
    parse_positive,
    select_device,
)
from text_model import (
    SIZES,
    TINY,
    NextTokenLoss,
    Setting,
    Transformer,
    build_transformer,
    encode_corpus,
    split_blocks,
    train_transformer,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from tqdm import tqdm  # a dependency of Lightning

from torch_nnmath._memory import MIB, read_peak, reset_peak
from torch_nnmath.functional import linear_cross_entropy

LARGEST = 5  # number of printed eigenvalues
Params = dict[str, Tensor]


def compute_plain_loss(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """The loss in plain PyTorch, which materialises all logits."""
    return F.cross_entropy(F.linear(x, W).flatten(0, -2), t.flatten())


@dataclass(frozen=True)
class Task:
    """A loss as a function of parameters, with the fused head and with all logits."""

    params: Params
    fused: Callable[[Params], Tensor]
    plain: Callable[[Params], Tensor]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params.values())


def build_tasks(model: Transformer, ids: Tensor) -> dict[str, Task]:
    fused, plain = NextTokenLoss(model), NextTokenLoss(model, compute_plain_loss)
    with torch.no_grad():
        x, t = model.features(ids[:, :-1]), ids[:, 1:]
    weight = model.head.weight.detach().clone().requires_grad_()
    return {
        "head": Task(
            {"weight": weight},
            lambda params: linear_cross_entropy(x, params["weight"], t),
            lambda params: compute_plain_loss(x, params["weight"], t),
        ),
        "whole": Task(
            dict(fused.named_parameters()),  # a tied weight occurs once
            lambda params: functional_call(fused, params, (ids,)),
            lambda params: functional_call(plain, params, (ids,)),
        ),
    }


# Hessian-vector products, and the spectrum from them


def compute_gradient(loss: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, ...]:
    """Returns the gradient with its graph, for differentiating again."""
    return torch.autograd.grad(loss(params), list(params.values()), create_graph=True)


def multiply_hessian(
    g: Sequence[Tensor], params: Params, v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Returns the Hessian times v, the gradient of g·v. It retains the graph of g."""
    return torch.autograd.grad(
        g, list(params.values()), v, retain_graph=True, materialize_grads=True
    )


class Hessian(LinearOperator):
    """The Hessian as SciPy's operator. All products share the gradient's graph."""

    def __init__(self, loss: Callable[[Params], Tensor], params: Params):
        self.params, self.g = params, compute_gradient(loss, params)
        self.progress: tqdm | None = None
        n = sum(p.numel() for p in params.values())
        super().__init__(np.dtype(str(self.g[0].dtype).removeprefix("torch.")), (n, n))

    def multiply(self, v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in self.params.values()])
        shaped = [x.view_as(p) for x, p in zip(pieces, self.params.values(), strict=True)]
        if self.progress is not None:
            self.progress.update()
        return torch.cat([h.flatten() for h in multiply_hessian(self.g, self.params, shaped)])

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        g = self.g[0]
        return self.multiply(torch.from_numpy(v.reshape(-1)).to(g.device, g.dtype)).cpu().numpy()


def lanczos(product: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of v's spectral measure: nodes, and weights that sum to 1.

    Each new vector is reorthogonalised twice against all earlier ones; otherwise rounding repeats
    converged eigenvalues.
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
            break  # the Krylov space is exhausted
        q = w / β[-1]
    T = torch.diag(torch.stack(α).double())
    off = torch.stack(β[: len(α) - 1]).double() if len(α) > 1 else T.new_empty(0)
    T += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(T.cpu())
    return nodes, vectors[0] ** 2


@dataclass(frozen=True)
class Spectrum:
    """A Hessian's spectrum. The `weights` of the `nodes` sum to 1."""

    size: int
    largest: Tensor
    smallest: float
    nodes: Tensor
    weights: Tensor
    products: int = 0  # 0: from the matrix

    @property
    def trace(self) -> float:
        return self.size * (self.nodes @ self.weights).item()

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue found."""
        low = min(self.smallest, self.nodes.min().item())
        return low, max(self.largest.max().item(), self.nodes.max().item())

    def compute_density(self, grid: Tensor, width: float) -> Tensor:
        """The eigenvalues' density, smoothed by a Gaussian of this standard deviation."""
        z = (grid[:, None] - self.nodes) / width
        gaussians = torch.exp(-(z**2) / 2) / (width * math.sqrt(2 * math.pi))
        return gaussians @ self.weights


def compute_spectrum(task: Task, probes: int, steps: int, seed: int, title: str) -> Spectrum:
    """Computes the spectrum from products, without the matrix."""
    H, n = Hessian(task.fused, task.params), task.size
    v = H.g[0]
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    with make_bar(f"{title}: density", probes * steps, "product") as H.progress:
        for _ in range(probes):
            probe = torch.randn(n, generator=generator, dtype=v.dtype).to(v.device)
            probe_nodes, probe_weights = lanczos(H.multiply, probe, min(steps, n))
            nodes.append(probe_nodes)
            weights.append(probe_weights / probes)
        products = H.progress.n
    # In float32 a product has about six correct digits.
    tolerance = 0 if v.dtype == torch.float64 else 1e-4
    start = torch.randn(n, generator=generator, dtype=v.dtype).numpy()
    options = {"v0": start, "tol": tolerance, "maxiter": 100, "return_eigenvectors": False}
    with make_bar(f"{title}: eigenvalues", None, "product") as H.progress:
        largest = np.sort(eigsh(H, k=LARGEST, which="LA", ncv=6 * LARGEST, **options))[::-1]
        smallest = torch.cat(nodes).min().item()  # an upper bound
        if "whole" in title:
            smallest = eigsh(H, k=1, which="SA", ncv=20, **options | {"tol": tolerance * 10})[0]
        products += H.progress.n
    top = torch.tensor(largest.copy(), dtype=torch.float64)
    return Spectrum(n, top, float(smallest), torch.cat(nodes), torch.cat(weights), products)


def compute_dense_spectrum(task: Task) -> Spectrum:
    """Computes all eigenvalues of PyTorch's Hessian of the plain expression."""
    shapes = {name: p.shape for name, p in task.params.items()}

    def compute_loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), pieces, strict=True)
        return task.plain({name: piece.view(shape) for (name, shape), piece in named})

    flat = torch.cat([p.detach().flatten() for p in task.params.values()])
    H = jacrev(grad(compute_loss), chunk_size=32)(flat)
    λ = torch.linalg.eigvalsh((H + H.T) / 2).cpu()
    return Spectrum(len(λ), λ.flip(0)[:LARGEST], λ[0].item(), λ, torch.full_like(λ, 1 / len(λ)))


# Other packages, if installed


class Weight(nn.Module):
    """A module whose only parameter is the head's weight; its output goes to FusedLoss."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.weight


class FusedLoss(nn.Module):
    reduction = "mean"  # curvlinops reads it

    def forward(self, x_and_weight: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return linear_cross_entropy(*x_and_weight, t)


def run_curvlinops(model: Transformer, ids: Tensor) -> Tensor:
    """Runs curvlinops on the head. It cannot do the whole model: its products are
    jvp(jacrev(loss)), which PyTorch 2.13 computes wrongly for a LayerNorm's weight and bias."""
    from curvlinops import HessianLinearOperator

    with torch.no_grad():
        data = [(model.features(ids[:, :-1]), ids[:, 1:])]
    module = Weight(model.head.weight)
    H = HessianLinearOperator(module, FusedLoss(), list(module.parameters()), data)
    start = np.random.default_rng(0).standard_normal(H.shape[0])
    options = {"v0": start, "ncv": 6 * LARGEST, "return_eigenvectors": False}
    return torch.tensor(eigsh(H.to_scipy(np.float64), k=LARGEST, which="LA", **options))


def run_hessian_eigenthings(model: Transformer, ids: Tensor) -> Tensor:
    from hessian_eigenthings import HessianOperator, lanczos

    H = HessianOperator(NextTokenLoss(model), [ids], lambda module, batch: module(batch))
    # Without reorthogonalisation eigenvalues are repeated.
    options = {"max_iter": 150, "reorthogonalize": True, "seed": 0}
    return lanczos(H, k=LARGEST, which="LA", **options).eigenvalues


PACKAGES = {
    ("head", "curvlinops"): run_curvlinops,
    ("whole", "hessian_eigenthings"): run_hessian_eigenthings,
}


# Memory


def measure_peak(name: str, setting: Setting, is_fused: bool, device: str) -> int:
    """Returns the peak bytes of one product, from the loss on, beyond arguments and result."""

    def make_product(setting: Setting) -> Callable[[], tuple[Tensor, ...]]:
        model = build_transformer(setting, 0).to(device)
        shape = setting.sequences, setting.context + 1
        task = build_tasks(model, torch.randint(setting.vocabulary, shape).to(device))[name]
        v = tuple(torch.randn_like(p) for p in task.params.values())
        loss = task.fused if is_fused else task.plain
        return lambda: multiply_hessian(compute_gradient(loss, task.params), task.params, v)

    make_product(replace(TINY, sequences=1))()  # loads the libraries that a first call loads
    product, where = make_product(setting), torch.device(device)
    gc.collect()
    before = reset_peak(where)
    result = product()
    peak = read_peak(where)
    return max(0, peak - before - sum(x.untyped_storage().nbytes() for x in result))


Case = tuple[str, Setting, bool]


def measure_peaks(setting: Setting, device: str) -> dict[tuple[str, int, bool], int]:
    """Measures by task, number of tokens and head; on a CPU each in a fresh process."""
    cases: list[Case] = [
        (name, replace(setting, sequences=setting.sequences * factor), is_fused)
        for name in ("head", "whole")
        for factor in (1, 4)
        for is_fused in (True, False)
    ]
    peaks = {}
    with make_bar("memory of one product", len(cases), "case") as progress:
        values = (
            run_in_processes(cases)
            if device == "cpu"
            else (measure_peak(*c, device) for c in cases)
        )
        for (name, case, is_fused), value in zip(cases, values, strict=True):
            peaks[name, case.sequences * case.context, is_fused] = value
            progress.update()
    return peaks


def run_in_processes(cases: Sequence[Case]) -> Iterator[int]:
    """Starts a process that imports this script and forks for each case."""
    code = "import curvature, sys; curvature.run_child(sys.argv[1])"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    text = json.dumps([(name, asdict(setting), is_fused) for name, setting, is_fused in cases])
    with subprocess.Popen(
        [sys.executable, "-c", code, text],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield from map(int, process.stdout)


def run_child(text: str) -> None:
    torch.set_num_threads(1)  # each thread would allocate its own block
    cases = [
        (name, Setting(**sizes), is_fused, "cpu") for name, sizes, is_fused in json.loads(text)
    ]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for value in pool.imap(measure_peak_of_case, cases):
            print(value, flush=True)


def measure_peak_of_case(case: tuple[str, Setting, bool, str]) -> int:
    return measure_peak(*case)


# The report


@dataclass(frozen=True)
class Results:
    dense: dict[str, Spectrum]  # the tiny model's matrices, by task
    tiny: dict[str, Spectrum]  # the same model by products
    larger: dict[str, Spectrum]
    packages: dict[tuple[str, str], Tensor]  # largest eigenvalues, by task and package
    peaks: dict[tuple[str, int, bool], int]
    picture: Path


def select_width(spectrum: Spectrum) -> float:
    """The smoothing width: fewer Lanczos steps resolve a large Hessian less."""
    low, high = spectrum.bounds
    return (high - low) / (120 if spectrum.size < 10_000 else 50)


def make_grid(spectrum: Spectrum, width: float) -> Tensor:
    low, high = spectrum.bounds
    return torch.linspace(low - 6 * width, high + 6 * width, 4001, dtype=torch.float64)


def compute_distance(a: Spectrum, b: Spectrum) -> float:
    """Half the area between the densities: 0 if they are equal, 1 if they do not overlap."""
    width = select_width(b)
    grid = make_grid(b, width)
    difference = (a.compute_density(grid, width) - b.compute_density(grid, width)).abs()
    return torch.trapezoid(difference, grid).item() / 2


def format_row(name: str, method: str, size: object, λ: Tensor, *rest: str) -> str:
    values = "".join(f"{x:11.6f}" for x in λ.tolist())
    return f"{name:7}{method:22}{size!s:>9}  {values}" + "".join(f"{x:>12}" for x in rest).rstrip()


def format_table(results: Results) -> str:
    head = (
        f"{'loss':7}{'method':22}{'size':>9}  "
        f"{f'the {LARGEST} largest eigenvalues':^{11 * LARGEST}}"
        f"{'smallest':>12}{'trace':>12}{'products':>12}"
    )
    lines = [head, "-" * len(head)]

    def add(name: str, method: str, s: Spectrum) -> None:
        trace = (
            f"≈ {s.trace:.0f}" if s.products else f"{s.trace:.3f}"
        )  # estimated from few probes, or exact
        rest = f"{s.smallest:z.6f}", trace, f"{s.products or ''}"
        lines.append(format_row(name, method, s.size, s.largest, *rest))

    for name, dense in results.dense.items():
        add(name, "tiny model, matrix", dense)
        add(name, "tiny model, products", results.tiny[name])
    for (name, package), λ in results.packages.items():
        lines.append(format_row(name, package, results.dense[name].size, λ))
    for name, larger in results.larger.items():
        add(name, "larger model, products", larger)
    for name, dense in results.dense.items():
        tiny = results.tiny[name]
        error = ((tiny.largest - dense.largest).abs() / dense.largest.abs()).max().item()
        lines.append(
            f"tiny model, {name}: relative difference of eigenvalues {error:.0e}, distance of the "
            f"densities {compute_distance(tiny, dense):.1%}"
        )
    lines += ["", f"{'peak memory of one product':30}{'tokens':>8}{'fused':>14}{'all logits':>14}"]
    lines.append("-" * 66)
    for name, rows in dict.fromkeys((name, rows) for name, rows, _ in results.peaks):
        fused, plain = (results.peaks[name, rows, is_fused] / MIB for is_fused in (True, False))
        label = f"larger model, {name}"
        lines.append(f"{label:30}{rows:8}{fused:10.1f} MiB{plain:10.1f} MiB")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, hspace=0.05, wspace=0.03)
    figure.suptitle(
        "The spectrum of a language model's Hessian, from Hessian-vector products", fontsize=15
    )
    panels = figure.subplots(3, 2, height_ratios=(1, 1, 0.55))
    titles = {"head": "the head's weight", "whole": "all parameters"}
    for above, name in zip(panels, titles, strict=False):
        dense, tiny, larger = (s[name] for s in (results.dense, results.tiny, results.larger))
        for axes, s, title in zip(
            above, (tiny, larger), ("tiny model", "larger model"), strict=True
        ):
            width = select_width(s)
            grid = make_grid(s, width)
            if s is tiny:
                low, high = dense.bounds
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
                grid, s.compute_density(grid, width), color=BLUE, lw=1.6, label="Lanczos quadrature"
            )
            single = 1 / (
                s.size * width * math.sqrt(2 * math.pi)
            )  # peak of one eigenvalue's Gaussian
            highest = s.compute_density(grid, width).max().item()
            axes.set_ylim(single / 8, highest * 6)
            axes.axhline(
                single, color="grey", lw=0.9, ls=":", label="height of a single eigenvalue"
            )
            marks, label = s.largest.tolist(), f"eigsh: the {LARGEST} largest"
            if name == "whole":
                marks, label = [*marks, s.smallest], f"{label} and the smallest"
            heights = [single / 5] * len(marks)
            axes.plot(marks, heights, "v", color=RED, ms=7, ls="none", label=label)
            axes.set_title(f"{title}, {titles[name]}: {s.size:,} × {s.size:,}")
            axes.set_xlabel("eigenvalue (nats per squared parameter)")
            axes.set_ylabel("density (fraction of eigenvalues per unit)")
            axes.xaxis.set_major_locator(MaxNLocator(8))
            axes.grid(alpha=0.25)
            axes.legend(fontsize=9)
    for axes, name in zip(panels[2], titles, strict=True):
        rows = sorted({rows for task, rows, _ in results.peaks if task == name})
        for is_fused, color, label, shift in (
            (True, BLUE, "fused head", -0.2),
            (False, ORANGE, "all logits", 0.2),
        ):
            values = [results.peaks[name, n, is_fused] / MIB for n in rows]
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compute eigenvalues and spectral density of a language model's Hessian from "
        "Hessian-vector products, compare them with a tiny model's matrix, and measure memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_accelerator(parser)
    parser.add_argument("--size", choices=SIZES, default="small", help="large needs a GPU")
    parser.add_argument(
        "--probes", type=parse_positive, default=1, help="random vectors for the density"
    )
    parser.add_argument(
        "--lanczos", type=parse_positive, default=60, help="Lanczos steps per random vector"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and probes")
    parser.add_argument("--out", type=Path, default=Path("curvature_out"), help="output folder")
    return parser.parse_args(argv)


Spectra = dict[str, Spectrum]


def examine_tiny_model(
    args: argparse.Namespace, device: str
) -> tuple[Spectra, Spectra, dict[tuple[str, str], Tensor]]:
    """Returns the spectra by the matrix and by products, and the eigenvalues by packages."""
    setting, _ = SIZES[args.size]
    _, training, validation = encode_corpus("small", setting.vocabulary)
    model = train_transformer(setting, training, args.seed, device, "tiny").double()
    ids = split_blocks(validation, setting.context)[: setting.sequences].to(device)
    tasks = build_tasks(model, ids)
    # Products are cheap here, so there are more of them.
    probes, steps = 5 * args.probes, 2 * args.lanczos
    tiny = {
        name: compute_spectrum(task, probes, steps, args.seed, f"tiny {name}")
        for name, task in tasks.items()
    }
    dense = {}
    with make_bar("tiny: matrices, for comparison", len(tasks), "matrix") as progress:
        for name, task in tasks.items():
            dense[name] = compute_dense_spectrum(task)
            progress.update()
    packages = {}
    for (name, package), run in PACKAGES.items():
        if find_spec(package):
            packages[name, package] = run(model, ids).double().cpu().sort(descending=True).values
    return dense, tiny, packages


def examine_larger_model(args: argparse.Namespace, device: str) -> Spectra:
    _, setting = SIZES[args.size]
    text = "large" if args.size == "large" else "small"
    _, training, validation = encode_corpus(text, setting.vocabulary)
    model = train_transformer(setting, training, args.seed, device, "larger")
    ids = split_blocks(validation, setting.context)[: setting.sequences].to(device)
    return {
        name: compute_spectrum(task, args.probes, args.lanczos, args.seed, f"larger {name}")
        for name, task in build_tasks(model, ids).items()
    }


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    device = select_device(args.accelerator).type
    with one_thread():
        dense, tiny, packages = examine_tiny_model(args, device)
    larger = examine_larger_model(args, device)
    memory = measure_peaks(SIZES[args.size][1], device)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(dense, tiny, larger, packages, memory, args.out / "curvature.png")
    draw(results, results.picture)
    print(f"\n{format_table(results)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
