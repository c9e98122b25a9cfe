"""Trains a language model with its batch and its vocabulary split over processes.

The model of language_model.py is trained twice from the same weights over the same batches: in one
process, and in several, through Lightning's ModelParallelStrategy. There the head's classes are
split over some processes (`VocabularyParallel`), the batch over the others, and all parameters over
those that split the batch (FSDP2). The end of a text is no target, so processes have different
numbers of targets; `count_tokens_per_rank` makes the loss the mean over all of them. Results:

- the two loss curves, and their largest difference;
- the bytes that one process sends for the head in a step, measured: for this library's head, for
  PyTorch's `loss_parallel` on logits in memory, and for gathered logits; a picture of both.

    python examples/scale_out.py                                 # 4 processes, 2 x 2
    python examples/scale_out.py --devices 4 --vocabulary-ranks 4
    python examples/scale_out.py --tie                           # one weight for head and embedding

It needs `pip install ".[examples]"`. Processes use GPUs where there are enough, else the CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from language_model import StepBar
from lightning.pytorch.strategies import ModelParallelStrategy
from matplotlib.figure import Figure  # without pyplot, which may need a display
from shared import BLUE, ORANGE, RED, add_sizes, parse_positive, parse_sized, silence_lightning
from text_model import END, Transformer, encode_corpus, split_blocks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from torch_nnmath.nn import LinearCrossEntropyLoss
from torch_nnmath.parallel import VocabularyParallel, count_tokens_per_rank

SIZES = {  # defaults by --size
    "small": {
        "vocabulary": 8192, "width": 96, "layers": 2, "heads": 4, "context": 64,
        "batch_size": 8, "steps": 100, "lr": 1e-3,
    },
    "large": {
        "vocabulary": 32768, "width": 512, "layers": 8, "heads": 8, "context": 512,
        "batch_size": 32, "steps": 1000, "lr": 1e-3,
    },
}  # fmt: skip


class NextTokenSum(nn.Module):
    """Token ids (B, T + 1) to the loss of every token but the first, summed."""

    def __init__(self, args: argparse.Namespace, ignore_index: int):
        super().__init__()
        self.net = Transformer(args.vocabulary, args.width, args.layers, args.heads, args.context)
        self.head = LinearCrossEntropyLoss(
            args.width, args.vocabulary, bias=False, reduction="sum", ignore_index=ignore_index
        )
        weight = self.net.embedding.weight
        # else a weight of its own: the head's is split over the classes, the embedding's is not
        self.head.linear.weight = weight if args.tie else nn.Parameter(weight.detach().clone())
        self.net.head = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.net.features(ids[:, :-1]), ids[:, 1:])


class ScaledModel(L.LightningModule):
    """Trains a `NextTokenSum`, split over the strategy's device mesh if it has one."""

    def __init__(self, args: argparse.Namespace, ignore_index: int, blocks: Tensor):
        super().__init__()
        torch.manual_seed(args.seed)
        self.args, self.ignore_index, self.blocks = args, ignore_index, blocks
        self.model = NextTokenSum(args, ignore_index)
        generator = torch.Generator().manual_seed(args.seed)
        size = args.steps, args.batch_size
        self.batches = torch.randint(len(blocks), size, generator=generator)
        self.losses: list[Tensor] = []
        self.sent: dict[str, int] = {}
        self.is_split = False

    def configure_model(self) -> None:
        if self.device_mesh is None or self.is_split:
            return
        self.is_split = True
        vocabulary, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        head, net = self.model.head, self.model.net
        parallelize_module(head, vocabulary, VocabularyParallel())
        modules = [*net.blocks, head, self.model]
        if self.args.tie:  # FSDP2 must have both uses of the weight in one module, here the model
            style = RowwiseParallel(input_layouts=Replicate())
            parallelize_module(net.embedding, vocabulary, style)
            head.linear.weight = net.embedding.weight
            modules.remove(head)
        for module in modules:
            fully_shard(module, mesh=data)

    def train_dataloader(self) -> DataLoader:
        """The ranks that share the classes have the same blocks of each batch."""
        rank, ranks = 0, 1
        if self.device_mesh is not None:
            data = self.device_mesh["data_parallel"]
            rank, ranks = data.get_local_rank(), data.size()
        batches = [indices[rank::ranks].tolist() for indices in self.batches]
        return DataLoader(self.blocks, batch_sampler=batches)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        mesh = self.device_mesh
        group = None if mesh is None else mesh["data_parallel"].get_group()
        tokens = count_tokens_per_rank(ids[:, 1:], ignore_index=self.ignore_index, group=group)
        loss = self.model(ids) / tokens
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # not foreach, since the parameters are on different meshes
        return torch.optim.AdamW(self.parameters(), self.args.lr, eps=1e-6, foreach=False)

    def on_train_end(self) -> None:
        self.curve = self.trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean")
        if self.device_mesh is not None:
            self.sent = measure_heads(self.args, self.device_mesh)


