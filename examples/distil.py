"""Distils a language model into a smaller one, with the fused loss and with all logits.

A teacher, a decoder-only transformer, is trained on Python's documentation (see `text_model.py`). A
student of half its width is trained three times on the same text, with the same initial weights
and batches: once by the labels alone, and twice by

    alpha * cross entropy of the labels + (1 - alpha) * temperature² * KL(teacher || student)

The first time `linear_kl_div` computes this loss, without the logits of student and teacher in
memory; the second time `F.kl_div` and `F.cross_entropy` do, from all logits. Results:

- a table: the losses and the validation loss of both distilled students are equal, the fused loss
  needs less memory, and both students are better than the one without a teacher;
- a picture: the coinciding curves, the validation losses, and the memory of a step.

    python examples/distil.py
    python examples/distil.py --alpha 0 --temperature 2     # the divergence alone, of softer models
    python examples/distil.py --size large                  # for a GPU, in bfloat16

It needs `pip install ".[examples]"`, and takes three minutes of CPU time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot, which may need a display
from shared import (
    BLUE,
    ORANGE,
    RED,
    add_sizes,
    format_mib,
    make_bar,
    parse_positive,
    parse_sized,
    plot_peaks,
    select_device,
)
from text_model import Setting, Transformer, encode_corpus, split_blocks, train_transformer
from torch import Tensor

from torch_nnmath._memory import can_reset_peak, read_peak, reset_peak
from torch_nnmath.functional import linear_cross_entropy, linear_kl_div

SIZES = {  # defaults by --size; those of the teacher have the prefix teacher_
    "small": {
        "vocabulary": 8192, "width": 96, "layers": 2, "heads": 4, "context": 128,
        "batch_size": 8, "steps": 150, "lr": 3e-3, "every": 50,
        "teacher_width": 192, "teacher_layers": 3, "teacher_steps": 240,
    },
    "large": {
        "vocabulary": 32768, "width": 256, "layers": 4, "heads": 4, "context": 512,
        "batch_size": 32, "steps": 1000, "lr": 2e-3, "every": 100,
        "teacher_width": 512, "teacher_layers": 8, "teacher_steps": 2000,
    },
}  # fmt: skip

# The losses: of the student's features x (N, D) and weight W, the teacher's, and labels y (N)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_losses(alpha: float, temperature: float) -> dict[str, Loss]:
    """The three losses of the student, by name."""

    def compute_labels_loss(x: Tensor, W: Tensor, xt: Tensor, Wt: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(x, W, y)

    def compute_fused_loss(x: Tensor, W: Tensor, xt: Tensor, Wt: Tensor, y: Tensor) -> Tensor:
        options = {"temperature": temperature, "temperature_factor": True}
        return linear_kl_div(x, W, xt, Wt, labels=y, alpha=alpha, **options)

    def compute_plain_loss(x: Tensor, W: Tensor, xt: Tensor, Wt: Tensor, y: Tensor) -> Tensor:
        z, zt = F.linear(x, W), F.linear(xt, Wt)
        l, lt = F.log_softmax(z / temperature, -1), F.log_softmax(zt / temperature, -1)
        divergence = F.kl_div(l, lt, reduction="batchmean", log_target=True)
        return alpha * F.cross_entropy(z, y) + (1 - alpha) * temperature**2 * divergence

    return {"labels": compute_labels_loss, "fused": compute_fused_loss, "plain": compute_plain_loss}


# The training


@dataclass
class Run:
    """The training of one student."""

    losses: list[float] = field(default_factory=list)  # of every step
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)  # after these steps
    seconds: list[float] = field(default_factory=list)  # of the steps without `peaks`
    peaks: list[float] = field(default_factory=list)  # bytes that a step allocates at its peak

    @property
    def peak(self) -> float:
        return max(self.peaks, default=math.nan)


@dataclass(frozen=True)
class Results:
    teacher_loss: float
    labels: Run
    fused: Run
    plain: Run
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the fused and the plain loss at any step."""
        pairs = zip(self.fused.losses, self.plain.losses, strict=True)
        return max(abs(a - b) for a, b in pairs)


@torch.no_grad()
def validate(net: Transformer, blocks: Tensor, args: argparse.Namespace) -> float:
    """The mean cross entropy of the labels of the validation text."""
    total = 0.0
    for block in blocks.split(args.batch_size):
        ids = block.to(args.device)
        x = net.features(ids[:, :-1])
        total += linear_cross_entropy(x, net.head.weight, ids[:, 1:], reduction="sum").item()
    return total / blocks[:, 1:].numel()


