"""One call of `swap` in a model of Hugging Face's, and what it changes in training.

A small Llama is made from its configuration, nothing is downloaded, and trained by
`transformers.Trainer` on Python's documentation (the text and the tokenizer of
`language_model.py`): once as it is, and once, from the same weights over the same batches, after

    report = torch_nnmath.swap(model)

The model goes on to compute its own loss; the logits that it takes the loss of are no longer
computed. What to see:

- a table: the losses and gradients are the same, the peak memory of a step is lower;
- the report: which modules changed, and that every loss was computed without logits;
- a picture: the one loss curve exactly under the other, time and memory of a step.

    python examples/swap_transformers.py
    python examples/swap_transformers.py --vocabulary 4096 --steps 20
    python examples/swap_transformers.py --model gemma2         # its logits have a soft cap
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
from language_model import (  # beside this file
    add_sizes,
    bar,
    blocks,
    device_of,
    memory,
    mib,
    parse_sized,
    tokens,
)
from matplotlib.figure import Figure  # without pyplot, a PNG is drawn by Agg and needs no display
from torch import Tensor

import torch_nnmath

try:
    import transformers
except ModuleNotFoundError as error:
    raise SystemExit('this example needs transformers: pip install ".[transformers]"') from error

SIZES = {  # of --size; each can be given by itself
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
    """The same at every call."""
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


def gradients(model: transformers.PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Of the model's own loss."""
    ids = ids.to(model.device)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Meter(transformers.TrainerCallback):
    """Times the steps, and takes the peak memory of the second to the fourth; shows a bar."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = bar(self.name, state.max_steps)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.measures = 1 <= state.global_step <= 3
        if self.measures:
            self.before = memory(self.device, reset=True)
        self.start = self.wait()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = self.wait() - self.start
        if self.measures:
            self.peaks.append(memory(self.device) - self.before)
        else:
            self.seconds.append(seconds)
        self.bar.update()


@dataclass(frozen=True)
class Run:
    """One training."""

    training: list[float]  # loss of every step
    first: float  # validation loss
    last: float
    seconds: float  # median of the steps
    peak: float  # bytes, of a step, above weights and optimizer's state


@dataclass(frozen=True)
class Results:
    plain: Run
    swapped: Run
    gradients: float  # largest difference, relative to the parameter's largest entry
    report: torch_nnmath.swapping.Report
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the two losses at any step."""
        pairs = zip(self.plain.training, self.swapped.training, strict=True)
        return max(abs(a - b) for a, b in pairs)


def train(
    name: str, model: transformers.PreTrainedModel, data: Sequence[Tensor], args: argparse.Namespace
) -> Run:
    on_gpu = args.device.type == "cuda"
    training, validation = ([{"input_ids": b, "labels": b} for b in its] for its in data)
    with TemporaryDirectory() as folder:  # the Trainer wants one, but nothing is saved
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
                prediction_loss_only=True,  # else an evaluation would ask for the logits
                bf16=on_gpu,
                use_cpu=not on_gpu,
                seed=args.seed,
                logging_steps=1,
                disable_tqdm=True,  # a bar of our own, one line
                dataloader_pin_memory=on_gpu,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=training,
            eval_dataset=validation,
        )
        meter = Meter(name, trainer.args.device)
        trainer.add_callback(meter)
        trainer.remove_callback(transformers.PrinterCallback)  # a line for every step
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        last = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(meter.seconds or [math.nan])
    return Run(losses, first, last, seconds, max(meter.peaks, default=math.nan))


def table(results: Results) -> str:
    runs = results.plain, results.swapped
    rows = [
        ("", "as it was", "swapped"),
        ("validation loss at the start", *(f"{run.first:.4f}" for run in runs)),
        ("validation loss at the end", *(f"{run.last:.4f}" for run in runs)),
        ("time of a step (median)", *(f"{1000 * run.seconds:,.0f} ms" for run in runs)),
        ("peak memory of a step", *(mib(run.peak) for run in runs)),
    ]
    lines = [f"{name:30}{one:>14}{other:>14}" for name, one, other in rows]
    lines.insert(1, "-" * 58)
    lines += [
        "",
        f"largest difference of the training losses, any step      {results.difference:.1e}",
        f"largest relative difference of a gradient, first batch   {results.gradients:.1e}",
    ]
    return "\n".join(lines)


def draw(results: Results, title: str, path: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    blue, orange = "#14365d", "#f5a65b"
    plain, swapped = results.plain, results.swapped
    steps = range(1, len(plain.training) + 1)
    # The one thick and pale, the other thin and dashed on top, so that both can be seen.
    left.plot(steps, plain.training, color=orange, linewidth=6, alpha=0.7, label="as it was")
    left.plot(steps, swapped.training, color=blue, linewidth=1.4, dashes=(4, 2), label="swapped")
    ends = [0, len(plain.training)]
    left.plot(
        ends, [plain.first, plain.last], "s", color=orange, markersize=12, label="its validation"
    )
    left.plot(
        ends, [swapped.first, swapped.last], "o", color=blue, markersize=6, label="its validation"
    )
    left.set(xlabel="step", ylabel="loss of a token (nats)")
    left.set_title(f"largest difference of the training losses {results.difference:.1e}")
    left.grid(alpha=0.25)
    left.legend(ncols=2)
    for axes, values, name, unit in (
        (middle, [1000 * run.seconds for run in (plain, swapped)], "time of a step", "ms"),
        (right, [run.peak / 2**20 for run in (plain, swapped)], "peak memory of a step", "MiB"),
    ):
        bars = axes.bar(["as it was", "swapped"], values, color=[orange, blue], width=0.6)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.margins(y=0.12)
        axes.set(title=name, ylabel=unit)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a model of transformers as it is and after torch_nnmath.swap(model), "
        "and compare losses, gradients, time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument(
        "--model", default="llama", help="an architecture of transformers, as mistral or gemma2"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("swap_transformers_out"), help="the picture's folder"
    )
    args = parse_sized(parser, SIZES, argv)
    if args.width // args.heads % 2:
        parser.error("--width must be an even multiple of --heads")
    if args.model not in transformers.CONFIG_MAPPING:
        parser.error(f"--model: transformers has no {args.model}")
    args.device = device_of(args.accelerator)
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    tokenizer, *ids = tokens(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    data = [blocks(its, args.context - 1) for its in ids]  # the model shifts its labels itself

    model = build(args)
    before = gradients(model, data[0][: args.batch_size])
    report = torch_nnmath.swap(model)
    after = gradients(model, data[0][: args.batch_size])
    off = max(((after[n] - g).abs().max() / g.abs().max()).item() for n, g in before.items())
    del before, after

    plain = train("as it was", build(args), data, args)
    swapped = train("swapped", model, data, args)

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "swap_transformers.png"
    results = Results(plain, swapped, off, report, picture)
    title = f"{type(model).__name__}, {args.vocabulary:,} tokens: one call of torch_nnmath.swap"
    draw(results, title, picture)
    print(f"\n{report}\n\n{table(results)}\n\npicture: {picture}")
    return results


if __name__ == "__main__":
    main()
