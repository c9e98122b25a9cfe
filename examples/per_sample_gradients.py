"""Computes the gradient of every single example through the fused head, by `vmap(grad)`.

A batch's gradient is the mean of its examples' gradients. Differential privacy (which clips each of
them), data weighting, data pruning and the search for wrong labels need them individually, and
`torch.func.vmap(grad(loss))` computes them together, also for `linear_cross_entropy`. Two models
are trained first:

    digits   a small network on half of scikit-learn's digits; gradients of each digit of the other
             half
    text     a small transformer on real text (`text_model.py`); gradients of each sequence of the
             validation text

The examples with the largest norms are the hardest for the model. Results:

- a table: the distribution of the norms, and the difference of the mean of all gradients from the
  batch's gradient by an ordinary backward pass, which is due to rounding;
- the sequences with the largest and the smallest norms;
- a picture: histograms of the norms, and the hardest digits with their predictions.

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
from matplotlib.figure import Figure  # without pyplot, which may need a display
from matplotlib.ticker import LogLocator, MaxNLocator
from shared import (
    BLUE,
    RED,
    add_accelerator,
    make_bar,
    one_thread,
    parse_positive,
    select_device,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from text_model import END, SIZES, NextTokenLoss, encode_corpus, split_blocks, train_transformer
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from torch_nnmath.nn import LinearCrossEntropyLoss

SHOWN = 18  # number of digits in the picture
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Norms:
    """The loss and the gradient norm of each example of a data set, and two gradients of all."""

    losses: Tensor
    norms: Tensor
    mean: Params  # the mean of all examples' gradients
    batch: Params  # the gradient of the mean loss, by an ordinary backward pass

    @property
    def difference(self) -> float:
        """The norm of `mean - batch`, relative to the norm of `batch`."""
        squares = sum(((self.mean[k] - g) ** 2).sum() for k, g in self.batch.items())
        return (squares / sum((g**2).sum() for g in self.batch.values())).sqrt().item()

    @property
    def hardest(self) -> list[int]:
        """The examples' indices, by descending norm."""
        return self.norms.argsort(descending=True).tolist()


def compute_norms(module: nn.Module, data: Sequence[Tensor], chunk: int, title: str) -> Norms:
    """Computes the gradients of a module whose output is the mean loss of a batch.

    Args:
        data: the module's arguments, with the examples along the first axis.
        chunk: the number of examples at a time; their gradients take chunk x parameters of memory.
    """
    params = {name: p.detach() for name, p in module.named_parameters()}

    def compute_loss(params: Params, *example: Tensor) -> Tensor:
        return functional_call(module, params, tuple(x[None] for x in example))

    compute_gradients = vmap(grad_and_value(compute_loss), in_dims=(None, *[0] * len(data)))
    losses, norms = [], []
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    with make_bar(f"{title}: gradients", len(data[0]), "example") as progress:
        for examples in zip(*(x.split(chunk) for x in data), strict=True):
            gradients, c = compute_gradients(params, *examples)
            losses.append(c)
            norms.append(sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt())
            for name, g in gradients.items():
                total[name] += g.sum(0)
            progress.update(len(c))
    n = len(data[0])
    batch = {name: torch.zeros_like(p) for name, p in params.items()}
    for examples in zip(*(x.split(chunk) for x in data), strict=True):  # without vmap
        c = module(*examples) * (len(examples[0]) / n)
        for name, g in zip(params, torch.autograd.grad(c, list(module.parameters())), strict=True):
            batch[name] += g
    mean = {name: g / n for name, g in total.items()}
    return Norms(torch.cat(losses), torch.cat(norms), mean, batch)


# Digits


class Digits(nn.Module):
    """Pixels (N, 64) and digits (N) to the mean loss, by a hidden layer and the fused head."""

    def __init__(self, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.Tanh())
        self.head = LinearCrossEntropyLoss(hidden, 10, bias=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x), y)

    def predict(self, x: Tensor) -> Tensor:
        """Pixels (N, 64) to the predicted digits (N)."""
        return self.head.linear(self.body(x)).argmax(-1)


@dataclass(frozen=True)
class DigitResults:
    x: Tensor
    y: Tensor
    predictions: Tensor
    norms: Norms

    @property
    def is_wrong(self) -> Tensor:
        return self.predictions != self.y


