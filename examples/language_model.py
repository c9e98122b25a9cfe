"""A small language model of Python's documentation, trained with the fused head and the plain one.

The text is English that came with Python: the topics of `help()` and the docstrings of the standard
library, about 2 MB, nothing is downloaded. A decoder-only transformer is trained on it twice, from
the same weights over the same batches in float32: once with this library's fused head, which never
holds the logits in memory, and once with `F.cross_entropy` of all logits. What to see:

- a table: both reach the same validation loss, well below that of word frequencies alone (the
  unigram model); the fused head needs less memory; a sample of what the model writes;
- a picture: the plain head's loss curves lie exactly under the fused one's.

    python examples/language_model.py
    python examples/language_model.py --resume                   # after an interruption
    python examples/language_model.py --devices 2                # the same curve, two processes
    python examples/language_model.py --size large               # for a GPU, in bfloat16

It needs `pip install ".[examples]"`, and takes under six minutes on two cores. Reading
the text of `--size large`, some 40 MB where much is installed, takes some minutes by itself.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import hashlib
import logging
import math
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from matplotlib.figure import Figure  # without pyplot, a PNG is drawn by Agg and needs no display
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # which Lightning brings

from torch_nnmath.functional import linear_cross_entropy

END = "<|end|>"  # of a text
SIZES = {  # of --size; each can be given by itself
    "small": {
        "vocabulary": 8192, "width": 192, "layers": 4, "heads": 4, "context": 128,
        "batch_size": 8, "steps": 300, "lr": 1e-3, "every": 60,
    },
    "large": {
        "vocabulary": 32768, "width": 512, "layers": 8, "heads": 8, "context": 512,
        "batch_size": 32, "steps": 1000, "lr": 1e-3, "every": 100,
    },
}  # fmt: skip


# The text


def docstrings(source: str) -> list[str]:
    """Of a module and of everything in it, read without importing it."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's escapes
        found = [ast.get_docstring(x) for x in ast.walk(ast.parse(source)) if isinstance(x, kinds)]
    return [text for text in found if text]


@cache
def corpus(size: str = "small") -> tuple[list[str], list[str]]:
    """Texts for training and for validation: a file's docstrings, or a topic of `help()`, each.

    "small" is the standard library's, "large" has those of all installed packages too. About one
    text in twenty is for validation, chosen by a hash of its file's name. A docstring that occurs
    again is left out, so that none is in both.
    """
    texts = {f"topics/{name}": [text] for name, text in sorted(topics.items())}
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    roots = [stdlib, Path(paths["purelib"])] if size == "large" else [stdlib]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if {"test", "tests", "idlelib", "pydoc_data"} & set(name.parts) or (
                root == stdlib and {"site-packages", "dist-packages"} & set(name.parts)
            ):
                continue
            try:
                texts[name.as_posix()] = docstrings(path.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError, RecursionError):  # a bad example, not UTF-8
                continue
    seen: set[str] = set()
    training: list[str] = []
    validation: list[str] = []
    for name, parts in texts.items():
        new = [text for text in dict.fromkeys(parts) if text not in seen]
        seen.update(new)
        if new:
            is_held_out = hashlib.sha256(name.encode()).digest()[0] % 20 == 0
            (validation if is_held_out else training).append("\n\n".join(new))
    return training, validation


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte pairs of these texts; any other text can be written in them too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def tokens(size: str = "small", vocabulary: int = 8192) -> tuple[Tokenizer, Tensor, Tensor]:
    """The tokenizer, and the ids (n,) of the texts for training and for validation."""
    training, validation = corpus(size)
    tokenizer = train_tokenizer(training, vocabulary)
    end = tokenizer.token_to_id(END)

    def ids(texts: Sequence[str]) -> Tensor:
        encoded = tokenizer.encode_batch(texts)
        return torch.tensor([i for text in encoded for i in (*text.ids, end)])

    return tokenizer, ids(training), ids(validation)


def blocks(ids: Tensor, context: int) -> Tensor:
    """(n, context + 1): inputs are `[:, :-1]`, targets `[:, 1:]`; every token is a target once."""
    return ids.unfold(0, context + 1, context)


