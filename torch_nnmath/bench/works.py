"""What is measured: the works, their contenders, floors, sizes and targets."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nnmath import functional as ours

Size = tuple[int, ...]
Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]

IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """Arguments, those with a gradient first, and the upstream gradient if the output is no scalar.

    Of a second derivative the upstream gradient is the direction: a tensor for each leaf.
    """

    leaves: Results
    others: Results = ()
    upstream: Results | None = None

    @property
    def args(self) -> Results:
        return self.leaves + self.others

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """The same numbers in memory of their own."""

        def copied(x: Tensor) -> Tensor:
            to = dtype if x.is_floating_point() else None
            return x.detach().to(to or x.dtype, copy=True).requires_grad_(x.requires_grad)

        each = (self.leaves, self.others, self.upstream or ())
        leaves, others, upstream = (tuple(map(copied, tensors)) for tensors in each)
        return Problem(leaves, others, upstream or None)


class Draw:
    """Random tensors, always the same."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        generator, dtype, device = self.generator, self.dtype, self.device
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def classes(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), generator=self.generator, device=self.device)


# A run returns the value, then what is differentiated. Gradients are asked for with
# `autograd.grad`, since adding them up in `.grad` would be timed too.


def both(function: Function, problem: Problem) -> Results:
    """Forward and backward."""
    value = function(*problem.args)
    return value.detach(), *torch.autograd.grad(value, problem.leaves, problem.upstream)


def forward(function: Function, problem: Problem) -> Results:
    """Forward alone, without a graph."""
    with torch.no_grad():
        return (function(*problem.args),)


def hessian_vector(function: Function, problem: Problem) -> Results:
    """A Hessian-vector product by double backward."""
    value, leaves = function(*problem.args), problem.leaves
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    return value.detach(), *torch.autograd.grad(gradients, leaves, problem.upstream)


@dataclass(frozen=True)
class Contender:
    """One way to compute a work."""

    function: Function
    compiled: bool = False
    logits: bool = False  # holds all of the head's logits
    overwrites: bool = False  # writes to its arguments, so that it needs its own
    same: bool = True  # computes what the others compute


@dataclass(frozen=True)
class Floor:
    """What the machine needs for the least that the work must do."""

    what: str
    prepared: Callable[[Problem], Callable[[], object]]


@dataclass(frozen=True)
class Target:
    """A number to be reached: at most `limit`, by `of` compared with `over`.

    "time", "memory" (of peaks) and "error" are ratios, "difference" is in µs, "peak" and "growth"
    (of the peak, from the first size to the last) in MiB. Without a size it holds at each.
    """

    limit: float
    over: str = ""
    of: str = "ours"
    kind: Literal["time", "memory", "error", "difference", "peak", "growth"] = "time"
    size: Size | None = None

    def __str__(self) -> str:
        return {
            "time": f"{self.of} / {self.over}",
            "memory": f"peak of {self.of} / of {self.over}",
            "error": f"error of {self.of} / of {self.over}",
            "difference": f"{self.of} - {self.over}, µs",
            "peak": f"peak of {self.of}, MiB",
            "growth": f"peak of {self.of}, MiB more than at the first size",
        }[self.kind]


@dataclass(frozen=True)
class Work:
    """A computation, and who competes in it. Of `rounds` there are at least and at most so many."""

    name: str
    about: str
    axes: tuple[str, ...]
    draw: Callable[..., Problem]  # of a Draw and the size's numbers
    contenders: Mapping[str, Contender]
    sizes: tuple[Size, ...]
    cuda_sizes: tuple[Size, ...]
    floor: Floor | None = None
    targets: tuple[Target, ...] = ()
    mode: Callable[[Function, Problem], Results] = both
    dtype: torch.dtype = torch.float32
    rounds: tuple[int, int] = (5, 101)
    error: bool = True
    memory: bool = False

    def drawn(self, size: Size, dtype: torch.dtype, device: str) -> Problem:
        """Its arguments."""
        problem = self.draw(Draw(dtype, device), *size)
        for x in problem.leaves:
            x.requires_grad_()
        return problem

    def prepared(self, name: str, problem: Problem) -> Callable[[], Results]:
        """A contender, ready to be called again and again."""
        contender = self.contenders[name]
        function = contender.function
        if contender.compiled:
            function = torch.compile(function)
        problem = problem.copy() if contender.overwrites else problem
        return functools.partial(self.mode, function, problem)

    def size(self, text: str) -> Size:
        """Reads 1024x512; a ValueError says what a size looks like."""
        numbers = text.split("x")
        if len(numbers) != len(self.axes) or not all(n.isdecimal() and int(n) for n in numbers):
            like = f"{'x'.join(self.axes)}, such as {written(self.sizes[0])}"
            raise ValueError(f"a size of {self.name} is {like}, not {text!r}")
        return tuple(map(int, numbers))


