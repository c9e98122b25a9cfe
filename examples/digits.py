"""Trains a network on handwritten digits with the document's gradients and with PyTorch's.

The same small network is trained on the digits bundled with scikit-learn (real scans of 8 x 8
pixels; nothing is downloaded) for the two problems of the document:

    5.1  sigmoid and squared error      c = ½ Σ (t - σ(z))²
    5.2  softmax and cross entropy      c = -Σ t ln softmax(z)

each with `torch_nnmath`, whose gradients are the document's (with the sign of dc/da in 5.1
corrected), and with PyTorch's own modules, from the same weights over the same batches. Results:

- a table: both networks reach the same test accuracy, at least 95 %, and their losses agree to
  rounding;
- a picture: the loss curves coincide; below them are test digits with the predictions of the two
  networks.

    python examples/digits.py
    python examples/digits.py --hidden 128 --seed 1 --accelerator gpu

It needs `pip install ".[examples]"`, and takes well under a minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from matplotlib.figure import Figure  # without pyplot, which may need a display
from matplotlib.ticker import LogLocator, MaxNLocator
from shared import (
    BLUE,
    ORANGE,
    RED,
    add_accelerator,
    make_bar,
    parse_positive,
    select_device,
    silence_lightning,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torch_nnmath import nn

Loss = Callable[[Tensor, Tensor], Tensor]


def sigmoid_squared_error(z: Tensor, t: Tensor) -> Tensor:
    """5.1 in plain PyTorch: the mean over the examples of ½ Σ (t - σ(z))²."""
    return 0.5 * ((torch.sigmoid(z) - t) ** 2).sum(-1).mean()


@dataclass(frozen=True)
class Problem:
    """A section of the document: its loss of pre-activations z and one-hot targets t, twice."""

    title: str
    ours: Loss
    pytorch: Loss
    lr: float


PROBLEMS = {
    "5.1": Problem(
        "sigmoid and squared error", nn.SigmoidSquaredErrorLoss(), sigmoid_squared_error, lr=2.0
    ),
    "5.2": Problem(
        "softmax and cross entropy", nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(), lr=0.5
    ),
}


class Classifier(L.LightningModule):
    """Trains a network whose outputs are pre-activations."""

    def __init__(self, net: torch.nn.Module, loss: Loss, lr: float):
        super().__init__()
        self.net, self.loss, self.lr = net, loss, lr
        self.losses: list[Tensor] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, t = batch
        c = self.loss(self.net(x), t)
        self.losses.append(c.detach())  # stays on the device: no synchronisation
        return c

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        # Sigmoid and softmax do not change which output is largest.
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With plain gradient descent every error in a gradient shows. Adam's steps hardly depend
        # on the gradient's scale, so it would hide a wrong factor.
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class EpochBar(ProgressBar):
    """Shows the progress of a training in one line."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = make_bar(self.title, trainer.max_epochs, "epoch")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        last = torch.stack(pl_module.losses[-trainer.num_training_batches :]).mean().item()
        self.bar.set_postfix_str(f"loss {last:.4f}", refresh=False)
        self.bar.close()


@dataclass(frozen=True)
class Run:
    """One training: the loss at each step, and the predictions for the test set."""

    losses: Tensor  # (epochs, steps per epoch)
    predictions: Tensor  # (test digits,)
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """The trainings for one problem, with the library and with PyTorch."""

    ours: Run
    pytorch: Run

    @property
    def difference(self) -> float:
        """The largest absolute difference between the losses at any step."""
        return (self.ours.losses - self.pytorch.losses).abs().max().item()


@dataclass(frozen=True)
class Results:
    problems: dict[str, Comparison]
    picture: Path


