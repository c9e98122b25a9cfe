"""The gradient of each example by itself, through the fused head: `torch.func.vmap` of `grad`.

A batch's gradient is the mean of its examples'. Who clips each of them (differential privacy),
weighs or prunes data, or looks for wrong labels, needs them one by one, and `vmap(grad(loss))`
gives them all at once, also where the loss is `linear_cross_entropy`. Two models are trained first:

    digits   a small network on scikit-learn's bundled digits; of the half that it has not seen
             there is a gradient for each digit
    text     a small Transformer on real text (`language_model.py`), one for each sequence of its
             validation text

and the examples with the largest norms are those that the model finds hardest. What to see:

- a table: how the norms are distributed, and that the mean of all gradients is the gradient of the
  whole batch, from one ordinary backward, to rounding;
- the sequences with the largest and with the smallest norm, printed;
- a picture: histograms of the norms, and the hardest digits with what they are taken for.

    python examples/per_sample_gradients.py
    python examples/per_sample_gradients.py --sequences 1024 --chunk 32 --seed 1
    python examples/per_sample_gradients.py --size large --accelerator gpu

It needs `pip install ".[examples]"`, and takes under two minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from curvature import SIZES, LossOf, one_thread, trained
from language_model import add_accelerator, bar, blocks, device_of, positive, tokens
from matplotlib.figure import Figure  # without pyplot, a PNG is drawn by Agg and needs no display
from matplotlib.ticker import LogLocator, MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from torch_nnmath.nn import LinearCrossEntropyLoss

SHOWN = 18  # digits in the picture
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Norms:
    """Of a data set: each example's loss and norm of its gradient, and how the sum compares."""

    losses: Tensor
    norms: Tensor
    mean: Params  # of the gradients of all examples
    batch: Params  # the gradient of the mean loss

    @property
    def difference(self) -> float:
        """Of the mean of the gradients from the batch's gradient, over the latter's norm."""
        off = sum(((self.mean[k] - g) ** 2).sum() for k, g in self.batch.items())
        return (off / sum((g**2).sum() for g in self.batch.values())).sqrt().item()

    @property
    def hardest(self) -> list[int]:
        return self.norms.argsort(descending=True).tolist()


def per_sample(module: nn.Module, data: Sequence[Tensor], chunk: int, title: str) -> Norms:
    """Of a module that gives the mean loss of a batch, which `data` are the arguments of.

    A gradient of each example takes memory of examples times parameters: a chunk's at a time.
    """
    params = {name: p.detach() for name, p in module.named_parameters()}

    def of_one(params: Params, *example: Tensor) -> Tensor:
        return functional_call(module, params, tuple(x[None] for x in example))

    each = vmap(grad_and_value(of_one), in_dims=(None, *[0] * len(data)))
    losses, norms = [], []
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    with bar(f"{title}: gradients", len(data[0]), "example") as progress:
        for examples in zip(*(x.split(chunk) for x in data), strict=True):
            gradients, c = each(params, *examples)
            losses.append(c)
            norms.append(sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt())
            for name, g in gradients.items():
                total[name] += g.sum(0)
            progress.update(len(c))
    n = len(data[0])
    batch = {name: torch.zeros_like(p) for name, p in params.items()}
    for examples in zip(*(x.split(chunk) for x in data), strict=True):  # no vmap in this one
        c = module(*examples) * (len(examples[0]) / n)
        for name, g in zip(params, torch.autograd.grad(c, list(module.parameters())), strict=True):
            batch[name] += g
    mean = {name: g / n for name, g in total.items()}
    return Norms(torch.cat(losses), torch.cat(norms), mean, batch)


# Digits


class Digits(nn.Module):
    """Pixels (N, 64) and digits (N) to the mean loss: a hidden layer, and the fused head."""

    def __init__(self, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.Tanh())
        self.head = LinearCrossEntropyLoss(hidden, 10, bias=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x), y)

    def read(self, x: Tensor) -> Tensor:
        """The digits that the pixels are taken for."""
        return self.head.linear(self.body(x)).argmax(-1)


@dataclass(frozen=True)
class ReadDigits:
    x: Tensor
    y: Tensor
    read: Tensor
    its: Norms


def digits(epochs: int, seed: int, device: str) -> ReadDigits:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
    y = torch.tensor(labels, device=device)
    train, test = train_test_split(
        np.arange(len(x)), test_size=0.5, stratify=labels, random_state=seed
    )
    torch.manual_seed(seed)
    net = Digits(64).to(device)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    with bar("digits: training", epochs, "epoch") as progress:
        for _ in range(epochs):
            for chosen in torch.from_numpy(train)[torch.randperm(len(train))].split(64):
                adam.zero_grad()
                net(x[chosen], y[chosen]).backward()
                adam.step()
            progress.update()
    x, y = x[test], y[test]
    its = per_sample(net, (x, y), chunk=256, title="digits")
    with torch.no_grad():
        return ReadDigits(x.cpu(), y.cpu(), net.read(x).cpu(), its)


# Text


@dataclass(frozen=True)
class ReadText:
    texts: list[str]
    its: Norms


def text(args: argparse.Namespace, device: str) -> ReadText:
    setting = SIZES[args.size][1]
    tokenizer, training, held_out = tokens(
        "large" if args.size == "large" else "small", setting.vocabulary
    )
    if args.steps is not None:
        setting = replace(setting, steps=args.steps)
    model = trained(setting, training, args.seed, device, "text")
    # chosen all over the text
    all_of_it = blocks(held_out, setting.context)
    chosen = torch.linspace(0, len(all_of_it) - 1, min(args.sequences, len(all_of_it))).long()
    ids = all_of_it[chosen]
    its = per_sample(LossOf(model), (ids.to(device),), args.chunk, "text")
    return ReadText([tokenizer.decode(i) for i in ids.tolist()], its)


