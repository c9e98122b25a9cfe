"""The table of works: what is measured, against which contenders, at which sizes."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nnmath import functional
from torch_nnmath.bench.training_steps import (
    make_convolutions,
    make_hidden_layer,
    make_step_contenders,
)
from torch_nnmath.bench.work import (
    Contender,
    Floor,
    Function,
    Problem,
    RandomTensors,
    Size,
    Target,
    Work,
    forward,
    hessian_vector_product,
)

IGNORE_INDEX = -100

# Arguments


def draw_head(random: RandomTensors, rows: int, features: int, classes: int) -> Problem:
    x, W = random.normal(rows, features), random.normal(classes, features) / features**0.5
    return Problem((x, W), (random.class_indices(rows, classes),))


def draw_head_half_ignored(
    random: RandomTensors, rows: int, features: int, classes: int
) -> Problem:
    problem = draw_head(random, rows, features, classes)
    problem.constants[0][random.normal(rows).argsort()[::2]] = IGNORE_INDEX
    return problem


def draw_head_and_vector(random: RandomTensors, rows: int, features: int, classes: int) -> Problem:
    vector = random.normal(rows, features), random.normal(classes, features)
    return replace(draw_head(random, rows, features, classes), upstream=vector)


def draw_head_and_advantages(
    random: RandomTensors, rows: int, features: int, classes: int
) -> Problem:
    problem = draw_head(random, rows, features, classes)
    return replace(problem, constants=(*problem.constants, random.normal(rows)))


def draw_two_heads(
    random: RandomTensors, rows: int, features: int, teacher_features: int, classes: int
) -> Problem:
    student, teacher = (
        (random.normal(rows, n), random.normal(classes, n) / n**0.5)
        for n in (features, teacher_features)
    )
    return Problem(student, teacher)


def draw_logits(random: RandomTensors, rows: int, classes: int) -> Problem:
    return Problem((random.normal(rows, classes),), (random.class_indices(rows, classes),))


def draw_elements(random: RandomTensors, *shape: int) -> Problem:
    return Problem((random.normal(*shape),), upstream=(random.normal(*shape),))


def draw_elements_and_targets(random: RandomTensors, *shape: int) -> Problem:
    return Problem((random.normal(*shape),), (random.normal(*shape).sigmoid(),))


def draw_layer(random: RandomTensors, rows: int, in_features: int, out_features: int) -> Problem:
    W = random.normal(out_features, in_features) / in_features**0.5
    leaves = random.normal(rows, in_features), W, random.normal(out_features)
    return Problem(leaves, upstream=(random.normal(rows, out_features),))


def draw_network(
    random: RandomTensors, rows: int, in_features: int, hidden: int, classes: int
) -> Problem:
    sizes = ((hidden, in_features), (hidden,), (classes, hidden), (classes,))
    parameters = tuple(random.normal(*size) / in_features**0.5 for size in sizes)
    constants = random.normal(rows, in_features), random.class_indices(rows, classes)
    return Problem(parameters, constants)


def draw_images(
    random: RandomTensors, rows: int, width: int, channels: int, classes: int
) -> Problem:
    """Images in channels_last, and the parameters of two convolutions and a head."""
    shapes = (channels, 3, 3, 3), (channels, channels, 3, 3), (classes, channels)
    parameters = [
        parameter
        for shape in shapes
        for parameter in (
            random.normal(*shape) / math.prod(shape[1:]) ** 0.5,
            random.normal(shape[0]),
        )
    ]
    images = random.normal(rows, 3, width, width).contiguous(memory_format=torch.channels_last)
    return Problem(tuple(parameters), (images, random.class_indices(rows, classes)))


# Floors


def prepare_products(problem: Problem, with_backward: bool = True) -> Callable[[], object]:
    """Returns a call of z = x Wᵀ, dx = dz W and dW = dzᵀ x; z serves as dz, which has its shape."""
    x, W = (leaf.detach() for leaf in problem.leaves[:2])
    for target in problem.constants:
        x = x[target != IGNORE_INDEX]
    z, dx, dW = x.new_empty(len(x), len(W)), torch.empty_like(x), torch.empty_like(W)

    def run() -> None:
        torch.mm(x, W.T, out=z)
        if with_backward:
            torch.mm(z, W, out=dx)
            torch.mm(z.T, x, out=dW)

    return run


def prepare_distillation(problem: Problem) -> Callable[[], object]:
    """Returns a call of `prepare_products` of the student, and of the teacher's one product."""
    student = prepare_products(replace(problem, constants=()))
    teacher = prepare_products(Problem(problem.constants), with_backward=False)
    return lambda: (student(), teacher())