def read_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    name: str,
    compute_loss: Loss,
    teacher: Transformer,
    data: Sequence[Tensor],
    args: argparse.Namespace,
) -> Run:
    """Trains a student, with the same weights and batches for every loss."""
    torch.manual_seed(args.seed)
    student = Transformer(args.vocabulary, args.width, args.layers, args.heads, args.context)
    student.to(args.device)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, betas=(0.9, 0.95), eps=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    generator, run = torch.Generator().manual_seed(args.seed), Run()
    training, validation = data
    is_gpu = args.device.type == "cuda"
    with make_bar(name, args.steps) as progress:
        for step in range(args.steps):
            optimizer.zero_grad()
            # The first steps allocate the optimizer's state; three steps after them are enough.
            is_measured = 2 <= step < 5 and can_reset_peak(args.device)
            memory = reset_peak(args.device) if is_measured else 0
            start = read_time(args.device)
            indices = torch.randint(len(training), (args.batch_size,), generator=generator)
            ids = training[indices].to(args.device)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=is_gpu):
                with torch.no_grad():
                    xt = teacher.features(ids[:, :-1]).flatten(0, 1)
                x = student.features(ids[:, :-1]).flatten(0, 1)
                heads = x, student.head.weight, xt, teacher.head.weight.detach()
                loss = compute_loss(*heads, ids[:, 1:].flatten())
            loss.backward()
            if is_measured:
                run.peaks.append(read_peak(args.device) - memory)
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            if not is_measured:
                run.seconds.append(read_time(args.device) - start)
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                run.validation_steps.append(step + 1)
                run.validation_losses.append(validate(student, validation, args))
                progress.set_postfix_str(
                    f"validation {run.validation_losses[-1]:.4f}", refresh=False
                )
            progress.update()
    return run


# The report


def format_table(results: Results) -> str:
    runs = results.labels, results.fused, results.plain
    rows = [
        ("", "labels alone", "fused", "plain"),
        ("validation loss", *(f"{run.validation_losses[-1]:.4f}" for run in runs)),
        (
            "time of a step (median)",
            *(f"{1000 * statistics.median(run.seconds or [math.nan]):,.0f} ms" for run in runs),
        ),
        ("peak memory of a step", *(format_mib(run.peak) for run in runs)),
    ]
    lines = [f"{name:26}{one:>14}{two:>14}{three:>14}" for name, one, two, three in rows]
    lines.insert(1, "-" * 68)
    lines += [
        "",
        f"validation loss of the teacher                             {results.teacher_loss:.4f}",
        f"largest difference of fused and plain losses, any step     {results.difference:.1e}",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    figure.suptitle("Distillation of a language model of Python's documentation", fontsize=15)
    left, middle, right = figure.subplots(1, 3, width_ratios=(2.2, 2.2, 1))
    labels, fused, plain = results.labels, results.fused, results.plain
    steps = range(1, len(fused.losses) + 1)
    # A thin dashed line over a thick pale one: both are visible where they coincide.
    left.plot(steps, plain.losses, color=ORANGE, linewidth=6, alpha=0.6, label="plain")
    left.plot(steps, fused.losses, color=BLUE, linewidth=1.2, dashes=(4, 2), label="fused")
    left.set(xlabel="step", ylabel="loss of distillation (nats)")
    left.set_title(f"largest difference of the losses {results.difference:.1e}")
    middle.plot(
        labels.validation_steps,
        labels.validation_losses,
        "^-",
        color=RED,
        label="student, labels alone",
    )
    middle.plot(
        plain.validation_steps,
        plain.validation_losses,
        "s",
        color=ORANGE,
        markersize=12,
        label="plain distilled",
    )
    middle.plot(
        fused.validation_steps,
        fused.validation_losses,
        "o-",
        color=BLUE,
        markersize=6,
        label="fused distilled",
    )
    middle.axhline(results.teacher_loss, color="gray", linestyle=":", label="teacher")
    middle.set(xlabel="step", ylabel="validation loss of a token (nats)")
    middle.set_title("cross entropy of the validation text")
    for axes in (left, middle):
        axes.grid(alpha=0.25)
        axes.legend()
    plot_peaks(right, fused.peak, plain.peak)
    figure.savefig(path, dpi=110)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distil a language model into a smaller one, with the fused loss and with all "
        "logits, and compare losses and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument("--teacher-width", type=parse_positive, help="features per token")
    parser.add_argument("--teacher-layers", type=parse_positive, help="transformer layers")
    parser.add_argument("--teacher-steps", type=parse_positive, help="training steps")
    parser.add_argument("--every", type=parse_positive, help="steps between validations")
    parser.add_argument("--alpha", type=float, default=0.3, help="weight of the labels, 0 to 1")
    parser.add_argument("--temperature", type=float, default=1.0, help="of both models, above 0")
    parser.add_argument(
        "--out", type=Path, default=Path("distil_out"), help="output folder for the picture"
    )
    args = parse_sized(parser, SIZES, argv)
    if args.teacher_width % args.heads:
        parser.error("--teacher-width must be a multiple of --heads")
    if not 0 <= args.alpha <= 1:
        parser.error("--alpha must be in [0, 1]")
    if not 0 < args.temperature < math.inf:
        parser.error("--temperature must be positive and finite")
    args.device = select_device(args.accelerator)
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    tokenizer, *ids = encode_corpus(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    data = [split_blocks(text, args.context) for text in ids]
    setting = Setting(
        *(args.vocabulary, args.teacher_width, args.teacher_layers, args.heads),
        context=args.context,
        sequences=args.batch_size,
        steps=args.teacher_steps,
        lr=args.lr / 2,
    )
    teacher = train_transformer(setting, ids[0], args.seed, str(args.device), "teacher")
    teacher_loss = validate(teacher, data[1], args)
    losses = make_losses(args.alpha, args.temperature)
    runs = {
        name: train(f"student, {name}", loss, teacher, data, args) for name, loss in losses.items()
    }

    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(teacher_loss, **runs, picture=args.out / "distil.png")
    draw(results, results.picture)
    print(f"\n{format_table(results)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
