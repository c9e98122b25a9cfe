"""Every public function on random shapes, options, dtypes and strides against plain PyTorch.

In float64, value and derivatives of every order and mode are those of an expression that is
written out here or in `truth.py`. In other dtypes value and gradients have to be about as exact as
that expression (see `tolerance.py`). `test_precision.py` bounds the error of every element.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import limit_head_blocks
from hypothesis import strategies as st
from random_arguments import (
    BASES,
    F64,
    REDUCTIONS,
    ROW_COUNTS,
    SIZES,
    RandomArguments,
    run_examples,
)
from tolerance import find_errors
from torch import Tensor

import torch_nnmath.functional as ours

pytestmark = [
    pytest.mark.usefixtures("one_thread", "new_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:Using a target size"),  # of mse_loss where it broadcasts
]
DTYPES = (F64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """A public function of the tensors that may require gradients, and its plain equivalent."""

    inputs: dict[str, Tensor]
    compute: Callable[..., Tensor]
    compute_expected: Callable[..., Tensor]
    block_bytes: int | None = None
    cancellation: float = 0.0  # error of float32 where terms cancel, which may be PyTorch's 0

    def limit_blocks(self) -> Any:
        if self.block_bytes is None:
            return contextlib.nullcontext()
        return limit_head_blocks(self.block_bytes)


# One function draws the arguments of each public function


def draw_linear(a: RandomArguments) -> Call:
    features, outputs, is_matrix = a.choose(*SIZES), a.choose(*SIZES), a.choose(True, True, False)
    inputs = {
        "input": a.tensor(*a.choose_shape(0, 2), features),
        "weight": a.tensor(*[outputs] * is_matrix, features),
    }
    if a.choose(True, False):
        inputs["bias"] = a.tensor(*[outputs] * is_matrix)

    def compute_expected(x, W, b=None):
        z = x @ W.mT if is_matrix else x @ W
        return z if b is None else z + b

    return Call(inputs, ours.linear, compute_expected)


def make_elementwise(f: Any, plain: Any) -> Callable[[RandomArguments], Call]:
    def draw(a: RandomArguments) -> Call:
        return Call({"input": a.tensor(*a.choose_shape(), may_be_large=True)}, f, plain)

    return draw


def compute_relu_in_place(x: Tensor) -> Tensor:
    return ours.relu(x.clone(), inplace=True)


def compute_relu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, 0)


def draw_softmax(a: RandomArguments) -> Call:
    shape = a.choose_shape()
    dim, dtype = a.choose_dim(len(shape)), a.choose(None, F64)
    return Call(
        {"input": a.tensor(*shape, may_be_large=True)},
        lambda z: ours.softmax(z, dim, dtype=dtype),
        lambda z: truth.softmax(z if dtype is None else z.to(dtype), dim),
    )


def draw_softmax_jacobian(a: RandomArguments) -> Call:
    shape = a.choose_shape(1)
    dim = a.choose_dim(len(shape))

    def compute_expected(z):
        p = torch.softmax(z, dim).movedim(dim, -1)
        return p.unsqueeze(-1) * (torch.eye(p.shape[-1], dtype=p.dtype) - p.unsqueeze(-2))

    inputs = {"input": a.tensor(*shape, may_be_large=True)}
    return Call(inputs, lambda z: ours.softmax_jacobian(z, dim), compute_expected)


def draw_mse_loss(a: RandomArguments) -> Call:
    shape, reduction = a.choose_shape(), a.choose(*REDUCTIONS)
    shapes = shape, shape
    if shape and a.choose(False, True):  # broadcasting, either way
        narrow = tuple(a.choose(size, 1) for size in shape)[a.draw(st.integers(0, len(shape))) :]
        shapes = a.choose((shape, narrow), (narrow, shape))
    inputs = {"input": a.tensor(*shapes[0]), "target": a.tensor(*shapes[1])}
    if a.choose(False, True):
        inputs["weight"] = a.positive(*shapes[0])

    def compute_expected(x, t, w=None):
        c = (x - t).square()
        count = c.numel() if w is None else w.sum()
        return truth.reduce_losses(c if w is None else c * w, reduction, count)

    return Call(
        inputs,
        lambda x, t, w=None: ours.mse_loss(x, t, reduction=reduction, weight=w),
        compute_expected,
    )


def make_per_example(f: Any, activation: Any) -> Callable[[RandomArguments], Call]:
    """Draws for squared_error, which has no activation, or with a sigmoid before it."""

    def draw(a: RandomArguments) -> Call:
        shape, reduction = a.choose_shape(), a.choose(*REDUCTIONS)
        axes = a.draw(st.sets(st.integers(0, len(shape) - 1))) if shape else set()
        dim: Any = tuple(axis - a.choose(0, len(shape)) for axis in axes)
        if shape and len(dim) == 1 and a.choose(True, False):
            dim = dim[0]
        elif not shape and a.choose(True, False):
            dim = -1

        def compute_expected(x, t):
            c = (activation(x) - t).square()
            c = (c.sum(tuple(axes)) if axes else c) / 2
            return truth.reduce_losses(c, reduction, c.numel())

        return Call(
            {"input": a.tensor(*shape, may_be_large=True), "target": a.tensor(*shape)},
            lambda x, t: f(x, t, reduction=reduction, dim=dim),
            compute_expected,
        )

    return draw


def draw_categorical_cross_entropy(a: RandomArguments) -> Call:
    shape = a.choose_shape()
    dim = a.choose_dim(len(shape))
    base, reduction, has_indices = a.choose(*BASES), a.choose(*REDUCTIONS), a.choose(False, True)
    inputs, y = {"probs": a.positive(*shape)}, None
    rows = inputs["probs"].sum(dim).shape
    if has_indices and shape and shape[dim]:
        y = a.indices(rows, shape[dim])
    else:
        inputs["target"] = a.positive(*shape)
    if math.prod(rows) > 1 and a.choose(False, True):
        inputs["row_weight"] = a.positive(*rows)
    names = tuple(inputs)

    def compute_expected(*xs):
        tensors = dict(zip(names, xs, strict=True))
        l, t, r = tensors["probs"].log(), tensors.get("target"), tensors.get("row_weight")
        c = l.gather(dim, y.unsqueeze(dim)).squeeze(dim) if t is None else (t * l).sum(dim)
        c, n = (c, c.numel()) if r is None else (r * c, r.sum())
        return truth.reduce_losses(-c / math.log(base), reduction, n)

    def compute(*xs):
        tensors = {"target": y} | dict(zip(names, xs, strict=True))
        return ours.categorical_cross_entropy(base=base, reduction=reduction, dim=dim, **tensors)

    return Call(inputs, compute, compute_expected)


class CrossEntropyOptions:
    """What cross_entropy and the head have in common.

    `inputs` has the class weights and the target of probabilities that were drawn, if any;
    `y` the class indices otherwise.
    """

    def __init__(self, a: RandomArguments, rows: Sequence[int], C: int, class_dim: int):
        self.y: Tensor | None = None
        self.inputs: dict[str, Tensor] = {}
        self.ignore_index = -100
        if a.choose(True, False):
            self.draw_indices(a, rows, C)
        else:
            t = a.uniform(*rows, C)
            kind = a.choose("any", "probabilities", "with zeros")
            if kind == "probabilities":
                t = t / t.sum(-1, keepdim=True)
            elif kind == "with zeros":
                t = t.masked_fill(a.uniform(*rows, C) < 0.5, 0)
            self.inputs["target"] = a.lay_out(t.movedim(-1, class_dim).to(a.dtype))
        reduction = a.choose(*REDUCTIONS)
        divisor = a.choose(None, None, 3, 0.7, "tensor") if reduction == "mean" else None
        divides_by_weight = reduction == "mean" and divisor is None
        # a mean over rows of one class does not depend on that class's weight
        may_have_weight = self.y is None or not divides_by_weight or self.count_classes() > 1
        if may_have_weight and a.choose(False, True):
            w = a.positive(C)
            has_zeros = not divides_by_weight and a.choose(False, False, True)
            self.inputs["weight"] = torch.zeros_like(w) if has_zeros else w
        # the mean of one row does not depend on its weight; one of signed weights cancels
        if not divides_by_weight:
            self.inputs |= {"row_weight": a.tensor(*rows)} if a.choose(False, True) else {}
        elif self.count_kept(rows) > 1 and a.choose(False, True):
            self.inputs["row_weight"] = a.positive(*rows)
        if divisor == "tensor":
            self.inputs["divisor"] = a.positive()
        self.named = {
            "reduction": reduction,
            "base": a.choose(*BASES),
            "label_smoothing": a.choose(0.0, 0.1, 1.0),
            "ignore_index": self.ignore_index,
        }
        if divisor is not None and divisor != "tensor":
            self.named["divisor"] = divisor

    def draw_indices(self, a: RandomArguments, rows: Sequence[int], C: int) -> None:
        y = a.indices(rows, C)
        ignored = a.choose(-100, 0, -1, 255, -(2**63))
        if a.choose(False, True):
            y.masked_fill_(a.uniform(*rows) < 0.4, ignored)
        if y.numel() and a.has_finite_mean:
            y.view(-1)[0] = C - 1 if ignored == 0 else 0
        is_byte_range = not ((y < 0) | (y > 255)).any()
        self.y = a.lay_out(y.to(torch.uint8) if is_byte_range and a.choose(False, True) else y)
        self.ignore_index = ignored
        if a.has_finite_mean and not self.count_kept(rows):
            self.ignore_index = -100

    def count_kept(self, rows: Sequence[int]) -> int:
        if self.y is None:
            return math.prod(rows)
        return int((self.y.long() != self.ignore_index).sum())

    def count_classes(self) -> int:
        """The number of different classes in the rows that count."""
        assert self.y is not None
        y = self.y.long()
        return len(y[y != self.ignore_index].unique())

    def get_target(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["target"] if self.y is None else self.y


def choose_class_count(a: RandomArguments) -> int:
    """A single class has the loss 0, relative to which no rounding error is small."""
    return a.choose(2, 3, 5, 17, *[1] * (a.dtype == F64))


def draw_cross_entropy(a: RandomArguments) -> Call:
    C, rows = choose_class_count(a), a.choose_shape()
    if rows and rows[0] > 5 and len(rows) > 1:
        C = min(C, 5)
    class_dim = 1 if rows else 0
    options = CrossEntropyOptions(a, rows, C, class_dim)
    z = a.tensor(*rows[:1], C, *rows[1:], may_be_large=True)
    return make_call({"input": z}, options, ours.cross_entropy, truth.cross_entropy)


def draw_linear_cross_entropy(a: RandomArguments) -> Call:
    C, D = choose_class_count(a), a.choose(2, 3, 1, 0, 5)
    kind = a.choose("rows", "K-dimensional", "vector", "N-dimensional")
    N = max(a.choose(*ROW_COUNTS), 1 if a.has_finite_mean else 0)
    batch: tuple[int, ...] = () if kind == "vector" else (N,)
    positions: tuple[int, ...] = ()
    if kind == "N-dimensional":
        batch = (a.choose(2, 1, 3), N)
    elif kind == "K-dimensional":
        positions = tuple(a.choose(2, 1, 3) for _ in range(a.choose(1, 2)))
    options = CrossEntropyOptions(a, (*batch, *positions), C, len(batch))
    if options.y is None or (options.ignore_index == -100 and a.choose(True, False)):
        options.named["ignore_index"] = None
    inputs = {
        "x": a.tensor(*batch, D, may_be_large=True),
        "W": a.tensor(C, *positions, D),
    }
    if a.choose(True, False):
        inputs["b"] = a.tensor(C, *positions)

    def compute(x, W, target, b=None, **named):
        return ours.linear_cross_entropy(x, W, target, linear_bias=b, **named)

    call = make_call(inputs, options, compute, truth.linear_cross_entropy)
    call.block_bytes = a.choose(1, 4 * C * 64, None, 1)
    return call


def make_call(inputs, options, compute, compute_expected) -> Call:
    inputs = inputs | options.inputs
    names = tuple(inputs)

    def bind(f):
        def call(*xs):
            tensors = dict(zip(names, xs, strict=True))
            target = options.get_target(tensors)
            tensors.pop("target", None)
            first = [tensors.pop(name) for name in ("input", "x", "W") if name in tensors]
            return f(*first, target, **tensors, **options.named)

        return call

    return Call(inputs, bind(compute), bind(compute_expected))


def draw_divergence(a: RandomArguments, mix: float, **kind: Any) -> Call:
    C, k_or_head = choose_class_count(a), a.choose("head", "logits", "top-k")
    N = max(a.choose(*ROW_COUNTS), 1 if a.has_finite_mean else 0)
    batch = a.choose((N,), (N,), (), (2, N))
    D, Dt = a.choose(2, 3, 1, 0, 5), a.choose(3, 1, 2)
    inputs = {"x": a.tensor(*batch, D, may_be_large=True), "W": a.tensor(C, D)}
    options: dict[str, Any] = {
        "temperature": a.choose(1.0, 2.0, 0.7),
        "temperature_factor": a.choose(False, True),
        "base": a.choose(*BASES),
        "reduction": a.choose(*REDUCTIONS),
    }
    if a.choose(True, False):
        inputs["b"] = a.tensor(C)
    if k_or_head == "head":
        inputs |= {"xt": a.tensor(*batch, Dt, may_be_large=True), "Wt": a.tensor(C, Dt)}
        if a.choose(True, False):
            inputs["bt"] = a.tensor(C)
    elif k_or_head == "logits":
        inputs["xt"] = a.tensor(*batch, C, may_be_large=True)
    else:
        k = a.draw(st.integers(1, C))
        # the mass of other classes is not so small that rounding the log-probabilities removes it
        lt = a.normal(*batch, k + 1).log_softmax(-1)[..., :k] - 0.1
        inputs["xt"] = lt.to(a.dtype)
        options["teacher_indices"] = a.uniform(*batch, C).topk(k).indices
        options["remainder"] = a.choose("class", "drop")
    if a.choose(True, False):
        y = a.indices(batch, C)
        options["labels"] = y.masked_fill(a.uniform(*batch) < a.choose(0.0, 0.3), -100)
        if a.has_finite_mean and batch:
            options["labels"][0] = y[0]
        elif a.has_finite_mean:
            options["labels"] = y
        options["alpha"] = a.choose(0.0, 0.3)
    names = tuple(inputs)

    def compute(*xs):
        t = dict(zip(names, xs, strict=True))
        heads = t["x"], t["W"], t["xt"], t.get("Wt")
        biases = {"student_bias": t.get("b"), "teacher_bias": t.get("bt")}
        f = ours.linear_jsd if "beta" in kind else ours.linear_kl_div
        return f(*heads, **biases, **kind, **options)

    def compute_expected(*xs):
        return truth.linear_divergence(**dict(zip(names, xs, strict=True)), mix=mix, **options)

    # logarithms are rounded relative to the logits, which are sums over the features, then
    # subtracted, then multiplied by features
    size = max([1.0, *(v.abs().max().item() for v in inputs.values() if v.numel())])
    blocks = a.choose(1, 4 * C * 64, None, 1)
    cancellation = 2.0**-22 * size**2 * max(D, Dt)
    return Call(inputs, compute, compute_expected, blocks, cancellation)


def draw_kl_div(a: RandomArguments) -> Call:
    reverse = a.choose(False, True)
    return draw_divergence(a, float(reverse), reverse=reverse)


def draw_jsd(a: RandomArguments) -> Call:
    beta = a.choose(0.5, 0.1, 0.9, 0.0, 1.0)
    return draw_divergence(a, beta, beta=beta)


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda z: z,
    "softmax": lambda z: z.softmax(-1),
}


def draw_feedforward(a: RandomArguments) -> Call:
    depth = a.choose(1, 2, 3)
    sizes = [a.choose(2, 3, 1, 5, 0) for _ in range(depth + 1)]
    names = list(ACTIVATIONS)
    hidden, last = a.choose(*names[:-1]), a.choose(*names)
    has_bias = [a.choose(True, False) for _ in range(depth)]
    inputs = {"input": a.tensor(*a.choose_shape(0, 2), sizes[0])}
    inputs |= {f"W{i}": a.tensor(sizes[i + 1], sizes[i]) for i in range(depth)}
    inputs |= {f"b{i}": a.tensor(sizes[i + 1]) for i in range(depth) if has_bias[i]}

    def split(parameters: Sequence[Tensor]) -> Any:
        biases = iter(parameters[depth:])
        return list(parameters[:depth]), [next(biases) if has else None for has in has_bias]

    def compute_expected(x, *parameters):
        for i, (W, b) in enumerate(zip(*split(parameters), strict=True)):
            x = ACTIVATIONS[last if i == depth - 1 else hidden](F.linear(x, W, b))
        return x

    def compute(x, *parameters):
        return ours.feedforward(x, *split(parameters), activation=hidden, output_activation=last)

    return Call(inputs, compute, compute_expected)


DRAWS: dict[str, Callable[[RandomArguments], Call]] = {
    "linear": draw_linear,
    "sigmoid": make_elementwise(ours.sigmoid, torch.sigmoid),
    "tanh": make_elementwise(ours.tanh, torch.tanh),
    "relu": make_elementwise(ours.relu, compute_relu),
    "relu in place": make_elementwise(compute_relu_in_place, compute_relu),
    "softmax": draw_softmax,
    "softmax_jacobian": draw_softmax_jacobian,
    "mse_loss": draw_mse_loss,
    "squared_error": make_per_example(ours.squared_error, lambda x: x),
    "sigmoid_squared_error": make_per_example(ours.sigmoid_squared_error, torch.sigmoid),
    "categorical_cross_entropy": draw_categorical_cross_entropy,
    "cross_entropy": draw_cross_entropy,
    "linear_cross_entropy": draw_linear_cross_entropy,
    "linear_jsd": draw_jsd,
    "linear_kl_div": draw_kl_div,
    "feedforward": draw_feedforward,
}
HAS_MANY_OPTIONS = ("cross_entropy", "linear_cross_entropy", "linear_jsd", "linear_kl_div")
ROUNDS_BETWEEN_OPERATIONS = ("softmax_jacobian", "feedforward")  # see test_precision

every_function = pytest.mark.parametrize("name", DRAWS)


# Comparisons


def assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts equality in float64, relative to the largest number that is expected."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    finite = expected.abs().nan_to_num(0, 0, 0)
    size = max(1.0, finite.max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found,
        expected,
        rtol=tolerance,
        atol=tolerance * size,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def assert_same_bits(what: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def make_leaves(call: Call, names: Sequence[str], change: Any = lambda x: x) -> dict[str, Tensor]:
    """Returns the inputs; those that are named require gradients."""
    return {
        name: change(x).detach().requires_grad_(name in names) for name, x in call.inputs.items()
    }


def watch_unneeded_gradients(result: Tensor) -> list[str]:
    """Returns a list to which a backward appends each gradient that no input needs."""
    unneeded: list[str] = []
    visited, nodes = set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes.extend(next_node for next_node, _ in node.next_functions)
        if hasattr(node, "needs_input_grad"):
            needed = [next_node is not None for next_node, _ in node.next_functions]

            def watch(gradients: Any, _: Any, name: str = node.name(), needed: Any = needed):
                for i, gradient in enumerate(gradients):
                    if gradient is not None and not needed[i]:
                        unneeded.append(f"{name} computed a gradient for its tensor {i}")

            node.register_hook(watch)
    return unneeded


def count_examples(name: str, number: int, factor: int = 3) -> int:
    return number * (factor if name in HAS_MANY_OPTIONS else 1)


@every_function
def test_value_and_gradients_of_some_inputs_match(name: str):
    """They also share no memory with the inputs, which stay as they are."""
    dtypes = (F64,) if name in ROUNDS_BETWEEN_OPERATIONS else DTYPES

    def check(data: Any) -> None:
        a = RandomArguments(data, dtypes)
        call = DRAWS[name](a)
        needed = a.choose_subset(tuple(call.inputs))
        before = {key: (x.clone(), x._version) for key, x in call.inputs.items()}
        with torch.no_grad():
            shape = call.compute_expected(*call.inputs.values()).shape
        g = a.lay_out(a.normal(*shape).to(a.dtype))

        def compute(f: Any, change: Any = lambda x: x) -> list[Tensor]:
            leaves = make_leaves(call, needed, change)
            value = f(*leaves.values())
            if not needed:
                return [value.detach()]
            asked = [leaves[key] for key in needed]
            gradients = torch.autograd.grad(
                value, asked, change(g).to(value.dtype), materialize_grads=True
            )
            return [value.detach(), *gradients]

        with call.limit_blocks():
            leaves = make_leaves(call, needed)
            value = call.compute(*leaves.values())
            assert value.requires_grad == bool(needed)
            assert not any(value.data_ptr() == x.data_ptr() for x in leaves.values() if x.numel())
            found = [value.detach()]
            if needed:
                asked, upstream = [leaves[key] for key in needed], g.to(value.dtype)
                unneeded = watch_unneeded_gradients(value)
                found += torch.autograd.grad(value, asked, upstream, retain_graph=True)
                assert not unneeded
                again = torch.autograd.grad(value, asked, upstream)
                for key, d, e in zip(needed, again, found[1:], strict=True):
                    assert_same_bits(f"second backward in {key}", d, e)
        names = ["value", *needed]
        if a.dtype == F64:
            for key, d, e in zip(names, found, compute(call.compute_expected), strict=True):
                assert_close(key, d, e, 1e-12)
        else:
            plain = compute(call.compute_expected)
            lines = find_errors(
                names,
                found,
                plain,
                lambda change: compute(call.compute_expected, change),
                call.cancellation,
            )
            assert not lines, "\n".join(lines)
        for key, (numbers, version) in before.items():
            assert call.inputs[key]._version == leaves[key]._version == version, f"{key}: written"
            assert_same_bits(f"{key} was written", call.inputs[key], numbers)

    run_examples(count_examples(name, 40), check)


@every_function
def test_derivatives_of_second_and_third_order_match(name: str):
    """In the inputs and the upstream gradient, along random directions."""

    def check(data: Any) -> None:
        a = RandomArguments(data, has_finite_mean=True)
        call = DRAWS[name](a)
        names = tuple(call.inputs)
        needed = a.choose_subset(names) or list(names[:1])
        seed = a.draw(st.integers(0, 2**31), "directions")
        with call.limit_blocks():
            found = compute_orders(call, call.compute, needed, seed)
            expected = compute_orders(call, call.compute_expected, needed, seed)
        for order, pairs in enumerate(zip(found, expected, strict=True)):
            for key, d, e in zip((*needed, "upstream"), *pairs, strict=True):
                assert_close(f"order {order + 1} in {key}", d, e, 1e-9)

    run_examples(count_examples(name, 16), check)


def compute_orders(call: Call, f: Any, needed: Sequence[str], seed: int) -> list[list[Tensor]]:
    """Returns the gradients of g · value, and twice those of the last ones along directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=F64, generator=generator)

    leaves = make_leaves(call, needed)
    value = f(*leaves.values())
    g = draw_like(value).requires_grad_()
    asked = [*(leaves[key] for key in needed), g]
    orders, derivative = [], (value * g).sum()
    for _ in range(3):
        if derivative.requires_grad:
            gradients = torch.autograd.grad(
                derivative, asked, create_graph=True, materialize_grads=True
            )
        else:
            gradients = [torch.zeros_like(x) for x in asked]
        orders.append([d.detach() for d in gradients])
        derivative = sum((d * draw_like(d)).sum() for d in gradients)
    return orders


