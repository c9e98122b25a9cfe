"""Trains a model of Hugging Face's `transformers` before and after one call of `swap`.

A small Llama is built from its configuration (nothing is downloaded) and trained by
`transformers.Trainer` on Python's documentation (see `text_model.py`): once unchanged, and once,
from the same weights over the same batches, after

    report = torch_nnmath.swap(model)

The model still computes its own loss, but the logits are never materialised. Results:

- the report: which modules changed, and that every loss was computed without logits;
- a table: losses and gradients are equal, the peak memory of a step is lower;
- a picture: the coinciding loss curves, the time and the memory of a step.

    python examples/swap_transformers.py
    python examples/swap_transformers.py --vocabulary 4096 --steps 20
    python examples/swap_transformers.py --model gemma2         # with a soft cap on its logits
    python examples/swap_transformers.py --size large           # for a GPU, in bfloat16

It needs `pip install ".[examples,transformers]"`, and takes under three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure  # without pyplot, which may need a display
from shared import BLUE, ORANGE, add_sizes, format_mib, make_bar, parse_sized, select_device
from text_model import encode_corpus, split_blocks
from torch import Tensor

import torch_nnmath
from torch_nnmath._memory import can_reset_peak, read_peak, reset_peak

try:
    import transformers
except ModuleNotFoundError as error:
    raise SystemExit('this example needs transformers: pip install ".[transformers]"') from error

SIZES = {  # defaults by --size
    "small": {
        "vocabulary": 16384, "width": 128, "layers": 4, "heads": 4, "context": 128,
        "batch_size": 8, "steps": 60, "lr": 3e-3,
    },
    "large": {
        "vocabulary": 65536, "width": 768, "layers": 12, "heads": 12, "context": 512,
        "batch_size": 32, "steps": 200, "lr": 6e-4,
    },
}  # fmt: skip


def build(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """Builds the model, with the same weights at every call."""
    transformers.set_seed(args.seed)
    config = transformers.AutoConfig.for_model(
        args.model,
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.width // args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(args.device)


def compute_gradients(model: transformers.PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of the model's own loss."""
    ids = ids.to(model.device)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


class Meter(transformers.TrainerCallback):
    """Measures the peak memory of steps 2 to 4 and the time of the others, and shows a bar."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def read_time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = make_bar(self.name, state.max_steps)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.is_measured = 1 <= state.global_step <= 3 and can_reset_peak(self.device)
        if self.is_measured:
            self.memory_before = reset_peak(self.device)
        self.start = self.read_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = self.read_time() - self.start
        if self.is_measured:
            self.peaks.append(read_peak(self.device) - self.memory_before)
        else:
            self.seconds.append(seconds)
        self.bar.update()


@dataclass(frozen=True)
class Run:
    """One training."""

    training: list[float]  # loss at every step
    first: float  # validation loss at the start
    last: float  # and at the end
    seconds: float  # median of the steps
    peak: float  # bytes in a step, beyond weights and the optimizer's state


@dataclass(frozen=True)
class Results:
    plain: Run
    swapped: Run
    gradient_difference: float  # relative to the largest entry of the same gradient
    report: torch_nnmath.swapping.Report
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the training losses at any step."""
        pairs = zip(self.plain.training, self.swapped.training, strict=True)
        return max(abs(a - b) for a, b in pairs)


def train(
    name: str, model: transformers.PreTrainedModel, data: Sequence[Tensor], args: argparse.Namespace
) -> Run:
    is_gpu = args.device.type == "cuda"
    training, validation = ([{"input_ids": b, "labels": b} for b in blocks] for blocks in data)
    with TemporaryDirectory() as folder:  # the Trainer requires one, but nothing is saved
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                learning_rate=args.lr,
                warmup_steps=max(1, args.steps // 10),
                lr_scheduler_type="cosine",
                prediction_loss_only=True,  # evaluation must not request the logits
                bf16=is_gpu,
                use_cpu=not is_gpu,
                seed=args.seed,
                logging_steps=1,
                disable_tqdm=True,  # Meter shows a bar of one line
                dataloader_pin_memory=is_gpu,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=training,
            eval_dataset=validation,
        )
        meter = Meter(name, trainer.args.device)
        trainer.add_callback(meter)
        trainer.remove_callback(transformers.PrinterCallback)  # prints a line at every step
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        last = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(meter.seconds or [math.nan])
    return Run(losses, first, last, seconds, max(meter.peaks, default=math.nan))