def examine_digits(epochs: int, seed: int, device: str) -> DigitResults:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
    y = torch.tensor(labels, device=device)
    train, test = train_test_split(
        np.arange(len(x)), test_size=0.5, stratify=labels, random_state=seed
    )
    torch.manual_seed(seed)
    net = Digits(64).to(device)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    with make_bar("digits: training", epochs, "epoch") as progress:
        for _ in range(epochs):
            for indices in torch.from_numpy(train)[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                net(x[indices], y[indices]).backward()
                optimizer.step()
            progress.update()
    x, y = x[test], y[test]
    norms = compute_norms(net, (x, y), chunk=256, title="digits")
    with torch.no_grad():
        return DigitResults(x.cpu(), y.cpu(), net.predict(x).cpu(), norms)


# Text


@dataclass(frozen=True)
class TextResults:
    texts: list[str]
    norms: Norms


def examine_text(args: argparse.Namespace, device: str) -> TextResults:
    setting = SIZES[args.size][1]
    text = "large" if args.size == "large" else "small"
    tokenizer, training, validation = encode_corpus(text, setting.vocabulary)
    if args.steps is not None:
        setting = replace(setting, steps=args.steps)
    model = train_transformer(setting, training, args.seed, device, "text")
    blocks = split_blocks(validation, setting.context)
    # evenly spaced over the text
    ids = blocks[torch.linspace(0, len(blocks) - 1, min(args.sequences, len(blocks))).long()]
    norms = compute_norms(NextTokenLoss(model), (ids.to(device),), args.chunk, "text")
    return TextResults([tokenizer.decode(i) for i in ids.tolist()], norms)


# The report


@dataclass(frozen=True)
class Results:
    digits: DigitResults
    text: TextResults
    picture: Path


def format_table(results: Results) -> str:
    lines = [
        f"{'':18}{'norm of the gradient':^32}{'relative difference':>21}",
        f"{'':8}{'examples':>10}{'median':>10}{'90 %':>10}{'largest':>12}{'mean from batch':>21}",
        "-" * 71,
    ]
    for name, norms in (("digits", results.digits.norms), ("text", results.text.norms)):
        median, high = norms.norms.quantile(norms.norms.new_tensor([0.5, 0.9])).tolist()
        lines.append(
            f"{name:8}{len(norms.norms):10}{median:10.4f}{high:10.4f}{norms.norms.max():12.4f}"
            f"{norms.difference:21.1e}"
        )
    is_wrong = results.digits.is_wrong
    hardest = results.digits.norms.hardest[:SHOWN]
    lines.append(
        f"\nWrong predictions: {is_wrong.sum()} of all {len(is_wrong)} digits, and "
        f"{is_wrong[hardest].sum()} of the {SHOWN} digits with the largest norms."
    )
    return "\n".join(lines)


def shorten(text: str, characters: int = 150) -> str:
    """Puts the beginning of a text into one line."""
    line = " ".join(text.replace(END, " ").split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def format_sequences(results: Results, n: int = 3) -> str:
    norms, lines = results.text.norms, []
    for label, indices in (("largest", norms.hardest[:n]), ("smallest", norms.hardest[::-1][:n])):
        lines.append(f"\nText with the {label} norms:")
        lines += [f"  {norms.norms[i]:8.3f}  {shorten(results.text.texts[i])}" for i in indices]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12, hspace=0.05)
    figure.suptitle("Gradients of single examples through the fused head", fontsize=15)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    left, middle, right = above.subplots(1, 3)

    digits = results.digits
    norms, is_wrong = digits.norms.norms.cpu(), digits.is_wrong
    bins = np.geomspace(norms.min().item(), norms.max().item() * 1.01, 40)
    left.hist(
        [norms[is_wrong].numpy(), norms[~is_wrong].numpy()],
        bins,
        stacked=True,
        color=(RED, BLUE),
        label=(f"wrong ({is_wrong.sum()})", f"right ({(~is_wrong).sum()})"),
    )
    left.set(xscale="log", xlabel="norm of a digit's gradient", ylabel="digits")
    left.set_title("Digits of the test set")
    left.legend(loc="upper left")

    text = results.text.norms
    norms, losses = text.norms.cpu().numpy(), text.losses.cpu().numpy()
    middle.hist(norms, np.geomspace(norms.min(), norms.max() * 1.01, 40), color=BLUE)
    middle.set(xscale="log", xlabel="norm of a sequence's gradient", ylabel="sequences")
    middle.yaxis.set_major_locator(MaxNLocator(integer=True))
    middle.set_title("Validation text")
    right.scatter(losses, norms, s=12, color=BLUE, alpha=0.5, lw=0)
    hardest = text.hardest[:3]
    right.scatter(
        losses[hardest], norms[hardest], s=50, facecolor="none", edgecolor=RED, label="hardest"
    )
    right.set(
        yscale="log", xlabel="loss of the sequence (nats per token)", ylabel="norm of its gradient"
    )
    right.set_title("Norm against loss")
    right.legend()
    for axis in (middle.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)

    below.suptitle(f"The {SHOWN} digits with the largest gradients")
    hardest = digits.norms.hardest[:SHOWN]
    for axes, i in zip(below.subplots(2, SHOWN // 2).flat, hardest, strict=False):
        axes.imshow(digits.x[i].reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"digit {digits.y[i]}")
        prediction = f"predicted {digits.predictions[i]} {'✗' if is_wrong[i] else '✓'}"
        axes.set_xlabel(
            f"{prediction}\nnorm {digits.norms.norms[i]:.1f}", color=RED if is_wrong[i] else BLUE
        )
    figure.savefig(path, dpi=100)


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compute per-sample gradients by vmap(grad) through the fused head, and show "
        "the distribution of their norms and the examples with the largest ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_accelerator(parser)
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="size of the language model; large needs a GPU",
    )
    parser.add_argument(
        "--epochs", type=parse_positive, default=40, help="training epochs on the digits"
    )
    parser.add_argument(
        "--steps", type=parse_positive, help="training steps on text; by default those of --size"
    )
    parser.add_argument(
        "--sequences", type=parse_positive, default=256, help="number of text sequences"
    )
    parser.add_argument(
        "--chunk",
        type=parse_positive,
        default=8,
        help="text sequences whose gradients are in memory at the same time",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("per_sample_gradients_out"),
        help="output folder for the picture",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    device = select_device(args.accelerator).type
    args.out.mkdir(parents=True, exist_ok=True)
    with one_thread():
        digits = examine_digits(args.epochs, args.seed, device)
    results = Results(digits, examine_text(args, device), args.out / "per_sample_gradients.png")
    draw(results, results.picture)
    print(f"\n{format_table(results)}\n{format_sequences(results)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
