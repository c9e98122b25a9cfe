"""Handwritten digits, learned with the document's gradients and with PyTorch's.

The same small network is trained on scikit-learn's bundled digits (real scans of 8 x 8 pixels,
nothing is downloaded) for the two problems that the document works out:

    5.1  sigmoid and squared error      c = ½ Σ (t - σ(z))²
    5.2  softmax and cross entropy      c = -Σ t ln softmax(z)

each with `torch_nnmath`, whose gradients are the document's (but for the sign that 5.1 prints for
dc/da, along which the loss would climb), and with PyTorch's own modules, from the same weights and
over the same batches. What to see:

- a table: both reach the same test accuracy, at least 95 %, and their losses agree to rounding;
- a picture: PyTorch's loss curves lie exactly under ours, and below them are some test digits with
  what the two networks take them for.

    python examples/digits.py
    python examples/digits.py --hidden 128 --seed 1 --accelerator gpu

It needs `pip install ".[examples]"`, and takes well under a minute on two cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from matplotlib.figure import Figure  # without pyplot, a PNG is drawn by Agg and needs no display
from matplotlib.ticker import LogLocator, MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm  # which Lightning brings

from torch_nnmath import nn

Loss = Callable[[Tensor, Tensor], Tensor]


def sigmoid_squared_error(z: Tensor, t: Tensor) -> Tensor:
    """5.1 as one writes it in PyTorch: ½ Σ (t - σ(z))², the mean over the examples."""
    return 0.5 * ((torch.sigmoid(z) - t) ** 2).sum(-1).mean()


@dataclass(frozen=True)
class Problem:
    """A section of the document: its loss on pre-activations z and one-hot targets t, twice."""

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
    """Any network that gives pre-activations, with any loss on them."""

    def __init__(self, net: torch.nn.Module, loss: Loss, lr: float):
        super().__init__()
        self.net, self.loss, self.lr = net, loss, lr
        self.losses: list[Tensor] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, t = batch
        c = self.loss(self.net(x), t)
        self.losses.append(c.detach())  # left on its device: a GPU need not wait for the CPU
        return c

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        # Neither sigmoid nor softmax changes which output is the largest.
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Plain gradient descent shows a gradient as it is. Adam's steps hardly depend on its
        # size, so that one which is wrong by a factor would learn all the same.
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class EpochBar(ProgressBar):
    """One line for a training run, however many epochs it has, also where output is a file."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = tqdm(
            desc=f"{self.title:16}",
            total=trainer.max_epochs,
            unit="epoch",
            file=sys.stdout,
            dynamic_ncols=True,
            # A terminal draws over the line; a file keeps every state of it, so it gets few.
            mininterval=0.1 if sys.stdout.isatty() else 30,
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        last = torch.stack(pl_module.losses[-trainer.num_training_batches :]).mean().item()
        self.bar.set_postfix_str(f"loss {last:.4f}", refresh=False)
        self.bar.close()


@dataclass(frozen=True)
class Run:
    """One training: the loss of each epoch (mean) and step, and what it makes of the test set."""

    losses: Tensor  # (epochs, steps of an epoch)
    predictions: Tensor  # (test digits,)
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """The same problem by the library and by PyTorch."""

    ours: Run
    pytorch: Run

    @property
    def difference(self) -> float:
        """The largest absolute difference between the two losses at any step."""
        return (self.ours.losses - self.pytorch.losses).abs().max().item()


@dataclass(frozen=True)
class Results:
    problems: dict[str, Comparison]
    picture: Path


