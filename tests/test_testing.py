"""The checker finds the fault of each broken Function, and none in correct functions."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torch_nnmath import testing
from torch_nnmath.testing import Verdict, _check
from torch_nnmath.testing._check import Sine
from torch_nnmath.testing._report import SilentZero
from torch_nnmath.testing._transforms import Transform

torch_functional = torch.nn.functional
BEYOND_PYTORCH = {"forward mode through compile", "second order through compile"}
TRACING = {n for n in testing.TRANSFORMS if any(w in n for w in ("compile", "export", "make_fx"))}
EAGER = [name for name in testing.TRANSFORMS if name not in TRACING]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Product(Function):
    """x Wᵀ, correct wherever PyTorch supports a Function. Broken Functions derive from it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W):
        return x @ W.T

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        needs_x, needs_W = ctx.needs_input_grad
        return dy @ W if needs_x else None, dy.T @ x if needs_W else None

    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return dx @ W.T + x @ dW.T


class WrongSign(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return -dy @ W, dy.T @ x


class WrongTranspose(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return dy @ W, x.T @ dy


class IgnoresUpstream(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return torch.ones_like(dy) @ W, torch.ones_like(dy).T @ x


class ZeroTangent(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return torch.zeros_like(x @ W.T)


class SavesOtherTensorsForTheTangent(Product):
    """Saves for the backward only what it reads; vmap keeps the batch axes of one list."""

    @staticmethod
    def setup_context(ctx, inputs, y):
        x, W = inputs
        needs_x, needs_W = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_W else None, W if needs_x else None)
        ctx.save_for_forward(x, W)


class IgnoresTangentOfW(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        _, W = ctx.saved_tensors
        return dx @ W.T


class NoTangent(Product):
    jvp = Function.jvp


class WritesInput(Product):
    @staticmethod
    def forward(x, W):
        y = x @ W.T
        x.mul_(2)
        return y


class WritesAndRestoresInput(Product):
    @staticmethod
    def forward(x, W):
        y = x.neg_() @ -W.T
        x.neg_()
        return y


class WritesUpstream(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        gradients = dy @ W, dy.T @ x
        dy.mul_(0.5)
        return gradients


class WritesTangent(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return dx.mul_(2) @ W.T / 2 + x @ dW.T


class HalvesSecondBackward(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        ctx.factor = getattr(ctx, "factor", 2) / 2
        return ctx.factor * dy @ W, ctx.factor * dy.T @ x


class NoGradientBesideFrozenInput(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy) if all(ctx.needs_input_grad) else (None, None)


class GradientOfOtherDtype(Product):
    @staticmethod
    def backward(ctx, dy):
        return tuple(g.float() for g in Product.backward(ctx, dy))


class ClipsLargeUpstreams(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy.clamp(-20, 20))


class HalvesGradientOfOneRow(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy / 2 if len(dy) == 1 else dy)


class DividesByNumberOfRows(Product):
    @staticmethod
    def backward(ctx, dy):
        rows = len(dy)
        return Product.backward(ctx, dy * (rows / rows))


class SavesOnContext(Product):
    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.inputs = inputs
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.inputs
        return dy @ W, dy.T @ x


class KeepsStateOnClass(Product):
    @staticmethod
    def setup_context(ctx, inputs, y):
        Product.setup_context(ctx, inputs, y)
        KeepsStateOnClass.saved_tensors = inputs

    @staticmethod
    def backward(ctx, dy):
        x, W = KeepsStateOnClass.saved_tensors
        return dy @ W, dy.T @ x


class UnpacksSavedTensorsTwice(Product):
    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[1], dy.T @ ctx.saved_tensors[0]


class OnceDifferentiable(Product):
    backward = staticmethod(once_differentiable(Product.backward))


class DetachedBackward(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = (saved.detach() for saved in ctx.saved_tensors)
        return dy @ W, dy.T @ x


class NoVmapRule(Product):
    generate_vmap_rule = False


class MixesRows(Product):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, dims, x, W):
        x, W = (
            v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0)
            for v, d in zip((x, W), dims, strict=True)
        )
        return MixesRows.apply(x.flip(0).flatten(0, 1), W[0]).unflatten(0, x.shape[:2]), 0


class FlattensUpstream(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy.view(-1).view(dy.shape))


class IgnoresStrides(Product):
    """Ignores strides, like a kernel that takes only a pointer."""

    @staticmethod
    def forward(x, W):
        _, columns = x.shape
        return torch.as_strided(x, x.shape, (columns, 1)) @ W.T


class IgnoresDevice(Product):
    @staticmethod
    def forward(x, W):
        return x @ W.T + torch.zeros(len(W), dtype=x.dtype)


class ForwardReadsValues(Product):
    @staticmethod
    def forward(x, W):
        return x @ W.T if x.sum().item() < 1e9 else x @ W.T + 1


class SavedIntermediate(Function):
    """x sin x. Its backward ignores that the saved sine depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        sine = x.sin()
        return x * sine, sine

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*inputs, outputs[1])

    @staticmethod
    def backward(ctx, dy, _):
        x, sine = ctx.saved_tensors
        return dy * (sine + x * x.cos())


def call_saved_intermediate(x):
    return SavedIntermediate.apply(x)[0]


class TangentWithoutGraph(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = (saved.detach() for saved in ctx.saved_tensors)
        return dx @ W.T + x @ dW.T


class BackwardReadsValues(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy if dy.sum().item() < 1e9 else 0 * dy)


class TangentReadsValues(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        return Product.jvp(ctx, dx if dx.sum().item() < 1e9 else 0 * dx, dW)


class SavesPointers(Product):
    """Does not notice in-place edits, like a backward that saves a pointer."""

    @staticmethod
    def setup_context(ctx, inputs, y):
        Product.setup_context(ctx, inputs, y)
        ctx.pointers = [x.data_ptr() for x in inputs]

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        x, W = (v * (v.data_ptr() == p) for v, p in zip(saved, ctx.pointers, strict=True))
        return dy @ W, dy.T @ x


class NeedsBothUpstreams(Function):
    @staticmethod
    def forward(x, W):
        return x * W, x + W

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dp, ds):
        x, W = ctx.saved_tensors
        return dp * W + ds, dp * x + ds


class NoThirdDerivative(Function):
    """x⁴, with right derivatives up to the second order."""

    @staticmethod
    def forward(x, W):
        return x**4 + W

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        x0 = x.detach()
        return dy * (4 * x0**3 + 12 * x0**2 * (x - x0)), dy


def flatten_by_view(x, W):
    return x.view(-1).sin() * W.reshape(-1)


def add_one_without_grad_mode(x, W):
    return x * W if torch.is_grad_enabled() else x * W + 1


def add_one_in_inference_mode(x, W):
    return x * W + 1 if torch.is_inference_mode_enabled() else x * W


def add_one_to_functional_tensors(x, W):
    return x * W + torch._is_functional_tensor(x)


def read_uninitialised_memory(x, W):
    return x * W + (0 * torch.empty_like(x)).nan_to_num(7.0)


X, W = draw(3, 3), draw(4, 3)[:3] + 1
WRONG, RAISES, ZERO, WRITES = (
    Verdict.WRONG,
    Verdict.RAISES,
    Verdict.SILENT_ZERO,
    Verdict.WRITES,
)


FAULTS = [
    (WrongSign, WRONG, ["gradient", "gradcheck", "vjp", "jacrev"], ["forward mode", "jacfwd"]),
    (WrongTranspose, WRONG, ["gradient", "gradcheck"], ["forward mode", "no_grad"]),
    (IgnoresUpstream, WRONG, ["gradient", "upstream gradients"], ["forward mode"]),
    (ZeroTangent, ZERO, ["forward mode", "jvp", "jacfwd", "linearize"], ["gradient"]),
    (IgnoresTangentOfW, WRONG, ["forward mode", "jvp"], ["gradient", "second order"]),
    (NoTangent, RAISES, ["forward mode", "forward over reverse", "jvp"], ["second order"]),
    (WritesInput, WRITES, ["gradient", "no_grad"], []),
    (WritesAndRestoresInput, WRITES, ["gradient", "no_grad"], []),
    (WritesUpstream, WRITES, ["gradient", "vjp"], ["no_grad", "forward mode"]),
    (WritesTangent, WRITES, ["forward mode"], ["gradient"]),
    (HalvesSecondBackward, WRONG, ["retained graph"], ["gradient", "forward mode"]),
    (NoGradientBesideFrozenInput, ZERO, ["frozen inputs"], ["gradient", "forward mode"]),
    (ClipsLargeUpstreams, WRONG, ["upstream gradients"], ["gradient", "second order"]),
    (HalvesGradientOfOneRow, WRONG, ["small batches"], ["gradient", "vmap of subsets"]),
    (DividesByNumberOfRows, RAISES, ["small batches"], ["gradient", "vmap(grad)"]),
    (GradientOfOtherDtype, WRONG, ["types of gradients"], ["forward mode"]),
    (SavesOnContext, WRONG, ["edited before backward"], ["gradient", "retained graph"]),
    (KeepsStateOnClass, WRONG, ["interleaved calls"], ["gradient", "second order", "vmap(grad)"]),
    (UnpacksSavedTensorsTwice, RAISES, ["checkpoint"], ["gradient", "second order"]),
    (OnceDifferentiable, ZERO, ["second order"], ["gradient"]),
    (OnceDifferentiable, WRONG, ["gradgradcheck"], ["gradient"]),
    (DetachedBackward, WRONG, ["gradgradcheck"], ["gradient", "forward mode"]),
    (DetachedBackward, ZERO, ["second order"], ["gradient", "forward mode"]),
    (NoVmapRule, RAISES, ["vmap", "vmap(grad)"], ["gradient", "second order"]),
    (MixesRows, WRONG, ["vmap", "grad(vmap)", "vmap(vmap)"], ["gradient"]),
    (SavesOtherTensorsForTheTangent, RAISES, ["vmap of subsets"], ["vmap", "vmap(grad)", "jvp"]),
    (FlattensUpstream, RAISES, ["upstream gradients"], ["gradient"]),
    (IgnoresStrides, WRONG, ["strided inputs"], ["gradient"]),
    (IgnoresDevice, RAISES, ["default device", "meta device"], ["gradient"]),
    (ForwardReadsValues, RAISES, ["meta device", "vmap", "make_fx"], ["gradient"]),
    (NoTangent, RAISES, ["forward over forward", "batched tangents"], ["gradient"]),
    (NoVmapRule, RAISES, ["vmap(vmap)", "vmap(jacfwd)", "per-sample gradients"], ["gradient"]),
    (TangentWithoutGraph, ZERO, ["reverse over forward"], ["forward mode", "second order"]),
    (BackwardReadsValues, RAISES, ["batched gradients", "fake tensors"], ["retained graph"]),
    (TangentReadsValues, RAISES, ["batched tangents", "jacfwd"], ["forward mode"]),
    (SavesPointers, ZERO, ["saved-tensor hooks"], ["gradient", "retained graph"]),
    (NeedsBothUpstreams, RAISES, ["outputs left unused"], ["gradient", "second order"]),
    (NoThirdDerivative, ZERO, ["third order"], ["gradient", "second order"]),
    (Product, RAISES, ["autocast bfloat16", "autocast float16"], ["gradient", "checkpoint"]),
    (flatten_by_view, RAISES, ["expanded inputs", "strided inputs"], ["gradient"]),
    (add_one_without_grad_mode, WRONG, ["no_grad"], ["gradient"]),
    (add_one_in_inference_mode, WRONG, ["inference mode"], ["gradient", "no_grad"]),
    (add_one_to_functional_tensors, WRONG, ["functionalize"], ["gradient", "vmap"]),
    (read_uninitialised_memory, WRONG, ["deterministic algorithms"], ["gradient"]),
]


@pytest.mark.parametrize(("function", "verdict", "failing", "passing"), FAULTS)
def test_broken_function_fails_its_transforms_only(function, verdict, failing, passing):
    report = testing.check(function, [X, W], transforms=[*failing, *passing])
    for transform in failing:
        assert report[transform].verdict == verdict, report
        assert report[transform].detail
    for transform in passing:
        assert report[transform].verdict == Verdict.RIGHT, report
    assert not report.right
    with pytest.raises(AssertionError, match=f"{function.__name__}: {re.escape(failing[0])}: "):
        report.raise_on_failure()


# Transforms whose broken functions are in other tests of this file.
TESTED_ELSEWHERE = {
    *("value", "hessian", "deepcopy", "pickle", "export", "export, strict"),
    *("compile", "compile by Inductor", "compile, dynamic shapes", "torch.func inside compile"),
    *("forward mode through compile", "compile, dynamic=True"),
}
NOT_TESTABLE = {"second order through compile"}  # a silent zero for every function


def test_every_transform_has_a_broken_function():
    tested = {transform for _, _, failing, _ in FAULTS for transform in failing}
    assert tested | TESTED_ELSEWHERE | NOT_TESTABLE == {*testing.TRANSFORMS}


@pytest.mark.parametrize("function", [Product, NoTangent])
def test_functionalize_of_a_function_is_beyond_pytorch(function):
    row = testing.check(function, [X, W], transforms=["functionalize"])["functionalize"]
    assert row.verdict == Verdict.CANNOT
    assert "functionalize rule" in row.detail.lower()


def test_saved_intermediate_fails_at_second_order():
    transforms = ["gradient", "second order", "gradgradcheck", "hessian"]
    report = testing.check(call_saved_intermediate, [draw(3)], transforms=transforms)
    verdicts = [row.verdict for row in report]
    assert verdicts[:3] == ["right", "wrong", "wrong"]
    detail = report["second order"].detail
    assert detail.startswith("the Hessian-vector product of input 0 is ")


class SlightlyOff(Function):
    """x³, with a relative error in the derivative of each order."""

    @staticmethod
    def forward(x, errors):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, y):
        x, ctx.errors = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        first, second, third = (1 + error for error in ctx.errors)
        x0 = x.detach()
        step = x - x0
        series = 3 * x0**2 * first + 6 * x0 * second * step + 3 * third * step**2
        return dy * series, None


@pytest.mark.parametrize(
    ("transform", "order", "tolerance"),
    [("gradient", 0, 1e-8), ("second order", 1, 1e-6), ("third order", 2, 1e-4)],
)
def test_tolerance_of_each_order(transform, order, tolerance):
    """Ten times the tolerance is wrong, a tenth of it right."""
    for error, is_right in ((10 * tolerance, False), (tolerance / 10, True)):
        errors = [0.0, 0.0, 0.0]
        errors[order] = error
        report = testing.check(SlightlyOff, [draw(3), errors], transforms=[transform])
        assert report.right == is_right, report


def test_tolerance_of_value():
    report = testing.check(
        torch.sin,
        draw(3),
        reference=lambda x: x.sin() * (1 + 1e-9),
        transforms=["value"],
    )
    assert not report.right


def test_function_that_recompiles_for_each_size_fails_dynamic_shapes():
    def unroll_rows(x):
        return sum(x[i] for i in range(x.shape[0]))

    transforms = ["compile", "compile, dynamic shapes"]
    report = testing.check(unroll_rows, [draw(3, 2)], transforms=transforms)
    assert [row.verdict for row in report] == ["right", "wrong"]
    assert "graphs for batches of 3, 6, 9" in report["compile, dynamic shapes"].detail


@pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 specialises the number")
def test_function_that_no_symbol_can_enter_raises_under_dynamic_compile():
    def scale(x, factor=2.0):
        if not math.isfinite(factor):
            raise ValueError(factor)
        return factor * x

    transforms = ["compile", "compile, dynamic=True"]
    report = testing.check(scale, [draw(3)], transforms=transforms)
    assert [row.verdict for row in report] == ["right", RAISES]


def test_function_that_branches_on_values_raises_under_tracing_transforms():
    def branch_on_value(x):
        return x * 2 if x.sum() > 0 else x * 3

    transforms = ["gradient", "compile", "make_fx", "export", "export, strict", "vmap"]
    report = testing.check(branch_on_value, [draw(3)], transforms=transforms)
    assert [row.verdict for row in report] == ["right", *[RAISES] * 5]


def test_custom_operator_without_fake_kernel_is_not_right():
    @torch.library.custom_op("torch_nnmath_tests::no_fake_kernel", mutates_args=())
    def no_fake_kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    report = testing.check(no_fake_kernel, [draw(3)], transforms=["gradient", "compile"])
    assert not report.right


def test_function_without_gradient_when_compiled_is_silent_zero():
    def detach_if_compiled(x):
        return x.detach() * 2 + (0 * x if torch.compiler.is_compiling() else x - x.detach()) * 2

    transforms = ["gradient", "compile", "compile by Inductor", "torch.func inside compile"]
    report = testing.check(detach_if_compiled, [draw(3)], transforms=transforms)
    assert [row.verdict for row in report] == [Verdict.RIGHT, ZERO, ZERO, ZERO]


class Unpicklable(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.activation = lambda x: x


class LosesBiasOnCopy(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        with torch.no_grad():
            self.bias.zero_()


class CopiesAreShared(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class CannotBeCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("module", "transform", "verdict"),
    [
        (Unpicklable, "pickle", RAISES),
        (LosesBiasOnCopy, "pickle", WRONG),
        (LosesBiasOnCopy, "deepcopy", WRONG),
        (CopiesAreShared, "deepcopy", WRONG),
        (CannotBeCopied, "deepcopy", RAISES),
    ],
)
def test_module_with_broken_copy_fails_deepcopy_or_pickle(module, transform, verdict):
    report = testing.check(module(3, 2), [X], transforms=["gradient", transform])
    assert [row.verdict for row in report] == [Verdict.RIGHT, verdict]
    report = testing.check(nn.Linear(3, 2), [X], transforms=[transform])
    assert report[transform].verdict == Verdict.RIGHT


Y = torch.tensor([0, 2, -100])
CORRECT_FUNCTIONS = {
    "sin": (torch.sin, [draw(3)]),
    "scalar": (torch.exp, [torch.tensor(0.3)]),
    "linear": (torch_functional.linear, [X, W, draw(3)]),
    "mse_loss": (torch_functional.mse_loss, [1000 * X, W]),
    "cross_entropy": (torch_functional.cross_entropy, [X, Y]),
    "topk": (lambda x: x.topk(2), [X]),
    "unbind": (lambda x: x.unbind(), [X]),
    "other arguments": (lambda x, factor, flag: x * factor if flag else x, [X, 2.5, True]),
    "embedding": (torch_functional.embedding, [torch.tensor([0, 1, 1]), X]),
    "zeros": (torch.square, [torch.zeros(3)]),
    "inv": (torch.linalg.inv, [draw(2, 2)]),
    "module": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), [X]),
    "buffers": (nn.BatchNorm1d(3).eval(), [X]),
    "Function": (Sine, [X]),
}
# One of each kind of argument: tracing the others is slow and differs in the operator only.
TRACED = {"scalar", "cross_entropy", "unbind", "other arguments", "buffers", "Function"}


@pytest.mark.parametrize("name", CORRECT_FUNCTIONS)
def test_correct_function_is_right(name):
    function, inputs = CORRECT_FUNCTIONS[name]
    transforms = testing.TRANSFORMS if name in TRACED else EAGER
    if name != "cross_entropy":  # PyTorch supports them for no function: one is enough
        transforms = [each for each in transforms if each not in BEYOND_PYTORCH]
    report = testing.check(function, inputs, transforms=transforms)
    assert report.right, report
    unsupported = {row.transform for row in report if row.verdict == Verdict.CANNOT}
    allowed = BEYOND_PYTORCH
    if name == "Function":  # what PyTorch does not support for a Function with a jvp
        compilers = {"compile", "compile by Inductor", "compile, dynamic shapes"}
        compilers |= {"compile, dynamic=True", "functionalize"}
        allowed = {*allowed, *compilers, "forward over forward"}
        if torch.__version__ >= "2.15":  # Dynamo refuses a jvp inside `torch.func`, too
            allowed.add("torch.func inside compile")
    assert unsupported <= allowed


def test_only_inputs_that_require_gradients_are_differentiated():
    def detach_second(x, y):
        return x * y.detach()

    x, y = draw(3), draw(3) + 2
    assert not testing.check(detach_second, [x, y], transforms=["gradient"]).right
    testing.assert_right(detach_second, [x.requires_grad_(), y], transforms=testing.QUICK)


class DetachesInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class DetachesBias(nn.Linear):
    def forward(self, x):
        return torch_functional.linear(x, self.weight, self.bias.detach())


@pytest.mark.parametrize(("module", "label"), [(DetachesInput, "input 0"), (DetachesBias, "bias")])
def test_gradients_of_module_inputs_and_parameters_are_checked(module, label):
    report = testing.check(module(3, 2), [X], transforms=["gradient"])
    assert report["gradient"].verdict == ZERO
    assert f"the gradient of {label} is 0" in report["gradient"].detail


def test_frozen_parameters_of_module_are_not_differentiated():
    module = DetachesBias(3, 2)
    module.bias.requires_grad_(False)
    testing.assert_right(module, [X], transforms=["gradient", "forward mode", "vmap(grad)"])


def test_reference_determines_expected_value_and_gradient():
    def scaled_square(x):
        return 1.001 * x.square()

    x, transforms = draw(3), ["value", "gradient"]
    report = testing.check(scaled_square, x, transforms=transforms)
    assert [row.verdict for row in report] == [Verdict.NOT_APPLICABLE, Verdict.RIGHT]
    report = testing.check(scaled_square, x, reference=torch.square, transforms=transforms)
    assert [row.verdict for row in report] == [WRONG, WRONG]
    report = testing.check(lambda x: x[None], x, reference=lambda x: +x, transforms=["value"])
    assert report["value"].detail == "output 0 has shape (1, 3), not (3,)"


def test_reference_of_module_must_be_module():
    module, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    assert testing.check(module, [X], reference=reference, transforms=["value", "gradient"]).right
    with pytest.raises(TypeError, match="reference of a module"):
        testing.check(module, [X], reference=torch.sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_in_other_precision(dtype):
    transforms = [name for name in testing.QUICK if name not in TRACING]
    report = testing.check(
        torch_functional.cross_entropy, [X, Y], transforms=transforms, dtype=dtype
    )
    assert report.dtype == dtype
    assert report.right, report
    wrong = testing.check(
        lambda x: x * 1.2 - (0.2 * x).detach(), [X], transforms=["gradient"], dtype=dtype
    )
    assert wrong["gradient"].verdict == WRONG


def test_silent_zero_is_a_fault_if_pytorch_raises(monkeypatch):
    """PyTorch's operations raise under the planted transform; the result of this function is 0."""

    def double(x):
        return 2 * x

    def check(case):
        raise SilentZero("planted") if case.function is double else NotImplementedError("planted")

    monkeypatch.setitem(_check.REGISTRY, "planted", Transform("planted", check, is_quick=False))
    for function, verdict in ((double, ZERO), (torch.sin, Verdict.CANNOT)):
        report = testing.check(function, [X], transforms=["planted"])
        assert report["planted"].verdict == verdict


@pytest.mark.skipif(
    torch.__version__ >= "2.14", reason="since PyTorch 2.14, Dynamo refuses inputs with a tangent"
)
def test_function_without_tangent_when_compiled_is_silent_zero():
    def detach_if_compiled(x):
        return x.detach() * 2 if torch.compiler.is_compiling() else x * 2

    transform = "forward mode through compile"
    report = testing.check(torch.sin, [X], transforms=[transform])
    assert report[transform].verdict == Verdict.CANNOT
    report = testing.check(detach_if_compiled, [X], transforms=[transform])
    assert report[transform].verdict == ZERO


def test_random_function_is_wrong():
    report = testing.check(
        lambda x: torch_functional.dropout(x, 0.5), [draw(50)], transforms=["gradient"]
    )
    assert "another value at each call" in report["gradient"].detail


def test_check_neither_writes_inputs_nor_seeds_random_numbers():
    x = draw(3, 3).requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    testing.check(WritesInput, [x, W], transforms=testing.QUICK[:5])
    assert torch.equal(x, before)
    assert x.grad is None
    assert torch.equal(state, torch.get_rng_state())


def test_check_leaves_module_unchanged():
    module = nn.Linear(3, 2)
    testing.check(module, [X], transforms=["gradient", "no_grad"])
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None


def test_check_restores_settings_of_torch():
    """OnceDifferentiable fails inside "deterministic algorithms"."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        testing.check(OnceDifferentiable, [X, W], transforms=EAGER)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"


def test_report_as_table_dict_and_error():
    report = testing.check(WrongSign, [X, W], transforms=["no_grad", "gradient", "deepcopy"])
    lines = str(report).splitlines()
    assert lines[0] == "WrongSign, float64"
    assert lines[1].split() == ["no_grad", "right"]
    assert re.match("gradient  wrong +the gradient of input 0 is ", lines[2])
    assert re.match("deepcopy  not applicable +a function", lines[3])
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["function"] == "WrongSign"
    assert not loaded["right"]
    assert [row["verdict"] for row in loaded["rows"]] == ["right", "wrong", "not applicable"]
    assert loaded["rows"][1]["detail"] == report["gradient"].detail
    assert loaded["rows"][0]["error"] < 1e-15
    assert loaded["rows"][1]["error"] == pytest.approx(2)  # relative, of -g for g
    assert loaded["rows"][2]["error"] is None
    with pytest.raises(
        AssertionError, match="WrongSign: gradient: wrong: the gradient of input 0 is"
    ):
        testing.assert_right(WrongSign, [X, W], transforms=["no_grad", "gradient"])
    assert testing.assert_right(WrongSign, [X, W], transforms=["no_grad"]) is None
    with pytest.raises(KeyError):
        report["vmap"]


def test_detail_of_wrong_gradient_has_actual_and_expected_value():
    detail = testing.check(WrongSign, [X, W], transforms=["gradient"])["gradient"].detail
    actual, expected = map(float, re.search(r"is (\S+), expected (\S+)$", detail).groups())
    assert actual == pytest.approx(-expected)
    assert actual != 0


@pytest.mark.parametrize(
    ("function", "inputs", "options", "error", "match"),
    [
        (3, [X], {}, TypeError, "callable"),
        (nn.Linear, [X], {}, TypeError, "instance"),
        (torch.sin, [], {}, ValueError, "nothing to differentiate"),
        (torch.sin, [Y], {}, ValueError, "nothing to differentiate"),
        (torch.sin, [X + 1j], {}, TypeError, "complex"),
        (torch.sin, [X], {"transforms": ["warp"]}, ValueError, "no transform 'warp'"),
        (torch.sin, [X], {"dtype": torch.int64}, TypeError, "dtype must be one of"),
    ],
)
def test_check_of_invalid_arguments_raises(function, inputs, options, error, match):
    with pytest.raises(error, match=match):
        testing.check(function, inputs, **options)


@pytest.mark.skipif(not hasattr(nn.functional, "linear_cross_entropy"), reason="needs PyTorch 2.13")
def test_example_of_page_prints_verdicts_of_page(monkeypatch):
    """Runs both checks of the page: of PyTorch's chunked head and of this library's head."""
    page = (Path(__file__).parents[1] / "docs" / "checking.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.S | re.M)
    check, own_check = (b for kind, b in blocks if kind == "python" and "linear_cross_entropy" in b)
    (table,) = (block for kind, block in blocks if kind == "text" and "chunked" in block)
    namespace = {}
    exec(check.replace("print(report)", ""), namespace)
    verdicts = {row.transform: row.verdict for row in namespace["report"]}
    assert dict(re.findall(r"^(\S.*?) {2,}(\w[\w ]*?)(?: {2,}.*)?$", table, re.M)) == verdicts
    assert verdicts["value"] == verdicts["gradient"] == verdicts["frozen inputs"] == "right"
    assert verdicts["second order"] == verdicts["jvp"] == verdicts["jacfwd"] == "silent zero"
    assert verdicts["retained graph"] == verdicts["jacrev"] == "raises"
    # tests/test_formulas.py runs the tracing transforms on this library's head.
    monkeypatch.setattr(_check, "TRANSFORMS", EAGER)
    exec(own_check, namespace)