@every_function
def test_forward_mode_and_its_nestings_match(name: str):
    """jvp, jvp of jvp, jvp of vjp and vjp of jvp, with tangents of some of the inputs."""

    def check(data: Any) -> None:
        a = RandomArguments(data, has_finite_mean=True)
        call = DRAWS[name](a)
        names = tuple(call.inputs)
        moving = a.choose_subset(names) or list(names[:1])
        with call.limit_blocks():
            seed = a.draw(st.integers(0, 2**31), "directions")
            found = compute_forward_modes(call, call.compute, moving, seed)
            expected = compute_forward_modes(call, call.compute_expected, moving, seed)
        for what, pairs in expected.items():
            for d, e in zip(found[what], pairs, strict=True):
                assert_close(what, d, e, 1e-9)

    run_examples(count_examples(name, 10, factor=2), check)


def compute_forward_modes(call: Call, f: Any, moving: Sequence[str], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=F64, generator=generator)

    # forward mode needs primals with their own memory
    points = tuple(call.inputs[key].resolve_neg() for key in moving)
    points = tuple(x.clone() if 0 in x.stride() else x for x in points)
    v, w = (tuple(map(draw_like, points)) for _ in range(2))

    def compute(*xs: Tensor) -> Tensor:
        return f(*(call.inputs | dict(zip(moving, xs, strict=True))).values())

    def push(*xs: Tensor) -> Tensor:
        return torch.func.jvp(compute, xs, v)[1]

    def pull(*xs: Tensor) -> Any:
        return torch.func.vjp(compute, *xs)[1](g)

    value, tangent = torch.func.jvp(compute, points, v)
    g = draw_like(value)
    return {
        "value": (value,),
        "jvp": (tangent,),
        "jvp of jvp": (torch.func.jvp(push, points, w)[1],),
        "jvp of vjp": torch.func.jvp(pull, points, w)[1],
        "vjp of jvp": torch.func.vjp(push, *points)[1](g),
    }