def load(limit: int | None, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of images x (64 numbers in [0, 1]) and one-hot vectors t."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:limit] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:limit])
    train, test = train_test_split(
        range(len(x)), test_size=0.25, stratify=y.numpy(), random_state=seed
    )
    t = torch.nn.functional.one_hot(y, 10).to(x.dtype)
    return TensorDataset(x[train], t[train]), TensorDataset(x[test], t[test])


def networks(sizes: Sequence[int], seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The library's network and PyTorch's, with the same weights; their outputs are the z."""
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
    net: torch.nn.Module,
    loss: Loss,
    lr: float,
    data: tuple[TensorDataset, TensorDataset],
    args: argparse.Namespace,
) -> Run:
    model = Classifier(net, loss, lr)
    train, test = data
    order = torch.Generator().manual_seed(args.seed)  # its own, so that all runs see one order
    batches = DataLoader(train, args.batch_size, shuffle=True, generator=order)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        callbacks=[EpochBar(title)],
        enable_model_summary=False,
        enable_checkpointing=False,  # nothing is left behind but the picture
        logger=False,
    )
    trainer.fit(model, batches)
    predictions = torch.cat(trainer.predict(model, DataLoader(test, len(test)))).cpu()
    correct = predictions == test.tensors[1].argmax(-1)
    losses = torch.stack(model.losses).cpu().reshape(args.epochs, -1)
    return Run(losses, predictions, correct.double().mean().item())


def table(problems: dict[str, Comparison]) -> str:
    lines = [
        f"{'':31}{'test accuracy':^24}{'largest difference':>21}",
        f"{'problem':31}{'torch_nnmath':>12}{'PyTorch':>12}{'of the two losses':>21}",
        "-" * 76,
    ]
    for section, c in problems.items():
        lines.append(
            f"{section + ' ' + PROBLEMS[section].title:31}{c.ours.accuracy:12.1%}"
            f"{c.pytorch.accuracy:12.1%}{c.difference:21.1e}"
        )
    return "\n".join(lines)


def draw(problems: dict[str, Comparison], test: TensorDataset, path: Path) -> None:
    """The loss curves, and test digits with what the library's networks take them for."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.07)
    figure.suptitle("Handwritten digits: torch_nnmath's gradients against PyTorch's", fontsize=15)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))

    for axes, (section, c) in zip(above.subplots(1, 2), problems.items(), strict=True):
        epochs = range(1, len(c.ours.losses) + 1)
        # The one thick and pale, the other thin and dashed on top, so that both can be seen.
        thick = {"color": "#f5a65b", "linewidth": 7, "alpha": 0.7}
        thin = {"color": "#14365d", "linewidth": 1.6, "dashes": (4, 2)}
        axes.semilogy(epochs, c.pytorch.losses.mean(1).numpy(), **thick, label="PyTorch")
        axes.semilogy(epochs, c.ours.losses.mean(1).numpy(), **thin, label="torch_nnmath")
        axes.set_title(f"{section} {PROBLEMS[section].title}")
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss (mean of an epoch)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(which="both", alpha=0.25)
        axes.legend(title=f"largest difference {c.difference:.1e}")

    x, truth = test.tensors[0], test.tensors[1].argmax(-1)
    wrong = torch.stack([c.ours.predictions != truth for c in problems.values()]).any(0)
    misread, read = wrong.nonzero().flatten(), (~wrong).nonzero().flatten()
    shown = torch.cat([misread[:8], read, misread[8:]])[:16]
    below.suptitle(
        f"Test digits as torch_nnmath's two networks read them: {len(misread)} of {len(x)} are "
        "misread (✗) by one or both, some of these first"
    )
    for axes, i in zip(below.subplots(2, 8).flat, shown.tolist(), strict=True):
        axes.imshow(x[i].reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"a {truth[i]}")
        digits = {section: c.ours.predictions[i] for section, c in problems.items()}
        axes.set_xlabel(
            "\n".join(f"{s}: {d} {'✓' if d == truth[i] else '✗'}" for s, d in digits.items()),
            color="#c0143c" if wrong[i] else "#14365d",
        )
    figure.savefig(path, dpi=110)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what Lightning would say before each of the four runs; all else is shown."""
    info = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = info.level
    info.setLevel(logging.WARNING)  # which accelerators there are, and that training has ended
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",  # the data lie in memory; workers would slow it down
            "GPU available but not used",  # --accelerator cpu was asked for
            ".*LeafSpec",  # between Lightning and PyTorch's newest, out of our hands
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            info.setLevel(level)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits with torch_nnmath and with PyTorch, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to compute; auto takes a GPU where there is one",
    )
    parser.add_argument("--epochs", type=positive, default=40, help="passes over the digits")
    parser.add_argument("--batch-size", type=positive, default=16, help="digits of a step")
    parser.add_argument(
        "--hidden",
        type=positive,
        nargs="*",
        default=[64],
        help="nodes of each hidden layer, such as 64 32; without numbers there is none",
    )
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument("--limit", type=int, help="use only so many of the 1797 digits")
    parser.add_argument("--out", type=Path, default=Path("digits_out"), help="the picture's folder")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 100:
        parser.error("--limit must be at least 100, so that the test set has every digit")
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        parser.error("--accelerator gpu: PyTorch sees none")
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    data = load(args.limit, args.seed)
    problems = {}
    with quiet():
        for section, problem in PROBLEMS.items():
            ours, pytorch = networks((64, *args.hidden, 10), args.seed)
            lr = problem.lr
            problems[section] = Comparison(
                train_and_test(f"{section} torch_nnmath", ours, problem.ours, lr, data, args),
                train_and_test(f"{section} PyTorch", pytorch, problem.pytorch, lr, data, args),
            )
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "digits.png"
    draw(problems, data[1], picture)
    print(f"\n{table(problems)}\n\npicture: {picture}")
    return Results(problems, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices as small as these only lose by sharing the work
    main()