def prepare_copy(problem: Problem) -> Callable[[], object]:
    """Returns a copy of half the bytes that the work reads and writes, so that it moves as many."""
    upstream = problem.upstream or ()
    output = upstream  # the output has the same shape
    tensors = (*problem.args, *upstream, *output, *problem.leaves)  # the last for the gradients
    half = sum(x.nbytes for x in tensors) // 2
    source = torch.zeros(half // 8, dtype=torch.int64, device=problem.args[0].device)
    return functools.partial(torch.empty_like(source).copy_, source)


THREE_PRODUCTS = Floor("the three matrix products into allocated memory", prepare_products)
ONE_PRODUCT = Floor(
    "the matrix product into allocated memory",
    functools.partial(prepare_products, with_backward=False),
)
FOUR_PRODUCTS = Floor(
    "three matrix products of the student and one of the teacher into allocated memory",
    prepare_distillation,
)
COPY = Floor("a copy of the bytes of arguments, output and gradients", prepare_copy)


# Contenders


def import_on_call(module: str, name: str, **options: Any) -> Function:
    """Returns a function of another library, which is imported at the first call."""
    return lambda *args: getattr(importlib.import_module(module), name)(*args, **options)


def make_contenders(
    function: Function, eager: Function, materialises_logits: bool = False
) -> dict[str, Contender]:
    """Returns this library's function and PyTorch's, each eager and compiled.

    `materialises_logits` says whether PyTorch's function materialises the head's logits.
    """
    return {
        "ours": Contender(function),
        "eager": Contender(eager, materialises_logits=materialises_logits),
        "compile": Contender(eager, is_compiled=True, materialises_logits=materialises_logits),
        "ours compiled": Contender(function, is_compiled=True),
    }


def eager_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, W), t)


def chunked_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """Computes PyTorch's chunked head with its default chunks."""
    return F.linear_cross_entropy(x, W, t, options=torch.nn.LinearCrossEntropyOptions())


def head_none_ignored(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t.clamp(min=0))


# Values that are usual in training language models
SOFTCAP, Z_LOSS, ENTROPY_BONUS = 30.0, 1e-4, 0.01


def capped_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, softcap=SOFTCAP, z_loss=Z_LOSS)


def eager_capped_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    z = SOFTCAP * torch.tanh(F.linear(x, W) / SOFTCAP)
    return F.cross_entropy(z, t) + Z_LOSS * z.logsumexp(-1).square().mean()