# The model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Ids (B, T) to logits (B, T, vocabulary); `head` is a Linear with the embedding's weight."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "position.weight"):
                nn.init.normal_(parameter, std=0.05)
            elif parameter.dim() == 2:
                into_sum = name.endswith(("out.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if into_sum else 1))

    def features(self, ids: Tensor) -> Tensor:
        """(B, T, width): what the head sees."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.norm(self.blocks(self.embedding(ids) + self.position(places)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


@torch.no_grad()
def sample(
    net: Transformer, tokenizer: Tokenizer, prompt: str, length: int, seed: int, top: int = 20
) -> str:
    """Goes on from the prompt, each token drawn from the `top` likeliest."""
    draw = torch.Generator().manual_seed(seed)
    device = net.embedding.weight.device
    ids = tokenizer.encode(prompt).ids
    for _ in range(length):
        seen = torch.tensor([ids[-net.context :]], device=device)
        values, candidates = net(seen)[0, -1].float().cpu().topk(min(top, net.head.out_features))
        ids.append(int(candidates[torch.multinomial(values.softmax(0), 1, generator=draw)]))
    return tokenizer.decode(ids, skip_special_tokens=False).replace(END, "\n\n")


def unigram(training: Tensor, targets: Tensor, vocabulary: int) -> float:
    """The loss of a model that knows only how often each token occurs; each is seen once more."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[targets].mean().item()


# The training


def memory(device: torch.device, reset: bool = False) -> float:
    """Bytes: the most that were in use since the last reset; nan where that cannot be told."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return math.nan
    if reset:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # what was freed goes back to the system
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


class LanguageModel(L.LightningModule):
    """Trains a Transformer with the one head or the other, and keeps account of it."""

    def __init__(self, args: argparse.Namespace, is_fused: bool, data: tuple[Tensor, Tensor]):
        super().__init__()
        torch.manual_seed(args.seed)
        self.net = Transformer(args.vocabulary, args.width, args.layers, args.heads, args.context)
        self.args, self.is_fused = args, is_fused
        self.training_blocks, self.validation_blocks = (blocks(ids, args.context) for ids in data)
        order = torch.Generator().manual_seed(args.seed)  # its own, so that both see one order
        n, needed = len(self.training_blocks), args.steps * args.batch_size
        rounds = [torch.randperm(n, generator=order) for _ in range(math.ceil(needed / n))]
        self.order = torch.cat(rounds)[:needed].view(args.steps, args.batch_size)
        self.account: dict[str, list[float]] = {
            name: [] for name in ("training", "validated", "validation", "seconds", "peak")
        }

    def loss(self, ids: Tensor, reduction: str = "mean") -> Tensor:
        features, targets = self.net.features(ids[:, :-1]), ids[:, 1:]
        if self.is_fused:  # straight from the features
            weight = self.net.head.weight
            return linear_cross_entropy(features, weight, targets, reduction=reduction)
        logits = self.net.head(features)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(ids)
        self.losses.append(loss.detach())  # left on its device: a GPU need not wait for the CPU
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.sums.append(self.loss(ids, "sum").detach())

    def train_dataloader(self) -> DataLoader:
        """Of an epoch: which batches depends on the step alone, so that a run can go on."""
        steps = self.order[self.global_step :][: self.args.every]
        rank, world = self.global_rank, self.trainer.world_size
        batches = [blocks_of[rank::world].tolist() for blocks_of in steps]
        return DataLoader(self.training_blocks, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        mine = range(self.global_rank, len(self.validation_blocks), self.trainer.world_size)
        return DataLoader(self.validation_blocks, self.args.batch_size, sampler=mine)

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if p.dim() != 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.args.lr, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-6
        )
        warm, steps = max(1, self.args.steps // 10), self.args.steps

        def rate(step: int) -> float:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            return min(1, (step + 1) / warm) * (0.05 + 0.95 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # What follows measures.

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_epoch_start(self) -> None:
        self.losses: list[Tensor] = []
        self.start = self.wait()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.measures = len(self.account["peak"]) < 3 and self.global_step > 1
        if self.measures:
            self.optimizers().zero_grad()
            self.before = memory(self.device, reset=True)

    def on_train_batch_end(self, outputs: Tensor, batch: Tensor, batch_idx: int) -> None:
        if self.measures:
            self.account["peak"].append(memory(self.device) - self.before)
        if self.trainer.is_last_batch:
            self.account["seconds"].append((self.wait() - self.start) / (batch_idx + 1))

    def on_validation_epoch_start(self) -> None:
        self.sums: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        reduce, account = self.trainer.strategy.reduce, self.account
        account["training"] += reduce(torch.stack(self.losses), reduce_op="mean").tolist()
        self.losses.clear()
        loss = reduce(torch.stack(self.sums).sum(), reduce_op="sum").item()
        account["validation"].append(loss / self.validation_blocks[:, 1:].numel())
        account["validated"].append(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["account"], checkpoint["settings"] = self.account, settings(self.args)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.account = checkpoint["account"]


def bar(title: str, total: int | None, unit: str = "step", **options: Any) -> tqdm:
    """One line, also where output is a file."""
    return tqdm(
        desc=f"{title:32}",
        total=total,
        unit=unit,
        file=sys.stdout,
        dynamic_ncols=True,
        # A terminal draws over the line; a file keeps every state of it, so it gets few.
        mininterval=0.1 if sys.stdout.isatty() else 60,
        **options,
    )


class StepBar(ProgressBar):
    """Shows how far a training is."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def disable(self) -> None:
        """Where another process shows it; the bar itself knows."""

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        total, done = pl_module.args.steps, trainer.global_step
        self.bar = bar(self.title, total, initial=done, disable=not trainer.is_global_zero)

    def on_train_batch_end(self, *args: object) -> None:
        self.bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        loss = pl_module.account["validation"][-1]
        self.bar.set_postfix_str(f"validation loss {loss:.4f}", refresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self.bar.close()


@dataclass(frozen=True)
class Run:
    """One training: its loss at every step and at each validation, and what it cost."""

    training: Tensor  # (steps,)
    validated: list[int]  # after which steps
    validation: Tensor
    tokens_per_second: float
    peak: float  # bytes, of a step, above weights and optimizer's state

    @property
    def perplexity(self) -> float:
        return self.validation[-1].exp().item()


@dataclass(frozen=True)
class Results:
    fused: Run
    plain: Run
    unigram: float  # its loss on the same validation targets
    sample: str
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the two losses at any step."""
        return (self.fused.training - self.plain.training).abs().max().item()


def settings(args: argparse.Namespace) -> dict:
    """What a training that goes on must have in common with its beginning."""
    free = ("accelerator", "devices", "out", "resume")
    return {name: value for name, value in vars(args).items() if name not in free}


def train(
    name: str, args: argparse.Namespace, data: tuple[Tensor, Tensor]
) -> tuple[LanguageModel, Run, bool]:
    """The model, its account, and whether this process is the one to speak of it."""
    model = LanguageModel(args, name == "fused", data)
    checkpoint = args.out / f"{name}.ckpt"
    resumes = args.resume and checkpoint.exists()
    if resumes:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")["settings"]
        if saved != settings(args):
            raise SystemExit(f"--resume: {checkpoint} was trained with other options: {saved}")
    on_gpu = device_of(args.accelerator).type == "cuda"
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        use_distributed_sampler=False,  # the loaders above share the blocks out
        precision=args.precision or ("bf16-mixed" if on_gpu else "32-true"),
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
    trainer.fit(model, ckpt_path=checkpoint if resumes else None)
    account = model.account
    seconds = torch.tensor(account["seconds"]).median().item()
    run = Run(
        torch.tensor(account["training"]),
        account["validated"],
        torch.tensor(account["validation"]),
        args.batch_size * args.context / seconds,
        max(account["peak"], default=math.nan),
    )
    return model, run, trainer.is_global_zero


def mib(peak: float) -> str:
    return "unknown" if math.isnan(peak) else f"{peak / 2**20:,.0f} MiB"


def table(results: Results) -> str:
    fused, plain = results.fused, results.plain
    share = math.exp(results.unigram)
    rows = [
        ("", "fused head", "plain head"),
        ("validation loss", *(f"{run.validation[-1]:.4f}" for run in (fused, plain))),
        ("validation perplexity", *(f"{run.perplexity:.1f}" for run in (fused, plain))),
        ("  of the unigram model's", *(f"{run.perplexity / share:.0%}" for run in (fused, plain))),
        (
            "training tokens per second",
            *(f"{run.tokens_per_second:,.0f}" for run in (fused, plain)),
        ),
        ("peak memory of a step", *(mib(run.peak) for run in (fused, plain))),
    ]
    lines = [f"{name:30}{one:>14}{other:>14}" for name, one, other in rows]
    lines.insert(1, "-" * 58)
    lines += [
        "",
        f"unigram model: perplexity {share:.1f}, loss {results.unigram:.4f}",
        f"largest difference of the two training losses, any step  {results.difference:.1e}",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Both trainings' losses over the steps, and what the heads cost."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle("A language model of Python's documentation, by two heads", fontsize=15)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    blue, orange = "#14365d", "#f5a65b"
    fused, plain = results.fused, results.plain
    steps = range(1, len(fused.training) + 1)
    # The one thick and pale, the other thin and dashed on top, so that both can be seen.
    left.plot(steps, plain.training, color=orange, linewidth=6, alpha=0.6, label="plain: training")
    left.plot(
        steps, fused.training, color=blue, linewidth=1.2, dashes=(4, 2), label="fused: training"
    )
    left.plot(
        plain.validated,
        plain.validation,
        "s",
        color=orange,
        markersize=13,
        label="plain: validation",
    )
    left.plot(
        fused.validated, fused.validation, "o-", color=blue, markersize=6, label="fused: validation"
    )
    left.axhline(results.unigram, color="#c0143c", linestyle=":", label="unigram model: validation")
    left.set(xlabel="step", ylabel="loss of a token (nats)")
    left.set_title(f"largest difference of the training losses {results.difference:.1e}")
    left.grid(alpha=0.25)
    left.legend()
    peaks = [run.peak / 2**20 for run in (fused, plain)]
    bars = right.bar(["fused", "plain"], peaks, color=[blue, orange], width=0.6)
    right.bar_label(bars, fmt="{:,.0f}", padding=3)
    right.margins(y=0.12)
    right.set_title("peak memory of a step")
    right.set_ylabel("MiB above weights and optimizer")
    figure.savefig(path, dpi=110)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what Lightning would say before each training; all else is shown."""
    info = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = info.level
    info.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",  # the data lie in memory; workers would slow it down
            "GPU available but not used",  # --accelerator cpu was asked for
            ".*LeafSpec",  # between Lightning and PyTorch's newest, out of our hands
            ".*exists and is not empty",  # checkpoints of a run before
            ".*across ranks is zero",  # no batches are left where --resume finds all steps done
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


def device_of(accelerator: str) -> torch.device:
    """Of `--accelerator`."""
    is_there = torch.cuda.is_available()
    if accelerator == "gpu" and not is_there:
        raise SystemExit("--accelerator gpu: PyTorch sees none")
    return torch.device("cuda" if is_there and accelerator != "cpu" else "cpu")


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to compute; auto takes a GPU where there is one",
    )


def add_sizes(parser: argparse.ArgumentParser, sizes: dict) -> None:
    parser.add_argument(
        "--size",
        choices=sizes,
        default="small",
        help="sets the defaults of sizes, --steps and --lr, here those of small; large is for a "
        "GPU, and its text has the docstrings of installed packages too",
    )
    parser.add_argument(
        "--vocabulary", type=positive, help="how many byte pairs, trained on the text"
    )
    parser.add_argument("--width", type=positive, help="features of a token")
    parser.add_argument("--layers", type=positive, help="pairs of attention and perceptron")
    parser.add_argument("--heads", type=positive, help="heads of attention in a layer")
    parser.add_argument("--context", type=positive, help="tokens of a block")
    parser.add_argument("--batch-size", type=positive, help="blocks of a step")
    parser.add_argument("--steps", type=positive, help="steps of a training")
    parser.add_argument("--lr", type=float, help="largest learning rate, above 0")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    add_accelerator(parser)


def parse_sized(
    parser: argparse.ArgumentParser, sizes: dict, argv: Sequence[str] | None
) -> argparse.Namespace:
    """With the defaults of the size that is asked for."""
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model twice, with the fused head and with the plain "
        "one, and compare losses, speed and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument(
        "--every", type=positive, help="steps between validations, each with a checkpoint"
    )
    parser.add_argument(
        "--devices", type=positive, default=1, help="processes, which share a step's blocks"
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"),
        help="as Lightning's; None is bf16-mixed on a GPU and 32-true on a CPU",
    )
    parser.add_argument("--prompt", default="Return the", help="what the sample begins with")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument(
        "--out", type=Path, default=Path("language_model_out"), help="for checkpoints and picture"
    )
    args = parse_sized(parser, SIZES, argv)
    if args.batch_size % args.devices:
        parser.error("--batch-size must be a multiple of --devices")
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    device_of(args.accelerator)  # that there is one
    if args.resume and not any(args.out.glob("*.ckpt")):
        raise SystemExit(f"--resume: there is no checkpoint in {args.out}")
    tokenizer, *data = tokens(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    args.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model, fused, speaks = train("fused", args, data)
        _, plain, _ = train("plain", args, data)
    targets = model.validation_blocks[:, 1:]
    picture = args.out / "language_model.png"
    results = Results(
        fused,
        plain,
        unigram(data[0], targets, args.vocabulary),
        sample(model.net, tokenizer, args.prompt, 60, args.seed),
        picture,
    )
    if speaks:  # of several processes the first
        draw(results, picture)
        parameters = sum(p.numel() for p in model.net.parameters())
        print(
            f"\n{parameters / 1e6:.1f} million parameters, trained on {args.steps} steps of "
            f"{args.batch_size} x {args.context} tokens of {len(data[0]):,}\n\n{table(results)}\n\n"
            f"a sample:\n{results.sample}\n\npicture: {picture}"
        )
    return results


if __name__ == "__main__":
    main()