# What is shown


@dataclass(frozen=True)
class Results:
    digits: ReadDigits
    text: ReadText
    picture: Path


def table(results: Results) -> str:
    lines = [
        f"{'':8}{'':10}{'norm of the gradient':^32}{'mean of all':>15}",
        f"{'':8}{'examples':>10}{'median':>10}{'90 %':>10}{'largest':>12}{'- batch gradient':>18}",
        "-" * 68,
    ]
    for name, its in (("digits", results.digits.its), ("text", results.text.its)):
        median, high = its.norms.quantile(its.norms.new_tensor([0.5, 0.9])).tolist()
        lines.append(
            f"{name:8}{len(its.norms):10}{median:10.4f}{high:10.4f}{its.norms.max():12.4f}"
            f"{its.difference:18.1e}"
        )
    d = results.digits
    wrong = d.read != d.y
    lines.append(
        f"\nOf the {SHOWN} digits with the largest norms {wrong[d.its.hardest[:SHOWN]].sum()} are "
        f"misread, of all {len(wrong)}: {wrong.sum()}."
    )
    return "\n".join(lines)


def excerpt(text: str, characters: int = 150) -> str:
    """In a line."""
    line = " ".join(text.replace("<|end|>", " ").split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def sequences(results: Results, n: int = 3) -> str:
    its, lines = results.text.its, []
    for what, chosen in (("largest", its.hardest[:n]), ("smallest", its.hardest[::-1][:n])):
        lines.append(f"\nText with the {what} norms:")
        for i in chosen:
            lines.append(f"  {its.norms[i]:8.3f}  {excerpt(results.text.texts[i])}")
    return "\n".join(lines)


BLUE, ORANGE, RED = "#14365d", "#f5a65b", "#c0143c"


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12, hspace=0.05)
    figure.suptitle("Gradients of single examples through the fused head", fontsize=15)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    left, middle, right = above.subplots(1, 3)

    d, its = results.digits, results.digits.its
    norms, wrong = its.norms.cpu(), d.read != d.y
    bins = np.geomspace(norms.min().item(), norms.max().item() * 1.01, 40)
    left.hist(
        [norms[wrong].numpy(), norms[~wrong].numpy()],
        bins,
        stacked=True,
        color=(RED, BLUE),
        label=(f"misread ({wrong.sum()})", f"read ({(~wrong).sum()})"),
    )
    left.set(xscale="log", xlabel="norm of a digit's gradient", ylabel="digits")
    left.set_title("Digits that the network has not seen")
    left.legend(loc="upper left")

    its = results.text.its
    norms, losses = its.norms.cpu().numpy(), its.losses.cpu().numpy()
    middle.hist(norms, np.geomspace(norms.min(), norms.max() * 1.01, 40), color=BLUE)
    middle.set(xscale="log", xlabel="norm of a sequence's gradient", ylabel="sequences")
    middle.yaxis.set_major_locator(MaxNLocator(integer=True))
    middle.set_title("Validation text")
    right.scatter(losses, norms, s=12, color=BLUE, alpha=0.5, lw=0)
    hard = its.hardest[:3]
    right.scatter(losses[hard], norms[hard], s=50, facecolor="none", edgecolor=RED, label="hardest")
    right.set(
        yscale="log", xlabel="loss of the sequence (nats per token)", ylabel="norm of its gradient"
    )
    right.set_title("Hard is not the same as unlikely")
    right.legend()
    for axis in (middle.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)

    below.suptitle(f"The {SHOWN} digits with the largest gradients")
    shown = results.digits.its.hardest[:SHOWN]
    for axes, i in zip(below.subplots(2, SHOWN // 2).flat, shown, strict=False):
        axes.imshow(d.x[i].reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        is_read = d.read[i] == d.y[i]
        axes.set(xticks=[], yticks=[], title=f"a {d.y[i]}")
        axes.set_xlabel(
            f"read as {d.read[i]} {'✓' if is_read else '✗'}\nnorm {d.its.norms[i]:.1f}",
            color=BLUE if is_read else RED,
        )
    figure.savefig(path, dpi=100)


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Per-sample gradients by vmap(grad) through the fused head: their norms, and "
        "the examples that are hardest by them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_accelerator(parser)
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="of the language model; large is for a GPU"
    )
    parser.add_argument(
        "--epochs", type=positive, default=40, help="passes of training over the digits"
    )
    parser.add_argument(
        "--steps", type=positive, help="steps of training on text; None is the size's own"
    )
    parser.add_argument("--sequences", type=positive, default=256, help="sequences of text")
    parser.add_argument(
        "--chunk", type=positive, default=8, help="sequences whose gradients are in memory at once"
    )
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument(
        "--out", type=Path, default=Path("per_sample_gradients_out"), help="the picture's folder"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    device = device_of(args.accelerator).type
    args.out.mkdir(parents=True, exist_ok=True)
    with one_thread():  # matrices as small as these only lose by sharing the work
        of_digits = digits(args.epochs, args.seed, device)
    results = Results(of_digits, text(args, device), args.out / "per_sample_gradients.png")
    draw(results, results.picture)
    print(f"\n{table(results)}\n{sequences(results)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