def policy_loss(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    """Computes a policy-gradient loss with an entropy bonus."""
    log_probs, entropy = functional.linear_log_probs(x, W, t, return_entropy=True)
    return -(advantages * log_probs).mean() - ENTROPY_BONUS * entropy.mean()


def eager_policy_loss(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    l = F.log_softmax(F.linear(x, W), -1)
    log_probs, entropy = l.gather(-1, t[:, None])[:, 0], -(l.exp() * l).sum(-1)
    return -(advantages * log_probs).mean() - ENTROPY_BONUS * entropy.mean()


def weighted_head(x: Tensor, W: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, row_weight=r, reduction="sum")


def eager_weighted_head(x: Tensor, W: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return (r * F.cross_entropy(F.linear(x, W), t, reduction="none")).sum()


def unweighted_head(x: Tensor, W: Tensor, t: Tensor, _: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, W, t, reduction="sum")


def weighted_row_losses(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    """Computes the policy-gradient loss without the bonus, from the head's unreduced losses."""
    return (advantages * functional.linear_cross_entropy(x, W, t, reduction="none")).mean()


def eager_kl_div(x: Tensor, W: Tensor, xt: Tensor, Wt: Tensor) -> Tensor:
    l, lt = (F.log_softmax(F.linear(*v), -1) for v in ((x, W), (xt, Wt)))
    return F.kl_div(l, lt, reduction="batchmean", log_target=True)


LIGER = "liger_kernel.transformers.functional"
HEAD_CONTENDERS = {
    **make_contenders(functional.linear_cross_entropy, eager_head, materialises_logits=True),
    "chunked": Contender(chunked_head),
    "Liger": Contender(import_on_call(LIGER, "liger_fused_linear_cross_entropy")),
    "CCE": Contender(import_on_call("cut_cross_entropy", "linear_cross_entropy")),
    "QuACK": Contender(
        import_on_call("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    ),
}

# Works

COMPILED_TARGET = Target(1.05, "compile", contender="ours compiled")

head = Work(
    "head",
    "linear, softmax and cross entropy",
    ("ROWS", "FEATURES", "CLASSES"),
    draw_head,
    HEAD_CONTENDERS,
    sizes=((1024, 512, 32000), (1024, 256, 50257)),
    cuda_sizes=((4096, 4096, 128256),),
    floor=THREE_PRODUCTS,
    targets=(
        Target(1.10, "floor"),
        Target(0.85, "eager"),
        Target(0.50, "chunked"),
        Target(1.00, "compile"),
        COMPILED_TARGET,
    ),
    measures_memory=True,
)
small_head = replace(head, sizes=head.sizes[:1])
heads = (
    head,
    replace(
        small_head,
        name="head-bfloat16",
        dtype=torch.bfloat16,
        targets=(Target(0.95, "eager"), Target(1.00, "eager", kind="error")),
    ),
    replace(
        small_head,
        name="head-ignored",
        description="the head with half of the rows ignored",
        draw_inputs=draw_head_half_ignored,
        contenders={
            **HEAD_CONTENDERS,
            "none ignored": Contender(head_none_ignored, is_equivalent=False),
        },
        targets=(Target(0.60, "none ignored"),),
    ),
    replace(
        small_head,
        name="head-capped",
        description="the head with soft cap and z-loss; plain: without",
        contenders={
            **make_contenders(capped_head, eager_capped_head, materialises_logits=True),
            "plain": Contender(functional.linear_cross_entropy, is_equivalent=False),
            "Liger": Contender(
                import_on_call(
                    LIGER,
                    "liger_fused_linear_cross_entropy",
                    softcap=SOFTCAP,
                    lse_square_scale=Z_LOSS,
                )
            ),
        },
        targets=(Target(1.10, "plain"), Target(1.10, "plain", kind="memory")),
    ),
    replace(
        small_head,
        name="head-policy",
        description="a policy gradient with entropy bonus; plain: the weighted losses of the rows",
        draw_inputs=draw_head_and_advantages,
        contenders={
            **make_contenders(policy_loss, eager_policy_loss, materialises_logits=True),
            "plain": Contender(weighted_row_losses, is_equivalent=False),
        },
        floor=None,
        targets=(Target(1.10, "plain"), Target(1.10, "plain", kind="memory")),
    ),
    replace(
        small_head,
        name="row_weight",
        description="the head with a weight for each row; plain: without",
        draw_inputs=draw_head_and_advantages,
        contenders={
            **make_contenders(weighted_head, eager_weighted_head, materialises_logits=True),
            "plain": Contender(unweighted_head, is_equivalent=False),
        },
        targets=(Target(1.03, "plain"), Target(1.05, "plain", kind="memory")),
    ),
    replace(
        head,
        name="head-forward",
        description="the head without gradients",
        mode=forward,
        floor=ONE_PRODUCT,
        targets=(Target(1.15, "floor"),),
    ),
    replace(
        head,
        name="head-second",
        description="a Hessian-vector product of the head",
        draw_inputs=draw_head_and_vector,
        mode=hessian_vector_product,
        # Compiled functions and PyTorch's chunked head have no second derivative.
        contenders={name: HEAD_CONTENDERS[name] for name in ("ours", "eager")},
        sizes=((1024, 256, 16000),),
        cuda_sizes=((4096, 1024, 32000),),
        floor=None,
        targets=(Target(1.00, "eager"),),
    ),
    replace(
        head,
        name="head-memory",
        description="the peak memory of the head, without times",
        sizes=((4096, 256, 32000), (16384, 256, 32000)),
        cuda_sizes=(),
        floor=None,
        targets=(Target(128, kind="peak", size=(4096, 256, 32000)), Target(8, kind="growth")),
        round_limits=(0, 0),
        measures_error=False,
    ),
)
distillation = replace(
    head,
    name="distillation",
    description="the divergence of a frozen teacher's head from a student's",
    axes=("ROWS", "FEATURES", "TEACHER_FEATURES", "CLASSES"),
    draw_inputs=draw_two_heads,
    contenders={
        **make_contenders(functional.linear_kl_div, eager_kl_div, materialises_logits=True),
        "ours, Jensen-Shannon": Contender(functional.linear_jsd, is_equivalent=False),
    },
    sizes=((1024, 512, 1024, 32000),),
    cuda_sizes=((4096, 2048, 4096, 128256),),
    floor=FOUR_PRODUCTS,
    targets=(
        Target(1.25, "floor"),
        Target(1.25, "floor", contender="ours, Jensen-Shannon"),
        Target(1.00, "eager"),
    ),
)
scaling = replace(
    head,
    name="scaling",
    description="the head for growing rows and growing classes, with a figure of its own",
    contenders={name: HEAD_CONTENDERS[name] for name in ("ours", "eager", "compile", "chunked")},
    sizes=(
        *((512 << i, 256, 32000) for i in range(6)),
        *((1024, 128, 2048 << i) for i in range(8)),
    ),
    cuda_sizes=(),
    floor=None,
    targets=(),
    round_limits=(3, 3),
    measures_error=False,
)
cross_entropy = Work(
    "cross_entropy",
    "softmax and cross entropy on logits",
    ("ROWS", "CLASSES"),
    draw_logits,
    {
        **make_contenders(functional.cross_entropy, F.cross_entropy),
        "Liger": Contender(import_on_call(LIGER, "liger_cross_entropy"), overwrites_arguments=True),
        "QuACK": Contender(import_on_call("quack.cross_entropy", "cross_entropy")),
    },
    sizes=((2048, 32000), (8192, 1000), (65536, 10)),
    cuda_sizes=((8192, 32000), (8192, 128256)),
    floor=COPY,
    targets=(
        Target(0.50, "eager", size=(2048, 32000)),
        Target(0.90, "eager", size=(8192, 1000)),
        Target(1.00, "eager", size=(65536, 10)),
        Target(1.00, "compile", size=(2048, 32000)),
        COMPILED_TARGET,
    ),
    measures_memory=True,
)
linear = Work(
    "linear",
    "an affine map",
    ("ROWS", "IN", "OUT"),
    draw_layer,
    make_contenders(functional.linear, F.linear),
    sizes=((4096, 1024, 1024),),
    cuda_sizes=((8192, 4096, 4096),),
    floor=THREE_PRODUCTS,
    targets=(Target(1.10, "eager"), COMPILED_TARGET),
)
sigmoid = Work(
    "sigmoid",
    "elementwise",
    ("ROWS", "COLUMNS"),
    draw_elements,
    make_contenders(functional.sigmoid, torch.sigmoid),
    sizes=((4096, 1024),),
    cuda_sizes=((8192, 8192),),
    floor=COPY,
    targets=(Target(1.25, "eager"), COMPILED_TARGET),
)
tanh = replace(sigmoid, name="tanh", contenders=make_contenders(functional.tanh, torch.tanh))
relu = replace(sigmoid, name="relu", contenders=make_contenders(functional.relu, F.relu))
softmax = replace(
    sigmoid,
    name="softmax",
    description="over each row",
    contenders=make_contenders(lambda z: functional.softmax(z, -1), lambda z: F.softmax(z, -1)),
)
mse_loss = replace(
    sigmoid,
    name="mse_loss",
    description="squared error, the mean over all elements",
    draw_inputs=draw_elements_and_targets,
    contenders=make_contenders(functional.mse_loss, F.mse_loss),
)
sigmoid_squared_error = replace(
    mse_loss,
    name="sigmoid_squared_error",
    description="sigmoid and squared error, two calls in PyTorch",
    contenders=make_contenders(
        functional.sigmoid_squared_error,
        lambda z, t: F.mse_loss(torch.sigmoid(z), t, reduction="sum") / (2 * len(z)),
    ),
    targets=(Target(0.70, "eager"), COMPILED_TARGET),
)
elementwise = (sigmoid, tanh, softmax, relu, mse_loss)


def make_fixed(work: Work, target: Target, size: Size | None = None) -> Work:
    return replace(
        work,
        name=f"fixed/{work.name}",
        description=f"{work.name} at a size where fixed costs dominate",
        contenders={name: work.contenders[name] for name in ("ours", "eager")},
        sizes=(size or (64,) * len(work.axes),),
        cuda_sizes=(),
        floor=None,
        targets=(target,),
    )


fixed = (
    *(
        make_fixed(work, Target(microseconds, "eager", kind="difference"))
        for work, microseconds in (
            *((work, 15) for work in (sigmoid, tanh, softmax, relu)),
            (mse_loss, 40),
            (sigmoid_squared_error, 50),
            (linear, 20),
        )
    ),
    make_fixed(cross_entropy, Target(2.0, "eager"), (64, 10)),
    Work(
        "fixed/step",
        "a training step of a network with one hidden layer; modules: with PyTorch's loss",
        ("ROWS", "IN", "HIDDEN", "CLASSES"),
        draw_network,
        make_step_contenders(make_hidden_layer),
        sizes=((32, 64, 32, 10),),
        cuda_sizes=(),
        targets=(Target(1.6, "eager"), Target(1.1, "modules", contender="swapped")),
        is_training_step=True,
    ),
)
convolutions = Work(
    "convolutions",
    "a training step of a small convolutional network; modules: with PyTorch's loss",
    ("ROWS", "WIDTH", "CHANNELS", "CLASSES"),
    draw_images,
    make_step_contenders(make_convolutions),
    sizes=((16, 32, 32, 10),),
    cuda_sizes=(),
    targets=(Target(1.05, "eager"), Target(1.05, "eager", contender="swapped")),
    is_training_step=True,
)
WORKS = {
    work.name: work
    for work in (
        *heads,
        distillation,
        cross_entropy,
        sigmoid_squared_error,
        *elementwise,
        linear,
        convolutions,
        *fixed,
        scaling,
    )
}


def select_works(names: Sequence[str]) -> list[Work]:
    """Returns the works of these names, or all but scaling if there are no names.

    "fixed" selects every work of that group. Raises ValueError for an unknown name.
    """
    groups = {name: name.split("/")[0] for name in WORKS}
    for name in names:
        if name not in groups and name not in groups.values():
            known_names = ", ".join([*WORKS, "fixed"])
            raise ValueError(f"there is no work {name!r}; the works are {known_names}")
    names = names or [name for name in WORKS if name != "scaling"]
    return [work for name, work in WORKS.items() if name in names or groups[name] in names]
