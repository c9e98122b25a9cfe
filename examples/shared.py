"""Command-line options, progress bars and colours that the examples share."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm  # a dependency of Lightning

BLUE, ORANGE, RED = "#14365d", "#f5a65b", "#c0143c"


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="device; auto uses a GPU if there is one",
    )


def select_device(accelerator: str) -> torch.device:
    """Returns the device for `--accelerator`."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise SystemExit("--accelerator gpu: PyTorch finds no GPU")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def add_sizes(parser: argparse.ArgumentParser, sizes: dict) -> None:
    """Adds the options of a language model and its training."""
    parser.add_argument(
        "--size",
        choices=sizes,
        default="small",
        help="sets the defaults of the options below (shown for small); large needs a GPU and adds "
        "the docstrings of installed packages to the text",
    )
    parser.add_argument("--vocabulary", type=parse_positive, help="number of tokens")
    parser.add_argument("--width", type=parse_positive, help="features per token")
    parser.add_argument("--layers", type=parse_positive, help="transformer layers")
    parser.add_argument("--heads", type=parse_positive, help="attention heads per layer")
    parser.add_argument("--context", type=parse_positive, help="tokens per block")
    parser.add_argument("--batch-size", type=parse_positive, help="blocks per step")
    parser.add_argument("--steps", type=parse_positive, help="training steps")
    parser.add_argument("--lr", type=float, help="peak learning rate, above 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    add_accelerator(parser)


def parse_sized(
    parser: argparse.ArgumentParser, sizes: dict, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parses arguments with the defaults of the selected size."""
    parser.set_defaults(**sizes["small"])
    parser.set_defaults(**sizes[parser.parse_known_args(argv)[0].size])
    args = parser.parse_args(argv)
    if args.vocabulary < 257:
        parser.error("--vocabulary must be at least 257: every byte, and the end of a text")
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    if not args.lr > 0:
        parser.error("--lr must be above 0")
    return args


def make_bar(title: str, total: int | None, unit: str = "step", **options: Any) -> tqdm:
    """Makes a progress bar of one line on stdout."""
    return tqdm(
        desc=f"{title:32}",
        total=total,
        unit=unit,
        file=sys.stdout,
        dynamic_ncols=True,
        # A terminal overwrites the line. A file keeps every update, so it gets few.
        mininterval=0.1 if sys.stdout.isatty() else 60,
        **options,
    )


def plot_peaks(axes: Any, fused: float, plain: float) -> None:
    """Draws the peak memory of a step, in bytes, with the fused and with the plain loss."""
    peaks = [fused / 2**20, plain / 2**20]
    bars = axes.bar(["fused", "plain"], peaks, color=[BLUE, ORANGE], width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(y=0.12)
    axes.set(title="peak memory of a step", ylabel="MiB above weights and optimizer")


def format_mib(size: float) -> str:
    return "unknown" if math.isnan(size) else f"{size / 2**20:,.0f} MiB"


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread: small matrices are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Suppresses the messages that Lightning prints before each training, and no others."""
    info = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = info.level
    info.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",  # the data are in memory: workers would slow it down
            "GPU available but not used",  # --accelerator cpu
            ".*LeafSpec",  # Lightning uses an API that the newest PyTorch deprecates
            ".*exists and is not empty",  # checkpoints of an earlier run
            ".*across ranks is zero",  # --resume after the last step has no batches left
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            info.setLevel(level)