def format_table(results: Results) -> str:
    runs, gradients = (results.plain, results.swapped), results.gradient_difference
    rows = [
        ("", "as it was", "swapped"),
        ("validation loss at the start", *(f"{run.first:.4f}" for run in runs)),
        ("validation loss at the end", *(f"{run.last:.4f}" for run in runs)),
        ("time of a step (median)", *(f"{1000 * run.seconds:,.0f} ms" for run in runs)),
        ("peak memory of a step", *(format_mib(run.peak) for run in runs)),
    ]
    lines = [f"{name:30}{one:>14}{other:>14}" for name, one, other in rows]
    lines.insert(1, "-" * 58)
    lines += [
        "",
        f"largest difference of the training losses, any step      {results.difference:.1e}",
        f"largest relative difference of a gradient, first batch   {gradients:.1e}",
    ]
    return "\n".join(lines)


def draw(results: Results, title: str, path: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    plain, swapped = results.plain, results.swapped
    steps = range(1, len(plain.training) + 1)
    # A thin dashed line over a thick pale one: both are visible where they coincide.
    left.plot(
        steps, plain.training, color=ORANGE, linewidth=6, alpha=0.7, label="as it was: training"
    )
    left.plot(
        steps, swapped.training, color=BLUE, linewidth=1.4, dashes=(4, 2), label="swapped: training"
    )
    ends = [0, len(plain.training)]
    left.plot(
        ends,
        [plain.first, plain.last],
        "s",
        color=ORANGE,
        markersize=12,
        label="as it was: validation",
    )
    left.plot(
        ends,
        [swapped.first, swapped.last],
        "o",
        color=BLUE,
        markersize=6,
        label="swapped: validation",
    )
    left.set(xlabel="step", ylabel="loss of a token (nats)")
    left.set_title(f"largest difference of the training losses {results.difference:.1e}")
    left.grid(alpha=0.25)
    left.legend(ncols=2)
    for axes, values, name, unit in (
        (middle, [1000 * run.seconds for run in (plain, swapped)], "time of a step", "ms"),
        (right, [run.peak / 2**20 for run in (plain, swapped)], "peak memory of a step", "MiB"),
    ):
        bars = axes.bar(["as it was", "swapped"], values, color=[ORANGE, BLUE], width=0.6)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.margins(y=0.12)
        axes.set(title=name, ylabel=unit)
    figure.savefig(path, dpi=110)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a model of transformers before and after torch_nnmath.swap(model), "
        "and compare losses, gradients, time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument(
        "--model", default="llama", help="architecture in transformers, such as mistral or gemma2"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("swap_transformers_out"),
        help="output folder for the picture",
    )
    args = parse_sized(parser, SIZES, argv)
    if args.width // args.heads % 2:
        parser.error("--width must be an even multiple of --heads")
    if args.model not in transformers.CONFIG_MAPPING:
        parser.error(f"--model: transformers has no {args.model}")
    args.device = select_device(args.accelerator)
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse_arguments(argv)
    tokenizer, *ids = encode_corpus(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    data = [split_blocks(text, args.context - 1) for text in ids]  # the model shifts the labels

    model = build(args)
    before = compute_gradients(model, data[0][: args.batch_size])
    report = torch_nnmath.swap(model)
    after = compute_gradients(model, data[0][: args.batch_size])
    difference = max(((after[n] - g).abs().max() / g.abs().max()).item() for n, g in before.items())
    del before, after

    plain = train("as it was", build(args), data, args)
    swapped = train("swapped", model, data, args)

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "swap_transformers.png"
    results = Results(plain, swapped, difference, report, picture)
    title = f"{type(model).__name__}, {args.vocabulary:,} tokens: one call of torch_nnmath.swap"
    draw(results, title, picture)
    print(f"\n{report}\n\n{format_table(results)}\n\npicture: {picture}")
    return results


if __name__ == "__main__":
    main()