# The bytes that are sent

# how often a ring passes a message on to all ranks
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that each rank sends in collectives, if they run in a ring.

    A mode sees the collectives of DTensor. It does not see inside this library's operators, which
    call `dist.all_reduce`.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.total = ranks, 0.0
        self.all_reduce = dist.all_reduce

    def __enter__(self) -> ByteCounter:
        def count_and_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count(PASSES["all_reduce"], [x])
            return self.all_reduce(x, *args, **kwargs)

        self.patch = mock.patch.object(dist, "all_reduce", count_and_reduce)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.stop()
        super().__exit__(*error)

    def count(self, passes: int, tensors: Sequence[Tensor]) -> None:
        size = max(x.numel() * x.element_size() for x in tensors)
        self.total += passes * size * (self.ranks - 1) / self.ranks

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # the mode then sees what DTensor calls
        result = function(*args, **(kwargs or {}))
        name = function.name()
        passes = [n for operation, n in PASSES.items() if f"_c10d_functional::{operation}" in name]
        if passes:
            self.count(*passes, [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)])
        return result


def measure_heads(args: argparse.Namespace, mesh: DeviceMesh) -> dict[str, int]:
    """The bytes that a rank sends for each head in one step over its rows, forward and backward."""
    vocabulary = mesh["tensor_parallel"]
    rows = args.batch_size // mesh["data_parallel"].size() * args.context
    generator = torch.Generator().manual_seed(args.seed)
    features = torch.randn(rows, args.width, generator=generator).to(mesh.device_type)
    targets = torch.randint(args.vocabulary, (rows,), generator=generator).to(mesh.device_type)

    def split(layer: nn.Module, style: Any) -> nn.Module:
        return parallelize_module(layer.to(mesh.device_type), vocabulary, style)

    def make_linear() -> nn.Module:
        return nn.Linear(args.width, args.vocabulary, bias=False)

    ours = split(
        LinearCrossEntropyLoss(args.width, args.vocabulary, bias=False), VocabularyParallel()
    )
    gathered = split(make_linear(), ColwiseParallel(output_layouts=Replicate()))
    in_memory = split(make_linear(), ColwiseParallel(use_local_output=False))
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "this library": lambda x: ours(x, targets),
        "loss_parallel": lambda x: F.cross_entropy(in_memory(x), targets),
        "gathered logits": lambda x: F.cross_entropy(gathered(x), targets),
    }
    sent = {}
    for name, compute_loss in steps.items():
        x = features.clone().requires_grad_()
        with ByteCounter(vocabulary.size()) as counter, loss_parallel():
            compute_loss(x).backward()
        sent[name] = round(counter.total)
    return sent


# The trainings


@dataclass(frozen=True)
class Results:
    one_process: Tensor  # (steps,): the training losses
    split: Tensor
    sent: dict[str, int]  # bytes in a step, by head
    picture: Path

    @property
    def difference(self) -> float:
        """The largest absolute difference between the training losses at any step."""
        return (self.one_process - self.split).abs().max().item()


