"""The works of the GPU's report, with its sizes and targets. `sizes` are those of a dry run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nnmath import functional, kernels
from torch_nnmath._memory import MIB
from torch_nnmath.bench import works
from torch_nnmath.bench.work import (
    Contender,
    Floor,
    Problem,
    RandomTensors,
    Size,
    Target,
    Work,
    forward,
)

MAIN_SIZE = (4096, 4096, 128256)
HEAD_SIZES = (
    MAIN_SIZE,
    (8192, 4096, 128256),
    (2048, 4096, 128256),
    (8192, 2304, 256000),
    (4096, 2048, 128256),
    (4096, 4096, 50257),
    (4096, 4096, 151936),
)
TOY_SIZE = (24, 16, 40)
SMOOTHING = 0.1
SHARPNESS = 6.0  # standard deviation of the logits of a trained model
COPY_SHARE = 0.85  # of the time of a pass over rows, what a copy of its bytes takes


def head_targets(size: Size) -> tuple[Target, ...]:
    """Returns the targets of the head: its time over that of its products, and its peak."""
    features = size[1]
    limit = 1.08 if features >= 4096 else 1.15
    budget = Target(kernels.get_memory_budget() / MIB, kind="peak", size=size)
    return Target(limit, "floor", size=size), budget


def without_compile(contenders: Mapping[str, Contender]) -> dict[str, Contender]:
    return {name: c for name, c in contenders.items() if not c.is_compiled}


# The head and its options

head = replace(
    works.head,
    sizes=(TOY_SIZE,),
    cuda_sizes=HEAD_SIZES,
    targets=tuple(target for size in HEAD_SIZES for target in head_targets(size)),
    dtype=torch.bfloat16,
    measures_error=False,  # the stage `head-errors` does, at a size for float64
)


def draw_head_and_class_weights(
    random: RandomTensors, rows: int, features: int, classes: int
) -> Problem:
    problem = works.draw_head(random, rows, features, classes)
    w = random.normal(classes).abs() + 0.1
    return replace(problem, constants=(*problem.constants, w))


def weighted_head(x: Tensor, W: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, weight=w)


def eager_weighted_head(x: Tensor, W: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, W), t, weight=w)


def smoothed_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, label_smoothing=SMOOTHING)


def eager_smoothed_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, W), t, label_smoothing=SMOOTHING)


def softcap_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, softcap=works.SOFTCAP)


def eager_softcap_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(works.SOFTCAP * torch.tanh(F.linear(x, W) / works.SOFTCAP), t)


def z_loss_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, z_loss=works.Z_LOSS)


def eager_z_loss_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    z = F.linear(x, W)
    return F.cross_entropy(z, t) + works.Z_LOSS * z.logsumexp(-1).square().mean()


def head_with_stats(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, return_stats=True)[0]


def plain_head(x: Tensor, W: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t)


def eager_row_losses(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    return (advantages * F.cross_entropy(F.linear(x, W), t, reduction="none")).mean()


def make_option(
    name: str,
    description: str,
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    limit: float = 1.08,
    draw_inputs: Callable[..., Problem] = works.draw_head,
) -> Work:
    """Returns the head with an option, this library's and PyTorch's; plain is without it."""
    ours, eager = functions
    return replace(
        head,
        name=f"head-{name}",
        description=description,
        draw_inputs=draw_inputs,
        contenders={
            "ours": Contender(ours),
            "eager": Contender(eager, materialises_logits=True),
            "plain": Contender(plain_head, is_equivalent=False),
        },
        cuda_sizes=(MAIN_SIZE,),
        floor=None,
        targets=(Target(limit, "plain"),),
    )


options = (
    make_option("softcap", "with a soft cap", (softcap_head, eager_softcap_head), 1.15),
    make_option("z-loss", "with the z-loss", (z_loss_head, eager_z_loss_head)),
    make_option("smoothing", "with label smoothing", (smoothed_head, eager_smoothed_head)),
    make_option(
        "class-weights",
        "with class weights",
        (weighted_head, eager_weighted_head),
        draw_inputs=draw_head_and_class_weights,
    ),
    make_option("stats", "with statistics", (head_with_stats, works.eager_head)),
    make_option(
        "none",
        "unreduced losses with a factor for each row",
        (works.weighted_row_losses, eager_row_losses),
        draw_inputs=works.draw_head_and_advantages,
    ),
    make_option(
        "policy",
        "log-probabilities and entropy",
        (works.policy_loss, works.eager_policy_loss),
        1.15,
        draw_inputs=works.draw_head_and_advantages,
    ),
)
second = replace(
    works.WORKS["head-second"],
    sizes=(TOY_SIZE,),
    cuda_sizes=((2048, 2048, 32000),),
    dtype=torch.bfloat16,
)


def draw_sharp_head(random: RandomTensors, rows: int, features: int, classes: int) -> Problem:
    problem = works.draw_head(random, rows, features, classes)
    x, W = problem.leaves
    return replace(problem, leaves=(SHARPNESS * x, W))


errors = replace(
    head,
    name="head-errors",
    description="errors of loss and gradients",
    contenders=without_compile(works.HEAD_CONTENDERS),
    cuda_sizes=((1024, 1024, 32000),),
    floor=None,
    targets=(),
)
sharp_errors = replace(errors, name="head-errors-sharp", draw_inputs=draw_sharp_head)

# Passes over rows

ROW_SIZES = ((8192, 128256), (8192, 32000), (8192, 1000), (8192, 262144))
TOY_ROWS = ((16, 40),)


def prepare_copies(problem: Problem, count: int) -> Callable[[], object]:
    """Returns a copy that moves as many bytes as `count` passes over the logits."""
    z = problem.args[0]
    source = torch.zeros(count * z.nbytes // 16, dtype=torch.int64, device=z.device)
    return functools.partial(torch.empty_like(source).copy_, source)


def copies(count: int) -> Floor:
    description = f"a copy of the bytes of {count} passes over the logits"
    return Floor(description, functools.partial(prepare_copies, count=count))


def make_row_work(work: Work, name: str, passes: int) -> Work:
    """Returns a work on rows whose floor is a copy of the necessary bytes."""
    return replace(
        work,
        name=name,
        contenders=without_compile(work.contenders),
        sizes=TOY_ROWS,
        cuda_sizes=ROW_SIZES,
        floor=copies(passes),
        targets=(Target(1 / COPY_SHARE, "floor"),),
        dtype=torch.bfloat16,
        measures_error=False,
        measures_memory=True,
    )


rows = (
    make_row_work(works.cross_entropy, "cross_entropy", 2),  # reads z, writes dz
    make_row_work(  # reads z, writes a
        replace(works.softmax, mode=forward, draw_inputs=works.draw_elements),
        "softmax-forward",
        2,
    ),
    make_row_work(works.softmax, "softmax", 5),  # and reads a and da, writes dz
)
compiled_row = replace(
    rows[0],
    name="cross_entropy-compiled",
    contenders=works.cross_entropy.contenders,
    cuda_sizes=ROW_SIZES[:1],
)
HEADS = (head, *options)
ALL = (*HEADS, second, errors, sharp_errors, *rows, compiled_row)