def written(size: Size) -> str:
    """1024x512."""
    return "x".join(map(str, size))


def name_of(dtype: torch.dtype) -> str:
    """float32."""
    return str(dtype).removeprefix("torch.")


def head_problem(draw: Draw, rows: int, features: int, classes: int) -> Problem:
    x, W = draw.normal(rows, features), draw.normal(classes, features) / features**0.5
    return Problem((x, W), (draw.classes(rows, classes),))


def half_ignored(draw: Draw, rows: int, features: int, classes: int) -> Problem:
    problem = head_problem(draw, rows, features, classes)
    problem.others[0][draw.normal(rows).argsort()[::2]] = IGNORED
    return problem


def head_and_direction(draw: Draw, rows: int, features: int, classes: int) -> Problem:
    direction = draw.normal(rows, features), draw.normal(classes, features)
    return replace(head_problem(draw, rows, features, classes), upstream=direction)


def logits(draw: Draw, rows: int, classes: int) -> Problem:
    return Problem((draw.normal(rows, classes),), (draw.classes(rows, classes),))


def elements(draw: Draw, *shape: int) -> Problem:
    return Problem((draw.normal(*shape),), upstream=(draw.normal(*shape),))


def elements_and_targets(draw: Draw, *shape: int) -> Problem:
    return Problem((draw.normal(*shape),), (draw.normal(*shape).sigmoid(),))


def layer(draw: Draw, rows: int, inward: int, outward: int) -> Problem:
    W = draw.normal(outward, inward) / inward**0.5
    leaves = draw.normal(rows, inward), W, draw.normal(outward)
    return Problem(leaves, upstream=(draw.normal(rows, outward),))


def products(problem: Problem, backward: bool = True) -> Callable[[], object]:
    """z = x Wᵀ, then dx = z W and dW = zᵀ x: z stands for its gradient, which has its shape."""
    x, W = (leaf.detach() for leaf in problem.leaves[:2])
    for t in problem.others:
        x = x[t != IGNORED]
    z, dx, dW = x.new_empty(len(x), len(W)), torch.empty_like(x), torch.empty_like(W)

    def run() -> None:
        torch.mm(x, W.T, out=z)
        if backward:
            torch.mm(z, W, out=dx)
            torch.mm(z.T, x, out=dW)

    return run


def copy(problem: Problem) -> Callable[[], object]:
    """Reads and writes as many bytes as there are in what the work reads and writes."""
    upstream = problem.upstream or ()  # the output is as large
    touched = (*problem.args, *upstream, *upstream, *problem.leaves)
    half = sum(x.nbytes for x in touched) // 2
    source = torch.zeros(half // 8, dtype=torch.int64, device=problem.args[0].device)
    return functools.partial(torch.empty_like(source).copy_, source)


THREE_PRODUCTS = Floor("its three matrix products into existing memory", products)
ONE_PRODUCT = Floor("its matrix product into existing memory", lambda p: products(p, False))
COPY = Floor("a copy of as many bytes as arguments, output and gradients have", copy)


def installed(module: str, name: str, **options: Any) -> Function:
    """Another library's function, looked for when it is called."""
    return lambda *args: getattr(importlib.import_module(module), name)(*args, **options)


def pair(mine: Function, eager: Function, logits: bool = False) -> dict[str, Contender]:
    """Ours and PyTorch's, as they are and compiled."""
    return {
        "ours": Contender(mine),
        "eager": Contender(eager, logits=logits),
        "compile": Contender(eager, compiled=True, logits=logits),
        "ours compiled": Contender(mine, compiled=True),
    }


def plain_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, W), t)


def chunked_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """PyTorch's own in chunks; it chooses small ones by itself."""
    return F.linear_cross_entropy(x, W, t, options=torch.nn.LinearCrossEntropyOptions())