def train(title: str, args: argparse.Namespace, strategy: Any, *model: Any) -> ScaledModel:
    is_split = not isinstance(strategy, str)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices if is_split else 1,
        strategy=strategy,
        use_distributed_sampler=False,  # the loader above distributes the blocks
        max_steps=args.steps,
        callbacks=[StepBar(title)],
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )
    module = ScaledModel(args, *model)
    trainer.fit(module)
    module.curve = module.curve.cpu()
    return module


def format_table(results: Results, args: argparse.Namespace) -> str:
    data = args.devices // args.vocabulary_ranks
    one, split = results.one_process, results.split
    lines = [
        f"{args.devices} processes: {data} parts of the batch x {args.vocabulary_ranks} of the "
        f"{args.vocabulary} classes",
        "",
        f"{'training loss':28}{'one process':>14}{'split':>14}",
        *(f"{f'step {i + 1}':28}{one[i]:14.6f}{split[i]:14.6f}" for i in (0, len(one) - 1)),
        f"largest difference at any step  {results.difference:.1e}",
        "",
        f"{'head':28}{'sent in a step':>14}",
        *(f"{name:28}{size / 2**10:10,.1f} KiB" for name, size in results.sent.items()),
    ]
    return "\n".join(lines)


def draw(results: Results) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = range(1, len(results.split) + 1)
    # A thin dashed line over a thick pale one: both are visible where they coincide.
    left.plot(steps, results.one_process, color=ORANGE, linewidth=6, alpha=0.6, label="one process")
    left.plot(steps, results.split, color=BLUE, linewidth=1.2, dashes=(4, 2), label="split")
    left.set(xlabel="step", ylabel="loss of a token (nats)")
    left.set_title(f"largest difference of the losses {results.difference:.1e}")
    left.grid(alpha=0.25)
    left.legend()
    sizes = [size / 2**10 for size in results.sent.values()]
    bars = right.bar([*results.sent], sizes, color=[BLUE, ORANGE, RED], width=0.6)
    right.bar_label(bars, fmt="{:,.0f}", padding=3)
    right.set_yscale("log")
    right.margins(y=0.12)
    right.set_title("sent by a process for the head in a step")
    right.set_ylabel("KiB")
    figure.savefig(results.picture, dpi=110)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model in one process and with batch and vocabulary "
        "split over several, and compare losses and the bytes that heads send.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument("--devices", type=parse_positive, default=4, help="number of processes")
    parser.add_argument(
        "--vocabulary-ranks",
        type=parse_positive,
        default=2,
        help="processes that split the vocabulary; the others split the batch",
    )
    parser.add_argument("--tie", action="store_true", help="give the head the embedding's weight")
    parser.add_argument(
        "--out", type=Path, default=Path("scale_out_out"), help="output folder for the picture"
    )
    args = parse_sized(parser, SIZES, argv)
    if args.devices % args.vocabulary_ranks:
        parser.error("--devices must be a multiple of --vocabulary-ranks")
    if args.batch_size % (args.devices // args.vocabulary_ranks):
        parser.error("--batch-size must be a multiple of --devices over --vocabulary-ranks")
    if args.accelerator == "auto" and torch.cuda.device_count() < args.devices:
        args.accelerator = "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> Results | None:
    """Returns the results in the first process, None in those that Lightning starts."""
    args = parse_arguments(argv)
    is_first_process = int(os.environ.get("LOCAL_RANK", 0)) == 0
    tokenizer, ids, _ = encode_corpus(args.size, args.vocabulary)
    args.vocabulary = tokenizer.get_vocab_size()  # a short text has fewer pairs
    model = tokenizer.token_to_id(END), split_blocks(ids, args.context)
    with silence_lightning():
        if is_first_process:
            one_process = train("one process", args, "auto", *model)
        strategy = ModelParallelStrategy(
            args.devices // args.vocabulary_ranks, args.vocabulary_ranks
        )
        split = train(f"{args.devices} processes", args, strategy, *model)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not is_first_process:
        return None
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(one_process.curve, split.curve, split.sent, args.out / "scale_out.png")
    draw(results)
    print(f"\n{format_table(results, args)}\n\npicture: {results.picture}")
    return results


if __name__ == "__main__":
    main()
