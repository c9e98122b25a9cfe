"""Trains a small language model with the fused head and with the plain head, and compares them.

The text is the documentation that comes with Python: the topics of `help()` and the docstrings of
the standard library, about 2 MB; nothing is downloaded. A decoder-only transformer is trained on it
twice, from the same weights over the same batches in float32: once with this library's fused head,
which never materialises the logits, and once with `F.cross_entropy` of all logits. Results:

- a table: both trainings reach the same validation loss, well below that of token frequencies (the
  unigram model), and the fused head needs less memory; then a sample from the model;
- a picture: the loss curves of the two heads coincide.

    python examples/language_model.py
    python examples/language_model.py --resume          # continue an interrupted training
    python examples/language_model.py --devices 2       # the same curve, in two processes
    python examples/language_model.py --size large      # for a GPU, in bfloat16

It needs `pip install ".[examples]"`, and takes under six minutes on two cores. With `--size large`,
reading the text (some 40 MB if many packages are installed) takes several minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
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
    silence_lightning,
)
from text_model import END, Transformer, encode_corpus, split_blocks
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from torch_nnmath._memory import can_reset_peak, read_peak, reset_peak
from torch_nnmath.functional import linear_cross_entropy

SIZES = {  # defaults by --size
    "small": {
        "vocabulary": 8192, "width": 192, "layers": 4, "heads": 4, "context": 128,
        "batch_size": 8, "steps": 300, "lr": 1e-3, "every": 60,
    },
    "large": {
        "vocabulary": 32768, "width": 512, "layers": 8, "heads": 8, "context": 512,
        "batch_size": 32, "steps": 1000, "lr": 1e-3, "every": 100,
    },
}  # fmt: skip


@torch.no_grad()
def generate(
    net: Transformer, tokenizer: Tokenizer, prompt: str, length: int, seed: int, top: int = 20
) -> str:
    """Continues the prompt; each token is drawn from the `top` most probable ones."""
    generator = torch.Generator().manual_seed(seed)
    device = net.embedding.weight.device
    ids = tokenizer.encode(prompt).ids
    for _ in range(length):
        context = torch.tensor([ids[-net.context :]], device=device)
        logits, candidates = net(context)[0, -1].float().cpu().topk(min(top, net.head.out_features))
        ids.append(int(candidates[torch.multinomial(logits.softmax(0), 1, generator=generator)]))
    return tokenizer.decode(ids, skip_special_tokens=False).replace(END, "\n\n")


def compute_unigram_loss(training: Tensor, targets: Tensor, vocabulary: int) -> float:
    """The loss of token frequencies in the training text, each count increased by one."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[targets].mean().item()


# The training