def load_data(limit: int | None, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Returns the training and the test set: pixels x (N, 64) in [0, 1] and one-hot t (N, 10)."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:limit] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:limit])
    train, test = train_test_split(
        range(len(x)), test_size=0.25, stratify=y.numpy(), random_state=seed
    )
    t = torch.nn.functional.one_hot(y, 10).to(x.dtype)
    return TensorDataset(x[train], t[train]), TensorDataset(x[test], t[test])


def build_networks(sizes: Sequence[int], seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns the library's network and PyTorch's, with equal weights; their outputs are z."""
    torch.manual_seed(seed)
    ours = nn.Feedforward(sizes, activation="sigmoid", output_activation="identity")
    layers: list[torch.nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.Sigmoid()]
    pytorch = torch.nn.Sequential(*layers[:-1])
    for parameter, copy in zip(ours.parameters(), pytorch.parameters(), strict=True):
        copy.data.copy_(parameter.data)
    return ours, pytorch


def train_and_test(
    title: str,
    model: Classifier,
    data: tuple[TensorDataset, TensorDataset],
    args: argparse.Namespace,
) -> Run:
    train, test = data
    order = torch.Generator().manual_seed(args.seed)  # the same order in all runs
    batches = DataLoader(train, args.batch_size, shuffle=True, generator=order)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        callbacks=[EpochBar(title)],
        enable_model_summary=False,
        enable_checkpointing=False,  # the picture is the only output
        logger=False,
    )
    trainer.fit(model, batches)
    predictions = torch.cat(trainer.predict(model, DataLoader(test, len(test)))).cpu()
    correct = predictions == test.tensors[1].argmax(-1)
    losses = torch.stack(model.losses).cpu().reshape(args.epochs, -1)
    return Run(losses, predictions, correct.double().mean().item())


def format_table(problems: dict[str, Comparison]) -> str:
    lines = [
        f"{'':31}{'test accuracy':^24}{'largest difference':>21}",
        f"{'problem':31}{'torch_nnmath':>12}{'PyTorch':>12}{'between losses':>21}",
        "-" * 76,
    ]
    for section, c in problems.items():
        lines.append(
            f"{section + ' ' + PROBLEMS[section].title:31}{c.ours.accuracy:12.1%}"
            f"{c.pytorch.accuracy:12.1%}{c.difference:21.1e}"
        )
    return "\n".join(lines)


def draw(problems: dict[str, Comparison], test: TensorDataset, path: Path) -> None:
    """Draws the loss curves, and test digits with the predictions of the library's networks."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.07)
    figure.suptitle("Handwritten digits, trained with torch_nnmath and with PyTorch", fontsize=15)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))

    for axes, (section, c) in zip(above.subplots(1, 2), problems.items(), strict=True):
        epochs = range(1, len(c.ours.losses) + 1)
        # A thin dashed line over a thick pale one: both are visible where they coincide.
        thick = {"color": ORANGE, "linewidth": 7, "alpha": 0.7}
        thin = {"color": BLUE, "linewidth": 1.6, "dashes": (4, 2)}
        axes.semilogy(epochs, c.pytorch.losses.mean(1).numpy(), **thick, label="PyTorch")
        axes.semilogy(epochs, c.ours.losses.mean(1).numpy(), **thin, label="torch_nnmath")
        axes.set_title(f"{section} {PROBLEMS[section].title}")
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss (mean over an epoch)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(which="both", alpha=0.25)
        axes.legend(title=f"largest difference {c.difference:.1e}")

    x, truth = test.tensors[0], test.tensors[1].argmax(-1)
    is_wrong = torch.stack([c.ours.predictions != truth for c in problems.values()]).any(0)
    wrong, right = is_wrong.nonzero().flatten(), (~is_wrong).nonzero().flatten()
    indices = torch.cat([wrong[:8], right, wrong[8:]])[:16]
    below.suptitle(
        f"Test digits with the predictions of torch_nnmath's two networks; wrong ones first (✗, by "
        f"one network or both: {len(wrong)} of {len(x)})"
    )
    for axes, i in zip(below.subplots(2, 8).flat, indices.tolist(), strict=True):
        axes.imshow(x[i].reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"digit {truth[i]}")
        digits = {section: c.ours.predictions[i] for section, c in problems.items()}
        axes.set_xlabel(
            "\n".join(f"{s}: {d} {'✓' if d == truth[i] else '✗'}" for s, d in digits.items()),
            color=RED if is_wrong[i] else BLUE,
        )
    figure.savefig(path, dpi=110)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits with torch_nnmath and with PyTorch, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_accelerator(parser)
    parser.add_argument("--epochs", type=parse_positive, default=40, help="passes over the digits")
    parser.add_argument("--batch-size", type=parse_positive, default=16, help="digits per step")
    parser.add_argument(
        "--hidden",
        type=parse_positive,
        nargs="*",
        default=[64],
        help="nodes of each hidden layer, such as 64 32; no numbers mean no hidden layer",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order")
    parser.add_argument("--limit", type=int, help="use only this many of the 1797 digits")
    parser.add_argument(
        "--out", type=Path, default=Path("digits_out"), help="output folder for the picture"
    )
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 100:
        parser.error("--limit must be at least 100, so that the test set has every digit")
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    select_device(args.accelerator)  # fails early if there is none
    data = load_data(args.limit, args.seed)
    problems = {}
    with silence_lightning():
        for section, problem in PROBLEMS.items():
            ours, pytorch = build_networks((64, *args.hidden, 10), args.seed)
            problems[section] = Comparison(
                *(
                    train_and_test(
                        f"{section} {name}", Classifier(net, loss, problem.lr), data, args
                    )
                    for name, net, loss in (
                        ("torch_nnmath", ours, problem.ours),
                        ("PyTorch", pytorch, problem.pytorch),
                    )
                )
            )
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "digits.png"
    draw(problems, data[1], picture)
    print(f"\n{format_table(problems)}\n\npicture: {picture}")
    return Results(problems, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small matrices are slower on several threads
    main()