def none_ignored(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return ours.linear_cross_entropy(x, W, t.clamp(min=0))


def head_and_advantages(draw: Draw, rows: int, features: int, classes: int) -> Problem:
    problem = head_problem(draw, rows, features, classes)
    return replace(problem, others=(*problem.others, draw.normal(rows)))


CAP, Z_LOSS, BONUS = 30.0, 1e-4, 0.01  # as those who train language models choose them


def capped_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return ours.linear_cross_entropy(x, W, t, softcap=CAP, z_loss=Z_LOSS)


def plain_capped_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    z = CAP * torch.tanh(F.linear(x, W) / CAP)
    return F.cross_entropy(z, t) + Z_LOSS * z.logsumexp(-1).square().mean()


def policy(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    """The loss of a policy gradient with an entropy bonus."""
    log_probs, entropy = ours.linear_log_probs(x, W, t, return_entropy=True)
    return -(advantages * log_probs).mean() - BONUS * entropy.mean()


def plain_policy(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    l = F.log_softmax(F.linear(x, W), -1)
    log_probs, entropy = l.gather(-1, t[:, None])[:, 0], -(l.exp() * l).sum(-1)
    return -(advantages * log_probs).mean() - BONUS * entropy.mean()


def loss_of_rows(x: Tensor, W: Tensor, t: Tensor, advantages: Tensor) -> Tensor:
    return (advantages * ours.linear_cross_entropy(x, W, t, reduction="none")).mean()


LIGER = "liger_kernel.transformers.functional"
HEADS = {
    **pair(ours.linear_cross_entropy, plain_head, logits=True),
    "chunked": Contender(chunked_head),
    "Liger": Contender(installed(LIGER, "liger_fused_linear_cross_entropy")),
    "CCE": Contender(installed("cut_cross_entropy", "linear_cross_entropy")),
    "QuACK": Contender(installed("quack.linear_cross_entropy", "chunked_linear_cross_entropy")),
}
COMPILED = Target(1.05, "compile", of="ours compiled")

head = Work(
    "head",
    "linear, softmax and cross entropy",
    ("ROWS", "FEATURES", "CLASSES"),
    head_problem,
    HEADS,
    sizes=((1024, 512, 32000), (1024, 256, 50257)),
    cuda_sizes=((4096, 4096, 128256),),
    floor=THREE_PRODUCTS,
    targets=(
        *(Target(1.10, "floor"), Target(0.85, "eager"), Target(0.50, "chunked")),
        *(Target(1.00, "compile"), COMPILED),
    ),
    memory=True,
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
        about="the head where half of the rows are ignored",
        draw=half_ignored,
        contenders={**HEADS, "none ignored": Contender(none_ignored, same=False)},
        targets=(Target(0.60, "none ignored"),),
    ),
    replace(
        small_head,
        name="head-capped",
        about="the head with soft-cap and z-loss",
        contenders={
            **pair(capped_head, plain_capped_head, logits=True),
            "plain": Contender(ours.linear_cross_entropy, same=False),
            "Liger": Contender(
                installed(
                    LIGER,
                    "liger_fused_linear_cross_entropy",
                    softcap=CAP,
                    lse_square_scale=Z_LOSS,
                )
            ),
        },
        targets=(Target(1.10, "plain"), Target(1.10, "plain", kind="memory")),
    ),
    replace(
        small_head,
        name="head-policy",
        about="a policy gradient by log-probabilities and entropy; plain: the losses of the rows",
        draw=head_and_advantages,
        contenders={
            **pair(policy, plain_policy, logits=True),
            "plain": Contender(loss_of_rows, same=False),
        },
        floor=None,
        targets=(Target(1.10, "plain"), Target(1.10, "plain", kind="memory")),
    ),
    replace(
        head,
        name="head-forward",
        about="the head without gradients",
        mode=forward,
        floor=ONE_PRODUCT,
        targets=(Target(1.15, "floor"),),
    ),
    replace(
        head,
        name="head-second",
        about="a Hessian-vector product of the head",
        draw=head_and_direction,
        mode=hessian_vector,
        # of what is compiled or in PyTorch's chunks there is no second derivative
        contenders={name: HEADS[name] for name in ("ours", "eager")},
        sizes=((1024, 256, 16000),),
        cuda_sizes=((4096, 1024, 32000),),
        floor=None,
        targets=(Target(1.00, "eager"),),
    ),
    replace(
        head,
        name="head-memory",
        about="peak memory alone of the head",
        sizes=((4096, 256, 32000), (16384, 256, 32000)),
        cuda_sizes=(),
        floor=None,
        targets=(Target(128, kind="peak", size=(4096, 256, 32000)), Target(8, kind="growth")),
        rounds=(0, 0),
        error=False,
    ),
)
scaling = replace(
    head,
    name="scaling",
    about="the head by rows and by classes, for the picture",
    contenders={name: HEADS[name] for name in ("ours", "eager", "compile", "chunked")},
    sizes=(
        *((512 << i, 256, 32000) for i in range(6)),
        *((1024, 128, 2048 << i) for i in range(8)),
    ),
    cuda_sizes=(),
    floor=None,
    targets=(),
    rounds=(3, 3),
    error=False,
)
cross_entropy = Work(
    "cross_entropy",
    "softmax and cross entropy on logits",
    ("ROWS", "CLASSES"),
    logits,
    {
        **pair(ours.cross_entropy, F.cross_entropy),
        "Liger": Contender(installed(LIGER, "liger_cross_entropy"), overwrites=True),
        "QuACK": Contender(installed("quack.cross_entropy", "cross_entropy")),
    },
    sizes=((2048, 32000), (8192, 1000), (65536, 10)),
    cuda_sizes=((8192, 32000), (8192, 128256)),
    floor=COPY,
    targets=(
        Target(0.50, "eager", size=(2048, 32000)),
        Target(0.90, "eager", size=(8192, 1000)),
        Target(1.00, "eager", size=(65536, 10)),
        Target(1.00, "compile", size=(2048, 32000)),
        COMPILED,
    ),
    memory=True,
)
linear = Work(
    "linear",
    "an affine map",
    ("ROWS", "IN", "OUT"),
    layer,
    pair(ours.linear, F.linear),
    sizes=((4096, 1024, 1024),),
    cuda_sizes=((8192, 4096, 4096),),
    floor=THREE_PRODUCTS,
    targets=(Target(1.10, "eager"), COMPILED),
)
sigmoid = Work(
    "sigmoid",
    "elementwise",
    ("ROWS", "COLUMNS"),
    elements,
    pair(ours.sigmoid, torch.sigmoid),
    sizes=((4096, 1024),),
    cuda_sizes=((8192, 8192),),
    floor=COPY,
    targets=(Target(1.25, "eager"), COMPILED),
)
tanh = replace(sigmoid, name="tanh", contenders=pair(ours.tanh, torch.tanh))
relu = replace(sigmoid, name="relu", contenders=pair(ours.relu, F.relu))
softmax = replace(
    sigmoid,
    name="softmax",
    about="by rows",
    contenders=pair(lambda z: ours.softmax(z, -1), lambda z: F.softmax(z, -1)),
)
mse_loss = replace(
    sigmoid,
    name="mse_loss",
    about="squared error, the mean over all elements",
    draw=elements_and_targets,
    contenders=pair(ours.mse_loss, F.mse_loss),
)
sigmoid_squared_error = replace(
    mse_loss,
    name="sigmoid_squared_error",
    about="sigmoid and squared error, in PyTorch two calls",
    contenders=pair(
        ours.sigmoid_squared_error,
        lambda z, t: F.mse_loss(torch.sigmoid(z), t, reduction="sum") / (2 * len(z)),
    ),
    targets=(Target(0.70, "eager"), COMPILED),
)
by_element = (sigmoid, tanh, softmax, relu, mse_loss)
fixed = tuple(
    replace(
        work,
        name=f"fixed/{work.name}",
        about=f"{work.name} where there is hardly more than its fixed cost",
        contenders={name: work.contenders[name] for name in ("ours", "eager")},
        sizes=((64,) * len(work.axes),),
        cuda_sizes=(),
        floor=None,
        targets=(Target(25, "eager", kind="difference"),),
    )
    for work in (*by_element, linear, cross_entropy)
)
WORKS = {
    work.name: work
    for work in (*heads, cross_entropy, sigmoid_squared_error, *by_element, linear, *fixed, scaling)
}


def chosen(names: list[str]) -> list[Work]:
    """The works of these names, of which "fixed" is several; without a name all but scaling."""
    groups = {name: name.split("/")[0] for name in WORKS}
    for name in names:
        if name not in groups and name not in groups.values():
            raise ValueError(f"there is no work {name!r}, but {', '.join([*WORKS, 'fixed'])}")
    names = names or [name for name in WORKS if name != "scaling"]
    return [work for name, work in WORKS.items() if name in names or groups[name] in names]