class LanguageModel(L.LightningModule):
    """Trains a Transformer with one of the heads, and records losses, time and peak memory."""

    def __init__(self, args: argparse.Namespace, is_fused: bool, data: tuple[Tensor, Tensor]):
        super().__init__()
        torch.manual_seed(args.seed)
        self.net = Transformer(args.vocabulary, args.width, args.layers, args.heads, args.context)
        self.args, self.is_fused = args, is_fused
        self.training_blocks, self.validation_blocks = (
            split_blocks(ids, args.context) for ids in data
        )
        generator = torch.Generator().manual_seed(args.seed)  # the same order for both heads
        blocks, total = len(self.training_blocks), args.steps * args.batch_size
        epochs = math.ceil(total / blocks)
        order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])
        self.batches = order[:total].view(args.steps, args.batch_size)
        self.record: dict[str, list[float]] = {
            name: [] for name in ("training", "validated", "validation", "seconds", "peak")
        }

    def compute_loss(self, ids: Tensor, reduction: str = "mean") -> Tensor:
        features, targets = self.net.features(ids[:, :-1]), ids[:, 1:]
        if self.is_fused:
            weight = self.net.head.weight
            return linear_cross_entropy(features, weight, targets, reduction=reduction)
        logits = self.net.head(features)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = self.compute_loss(ids)
        self.losses.append(loss.detach())  # stays on the device: no synchronisation
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.loss_sums.append(self.compute_loss(ids, "sum").detach())

    def train_dataloader(self) -> DataLoader:
        """Loads one epoch. Its batches depend only on the step, so that a run can be resumed."""
        steps = self.batches[self.global_step :][: self.args.every]
        rank, world = self.global_rank, self.trainer.world_size
        batches = [indices[rank::world].tolist() for indices in steps]
        return DataLoader(self.training_blocks, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        indices = range(self.global_rank, len(self.validation_blocks), self.trainer.world_size)
        return DataLoader(self.validation_blocks, self.args.batch_size, sampler=indices)

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if p.dim() != 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.args.lr, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-6
        )
        warmup, steps = max(1, self.args.steps // 10), self.args.steps

        def compute_factor(step: int) -> float:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            return min(1, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, compute_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # The hooks below only measure.

    def read_time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_epoch_start(self) -> None:
        self.losses: list[Tensor] = []
        self.start = self.read_time()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # The first steps allocate the optimizer's state; three steps after them are enough.
        self.is_measured = len(self.record["peak"]) < 3 and self.global_step > 1
        self.is_measured &= can_reset_peak(self.device)
        if self.is_measured:
            self.optimizers().zero_grad()
            self.memory_before = reset_peak(self.device)

    def on_train_batch_end(self, outputs: Tensor, batch: Tensor, batch_idx: int) -> None:
        if self.is_measured:
            self.record["peak"].append(read_peak(self.device) - self.memory_before)
        if self.trainer.is_last_batch:
            self.record["seconds"].append((self.read_time() - self.start) / (batch_idx + 1))

    def on_validation_epoch_start(self) -> None:
        self.loss_sums: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        reduce, record = self.trainer.strategy.reduce, self.record
        record["training"] += reduce(torch.stack(self.losses), reduce_op="mean").tolist()
        self.losses.clear()
        loss = reduce(torch.stack(self.loss_sums).sum(), reduce_op="sum").item()
        record["validation"].append(loss / self.validation_blocks[:, 1:].numel())
        record["validated"].append(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["record"], checkpoint["settings"] = self.record, select_settings(self.args)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.record = checkpoint["record"]


class StepBar(ProgressBar):
    """Shows the progress of a training in one line."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def disable(self) -> None:
        """Lightning calls this in every process but the first, whose bar disables itself."""

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        total, step = pl_module.args.steps, trainer.global_step
        self.bar = make_bar(self.title, total, initial=step, disable=not trainer.is_global_zero)

    def on_train_batch_end(self, *args: object) -> None:
        self.bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        loss = pl_module.record["validation"][-1]
        self.bar.set_postfix_str(f"validation loss {loss:.4f}", refresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self.bar.close()


@dataclass(frozen=True)
class Run:
    """One training: its loss at every step and at each validation, its speed and its memory."""

    training: Tensor  # (steps,)
    validated: list[int]  # the steps after which it was validated
    validation: Tensor
    tokens_per_second: float
    peak: float  # bytes in a step, beyond weights and the optimizer's state

    @property
    def perplexity(self) -> float:
        return self.validation[-1].exp().item()


@dataclass(frozen=True)
class Results:
    fused: Run
    plain: Run
    unigram_loss: float  # on the same validation targets
    sample: str
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the training losses at any step."""
        return (self.fused.training - self.plain.training).abs().max().item()


def select_settings(args: argparse.Namespace) -> dict:
    """Returns the options that must not change when a training is resumed."""
    variable = ("accelerator", "devices", "out", "resume")
    return {name: value for name, value in vars(args).items() if name not in variable}


def train(
    name: str, args: argparse.Namespace, data: tuple[Tensor, Tensor]
) -> tuple[LanguageModel, Run, bool]:
    """Returns the model, its record, and whether this is the main process."""
    model = LanguageModel(args, name == "fused", data)
    checkpoint = args.out / f"{name}.ckpt"
    is_resumed = args.resume and checkpoint.exists()
    if is_resumed:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")["settings"]
        if saved != select_settings(args):
            raise SystemExit(f"--resume: {checkpoint} was trained with other options: {saved}")
    is_gpu = select_device(args.accelerator).type == "cuda"
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        use_distributed_sampler=False,  # the loaders above distribute the blocks
        precision=args.precision or ("bf16-mixed" if is_gpu else "32-true"),
        max_steps=args.steps,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[
            StepBar(f"{name} head"),
            ModelCheckpoint(args.out, name, enable_version_counter=False),  # at each validation
        ],
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(model, ckpt_path=checkpoint if is_resumed else None)
    record = model.record
    seconds = torch.tensor(record["seconds"]).median().item()
    run = Run(
        torch.tensor(record["training"]),
        record["validated"],
        torch.tensor(record["validation"]),
        args.batch_size * args.context / seconds,
        max(record["peak"], default=math.nan),
    )
    return model, run, trainer.is_global_zero


# The report


def format_table(results: Results) -> str:
    runs = results.fused, results.plain
    unigram_perplexity = math.exp(results.unigram_loss)
    rows = [
        ("", "fused head", "plain head"),
        ("validation loss", *(f"{run.validation[-1]:.4f}" for run in runs)),
        ("validation perplexity", *(f"{run.perplexity:.1f}" for run in runs)),
        (
            "  of the unigram model's",
            *(f"{run.perplexity / unigram_perplexity:.0%}" for run in runs),
        ),
        ("training tokens per second", *(f"{run.tokens_per_second:,.0f}" for run in runs)),
        ("peak memory of a step", *(format_mib(run.peak) for run in runs)),
    ]
    lines = [f"{name:30}{one:>14}{other:>14}" for name, one, other in rows]
    lines.insert(1, "-" * 58)
    lines += [
        "",
        f"unigram model: perplexity {unigram_perplexity:.1f}, loss {results.unigram_loss:.4f}",
        f"largest difference of the two training losses, any step  {results.difference:.1e}",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Draws the losses of both trainings over the steps, and their peak memory."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle("A language model of Python's documentation, by two heads", fontsize=15)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    fused, plain = results.fused, results.plain
    steps = range(1, len(fused.training) + 1)
    # A thin dashed line over a thick pale one: both are visible where they coincide.
    left.plot(steps, plain.training, color=ORANGE, linewidth=6, alpha=0.6, label="plain: training")
    left.plot(
        steps, fused.training, color=BLUE, linewidth=1.2, dashes=(4, 2), label="fused: training"
    )
    left.plot(
        plain.validated,
        plain.validation,
        "s",
        color=ORANGE,
        markersize=13,
        label="plain: validation",
    )
    left.plot(
        fused.validated, fused.validation, "o-", color=BLUE, markersize=6, label="fused: validation"
    )
    left.axhline(results.unigram_loss, color=RED, linestyle=":", label="unigram model: validation")
    left.set(xlabel="step", ylabel="loss of a token (nats)")
    left.set_title(f"largest difference of the training losses {results.difference:.1e}")
    left.grid(alpha=0.25)
    left.legend()
    plot_peaks(right, fused.peak, plain.peak)
    figure.savefig(path, dpi=110)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model twice, with the fused head and with the plain "
        "one, and compare losses, speed and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument(
        "--every", type=parse_positive, help="steps between validations, each with a checkpoint"
    )
    parser.add_argument(
        "--devices", type=parse_positive, default=1, help="number of processes, which share a batch"
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"),
        help="Lightning's precision; by default bf16-mixed on a GPU and 32-true on a CPU",
    )
    parser.add_argument("--prompt", default="Return the", help="the beginning of the sample")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoints")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("language_model_out"),
        help="output folder for checkpoints and picture",
    )
    args = parse_sized(parser, SIZES, argv)
    if args.batch_size % args.devices:
        parser.error("--batch-size must be a multiple of --devices")
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    select_device(args.accelerator)  # fails early if there is none
    if args.resume and not any(args.out.glob("*.ckpt")):
        raise SystemExit(f"--resume: there is no checkpoint in {args.out}")
    tokenizer, *data = encode_corpus(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    args.out.mkdir(parents=True, exist_ok=True)
    with silence_lightning():
        model, fused, is_main_process = train("fused", args, data)
        _, plain, _ = train("plain", args, data)
    targets = model.validation_blocks[:, 1:]
    picture = args.out / "language_model.png"
    results = Results(
        fused,
        plain,
        compute_unigram_loss(data[0], targets, args.vocabulary),
        generate(model.net, tokenizer, args.prompt, 60, args.seed),
        picture,
    )
    if is_main_process:
        draw(results, picture)
        parameters = sum(p.numel() for p in model.net.parameters())
        print(
            f"\n{parameters / 1e6:.1f} million parameters, trained on {args.steps} steps of "
            f"{args.batch_size} x {args.context} tokens of {len(data[0]):,}\n\n"
            f"{format_table(results)}\n\n"
            f"a sample:\n{results.sample}\n\npicture: {picture}"
        )
    return results


if __name__ == "__main__":
    main()
